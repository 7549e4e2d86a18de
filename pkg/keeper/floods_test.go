package keeper

import (
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/hold"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestWhoFloods: what is owed of each instance is shown while a stream is filling up, and the one that holds most of it is
// told to hold back; nobody when there is only one, or when everything is finished. One that goes on is named.
func TestWhoFloods(t *testing.T) {
	w := newWorld(t, "a", "b")
	now := time.Now()
	owed := func(p int) float64 { return testutil.ToFloat64(w.led.Owed("logs", w.names[p])) }
	look := func() {
		t.Helper()
		floors, state, err := w.conn.Floors(t.Context(), "LOGS")
		if err != nil {
			t.Fatal(err)
		}
		s := w.stream("LOGS")
		at := s.take(now, state)
		if at.done, err = s.finished(t.Context(), w.conn, floors); err != nil {
			t.Fatal(err)
		}
		w.floods(t.Context(), s, at, floors, now)
		now = now.Add(floodInterval)
	}
	send := func(p, n int) {
		t.Helper()
		for range n {
			if err := w.send(p); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.serve(true)
	defer w.serve(false)
	asker := hold.NewAsker(slog.New(slog.DiscardHandler))
	defer asker.Close()
	held := func(p int) string {
		t.Helper()
		asker.Held(w.conn, w.names[p], otlpwire.Logs, now.Add(24*time.Hour)) // asks
		w.until("an answer", func() bool { return !asker.Asks() })
		why := asker.Held(w.conn, w.names[p], otlpwire.Logs, time.Time{})
		if other := asker.Held(w.conn, w.names[p], otlpwire.Traces, time.Time{}); other != "" {
			t.Errorf("traces: %s", other)
		}
		return why
	}
	send(0, 60)
	look()
	if n := owed(0); n < 600_000 || n > 700_000 || held(0) != "" {
		t.Errorf("it has 600 kB alone: %v, %s", n, held(0))
	}
	send(1, 10)
	look()
	if one, other := owed(0), owed(1); one < 600_000 || one > 700_000 || other < 100_000 || other > 120_000 {
		t.Errorf("600 and 100 kB: %v and %v", one, other)
	}
	if why := held(0); !strings.Contains(why, "LOGS") || !strings.Contains(why, w.names[0]) || held(1) != "" {
		t.Errorf("told %q, and %q", why, held(1))
	}
	s := w.stream("LOGS")
	for _, one := range s.held {
		one.seen = time.Now().Add(-holdFor)
	}
	if why := held(0); why != "" {
		t.Errorf("nothing is known for a minute, and it is told %q", why)
	}
	disobeys := func() float64 { return testutil.ToFloat64(w.led.Disobeys("logs", w.names[0])) }
	send(0, 1)
	for range int(obeys/floodInterval) + 1 {
		if look(); disobeys() != 0 {
			t.Fatal("it does not disobey within a minute")
		}
	}
	for range 2 {
		look()
	}
	if w.said.Says("does not hold back") || disobeys() != 0 {
		t.Error("it has not sent anything since the minute in which it was told")
	}
	if n := testutil.ToFloat64(w.led.Held("logs", w.names[0])); n < obeys.Seconds() {
		t.Errorf("held for %v s", n)
	}
	send(0, 1)
	look()
	if !w.said.Says("does not hold back", "stream=LOGS", "instance="+w.names[0]) || disobeys() != 1 {
		t.Errorf("it is not named, %v:\n%s", disobeys(), &w.said)
	}
	for range int(obeys / floodInterval) {
		look()
	}
	if disobeys() != 0 {
		t.Error("it has sent nothing for a minute")
	}
	w.read("a-0", 30)
	w.read("b-0", 20)
	look()
	if n := owed(0); n < 420_000 || n > 480_000 {
		t.Errorf("42 messages of 10 kB are left: %v", n)
	}
	w.read("a-0", 60)
	w.read("b-0", 60)
	look()
	if owed(0) != 0 || owed(1) != 0 || held(0) != "" {
		t.Errorf("100 kB are owed in all: %v and %v", owed(0), owed(1))
	}
}

// TestFlooding is the law of who holds back.
func TestFlooding(t *testing.T) {
	at := func(owed uint64) stream { return stream{first: 1, last: 100, messages: 100, bytes: owed, max: 1000} }
	before := map[string]*told{"big": {}}
	for name, tc := range map[string]struct {
		at     stream
		share  float64
		holds  []holding
		before map[string]*told
		want   string
	}{
		"more than half of a stream that is half full": {at(600), 0.5, []holding{{"small", 200, 1}, {"big", 400, 1}}, nil, "big"},
		"two":                                   {at(600), 0.2, []holding{{"small", 50, 1}, {"big", 400, 1}, {"next", 150, 1}}, nil, "big next"},
		"half":                                  {at(600), 0.5, []holding{{"small", 300, 1}, {"big", 300, 1}}, nil, ""},
		"it is alone":                           {at(600), 0.5, []holding{{"big", 600, 1}, {"gone", 0, 1}}, nil, ""},
		"the stream is not half full":           {at(500), 0.5, []holding{{"small", 100, 1}, {"big", 400, 1}}, nil, ""},
		"it is held already":                    {at(400), 0.5, []holding{{"small", 240, 1}, {"big", 160, 1}}, before, "big"},
		"held, the stream is not full any more": {at(375), 0.5, []holding{{"small", 75, 1}, {"big", 300, 1}}, before, ""},
		"held, and has little":                  {at(600), 0.5, []holding{{"small", 300, 1}, {"big", 220, 1}, {"next", 80, 1}}, before, ""},
		"any share":                             {at(1000), 1, []holding{{"small", 1, 1}, {"big", 999, 1}}, nil, ""},
	} {
		var got []string
		for _, h := range flooding(tc.at, tc.share, tc.holds, tc.before) {
			got = append(got, h.instance)
		}
		if strings.Join(got, " ") != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
}

// TestWhoFillsAside is told to hold back the signal that fills it, also when there is only one, until there is room again; when
// ASIDE is nearly full all are that have something in it.
func TestWhoFillsAside(t *testing.T) {
	w := newWorld(t)
	now := time.Now()
	look := func() string {
		t.Helper()
		w.asides(t.Context(), held(w.state(bus.Aside)), now)
		now = now.Add(floodInterval)
		var all []string
		for _, instance := range w.names {
			all = append(all, strings.Join(w.answer(instance).Signals, "+"))
		}
		return strings.Join(all, " ")
	}
	send := func(sig otlpwire.Signal, backend string, p, n int) {
		t.Helper()
		for range n {
			if _, err := w.conn.Publish(t.Context(), bus.Message{
				Subject: bus.AsideSubject(sig, backend, p, w.names[p]), Body: make([]byte, 1_000),
				Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: now.UnixNano()},
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
	total := int(w.state(bus.Aside).MaxBytes / 1_150) // with its header
	if total < 40 {
		t.Fatalf("ASIDE has room for %d messages", total)
	}
	w.serve(true)
	send(otlpwire.Logs, "loki", 0, 1)
	look()
	now = now.Add(floodPause) // so little is looked at each half a minute
	send(otlpwire.Logs, "loki", 0, 1)
	look()
	if got := testutil.ToFloat64(w.led.AsideBytes("logs", "loki", w.names[0])); got < 2000 {
		t.Errorf("%v bytes of two messages are shown", got)
	}
	send(otlpwire.Logs, "loki", 0, total*22/100-2)
	send(otlpwire.Logs, "other", 0, total*22/100)
	if got := look(); got != " " {
		t.Errorf("%q hold back when it is not half full", got)
	}
	if testutil.ToFloat64(w.led.AsideBytes("logs", "loki", w.names[0])) < 10_000 {
		t.Error("what it has is not shown at once")
	}
	send(otlpwire.Logs, "loki", 1, total*12/100)
	send(otlpwire.Traces, "tempo", 0, 1)
	if got := look(); got != "logs " {
		t.Errorf("%q hold back, want the one that fills it", got)
	}
	for backend, n := range map[string]int{"loki": total * 22 / 100, "other": total * 22 / 100} {
		if got := testutil.ToFloat64(w.led.AsideBytes("logs", backend, w.names[0])); got < float64(1000*n) || got > float64(1200*n) {
			t.Errorf("%v bytes of %d messages of 1 kB are set aside for %s", got, n, backend)
		}
	}
	send(otlpwire.Metrics, "prometheus", 1, total*25/100)
	if got := look(); got != "traces+logs metrics+logs" {
		t.Errorf("%q hold back, want all", got)
	}
	for range int(obeys/floodInterval) + 2 {
		send(otlpwire.Metrics, "prometheus", 1, 1)
		look()
	}
	if w.said.Says("does not hold back") {
		t.Error("what the hub had before is no reason to name it")
	}
	if err := w.conn.Remove(t.Context(), bus.Aside, "aside.>", w.state(bus.Aside).LastSeq); err != nil {
		t.Fatal(err)
	}
	if got := look(); got != " " {
		t.Errorf("%q hold back when there is room", got)
	}
	send(otlpwire.Logs, "loki", 0, total*60/100)
	if look(); w.answer(w.names[0]).Signals == nil {
		t.Error("it does not hold back")
	}
	if w.serve(false); w.answer(w.names[0]).Signals != nil {
		t.Error("it holds back although this is not the keeper")
	}
}

// TestOverflowing is the law of that.
func TestOverflowing(t *testing.T) {
	at := func(bytes uint64) stream { return stream{first: 1, last: 100, messages: 100, bytes: bytes, max: 1000} }
	before := map[string]*told{"big": {}}
	for name, tc := range map[string]struct {
		at     stream
		share  float64
		before map[string]*told
		want   string
	}{
		"not half full":         {at(500), 0.5, nil, ""},
		"half full":             {at(501), 0.5, nil, "big"},
		"half full, any share":  {at(501), 1, nil, ""},
		"half full, less":       {at(501), 0.85, nil, ""},
		"three quarters full":   {at(750), 0.85, nil, ""},
		"more":                  {at(751), 0.85, nil, "small big"},
		"less than before":      {at(376), 0.5, before, "big"},
		"there is room again":   {at(375), 0.5, before, ""},
		"it was nearly full":    {at(563), 0.85, before, "big"},
		"and is not any longer": {at(562), 0.85, before, ""},
	} {
		var got []string
		for _, h := range overflowing(tc.at, tc.share, []holding{{"small", tc.at.bytes / 5, 1}, {"big", tc.at.bytes * 4 / 5, 1}}, tc.before) {
			got = append(got, h.instance)
		}
		if strings.Join(got, " ") != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
}

// TestHeldTwice: what is shown of an instance that is told to hold back because of its stream and of ASIDE is what is worse; and one
// that could not be told for a minute does not disobey.
func TestHeldTwice(t *testing.T) {
	w := newWorld(t)
	now, logs, aside := time.Now(), w.stream("LOGS"), w.setAside[otlpwire.Logs]
	shows := func(what string, seconds, disobeys float64) {
		t.Helper()
		if h, d := testutil.ToFloat64(w.led.Held("logs", "as-1")), testutil.ToFloat64(w.led.Disobeys("logs", "as-1")); h != seconds || d != disobeys {
			t.Errorf("%s: held for %v s, disobeys %v", what, h, d)
		}
	}
	look := func(s *kept, messages uint64) { w.hold(s, []holding{{"as-1", 100, messages}}, now) }
	look(logs, 1)
	for messages := uint64(2); messages < 10; messages++ {
		now = now.Add(obeys / 4)
		look(logs, messages)
		look(aside, messages)
	}
	shows("both", 120, 1)
	if a := w.answer("as-1"); !slices.Equal(a.Signals, []string{"logs"}) {
		t.Errorf("it is told %+v", a)
	}
	w.hold(aside, nil, now)
	shows("the stream", 120, 1)
	look(aside, 10)
	w.hold(logs, nil, now)
	shows("ASIDE", 0, 0)
	w.hold(aside, nil, now)
	shows("none", 0, 0)
	now = now.Add(time.Hour)
	look(logs, 1)
	now = now.Add(obeys + holdFor)
	look(logs, 2)
	shows("it was not told meanwhile", 0, 0)
}
