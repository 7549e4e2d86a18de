package sink

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/sampler"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/pkg/sink/horizon"
	"github.com/penstock/penstock/pkg/tally"
)

// TestSourcesAreShown on the page and in gauges, and not any more when the lane has ended.
func TestSourcesAreShown(t *testing.T) {
	d, _ := testExporter(t, &picky{})
	told := ""
	l := &traceLane{exporter: d, gauges: "3", tell: func(text string) { told = text }}
	known, waiting := d.Ledger.Sources("3")
	for _, tc := range []struct {
		of   sampler.Sources
		text string
	}{
		{sampler.Sources{Known: 3, Waiting: 7, For: "as-1"}, "3 sources; 7 traces wait for one that is behind, most for one of as-1"},
		{sampler.Sources{Known: 2}, "2 sources"},
		{sampler.Sources{}, ""},
	} {
		l.showSources(tc.of)
		if told != tc.text || testutil.ToFloat64(known) != float64(tc.of.Known) || testutil.ToFloat64(waiting) != float64(tc.of.Waiting) {
			t.Errorf("%+v: %q, %v known, %v wait", tc.of, told, testutil.ToFloat64(known), testutil.ToFloat64(waiting))
		}
	}
	(&traceLane{exporter: d}).showSources(sampler.Sources{Known: 1}) // of a replay
}

// gate is a backend that takes nothing until it is opened.
type gate struct {
	asked, open chan struct{}
	once        sync.Once
	mu          sync.Mutex
	spans       int
}

func (g *gate) Name() string { return "tempo" }
func (g *gate) Close() error { return nil }

func (g *gate) Write(ctx context.Context, _ string, payload []byte) error {
	g.once.Do(func() { close(g.asked) })
	select {
	case <-g.open:
	case <-ctx.Done():
		return ctx.Err()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.spans += otlpwire.Count(otlpwire.Traces, payload)
	return nil
}

// TestARescueIsRecordedAsSentWhenItIs: that it is sent is recorded after the backend has its spans; before that the next owner
// has to send them, and the tally says from where on they are still to be read, or sent.
func TestARescueIsRecordedAsSentWhenItIs(t *testing.T) {
	t.Parallel()
	g := &gate{asked: make(chan struct{}), open: make(chan struct{})}
	d, conn := testExporter(t, g)
	d.Signal, d.Ledger = otlpwire.Traces, ledger.New(prometheus.NewRegistry())
	set, err := policy.Parse("p", []byte("decision_wait: 1s\npolicies: [{name: errors, type: status_code, status_code: {status_codes: [ERROR]}}]"))
	if err != nil {
		t.Fatal(err)
	}
	set.Late = policy.Late{Traces: 10, Age: time.Hour}
	base := time.Now().Add(-time.Minute)
	for i, of := range []struct {
		at     time.Duration
		trace  string
		failed tracepb.Status_StatusCode
	}{{0, "a", 0}, {5 * time.Second, "b", 0}, {6 * time.Second, "a", tracepb.Status_STATUS_CODE_ERROR}} {
		payload, _ := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{
			{TraceId: []byte("0123456789abcde" + of.trace), SpanId: fmt.Appendf(nil, "%08d", i), Name: "x", Status: &tracepb.Status{Code: of.failed}},
		}}}}}})
		h := envelope.Header{ContentType: envelope.ContentTypeFrames, Items: 1, Arrival: base.Add(of.at).UnixNano(), ID: fmt.Sprint("m", i)}
		if _, err := conn.Publish(t.Context(), bus.Message{Subject: bus.SpansSubject(0), Header: h, Body: envelope.AppendFrame(nil, envelope.Frame{Instance: "as-1", Arrival: h.Arrival, Seq: uint64(i + 1), Payload: payload})}); err != nil {
			t.Fatal(err)
		}
	}
	hub := bus.NewHub(bus.Config{}, bus.DefaultTopology(), d.Log)
	hub.Conn = conn
	lane, err := conn.OpenLane(t.Context(), bus.LaneConfig{Stream: bus.Spans, Filter: bus.SpansSubject(0), Name: "tempo-0"})
	if err != nil {
		t.Fatal(err)
	}
	counts := tally.Open(tally.Config{Conn: d.Conn, Replicas: 1, Stream: bus.Spans, Lane: "tempo-0", Filter: bus.SpansSubject(0), Log: d.Log})
	l := newTraceLane(lane, d, liveCounterOf(d), versions.Fixed(set), bus.DecisionsSubject(0), horizon.New(hub, versions.DefaultConfig().Late, d.Ledger, d.Log), counts)
	l.maxBytes = 64 << 20
	again := func() uint64 {
		all, err := tally.All(t.Context(), conn)
		if err != nil {
			t.Fatal(err)
		}
		return all[bus.Spans]["tempo-0"].Again
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { _ = l.run(ctx) })
	recorded := func() (all []envelope.Late) {
		r, err := conn.OpenReader(t.Context(), bus.Decisions, 1)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		var body []byte
		if err := r.Each(t.Context(), func(m bus.Delivery) bool {
			m.Decompress(&body)
			decisions, _ := envelope.ReadDecisions(m.Body)
			for _, one := range decisions {
				if one.Instance != "" {
					all = append(all, one.Late)
				}
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
		return all
	}
	<-g.asked
	if got := recorded(); !slices.Equal(got, []envelope.Late{envelope.OnTime, envelope.Rescued}) {
		t.Errorf("the backend has nothing yet, and %v are recorded", got)
	}
	if from := again(); from != 1 {
		t.Errorf("the tally says that %d is read again", from)
	}
	close(g.open)
	want := []envelope.Late{envelope.OnTime, envelope.Rescued, envelope.RescueSent}
	soon, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	if !backoff.Until(soon, func() bool { return slices.Equal(recorded(), want) }) {
		t.Errorf("%v are recorded in the end", recorded())
	}
	if !backoff.Until(soon, func() bool { return again() == 0 }) {
		t.Errorf("the tally says in the end that %d is read again", again())
	}
	if g.mu.Lock(); g.spans != 2 {
		t.Errorf("the backend has %d spans", g.spans)
	}
	g.mu.Unlock()
}

// TestRescuesAreBounded: a lane with so many unfinished rescues reads nothing new until one is finished.
func TestRescuesAreBounded(t *testing.T) {
	l := &traceLane{sampler: sampler.NewSamplers(policy.KeepAll(time.Second), partition.Spread{N: 2}, 1<<20, 0, nil)}
	all := make([]envelope.Decision, maxRescues)
	for i := range all {
		all[i] = envelope.Decision{Domain: "as-1", Instance: "as-1", TraceID: otlpwire.TraceID{byte(i), byte(i >> 8), 1}, Kept: true, From: 1, Upto: uint64(i + 1), Late: envelope.Rescued}
	}
	if err := l.sampler.Remember(envelope.AppendDecisions(nil, all...)); err != nil || l.rescuesFirst() {
		t.Errorf("%v; nothing is restored yet, and rescues come first", err)
	}
	if out := l.sampler.Restore(); len(out.Rescues) != maxRescues || !l.rescuesFirst() {
		t.Errorf("%d rescues, and they do not come first", len(out.Rescues))
	}
	if l.sampler.Rescued(all[0]); l.rescuesFirst() {
		t.Error("one is finished, and the lane reads nothing")
	}
	if l = (&traceLane{ended: true}); !l.rescuesFirst() {
		t.Error("everything has been read, and the lane reads on")
	}
}
