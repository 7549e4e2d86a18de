package sink

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/sampler"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/pkg/sink/export"
	"github.com/penstock/penstock/pkg/sink/horizon"
	"github.com/penstock/penstock/pkg/tally"
)

// poisonWorld is a lane of traces whose sampler panics.
type poisonWorld struct {
	*testing.T
	k    *spanSet
	d    *export.Exporter
	conn *bus.Conn
	log  logtest.Log
	base time.Time
	sent int

	mu   sync.Mutex
	whys []string // of interruptions; read them when no lane runs
}

func newPoisonWorld(t *testing.T) *poisonWorld {
	t.Parallel()
	w := &poisonWorld{T: t, k: &spanSet{spans: map[uint64]bool{}}, base: time.Now().Add(-time.Hour)}
	w.d, w.conn = testExporter(t, w.k)
	w.d.Signal, w.d.Said, w.d.Log = otlpwire.Traces, new(backoff.Repeats), w.log.Logger(slog.LevelInfo)
	w.d.Count = liveCounterOf(w.d)
	return w
}

// send publishes the next message of SPANS, with a span of each instance, each a trace by itself: span number n is that of
// message n/10.
func (w *poisonWorld) send(at time.Duration, instances ...string) {
	w.Helper()
	w.sent++
	h := envelope.Header{ContentType: envelope.ContentTypeFrames, Items: len(instances), Arrival: w.base.Add(at).UnixNano(), ID: fmt.Sprint("m", w.sent)}
	m := bus.Message{Subject: bus.SpansSubject(0), Header: h}
	for i, instance := range instances {
		id := binary.BigEndian.AppendUint64(nil, uint64(w.sent*10+i))
		payload, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{
			{TraceId: append([]byte("01234567"), id...), SpanId: id, Name: "x"},
		}}}}}})
		if err != nil {
			w.Fatal(err)
		}
		m.Body = envelope.AppendFrame(m.Body, envelope.Frame{Instance: instance, Arrival: h.Arrival + int64(i)*int64(time.Millisecond), Seq: uint64(w.sent), Payload: payload})
	}
	if _, err := w.conn.Publish(w.Context(), m); err != nil {
		w.Fatal(err)
	}
}

// own runs the lane of a name, as change has it, until stop.
func (w *poisonWorld) own(name string, set *policy.Set, change func(*traceLane)) (l *traceLane, stop func()) {
	w.Helper()
	lane, err := w.conn.OpenLane(w.Context(), bus.LaneConfig{Stream: bus.Spans, Filter: bus.SpansSubject(0), Name: name, Raw: true, Interrupted: func(why string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.whys = append(w.whys, why)
	}})
	if err != nil {
		w.Fatal(err)
	}
	own := *w.d
	own.Waits = lane.Waits
	hub := bus.NewHub(bus.Config{}, bus.DefaultTopology(), own.Log)
	hub.Conn = w.conn
	counts := tally.Open(tally.Config{Conn: own.Conn, Replicas: 1, Stream: bus.Spans, Lane: name, Filter: bus.SpansSubject(0), Log: own.Log})
	l = newTraceLane(lane, &own, liveCounterOf(&own), versions.Fixed(set), bus.DecisionsSubject(0)+"-"+name, horizon.New(hub, versions.DefaultConfig().Late, own.Ledger, own.Log), counts)
	l.maxBytes = 64 << 20
	change(l)
	ctx, cancel := context.WithCancel(w.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = l.run(ctx)
	}()
	return l, func() {
		cancel()
		<-done
	}
}

func (w *poisonWorld) until(what string, is func() bool) {
	w.Helper()
	ctx, stop := context.WithTimeout(w.Context(), time.Minute)
	defer stop()
	if !backoff.Until(ctx, is) {
		w.Fatalf("%s: never; the log says\n%s", what, w.log.String())
	}
}

// stored waits until the backend has exactly these spans.
func (w *poisonWorld) stored(spans ...uint64) {
	w.Helper()
	got := func() []uint64 {
		w.k.mu.Lock()
		defer w.k.mu.Unlock()
		return slices.Sorted(maps.Keys(w.k.spans))
	}
	w.until(fmt.Sprintf("the backend has %v, not %v", spans, got()), func() bool { return slices.Equal(got(), spans) })
}

// letters are the dead letters: instance, reason, items and source.
func (w *poisonWorld) letters() (all []string) {
	w.Helper()
	if err := w.conn.Letters(w.Context(), "", "", true, func(l bus.Letter) bool {
		n := otlpwire.Count(otlpwire.Traces, l.Body)
		all = append(all, fmt.Sprintf("%s %s %d/%d %s %s", l.Instance, l.Reason, l.Items, n, l.Backend, l.Source))
		return true
	}); err != nil {
		w.Fatal(err)
	}
	return all
}

