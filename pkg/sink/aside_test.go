package sink

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/pkg/sink/export"
	"github.com/penstock/penstock/pkg/sink/horizon"
	"github.com/penstock/penstock/pkg/tally"
)

// tenants is a backend for several tenants: it refuses those in refused.
type tenants struct {
	mu      sync.Mutex
	refused map[string]error // by instance; "*": everybody
	stored  map[string][]string
	asked   map[string]int // how often it has refused
	slow    chan struct{}  // as-1 is answered when it is closed; nil: at once
	fails   string         // the item on which it fails
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
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	for _, who := range []string{instance, "*"} {
		if err := w.refused[who]; err != nil {
			w.asked[instance]++
			return err
		}
	}
	var names []string
	for item := range otlpwire.Items(payload) {
		switch name := name(item); name {
		case "boom":
			panic("boom")
		case w.fails:
			w.asked[instance]++
			return status.Error(codes.Internal, "no")
		default:
			names = append(names, name)
		}
	}
	w.stored[instance] = append(w.stored[instance], names...)
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
	d    *export.Exporter
	conn *bus.Conn
	sent map[string][]string
	ids  int

	lane  *bus.Lane
	aside *export.Aside
}

func newAsideWorld(t *testing.T, sig otlpwire.Signal) *asideWorld {
	w := &tenants{refused: map[string]error{}, stored: map[string][]string{}, asked: map[string]int{}}
	d, conn := testExporter(t, w)
	d.Signal, d.Said = sig, new(backoff.Repeats)
	d.Count = liveCounterOf(d)
	d.Accepted, d.Requests = new(backend.Accepted), 4
	world := &asideWorld{T: t, w: w, d: d, conn: conn, sent: map[string][]string{}}
	world.router() // for the horizon
	return world
}

// send publishes one more item of each.
func (w *asideWorld) send(instances ...string) {
	w.Helper()
	for _, instance := range instances {
		item := fmt.Sprintf("%03d", len(w.sent[instance]))
		w.sent[instance] = append(w.sent[instance], item)
		w.publish(instance, item)
	}
}

