package sink

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/pkg/sink/horizon"
	"github.com/penstock/penstock/pkg/tally"
)

// tenants is a backend for several tenants: it refuses those in refused.
type tenants struct {
	mu      sync.Mutex
	refused map[string]error // by instance; "*": everybody
	stored  map[string][]string
	asked   map[string]int // how often it has refused
	slow    chan struct{}  // as-1 is accepted when it is closed; nil: at once
}

func (w *tenants) Name() string { return "loki" }
func (w *tenants) Close() error { return nil }

func (w *tenants) Write(ctx context.Context, instance string, payload []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if slow := w.slow; slow != nil && instance == "as-1" {
		w.asked[instance]++
		w.mu.Unlock()
		select {
		case <-slow:
		case <-ctx.Done():
		}
		w.mu.Lock()
	}
	for _, who := range []string{instance, "*"} {
		if err := w.refused[who]; err != nil {
			w.asked[instance]++
			return err
		}
	}
	for item := range otlpwire.Items(payload) {
		w.stored[instance] = append(w.stored[instance], name(item))
	}
	return nil
}

// name is the text between the bars in an item.
func name(item []byte) string {
	if parts := strings.Split(string(item), "|"); len(parts) == 3 {
		return parts[1]
	}
	return fmt.Sprintf("%q", item)
}

func (w *tenants) refuse(instance string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refused[instance] = err
}

func (w *tenants) of(instance string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.stored[instance])
}

func (w *tenants) refusals(instance string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.asked[instance]
}

// asideWorld is a lane of three instances, each with its own tenant.
type asideWorld struct {
	*testing.T
	w    *tenants
	d    *exporter
	conn *bus.Conn
	sent map[string][]string
	lane *bus.Lane
}

func newAsideWorld(t *testing.T, sig otlpwire.Signal) *asideWorld {
	w := &tenants{refused: map[string]error{}, stored: map[string][]string{}, asked: map[string]int{}}
	d, conn := testExporter(t, w)
	d.sig, d.said = sig, new(backoff.Repeats)
	world := &asideWorld{t, w, d, conn, map[string][]string{}, nil}
	world.router() // for the horizon
	return world
}

// send publishes one more item of each.
func (w *asideWorld) send(instances ...string) {
	w.Helper()
	for _, instance := range instances {
		n := len(w.sent[instance])
		item := fmt.Sprintf("%03d", n)
		w.sent[instance] = append(w.sent[instance], item)
		m := bus.Message{Subject: bus.Subject(w.d.sig, instance), Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: time.Now().UnixNano(), ID: instance + item}}
		m.Body = lines(w.T, "|"+item+"|")
		if w.d.sig == otlpwire.Traces {
			payload, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, fmt.Appendf(nil, `{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"%032x","spanId":"%016x","name":"|%s|"}]}]}]}`, n+1, n+1, item), otlpwire.DefaultLimits)
			if err != nil {
				w.Fatal(err)
			}
			m.Subject, m.Header.ContentType = bus.SpansSubject(0), envelope.ContentTypeFrames
			m.Body = envelope.AppendFrame(nil, envelope.Frame{Instance: instance, Arrival: time.Now().UnixNano(), Seq: uint64(n + 1), Payload: payload})
		}
		if _, err := w.conn.Publish(w.Context(), m); err != nil {
			w.Fatal(err)
		}
	}
}

// router opens a lane of a router that has nothing to do.
func (w *asideWorld) router() *bus.Lane {
	w.Helper()
	lane, err := w.conn.OpenLane(w.Context(), bus.LaneConfig{Stream: bus.Stream(otlpwire.Traces), Filter: bus.PartitionFilter(otlpwire.Traces, 0), Name: bus.RouterLane + "0"})
	if err != nil {
		w.Fatal(err)
	}
	return lane
}

