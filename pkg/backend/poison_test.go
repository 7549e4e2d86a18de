package backend

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// cursed is a backend that does not take payloads with a cursed item.
type cursed struct {
	does   func() error
	writes int
	stored []string
}

func (*cursed) Name() string { return "cursed" }
func (*cursed) Close() error { return nil }

func (w *cursed) Write(_ context.Context, _ string, payload []byte) error {
	w.writes++
	if bytes.Contains(payload, []byte("curse")) {
		return w.does()
	}
	for item := range otlpwire.Items(payload) {
		i := bytes.Index(item, []byte("item-"))
		w.stored = append(w.stored, string(item[i:i+6]))
	}
	return nil
}

// TestPoison: what a backend does not take, without refusing it, is given up after both limits, and only while it accepts
// what others send; only the culprit. A writer that panics is not asked again about the same payload.
func TestPoison(t *testing.T) { synctest.Test(t, testPoison) }

func testPoison(t *testing.T) {
	const tries, after = 50, 15 * time.Minute
	fails := func() error { return errors.New("500") }
	for name, tc := range map[string]struct {
		does    func() error
		from    time.Duration // since when the backend accepts what others send
		others  time.Duration // until when it does, from the start; 0: never
		none    bool          // Poison is off
		given   bool
		panics  bool
		refused int // how often it refuses before it fails
	}{
		"fails":                        {does: fails, others: 24 * time.Hour, given: true},
		"fails, off":                   {does: fails, others: 24 * time.Hour, none: true},
		"fails, nobody else":           {does: fails},
		"fails for everybody at first": {does: fails, from: time.Hour, others: 24 * time.Hour, given: true},
		"refuses the sender for long":  {does: firstly(60, fault.Sender(fault.After(errors.New("429"), 0)), fails), others: 24 * time.Hour, given: true, refused: 60},
		"fails, then for everybody":    {does: fails, others: after - 2*time.Minute},
		"panics":                       {does: func() error { panic("bug") }, given: true, panics: true},
		"refuses the sender":           {does: func() error { return fault.Sender(fault.After(errors.New("429"), 0)) }, others: 24 * time.Hour},
		"is configured in a bad way":   {does: func() error { return fault.Configuration(errors.New("404")) }, others: 24 * time.Hour},
	} {
		w, start := &cursed{does: tc.does}, time.Now()
		payload := items(t, otlpwire.Logs, 8, func(i int) string {
			if i == 3 {
				return "curse"
			}
			return numbered(i)
		})
		given, panics, reasons := 0, 0, []string{}
		var first time.Duration
		d := Deliverer{
			Signal: otlpwire.Logs, Writer: w, Log: slog.New(slog.DiscardHandler), Delivered: func(int) {}, Paused: func(bool) {},
			Poison: Poison{After: after, Tries: tries}, Panicked: func(string, *fault.Panic) { panics++ },
			Others: func(instance string, since time.Time) bool {
				if instance != "as-1" {
					t.Errorf("asked about %s", instance)
				}
				return time.Since(start) > tc.from && start.Add(tc.others).After(since) && tc.others > 0
			},
			GiveUp: func(_ context.Context, _ string, payload []byte, reason string, _ error) bool {
				given, first = given+otlpwire.Count(otlpwire.Logs, payload), time.Since(start)
				reasons = append(reasons, reason)
				return true
			},
		}
		if tc.none {
			d.Poison.Tries = 0
		}
		ctx, cancel := context.WithTimeout(t.Context(), 6*time.Hour)
		done := d.Write(ctx, "as-1", payload, 8, false)
		cancel()
		switch {
		case done != tc.given || tc.given && (given != 1 || !slices.Equal(reasons, []string{ledger.DeadPoison})):
			t.Errorf("%s: %v, %d given up as %v", name, done, given, reasons)
		case tc.given && !slices.Equal(w.stored, []string{"item-0", "item-1", "item-2", "item-4", "item-5", "item-6", "item-7"}):
			t.Errorf("%s: stored %v", name, w.stored)
		case tc.panics && (first > time.Second || panics != 4): // of the halves that have it
			t.Errorf("%s: after %v, %d panics", name, first, panics)
		case tc.given && !tc.panics && (first < tc.from+after || first > tc.from+after+45*time.Minute || w.writes < tc.refused+tries):
			t.Errorf("%s: after %v and %d requests", name, first, w.writes)
		}
	}
}