// publish publishes items in one message.
func (w *asideWorld) publish(instance string, items ...string) {
	w.Helper()
	w.ids++
	now := time.Now().UnixNano()
	var texts, spans []string
	for i, item := range items {
		texts = append(texts, "|"+item+"|")
		spans = append(spans, fmt.Sprintf(`{"traceId":"%016d%016d","spanId":"%016d","name":"|%s|"}`, w.ids, i+1, w.ids, item)) // decimal: no byte is a bar
	}
	m := bus.Message{Subject: bus.Subject(w.d.Signal, instance), Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: len(items), Arrival: now, ID: fmt.Sprint(w.ids)}}
	m.Body = lines(w.T, texts...)
	if w.d.Signal == otlpwire.Traces {
		payload, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, fmt.Appendf(nil, `{"resourceSpans":[{"scopeSpans":[{"spans":[%s]}]}]}`, strings.Join(spans, ",")), otlpwire.DefaultLimits)
		if err != nil {
			w.Fatal(err)
		}
		m.Subject, m.Header.ContentType = bus.SpansSubject(0), envelope.ContentTypeFrames
		m.Body = envelope.AppendFrame(nil, envelope.Frame{Instance: instance, Arrival: now, Seq: uint64(w.ids), Payload: payload})
	}
	if _, err := w.conn.Publish(w.Context(), m); err != nil {
		w.Fatal(err)
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
	cfg := bus.LaneConfig{Stream: bus.Stream(w.d.Signal), Filter: bus.PartitionFilter(w.d.Signal, 0), Name: "loki-0", Raw: true}
	if w.d.Signal == otlpwire.Traces {
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
	own.Waits = lane.Waits
	own.Aside = export.NewAside(own, lane, 0, 2)
	w.aside = own.Aside
	l := lanes{cfg: Config{Streams: bus.Topology{Replicas: 1}}, led: w.d.Ledger}
	counts := l.tally(w.d, membership.Shared{Signal: w.d.Signal.String(), Backend: "loki", LaneConfig: cfg})
	go func() {
		defer close(done)
		if w.d.Signal != otlpwire.Traces {
			_ = newDirectLane(lane, &own, liveCounterOf(&own), counts).run(ctx)
			return
		}
		hub := bus.NewHub(bus.Config{}, bus.Topology{Partitions: 1}, own.Log)
		hub.Conn = w.conn
		horizon := horizon.New(hub, versions.DefaultConfig().Late, own.Ledger, own.Log)
		var wg sync.WaitGroup
		wg.Go(func() { horizon.Run(ctx) })
		l := newTraceLane(lane, &own, liveCounterOf(&own), versions.Fixed(policy.KeepAll(time.Second)), bus.DecisionsSubject(0), horizon, counts)
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
		got := ""
		for instance := range w.sent {
			stored := w.w.of(instance)
			got += fmt.Sprintf("; %s: %d sent, %d in ASIDE, %d stored, up to %q", instance, len(w.sent[instance]), w.waiting(instance), len(stored), stored[max(0, len(stored)-5):])
		}
		w.Fatalf("%s: never%s", what, got)
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
	there, err := w.conn.Subjects(w.Context(), bus.Aside, bus.AsideSubject(w.d.Signal, "loki", 0, instance))
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
			gauge := w.d.Ledger.Aside(sig.String(), 0, "loki")
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
			since := testutil.ToFloat64(w.d.Ledger.AsideSince(sig.String(), 0, "loki"))
			if age := float64(time.Now().UnixMilli())/1000 - since; age < 0 || age > 120 {
				t.Errorf("it waits for %v seconds", age)
			}
			if text := w.aside.Text(); !strings.Contains(text, "as-1 is set aside since 2") || !strings.Contains(text, "no such tenant") || strings.Contains(text, "as-2") {
				t.Errorf("the page says %q", text)
			}
			stop()
			if testutil.ToFloat64(gauge) != 0 || testutil.ToFloat64(w.d.Ledger.AsideSince(sig.String(), 0, "loki")) != 0 {
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
			led := w.d.Ledger.Of(sig)
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
	payload, _, err := new(envelope.Guard).Open(otlpwire.Logs, "as-1", lines(t, "|000|"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.conn.Publish(t.Context(), bus.Message{Subject: bus.AsideSubject(otlpwire.Logs, "loki", 0, "as-1"), Body: payload, Refusal: &bus.Refusal{Reason: "refused", Backend: "loki", Source: "LOGS 1"}, Header: envelope.Header{
		ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: 1, ID: "aside-loki-LOGS-1-0",
	}}); err != nil {
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
	w.until("all are tried", func() bool {
		return w.w.refusals("as-1") >= asideTries && w.w.refusals("as-2") >= asideTries && w.w.refusals("as-3") >= asideTries
	})
	aside := 0
	for _, instance := range []string{"as-1", "as-2", "as-3"} {
		aside += min(int(w.waiting(instance)), 1)
	}
	if aside != 1 || w.nothingOwed() {
		t.Errorf("%d are set aside", aside)
	}
	stop()
	w.w.refuse("*", nil)
	stop = w.own()
	defer stop()
	w.until("all", func() bool {
		return !slices.ContainsFunc([]string{"as-1", "as-2", "as-3"}, func(instance string) bool {
			return !slices.Equal(slices.Compact(w.w.of(instance)), w.sent[instance])
		})
	})
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
	if w.waiting("as-3") != 0 || w.nothingOwed() {
		t.Error("a third one is set aside")
	}
	for _, instance := range []string{"as-1", "as-2", "as-3"} {
		w.w.refuse(instance, nil)
	}
	stop()
	stop = w.own()
	defer stop()
	w.until("all", w.arrived("as-1", "as-2", "as-3"))
	w.until("those behind the third", func() bool { return slices.Equal(slices.Compact(w.w.of("as-4")), w.sent["as-4"]) })
}

// TestWhatIsRefusedForOtherReasonsStays: neither an outage of a backend nor bad items set an
// instance aside.
func TestWhatIsRefusedForOtherReasonsStays(t *testing.T) {
	t.Parallel()
	w := newAsideWorld(t, otlpwire.Logs)
	w.w.refuse("*", errors.New("connection refused"))
	stop := w.own()
	w.send("as-1", "as-2")
	w.until("some tries", func() bool { return w.w.refusals("as-1") > asideTries+4 && w.w.refusals("as-2") > asideTries+4 })
	if w.waiting("as-1")+w.waiting("as-2") != 0 {
		t.Error("set aside for a backend that is away")
	}
	w.w.refuse("*", nil)
	w.w.refuse("as-1", fault.Permanent(ledger.DeadRefused, errors.New("400")))
	w.until("the other", w.arrived("as-2"))
	w.until("a dead letter", func() bool { return testutil.ToFloat64(w.d.Ledger.Of(otlpwire.Logs).Dead(ledger.DeadRefused)) == 1 })
	if stop(); w.waiting("as-1") != 0 {
		t.Error("bad items are set aside")
	}
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
		return w.waiting("as-1") == 0 && testutil.ToFloat64(w.d.Ledger.Of(otlpwire.Logs).Dead(ledger.DeadRefused)) == 1
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
	s.Aside = export.NewAside(*s.Exporter, lane, 0, 2)
	go func() {
		defer close(done)
		_ = newDirectLane(lane, s.Exporter, liveCounterOf(s.Exporter), nil).run(ctx)
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
	gauge := s.Ledger.Aside("metrics", 0, "prometheus")
	if !backoff.Until(t.Context(), func() bool { return testutil.ToFloat64(gauge) == 0 }) {
		t.Fatal("stopped")
	}
	send()
	if n := testutil.ToFloat64(s.Ledger.Of(otlpwire.Metrics).Aside("prometheus")); n != 1 || fmt.Sprint(s.stored()) != "[1 2 3 1 1]" {
		t.Errorf("%v set aside, sums are %v", n, s.stored())
	}
}