// own runs the lane until stop.
func (w *asideWorld) own() (stop func()) {
	w.Helper()
	cfg := bus.LaneConfig{Stream: bus.Stream(w.d.sig), Filter: bus.PartitionFilter(w.d.sig, 0), Name: "loki-0", Raw: true}
	if w.d.sig == otlpwire.Traces {
		cfg.Stream, cfg.Filter = bus.Spans, bus.SpansSubject(0)
	}
	lane, err := w.conn.OpenLane(w.Context(), cfg)
	if err != nil {
		w.Fatal(err)
	}
	w.lane = lane
	ctx, cancel := context.WithCancel(w.Context())
	done := make(chan struct{})
	own := *w.d
	own.waits = lane.Waits
	if own.aside = newAside(own, lane, 0, 2); own.aside.exporter.waits != nil {
		w.Error("what is delivered beside the lane holds it up")
	}
	l := lanes{cfg: Config{Streams: bus.Topology{Replicas: 1}}, led: w.d.led}
	counts := l.tally(w.d, membership.Shared{Signal: w.d.sig.String(), Backend: "loki", LaneConfig: cfg})
	go func() {
		defer close(done)
		if w.d.sig != otlpwire.Traces {
			_ = newDirectLane(lane, &own, counts).run(ctx)
			return
		}
		hub := bus.NewHub(bus.Config{}, bus.Topology{Partitions: 1}, own.log)
		hub.Conn = w.conn
		horizon := horizon.New(hub, versions.DefaultConfig().Late, own.led, own.log)
		var wg sync.WaitGroup
		wg.Go(func() { horizon.Run(ctx) })
		l := newTraceLane(lane, &own, versions.Fixed(policy.KeepAll(time.Second)), bus.DecisionsSubject(0), horizon, counts)
		l.maxBytes = 64 << 20
		_ = l.run(ctx)
		wg.Wait()
	}()
	return func() {
		cancel()
		<-done
	}
}

func (w *asideWorld) until(what string, ok func() bool) {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), 2*time.Minute)
	defer cancel()
	if !backoff.Until(ctx, ok) {
		w.Fatalf("%s: never; stored %v", what, w.w.stored)
	}
}

func (w *asideWorld) arrived(instances ...string) func() bool {
	return func() bool {
		for _, instance := range instances {
			if !slices.Equal(w.w.of(instance), w.sent[instance]) {
				return false
			}
		}
		return true
	}
}

// waiting returns how many messages of an instance are in ASIDE.
func (w *asideWorld) waiting(instance string) (n uint64) {
	w.Helper()
	there, err := w.conn.Subjects(w.Context(), bus.Aside, bus.AsideSubject(w.d.sig, "loki", 0, instance))
	if err != nil {
		w.Fatal(err)
	}
	for _, messages := range there {
		n += messages
	}
	return n
}

// counted wants the lane's tally to have so many items of an instance, which ended so.
func (w *asideWorld) counted(instance string, items uint64, ended map[tally.Outcome]uint64) {
	w.Helper()
	all, err := tally.All(w.Context(), w.conn)
	if err != nil {
		w.Fatal(err)
	}
	for _, lanes := range all {
		if c := lanes["loki-0"].Instances[instance]; c.Items != items || !maps.Equal(c.Ended, ended) {
			w.Errorf("%s: %+v", instance, c)
		}
	}
	if len(all) != 1 {
		w.Errorf("tallies of %d streams", len(all))
	}
}

func (w *asideWorld) nothingOwed() bool {
	at, err := w.lane.Progress(w.Context())
	return err == nil && at.Lag == 0
}

var errTenant = fault.Sender(fault.Configuration(errors.New("401 Unauthorized: no such tenant")))