func (w *poisonWorld) panics(stage string) float64 {
	return testutil.ToFloat64(w.d.Ledger.Panics(stage))
}

// TestSpansThatMakeTheSamplerPanic are dead-lettered, with what else their instance has in the message, when they have come again;
// all others are delivered, also those of other instances in the message, and the floor passes it. Another owner does the same by
// itself.
func TestSpansThatMakeTheSamplerPanic(t *testing.T) {
	w := newPoisonWorld(t)
	bad := func(first int64, seq uint64) bool {
		if one := time.Duration(first-w.base.UnixNano()).Round(time.Millisecond)%time.Second == 0; seq == 2 || (seq == 3 || seq == 6) && one {
			panic("a bad trace")
		}
		return true
	}
	w.send(0, "as-1")
	w.send(0, "as-1", "as-2", "as-2")
	w.send(0, "as-1", "as-3")
	w.send(0, "as-1")
	w.send(time.Minute, "as-1", "as-2", "as-3")
	stored, letters := []uint64{10, 31, 40}, []string{"as-1 poison 1/1 sampler SPANS 2", "as-1 poison 1/1 sampler SPANS 3", "as-2 poison 2/2 sampler SPANS 2"}
	for i, name := range []string{"tempo-0", "tempo-1"} {
		w.k.mu.Lock()
		clear(w.k.spans)
		w.k.mu.Unlock()
		l, stop := w.own(name, policy.KeepAll(time.Second), func(l *traceLane) { l.in = bad })
		w.stored(stored...)
		w.until("the floor passes what is dead", func() bool { return l.lane.Floor() == 4 })
		if i == 1 { // a further one
			w.send(2*time.Minute, "as-1", "as-2", "as-3")
			w.send(3*time.Minute, "as-1", "as-2", "as-3")
			stored, letters = append(stored, 50, 51, 52, 61, 62), append(letters, "as-1 poison 1/1 sampler SPANS 6")
			w.stored(stored...)
			w.until("the floor passes what is dead, too", func() bool { return l.lane.Floor() == 6 })
		}
		stop()
		if i == 1 && (len(l.poison.of) != 1 || l.poison.of[sampler.About{Seq: 6, Instance: "as-1"}] == nil) || l.poison.others != 0 {
			t.Errorf("the lane remembers %v, and %d other panics", l.poison.of, l.poison.others)
		}
		if got := w.letters(); !slices.Equal(got, letters) { // once, by their ids
			t.Errorf("%s: dead letters %q, want %q", name, got, letters)
		}
		all, err := tally.All(t.Context(), w.conn)
		if err != nil {
			t.Fatal(err)
		}
		// What was sent in the step before a panic is read again, and known to be sent: unrecorded.
		one, two, n := all[bus.Spans][name].Instances["as-1"], all[bus.Spans][name].Instances["as-2"], uint64(i)
		if one == nil || two == nil || one.Items != 4+2*n || one.Ended[tally.Dead] != 2+n || one.Ended[tally.Delivered]+one.Ended[tally.Unrecorded] != 2+n || two.Items != 2+2*n || two.Ended[tally.Dead] != 2 {
			t.Errorf("%s: the tally has %+v, %+v", name, one, two)
		}
	}
	if dead, n := testutil.ToFloat64(w.d.Ledger.Of(otlpwire.Traces).Dead(ledger.DeadPoison)), w.panics(ledger.PanicSampler); dead != 9 || n != 7 || strings.Join(w.whys, " ") != strings.TrimSpace(strings.Repeat("panic ", 7)) {
		t.Errorf("%v dead spans, %v panics, interrupted by %q", dead, n, w.whys)
	}
	if !w.log.Says("level=ERROR", "a stage panicked", "stage=sampler", "instance=as-1", `source="SPANS 2"`, "a bad trace", "poison_test.go") || strings.Count(w.log.String(), "a stage panicked") != 1 {
		t.Errorf("it says %s", w.log.String())
	}
}

// TestAPanicWithoutAMessage: the lane is claimed again, after pauses, and dead-letters nothing.
func TestAPanicWithoutAMessage(t *testing.T) {
	w := newPoisonWorld(t)
	w.send(0, "as-1")
	w.send(time.Minute, "as-1")
	var claims []time.Time
	l, stop := w.own("tempo-0", policy.KeepAll(time.Second), func(l *traceLane) {
		l.follow = func(_ context.Context, s *sampler.Samplers) error {
			switch claims = append(claims, time.Now()); len(claims) {
			case 1:
				panic("decisions")
			case 2, 3:
				s.Idle(sampler.Mark{Before: make([]time.Time, 1), Routed: make([]uint64, 1)}, time.Now()) // of another number of partitions
			}
			return nil
		}
	})
	w.stored(10)
	stop()
	if n := w.panics(ledger.PanicSampler); n != 3 || l.poison.others != 2 || len(l.poison.of) != 0 || len(w.letters()) != 0 || !slices.Equal(w.whys, []string{"panic", "panic"}) {
		t.Errorf("%v panics, %d without a message, %v with one, letters %q, interrupted by %q", n, l.poison.others, l.poison.of, w.letters(), w.whys)
	}
	if len(claims) != 4 || claims[2].Sub(claims[1]) < 75*time.Millisecond || claims[3].Sub(claims[2]) < 150*time.Millisecond {
		t.Errorf("the claims are at %v, want pauses that grow", claims)
	}
}

