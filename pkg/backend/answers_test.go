package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

var relative = regexp.MustCompile(`"@([+-]\d+)s"`)

// input reads an OTLP/JSON request, in which "@-5s" stands for five seconds ago.
func input(t *testing.T, sig otlpwire.Signal, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	text = relative.ReplaceAllFunc(text, func(m []byte) []byte {
		n, _ := strconv.Atoi(string(m[2 : len(m)-2]))
		return fmt.Appendf(nil, `"%d"`, now.Add(time.Duration(n)*time.Second).UnixNano())
	})
	p, _, err := otlpwire.FromJSON(nil, sig, text, otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestConflict: Thanos answers 409 where Prometheus answers 400.
func TestConflict(t *testing.T) {
	one := input(t, otlpwire.Metrics, "thanos-409")
	for body, reason := range map[string]string{
		"store locally for endpoint : out of order sample": ledger.DeadOutOfOrder, "conflict": ledger.DeadOutOfOrder, "": ledger.DeadOutOfOrder,
		"add 1 samples: out of bounds": ledger.DeadTooOld, "too old sample": ledger.DeadTooOld, "out of bounds: timestamp is too far in the future": ledger.DeadTooNew,
	} {
		for _, kind := range []string{"remote_write 1.0", "remote_write 2.0"} {
			for _, code := range []int{400, 409} {
				want := reason
				if code == 400 && (body == "conflict" || body == "") {
					want = ledger.DeadRefused
				}
				if o := bring(t, kind, one, 20*time.Second, func(int, string) func(http.ResponseWriter) { return text(code, body) }); o.reason != want || o.dead != 1 || o.dedup != 0 {
					t.Errorf("%s, %d %q: %+v, want %s", kind, code, body, o, want)
				}
				// Behind an answer that may have been lost it is stored already.
				o := bring(t, kind, one, 20*time.Second, func(n int, _ string) func(http.ResponseWriter) {
					if n == 1 {
						return status(503)
					}
					return text(code, body)
				})
				if stored := want == ledger.DeadOutOfOrder; (o.dedup == 1) != stored || (o.delivered == 1) != stored || (o.dead == 0) != stored {
					t.Errorf("%s, 503 and %d %q: %+v", kind, code, body, o)
				}
			}
		}
	}
}

// TestOneRefusedTargetInfo: that of other resources goes on, and no point is lost for it.
func TestOneRefusedTargetInfo(t *testing.T) {
	var got []string
	refused := 0
	server := func(_ int, body string) func(http.ResponseWriter) {
		if strings.Contains(body, "host_name\x12\aculprit") {
			refused++
			return text(400, "label value too long")
		}
		for _, host := range []string{"host-a", "host-b", "host-c", "host-d"} {
			if strings.Contains(body, "host_name\x12\x06"+host) {
				got = append(got, host)
			}
		}
		return status(204)
	}
	payload := func(at time.Time, hosts ...string) []byte {
		var all []string
		for _, h := range hosts {
			all = append(all, fmt.Sprintf(`{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"s of %[1]s"}},{"key":"host.name","value":{"stringValue":%[1]q}}]},"scopeMetrics":[{"metrics":[{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"%[2]d","asInt":"1"}]}}]}]}`, h, at.UnixNano()))
		}
		p, _, err := otlpwire.FromJSON(nil, otlpwire.Metrics, []byte(`{"resourceMetrics":[`+strings.Join(all, ",")+`]}`), otlpwire.DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	// Payloads go to one writer, a second apart.
	start := time.Now().Add(-2 * time.Hour)
	var payloads [][]byte
	for i := range 8 {
		payloads = append(payloads, payload(start.Add(time.Duration(i)*time.Second), "culprit", "host-a", "host-b"))
	}
	payloads = append(payloads, payload(start.Add(8*time.Second), "host-c"), payload(start.Add(8*time.Second), "host-d", "culprit"))
	if o := bringAll(t, "remote_write 1.0", func(*Config) {}, payloads, start, 20*time.Second, server); o.dead > 0 || o.delivered != 8*3+3 {
		t.Errorf("%+v", o)
	}
	if want := "host-a host-b host-c host-d"; strings.Join(got, " ") != want || refused != 2 {
		t.Errorf("got %v after %d refusals, want %s", got, refused, want)
	}
}

// TestRefusedPointsHoldUpNoTargetInfo: what is refused is a point, again and again.
func TestRefusedPointsHoldUpNoTargetInfo(t *testing.T) {
	infos := 0
	server := func(_ int, body string) func(http.ResponseWriter) {
		if strings.Contains(body, "bad-point") {
			return text(400, "label value too long")
		}
		infos += strings.Count(body, "Target metadata")
		return status(204)
	}
	var payloads [][]byte
	start := time.Now().Add(-time.Hour)
	for i := range 5 {
		point := `{"timeUnixNano":"%d","asInt":"1","attributes":[{"key":"k","value":{"stringValue":%q}}]}`
		resource := `{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"s-%d"}},{"key":"host.name","value":{"stringValue":"h"}}]},"scopeMetrics":[{"metrics":[{"name":"g","gauge":{"dataPoints":[` + point + `,` + point + `]}}]}]}`
		at := start.Add(time.Duration(i) * time.Second).UnixNano()
		for n, text := range []string{"bad-point", "fine"} {
			p, _, err := otlpwire.FromJSON(nil, otlpwire.Metrics, fmt.Appendf(nil, `{"resourceMetrics":[`+resource+`]}`, 2*i+n, at, text, at, "fine"), otlpwire.DefaultLimits)
			if err != nil {
				t.Fatal(err)
			}
			payloads = append(payloads, p)
		}
	}
	o := bringAll(t, "remote_write 1.0", func(*Config) {}, payloads, start, 20*time.Second, server)
	if o.dead != 5 || o.delivered != 5*3 || infos != 5 {
		t.Errorf("%+v, %d times target_info, want 5", o, infos)
	}
}

// TestWordsOfLoki: releases write them with capitals and without.
func TestWordsOfLoki(t *testing.T) {
	one := input(t, otlpwire.Logs, "loki-one-line")
	for why, reason := range map[string]string{
		"max entry size '262144' bytes exceeded for stream '{a=\"b\"}' while adding an entry with length '400000' bytes": ledger.DeadTooLarge,
		"Max entry size '262144' bytes exceeded for stream '{a=\"b\"}' while adding an entry with length '400000' bytes": ledger.DeadTooLarge,
		"stream '{a=\"b\"}' has structured metadata too large: '70000' bytes, limit: '65536' bytes":                      ledger.DeadTooLarge,
		"stream '{a=\"b\"}' has too many structured metadata labels: '150', limit: '128'":                                ledger.DeadTooLarge,
		"entry with timestamp 2026-01-01 ignored, reason: 'entry out of order' for stream: {a=\"b\"},":                   ledger.DeadOutOfOrder,
		"entry with timestamp 2026-01-01 ignored, reason: 'entry too far behind, oldest acceptable timestamp is: …'":     ledger.DeadOutOfOrder,
		"entry for stream '{a=\"b\"}' has timestamp too old: 2020-01-01T00:00:00Z":                                       ledger.DeadTooOld,
		"entry for stream '{a=\"b\"}' has timestamp too new: 2040-01-01T00:00:00Z":                                       ledger.DeadTooNew,
		"error parsing labels": ledger.DeadRefused,
	} {
		for _, kind := range []string{"loki push", "loki otlp"} {
			for first := range 2 { // behind an answer that was lost, too: a line that is behind need not be there
				o := bring(t, kind, one, 20*time.Second, func(n int, _ string) func(http.ResponseWriter) {
					if n <= first {
						return status(503)
					}
					return text(400, why)
				})
				if o.dead != 1 || o.reason != reason || o.dedup != 0 || o.delivered != 0 {
					t.Errorf("%s, %s: %+v, want %s", kind, why, o, reason)
				}
			}
		}
	}
}

// TestOneTimeForGood: a record without a time has the same with every attempt, and when it is replayed.
func TestOneTimeForGood(t *testing.T) {
	three := input(t, otlpwire.Logs, "no-time")
	arrival := time.Now().Add(-time.Hour)
	for _, kind := range []string{"loki push", "loki otlp"} {
		var bodies []string
		for range 2 {
			bringAll(t, kind, func(*Config) {}, [][]byte{three}, arrival, 60*time.Second, func(n int, body string) func(http.ResponseWriter) {
				bodies = append(bodies, body)
				if n <= 3 {
					return status(503)
				}
				return status(204)
			})
		}
		own := string(protowire.AppendFixed64(nil, uint64(arrival.UnixNano())))
		if kind == "loki push" {
			own = string(protowire.AppendVarint(protowire.AppendVarint([]byte{8}, uint64(arrival.Unix())), 16))
		}
		for _, b := range bodies {
			if b != bodies[0] || strings.Count(b, own) != 1 {
				t.Errorf("%s: %d bodies: %x", kind, len(bodies), b)
			}
		}
	}
}

// TestArrivalReachesNamedWriters: those of further sets of backends.
func TestArrivalReachesNamedWriters(t *testing.T) {
	var got time.Time
	w := named{dated{&got}, "b"}
	at := time.Unix(1_700_000_000, 5)
	d := Deliverer{Signal: otlpwire.Logs, Writer: w, Arrival: at.UnixNano(), Delivered: func(int) {}, Paused: func(bool) {}}
	if !d.Write(t.Context(), "as-1", nil, 1, false) || !got.Equal(at) {
		t.Errorf("got %v", got)
	}
}

type dated struct{ at *time.Time }

func (dated) Name() string                                { return "dated" }
func (dated) Write(context.Context, string, []byte) error { return nil }
func (dated) Close() error                                { return nil }
func (d dated) WriteArrived(_ context.Context, _ string, _ []byte, at time.Time) error {
	*d.at = at
	return nil
}

// slow refuses until it is no longer asked by an owner.
type slow struct{ writes, owned int }

func (w *slow) Name() string { return "slow" }
func (w *slow) Close() error { return nil }

func (w *slow) Write(context.Context, string, []byte) error {
	w.writes++
	w.owned = 1 // for the question behind this, and not for the one behind the pause
	if w.writes == 10 {
		return nil // so that the test ends
	}
	return errors.New("not now")
}

// TestAnOwnerThatSlept: whoever lost the lane while it waited does not write what another has brought.
func TestAnOwnerThatSlept(t *testing.T) { synctest.Test(t, testAnOwnerThatSlept) }

func testAnOwnerThatSlept(t *testing.T) {
	w, start := &slow{owned: 1}, time.Now()
	d := Deliverer{Signal: otlpwire.Logs, Writer: w, Log: slog.New(slog.DiscardHandler), Delivered: func(int) {}, Paused: func(bool) {}, Owned: func() bool {
		w.owned--
		return w.owned >= 0
	}}
	if d.Write(t.Context(), "as-1", nil, 1, false) || w.writes != 1 || time.Since(start) == 0 {
		t.Errorf("%d writes, %v waited", w.writes, time.Since(start))
	}
	w = new(slow) // it has waited for its turn
	d.Writer = w
	if d.Write(t.Context(), "as-1", nil, 1, false) || w.writes != 0 {
		t.Errorf("%d writes of one that is not the owner", w.writes)
	}
}

// sequence answers one write after the other, and stores what comes then.
type sequence struct {
	answers []error
	writes  int
}

func (*sequence) Name() string { return "sequence" }
func (*sequence) Close() error { return nil }

func (w *sequence) Write(context.Context, string, []byte) (err error) {
	if w.writes < len(w.answers) {
		err = w.answers[w.writes]
	}
	w.writes++
	return err
}

// TestWhatGoesAside: a payload is set aside behind older ones of its instance, or when its sender is
// refused three times, or for longer than can be waited for; nothing else is.
func TestWhatGoesAside(t *testing.T) { synctest.Test(t, testWhatGoesAside) }

func testWhatGoesAside(t *testing.T) {
	refused := fault.Sender(fault.After(errors.New("too many"), time.Millisecond))
	long := fault.Sender(fault.After(errors.New("too many"), time.Minute))
	for name, tc := range map[string]struct {
		answers        []error
		behind, full   bool // older ones wait there, nothing more is taken there
		ended          bool // what takes it has ended
		writes, stored int
		offered        []bool // each time it is offered, whether it may have been written
		result         bool
		within         time.Duration // how long it may wait; a quarter of each pause is chance
	}{
		"accepted":             {stored: 1, writes: 1, offered: []bool{false}, result: true},
		"behind older ones":    {behind: true, offered: []bool{false}, result: true},
		"sender refused twice": {answers: []error{refused, refused}, writes: 3, stored: 1, offered: []bool{false}, result: true, within: 300 * time.Millisecond},
		"three times":          {answers: []error{refused, refused, refused}, writes: 3, offered: []bool{false, true}, result: true, within: 300 * time.Millisecond},
		"for a minute":         {answers: []error{long}, writes: 1, offered: []bool{false, true}, result: true},
		"no room there":        {answers: []error{refused, refused, refused}, full: true, writes: 4, stored: 1, offered: []bool{false, true}, result: true, within: 700 * time.Millisecond},
		"another refusal":      {answers: []error{fault.After(errors.New("busy"), time.Millisecond)}, writes: 2, stored: 1, offered: []bool{false}, result: true, within: 100 * time.Millisecond},
		"ended":                {answers: []error{long}, ended: true, writes: 1, offered: []bool{false, true}},
	} {
		w := &sequence{answers: tc.answers}
		stored, start := 0, time.Now()
		var offered []bool
		d := Deliverer{Signal: otlpwire.Logs, Writer: w, Log: slog.New(slog.DiscardHandler), Delivered: func(n int) { stored += n }, Paused: func(bool) {}}
		d.Aside = func(_ context.Context, instance string, _ []byte, again bool, t Trouble) (put, goOn bool) {
			offered = append(offered, again)
			if t.Err == nil {
				return tc.behind, true
			}
			return !tc.full && !tc.ended, !tc.ended
		}
		result := d.Write(t.Context(), "as-1", nil, 1, false)
		if result != tc.result || w.writes != tc.writes || stored != tc.stored || !slices.Equal(offered, tc.offered) {
			t.Errorf("%s: %v after %d writes, %d stored, offered %v", name, result, w.writes, stored, offered)
		}
		if took := time.Since(start); took > tc.within || took < tc.within*3/4 {
			t.Errorf("%s: it takes %v, want up to %v", name, took, tc.within)
		}
	}
}