// TestOneInstanceIsSetAside: a backend that refuses one instance gets the data of others, at
// once and in order; when it accepts the refused one again, it gets its data, in order, once,
// also if the lane has changed its owner meanwhile.
func TestOneInstanceIsSetAside(t *testing.T) {
	t.Parallel()
	for _, sig := range []otlpwire.Signal{otlpwire.Logs, otlpwire.Traces} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			w := newAsideWorld(t, sig)
			gauge := w.d.led.Aside(sig.String(), 0, "loki")
			stop := w.own()
			w.send("as-1", "as-2")
			w.until("both", w.arrived("as-1", "as-2"))
			w.w.refuse("as-1", errTenant)
			before := len(w.w.of("as-1"))
			for range 10 {
				w.send("as-1", "as-2", "as-3")
			}
			w.until("the others", w.arrived("as-2", "as-3"))
			w.until("the floor", w.nothingOwed)
			if n := w.waiting("as-1"); n == 0 || testutil.ToFloat64(gauge) != 1 {
				t.Errorf("%d messages set aside, of %v instances", n, testutil.ToFloat64(gauge))
			}
			stop()
			if testutil.ToFloat64(gauge) != 0 {
				t.Error("whoever has no lane has set nobody aside")
			}

			stop = w.own()
			for range 10 {
				w.send("as-1", "as-2", "as-3")
			}
			w.until("the others, of another owner", w.arrived("as-2", "as-3"))
			if n := len(w.w.of("as-1")); n != before {
				t.Errorf("%d items of the refused one", n-before)
			}
			asked := w.w.refusals("as-1")
			w.until("another try", func() bool { return w.w.refusals("as-1") > asked || asked > 4 })
			stop()
			w.w.refuse("as-1", nil)

			stop = w.own()
			w.until("as-1", w.arrived("as-1"))
			w.until("nothing is set aside", func() bool { return w.waiting("as-1") == 0 && testutil.ToFloat64(gauge) == 0 })
			w.send("as-1", "as-2")
			w.until("both again", w.arrived("as-1", "as-2"))
			w.until("the floor", w.nothingOwed)
			stop()
			led := w.d.led.Of(sig)
			if aside, delivered := testutil.ToFloat64(led.Aside("loki")), testutil.ToFloat64(led.Delivered("loki")); aside != 20 || delivered != 22+22+20 {
				t.Errorf("%v items set aside, %v delivered", aside, delivered)
			}
			w.counted("as-1", 22, map[tally.Outcome]uint64{tally.Delivered: 2, tally.Aside: 20})
			w.counted("as-2", 22, map[tally.Outcome]uint64{tally.Delivered: 22})
		})
	}
}

// TestWhatIsNewerGoesBehind: while data of an instance is in ASIDE, the lane writes none of this instance,
// though the backend would accept it.
func TestWhatIsNewerGoesBehind(t *testing.T) {
	t.Parallel()
	w := newAsideWorld(t, otlpwire.Logs)
	w.w.refuse("as-1", errTenant)
	stop := w.own()
	defer stop()
	w.send("as-2", "as-1")
	w.until("it is set aside", func() bool { return w.waiting("as-1") == 1 })
	w.w.mu.Lock()
	w.w.slow, w.w.refused["as-1"] = make(chan struct{}), nil
	asked := w.w.asked["as-1"]
	w.w.mu.Unlock()
	w.until("it is tried", func() bool { return w.w.refusals("as-1") > asked })
	for range 5 {
		w.send("as-1", "as-2")
	}
	w.until("the other", w.arrived("as-2"))
	if n := w.waiting("as-1"); n != 6 || len(w.w.of("as-1")) != 0 {
		t.Errorf("%d in ASIDE, %v written", n, w.w.of("as-1"))
	}
	close(w.w.slow)
	w.until("all of it", w.arrived("as-1"))
}

// TestWhatIsSetAsideTwice: an owner dies between ASIDE's acknowledgement and the move of the floor. The
// next one puts the same data there, or writes it if that has been delivered meanwhile. Nothing is
// lost or out of order.
func TestWhatIsSetAsideTwice(t *testing.T) {
	t.Parallel()
	w := newAsideWorld(t, otlpwire.Logs)
	w.send("as-1", "as-1")
	a := newAside(*w.d, w.router(), 0, 2)
	payload, _, err := new(envelope.Guard).Open(otlpwire.Logs, "as-1", lines(t, "|000|"))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.store(t.Context(), "as-1", payload, false, origin{stream: bus.Stream(otlpwire.Logs), seq: 1}); err != nil {
		t.Fatal(err)
	}
	stop := w.own()
	defer stop()
	w.until("as-1", func() bool { return slices.Equal(slices.Compact(w.w.of("as-1")), w.sent["as-1"]) })
	w.until("nothing is set aside", func() bool { return w.waiting("as-1") == 0 })
}