// firstly returns an error so often, and then what then returns.
func firstly(n int, err error, then func() error) func() error {
	return func() error {
		if n--; n >= 0 {
			return err
		}
		return then()
	}
}

// TestSlowWithoutAnAside: an attempt is cut once; when the payload cannot be set aside then, the next one takes its time.
func TestSlowWithoutAnAside(t *testing.T) { synctest.Test(t, testSlowWithoutAnAside) }

func testSlowWithoutAnAside(t *testing.T) {
	w, stored := new(unhurried), 0
	d := Deliverer{Signal: otlpwire.Logs, Writer: w, Log: slog.New(slog.DiscardHandler), Paused: func(bool) {}, Delivered: func(n int) { stored += n }, SlowAfter: 2 * time.Second}
	d.MayAside = func(string, Trouble) bool { return true }
	d.Aside = func(context.Context, string, []byte, bool, Trouble) (put, goOn bool) { return false, true }
	if !d.Write(t.Context(), "as-1", nil, 1, false) || stored != 1 || w.writes != 2 {
		t.Errorf("%d stored in %d attempts", stored, w.writes)
	}
}

// unhurried is a backend that takes three seconds.
type unhurried struct{ writes int }

func (*unhurried) Name() string { return "unhurried" }
func (*unhurried) Close() error { return nil }