// TestAMessageThatCannotBeReadWithoutAPanic becomes a dead letter as it is, and nothing is read again for it: the sampler has
// not panicked. Nor has a lane that reads the earlier spans of a rescued trace.
func TestAMessageThatCannotBeReadWithoutAPanic(t *testing.T) {
	w := newPoisonWorld(t)
	frames := func(g *envelope.Guard, d bus.Delivery, visit func(envelope.Frame) error) error {
		if d.Seq == 2 {
			panic("a bad message")
		}
		return routed(g, d, visit)
	}
	w.send(0, "as-1")
	w.send(0, "as-1", "as-2")
	w.send(0, "as-2")
	w.send(time.Minute, "as-1", "as-2")
	l, stop := w.own("tempo-0", policy.KeepAll(time.Second), func(l *traceLane) { l.frames = frames })
	w.stored(10, 30)
	w.until("the floor passes what is dead", func() bool { return l.lane.Floor() == 3 })
	stop()
	if got := w.letters(); len(got) != 1 || !strings.HasPrefix(got[0], "0 poison 1/") || !strings.HasSuffix(got[0], " reader SPANS 2") || w.panics(ledger.PanicSampler) != 1 || len(w.whys) != 0 {
		t.Errorf("letters %q, %v panics, interrupted by %q", got, w.panics(ledger.PanicSampler), w.whys)
	}
	p := &rescuePass{lane: &traceLane{exporter: w.d, frames: frames}, rescuer: sampler.NewRescuer(nil, nil)}
	if err := p.take(t.Context(), bus.Delivery{Seq: 2}); err != nil || w.panics(ledger.PanicSampler) != 2 {
		t.Errorf("%v, %v panics", err, w.panics(ledger.PanicSampler))
	}
}

// TestAPolicyThatPanics is counted and logged, once a minute, with all that is known of it; its trace is decided by the others.
func TestAPolicyThatPanics(t *testing.T) {
	w := newPoisonWorld(t)
	for range 3 {
		w.send(0, "as-1")
	}
	w.send(time.Minute, "as-1")
	set := policy.KeepAll(time.Second).With("mine", func(*policy.Trace) policy.Outcome { panic("a bad policy") })
	_, stop := w.own("tempo-0", set, func(*traceLane) {})
	w.stored(10, 20, 30)
	stop()
	if n := w.panics(ledger.PanicPolicy); n != 3 || w.panics(ledger.PanicSampler) != 0 || len(w.whys) != 0 {
		t.Errorf("%v policies panicked, %v samplers, interrupted by %q", n, w.panics(ledger.PanicSampler), w.whys)
	}
	if !w.log.Says("level=ERROR", "policy=mine", fmt.Sprintf("trace=3031323334353637%016x", 10), "instance=as-1", "a bad policy", "poison_test.go") || strings.Count(w.log.String(), "a policy panicked") != 1 {
		t.Errorf("it says %s", w.log.String())
	}
}

// TestPoisonIsBounded: beyond its bound a message is as good as none, and what a replay does not deliver counts as not chosen.
func TestPoisonIsBounded(t *testing.T) {
	d, _ := testExporter(t, &picky{})
	l := &traceLane{exporter: d}
	for seq := range uint64(maxPoison + 2) {
		l.panicked(sampler.Output{Panicked: &sampler.Panicked{About: sampler.About{Seq: seq + 1}, Panic: &fault.Panic{Value: seq, Stack: "long"}}})
	}
	if len(l.poison.of) != maxPoison || l.poison.others != 2 || l.poison.of[sampler.About{Seq: maxPoison}].why.Error() != fmt.Sprint("panic: ", maxPoison-1) {
		t.Errorf("%d messages are remembered, %d are not", len(l.poison.of), l.poison.others)
	}
	e := &excerpt{sig: otlpwire.Traces}
	payload, _ := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{{}, {}}}}}}})
	if err := e.poisoned(t.Context(), d, "as-1", payload, export.Origin{}, errors.New("why")); err != nil || e.progress().Unchosen != 2 {
		t.Errorf("%v, %+v", err, e.progress())
	}
}