// TestARefusalOfEverybody is an outage: one instance is set aside, the lane waits.
func TestARefusalOfEverybody(t *testing.T) {
	t.Parallel()
	w := newAsideWorld(t, otlpwire.Logs)
	w.w.refuse("*", errTenant)
	stop := w.own()
	w.send("as-1", "as-2", "as-3", "as-1")
	w.until("the second is tried", func() bool { return w.w.refusals("as-2") >= asideTries })
	if w.waiting("as-1") != 1 || w.waiting("as-2")+w.waiting("as-3") != 0 || w.nothingOwed() {
		t.Errorf("set aside: %d, %d, %d", w.waiting("as-1"), w.waiting("as-2"), w.waiting("as-3"))
	}
	stop()
	w.w.refuse("*", nil)
	stop = w.own()
	defer stop()
	w.until("all", w.arrived("as-1", "as-2", "as-3"))
}

// asideTries is how often a refused payload is tried before it may go aside.
const asideTries = 3

// TestAsideIsBounded: beyond max_instances the lane waits.
func TestAsideIsBounded(t *testing.T) {
	t.Parallel()
	w := newAsideWorld(t, otlpwire.Logs)
	stop := w.own() // two at most
	for i, instance := range []string{"as-1", "as-2", "as-3"} {
		w.w.refuse(instance, errTenant)
		w.send(instance, "as-4")
		if i < 2 {
			w.until("the other", w.arrived("as-4"))
		}
	}
	w.until("the third is tried", func() bool { return w.w.refusals("as-3") >= asideTries })
	if slices.Equal(w.w.of("as-4"), w.sent["as-4"]) {
		t.Error("a third one is set aside")
	}
	for _, instance := range []string{"as-1", "as-2", "as-3"} {
		w.w.refuse(instance, nil)
	}
	stop()
	stop = w.own()
	defer stop()
	w.until("all", w.arrived("as-1", "as-2", "as-3", "as-4"))
}

// TestWhatIsRefusedForOtherReasonsStays: neither an outage of a backend nor bad items set an
// instance aside.
func TestWhatIsRefusedForOtherReasonsStays(t *testing.T) {
	t.Parallel()
	w := newAsideWorld(t, otlpwire.Logs)
	w.w.refuse("as-1", errors.New("503"))
	stop := w.own()
	w.send("as-1", "as-2")
	w.until("some tries", func() bool { return w.w.refusals("as-1") > asideTries+2 })
	if w.waiting("as-1") != 0 || len(w.w.of("as-2")) != 0 {
		t.Error("set aside for a backend that is away")
	}
	w.w.refuse("as-1", fault.Permanent(ledger.DeadRefused, errors.New("400")))
	w.until("the other", w.arrived("as-2"))
	stop()
	if n := testutil.ToFloat64(w.d.led.Of(otlpwire.Logs).Dead(ledger.DeadRefused)); n != 1 || w.waiting("as-1") != 0 {
		t.Errorf("%v dead letters", n)
	}
}

// TestEqualHalvesAreTwo: a payload that is cut, for its size, into two halves of the same bytes is
// stored as two messages.
func TestEqualHalvesAreTwo(t *testing.T) {
	t.Parallel()
	w := newAsideWorld(t, otlpwire.Logs)
	random := make([]byte, 700<<10)
	_, _ = rand.Read(random) // never fails
	line := "|" + base64.StdEncoding.EncodeToString(random)[:700<<10] + "|"
	a := newAside(*w.d, w.router(), 0, 2)
	if err := a.store(t.Context(), "as-1", lines(t, line, line), false, origin{stream: bus.Stream(otlpwire.Logs), seq: 1}); err != nil {
		t.Fatal(err)
	}
	if n := w.waiting("as-1"); n != 2 {
		t.Fatalf("%d messages", n)
	}
	stop := w.own()
	defer stop()
	w.until("both", func() bool { return len(w.w.of("as-1")) == 2 })
}