func (w *unhurried) Write(ctx context.Context, _ string, _ []byte) error {
	w.writes++
	select {
	case <-time.After(3 * time.Second):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// never is a backend that does not answer.
type never struct{ ended int }

func (*never) Name() string { return "never" }
func (*never) Close() error { return nil }

func (w *never) Write(ctx context.Context, _ string, _ []byte) error {
	<-ctx.Done()
	w.ended++
	return ctx.Err()
}

// TestSlow: an attempt that is not answered is given up when the payload may be set aside, and not before, and the payload
// may have been written; an attempt that is answered is not disturbed.
func TestSlow(t *testing.T) { synctest.Test(t, testSlow) }

func testSlow(t *testing.T) {
	w, start := new(never), time.Now()
	var asked []time.Duration
	d := Deliverer{Signal: otlpwire.Logs, Writer: w, Log: slog.New(slog.DiscardHandler), Paused: func(bool) {}, SlowAfter: 2 * time.Second}
	d.MayAside = func(instance string, tr Trouble) bool {
		if instance != "as-1" || !tr.Slow || time.Since(tr.Since) != time.Second {
			t.Errorf("%s, %+v", instance, tr)
		}
		asked = append(asked, time.Since(start))
		return len(asked) == 3
	}
	d.Aside = func(_ context.Context, _ string, _ []byte, again bool, tr Trouble) (put, goOn bool) {
		if tr.Err != nil && (!again || !tr.Slow || tr.Attempts != 1) {
			t.Errorf("again %v, %+v", again, tr)
		}
		return tr.Err != nil, true
	}
	if !d.Write(t.Context(), "as-1", nil, 1, false) || w.ended != 1 || !slices.Equal(asked, []time.Duration{2 * time.Second, 4 * time.Second, 6 * time.Second}) {
		t.Errorf("asked after %v, %d attempts ended", asked, w.ended)
	}
}

// TestAccepted tells others from the instance itself.
func TestAccepted(t *testing.T) {
	var a Accepted
	at := time.Unix(1_700_000_000, 0)
	want := func(what, instance string, since time.Time, want bool) {
		t.Helper()
		if a.Others(instance, since) != want {
			t.Errorf("%s: %v", what, !want)
		}
	}
	want("nothing", "as-1", at.Add(-time.Hour), false)
	a.Note("as-1", at)
	want("itself", "as-1", at.Add(-time.Hour), false)
	want("another", "as-2", at.Add(-1), true)
	want("another, before", "as-2", at, false)
	a.Note("as-2", at.Add(1))
	a.Note("as-1", at.Add(2))
	a.Note("as-1", at.Add(3))
	want("the one before", "as-1", at, true)
	want("the one before, and not its own", "as-1", at.Add(1), false)
	want("the last one", "as-2", at.Add(2), true)
}

// TestIsPoison is the law of when a payload is given up: after both limits; a part of it after three attempts, when the backend has
// accepted something of another instance since the first of them.
func TestIsPoison(t *testing.T) {
	start := time.Unix(1_700_000_000, 0)
	var accepted time.Time
	attempts := func(p *delivery, from time.Duration, n int, every time.Duration) (is int) {
		for i := range n {
			if p.isPoison(errors.New("500"), start.Add(from+time.Duration(i)*every)) {
				is++
			}
		}
		return is
	}
	law := func(suspect bool) *delivery {
		return &delivery{suspect: suspect, Deliverer: &Deliverer{
			Poison: Poison{After: 2 * time.Hour, Tries: 50}, Others: func(_ string, since time.Time) bool { return accepted.After(since) },
		}}
	}
	accepted = start.Add(24 * time.Hour)
	p := law(false)
	if n := attempts(p, 0, 120, time.Minute); n != 0 {
		t.Errorf("given up %d times before its time, after 120 attempts", n)
	}
	if attempts(p, 2*time.Hour, 1, 0) != 1 {
		t.Error("not given up after two hours and 121 attempts")
	}
	if p = law(false); attempts(p, 0, 49, 3*time.Minute) != 0 || attempts(p, 3*time.Hour, 1, 0) != 1 {
		t.Error("not given up with the fiftieth attempt")
	}
	accepted = start.Add(-time.Second)
	p = law(true)
	if attempts(p, 0, 5, time.Second) != 0 {
		t.Error("a part is given up although nothing of another was accepted since its first attempt")
	}
	accepted = start.Add(5 * time.Second)
	if attempts(p, 6*time.Second, 1, 0) != 1 {
		t.Error("a part is not given up although something was")
	}
	if p = law(true); attempts(p, 0, 2, time.Second) != 0 || attempts(p, 4*time.Second, 1, 0) != 1 {
		t.Error("a part is given up with another attempt than the third one")
	}
}

// rested is a backend that fails, and notes how long it was left alone.
type rested struct{ at []time.Time }

func (*rested) Name() string { return "rested" }
func (*rested) Close() error { return nil }

func (w *rested) Write(context.Context, string, []byte) error {
	w.at = append(w.at, time.Now())
	return errors.New("500")
}

// TestSuspectsRest: a part of a payload that is poison is not tried again within two seconds, so that a backend that restarts is not
// taken for one that fails on it.
func TestSuspectsRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := new(rested)
		d := Deliverer{
			Signal: otlpwire.Logs, Writer: w, Log: slog.New(slog.DiscardHandler), Paused: func(bool) {}, Poison: Poison{Tries: 3},
			Others: func(string, time.Time) bool { return true }, GiveUp: func(context.Context, string, []byte, string, error) bool { return true },
		}
		one := items(t, otlpwire.Logs, 1, numbered)
		if !(&delivery{Deliverer: &d, instance: "as-1", payload: one, items: 1, suspect: true}).write(t.Context()) || len(w.at) != 3 {
			t.Fatalf("attempts at %v", w.at)
		}
		for i := range 2 {
			if rest := w.at[i+1].Sub(w.at[i]); rest < suspectPause {
				t.Errorf("attempt %d follows after %v", i+2, rest)
			}
		}
	})
}