// TestWhatNobodyKnowsOfIsFound: what was put into ASIDE without an answer, or by a previous owner that was
// slow, is delivered by the present owner of the lane.
func TestWhatNobodyKnowsOfIsFound(t *testing.T) {
	t.Parallel()
	w := newAsideWorld(t, otlpwire.Logs)
	a := newAside(*w.d, w.router(), 0, 2)
	var asked, owned atomic.Int64
	a.exporter.owned = func() bool {
		asked.Add(1)
		return owned.Load() > 0
	}
	if !a.claim(t.Context()) {
		t.Fatal("no claim")
	}
	defer a.close()
	if err := a.store(t.Context(), "as-1", lines(t, "|000|"), false, origin{stream: bus.Stream(otlpwire.Logs), seq: 1}); err != nil {
		t.Fatal(err)
	}
	if err := a.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.until("tries of one who is not the owner", func() bool { return asked.Load() > 2 })
	if n := len(w.w.of("as-1")); n > 0 {
		t.Errorf("%d items of one who is not the owner", n)
	}
	owned.Store(1)
	w.until("it", func() bool { return len(w.w.of("as-1")) == 1 && w.waiting("as-1") == 0 })
}

// TestDeadLettersOfWhatWasSetAside name the message that it was in, and not one of ASIDE.
func TestDeadLettersOfWhatWasSetAside(t *testing.T) {
	t.Parallel()
	w := newAsideWorld(t, otlpwire.Logs)
	w.w.refuse("as-1", errTenant)
	stop := w.own()
	defer stop()
	w.send("as-2", "as-1")
	w.until("it is set aside", func() bool { return w.waiting("as-1") == 1 })
	w.w.refuse("as-1", fault.Permanent(ledger.DeadRefused, errors.New("400")))
	w.until("it is dead", func() bool {
		return w.waiting("as-1") == 0 && testutil.ToFloat64(w.d.led.Of(otlpwire.Logs).Dead(ledger.DeadRefused)) == 1
	})
	if err := w.conn.Letters(t.Context(), "logs", "as-1", false, func(l bus.Letter) bool {
		if l.Source != "LOGS 2" || l.Items != 1 {
			t.Errorf("%+v", l)
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
}

// TestAsideIsDeleted: without the stream a lane works, but waits while the backend refuses an instance.
func TestAsideIsDeleted(t *testing.T) {
	t.Parallel()
	w := newAsideWorld(t, otlpwire.Logs)
	w.w.refuse("as-1", errTenant)
	stop := w.own()
	w.send("as-1", "as-2")
	w.until("the other", w.arrived("as-2"))
	stop()
	if _, err := w.conn.Ask(t.Context(), "$JS.API.STREAM.DELETE."+bus.Aside, nil); err != nil {
		t.Fatal(err)
	}
	w.w.refuse("as-1", nil)
	stop = w.own()
	defer stop()
	w.send("as-1", "as-2")
	w.sent["as-1"] = w.sent["as-1"][1:] // what was in the deleted stream is lost
	w.until("both", w.arrived("as-1", "as-2"))
}

// TestSumsDoNotComeBack: the series of an instance that is set aside begin at zero, there and when it is
// back: an earlier sum would show an increase that never happened.
func TestSumsDoNotComeBack(t *testing.T) {
	t.Parallel()
	s := newSums(t)
	lane := s.lane(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	s.aside = newAside(*s.exporter, lane, 0, 2)
	go func() {
		defer close(done)
		_ = newDirectLane(lane, s.exporter, nil).run(ctx)
	}()
	defer func() { stop(); <-done }()
	sent := 0
	send := func() {
		t.Helper()
		sent++
		s.publish(t, sent)
		if !backoff.Until(t.Context(), func() bool { return len(s.stored()) == sent }) {
			t.Fatal("stopped")
		}
	}
	for range 3 {
		send()
	}
	s.refuses(3, http.StatusTooManyRequests, "too many")
	send()
	gauge := s.led.Aside("metrics", 0, "prometheus")
	if !backoff.Until(t.Context(), func() bool { return testutil.ToFloat64(gauge) == 0 }) {
		t.Fatal("stopped")
	}
	send()
	if n := testutil.ToFloat64(s.led.Of(otlpwire.Metrics).Aside("prometheus")); n != 1 || fmt.Sprint(s.stored()) != "[1 2 3 1 1]" {
		t.Errorf("%v set aside, sums are %v", n, s.stored())
	}
}
