package sink

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/pkg/sink/horizon"
)

// stretch is a recorded stretch of SPANS: an instance, and two of a domain that are in different partitions of TRACES;
// ten minutes of stream time; the first traces are decided long before the end. The first instance of the domain
// has two edges, and the other has one; each has spans of most traces, and what two of them send comes one and three
// seconds later.
func stretch() (messages []bus.Message, spans int) {
	const perInstance = 26_000 // traces
	rng := rand.New(rand.NewPCG(7, 7))
	base := time.Unix(1_790_000_000, 0)
	buckets := make([][]envelope.Frame, 6400) // of 100 ms
	for inst := range 2 {
		byTick := make([][]*tracepb.Span, len(buckets))
		for range perInstance {
			id := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, rng.Uint64()), rng.Uint64())
			first := rng.IntN(6000)
			for range 1 + inst + rng.IntN(3) {
				spans++
				sp := &tracepb.Span{TraceId: id, SpanId: binary.BigEndian.AppendUint64(nil, uint64(spans)), Name: "op"}
				if rng.IntN(10) == 0 {
					sp.Status = &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR}
				}
				at := first + rng.IntN(80)
				byTick[at] = append(byTick[at], sp)
			}
			if rng.IntN(40) == 0 && first < 5000 { // it comes when the trace is decided
				spans++
				at := first + 150 + rng.IntN(1000)
				byTick[at] = append(byTick[at], &tracepb.Span{TraceId: id, SpanId: binary.BigEndian.AppendUint64(nil, uint64(spans)), Name: "late", Status: &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR}})
			}
		}
		// At the end spans that close all windows, and stay undecided.
		for n := range 6 {
			tick := &byTick[len(byTick)-2+n%2] // the last ones may wait for each other
			*tick = append(*tick, &tracepb.Span{TraceId: binary.BigEndian.AppendUint64(make([]byte, 8), uint64(inst+1)), SpanId: binary.BigEndian.AppendUint64(nil, uint64(spans+1+n))})
		}
		for tick, list := range byTick {
			if len(list) == 0 {
				continue
			}
			third := len(list) / 3
			from := []struct {
				instance string
				late     int
				spans    []*tracepb.Span
			}{{"as-0", 0, list}}
			if inst == 1 {
				from = append(from[:0], from[0], from[0], from[0])
				from[0].instance, from[0].spans = "as-1", list[:third]
				from[1].instance, from[1].late, from[1].spans = "as-1", 30, list[third:2*third]
				from[2].instance, from[2].late, from[2].spans = "as-2", 10, list[2*third:]
			}
			for source, one := range from {
				if len(one.spans) == 0 {
					continue
				}
				payload, _ := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: one.spans}}}}})
				comes := min(tick+one.late, len(buckets)-2+tick%2)
				buckets[comes] = append(buckets[comes], envelope.Frame{
					Instance: one.instance, Source: uint32(source + 1), Arrival: base.Add(time.Duration(tick) * 100 * time.Millisecond).UnixNano(), Payload: payload,
				})
			}
		}
	}
	var sequence uint64 // of TRACES
	for i, frames := range buckets {
		for n := range frames {
			sequence++
			frames[n].Seq = sequence
		}
		m := bus.Message{Subject: bus.SpansSubject(0), Header: envelope.Header{ContentType: envelope.ContentTypeFrames, Items: len(frames), ID: fmt.Sprint("m", i)}}
		for _, f := range frames {
			m.Body = envelope.AppendFrame(m.Body, f)
		}
		if len(frames) > 0 {
			messages = append(messages, m)
		}
	}
	return messages, spans
}

// spanSet is a backend that remembers which spans came.
type spanSet struct {
	mu      sync.Mutex
	spans   map[uint64]bool
	wanted  int           // how many must have come until reached is closed
	reached chan struct{} // nil: nobody waits
}

func (k *spanSet) Name() string { return "tempo" }
func (k *spanSet) Close() error { return nil }

func (k *spanSet) Write(_ context.Context, _ string, payload []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var sp otlpwire.Span
	for item := range otlpwire.Items(payload) {
		sp.Parse(item)
		k.spans[binary.BigEndian.Uint64(sp.SpanID[:])] = true
	}
	if k.reached != nil && len(k.spans) >= k.wanted {
		close(k.reached)
		k.reached = nil
	}
	return nil
}

// more returns a channel that is closed when n more have come.
func (k *spanSet) more(n int) <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.wanted, k.reached = len(k.spans)+n, make(chan struct{})
	return k.reached
}

// TestDecisionsAreRepeated decides a recorded stretch of more than 100,000 spans
// live, with two sinks that die meanwhile, and once more from the start at full
// speed: the kept spans are the same, with those of traces that late errors bring back.
func TestDecisionsAreRepeated(t *testing.T) {
	t.Parallel()
	messages, spans := stretch()
	if spans < 100_000 {
		t.Fatalf("%d spans only", spans)
	}
	policies, err := policy.Parse("p", []byte(`
decision_wait: 10s
policies:
  - {name: errors, type: status_code, status_code: {status_codes: [ERROR]}}
  - {name: share, type: probabilistic, probabilistic: {sampling_percentage: 5}}
  - {name: few, type: rate_limiting, rate_limiting: {spans_per_second: 12}}
`))
	if err != nil {
		t.Fatal(err)
	}
	policies.Late = policy.Late{Traces: 1000, Age: time.Hour}
	kept := map[string]map[uint64]bool{}
	for name, deaths := range map[string][]int{"live": nil, "after two failovers": {len(messages) / 3, 2 * len(messages) / 3}, "from the start again": {}} {
		k := &spanSet{spans: map[uint64]bool{}}
		d, conn := testExporter(t, k)
		d.Signal, d.Ledger = otlpwire.Traces, ledger.New(prometheus.NewRegistry())
		next := 0
		publish := func(upto int) {
			for next < upto {
				var pending []bus.Pending // a window of them: a connection has a bound
				for ; next < upto && len(pending) < 256; next++ {
					pending = append(pending, conn.PublishAsync(messages[next]))
				}
				for _, p := range pending {
					if err := p.Wait(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		if name == "from the start again" {
			publish(len(messages))
		}
		sinks := append(deaths, len(messages))
		for _, upto := range sinks {
			hub := bus.NewHub(bus.Config{}, bus.DefaultTopology(), d.Log)
			hub.Conn = conn
			horizon := horizon.New(hub, versions.DefaultConfig().Late, d.Ledger, d.Log)
			ctx, die := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() { horizon.Run(ctx) })
			lane, err := conn.OpenLane(ctx, bus.LaneConfig{Stream: bus.Spans, Filter: bus.SpansSubject(0), Name: "tempo-0"})
			if err != nil {
				t.Fatal(err)
			}
			l := newTraceLane(lane, d, liveCounterOf(d), versions.Fixed(policies, domain.Version{Number: 1, From: 1, Set: domain.New(domain.Config{{Name: "d", Instances: []string{"as-1", "as-2"}}})}), bus.DecisionsSubject(0), horizon, nil)
			l.maxBytes = 64 << 20
			wg.Go(func() { _ = l.run(ctx) })
			begun := k.more(1000)
			for next < upto {
				publish(min(next+200, upto))
			}
			if upto < len(messages) {
				select {
				case <-begun: // it has begun to send, and dies while it sends
				case <-t.Context().Done():
				}
			} else {
				backoff.Until(t.Context(), func() bool {
					at, err := lane.Progress(ctx)
					return err == nil && at.Lag <= 2
				})
			}
			die()
			wg.Wait()
		}
		kept[name] = k.spans
		recorded, rescued := 0, 0
		if _, err := conn.TakeJournal(t.Context(), bus.Decisions, bus.Message{Subject: bus.DecisionsSubject(0), Header: envelope.Header{ContentType: envelope.ContentTypeDecisions, Arrival: 1}}, func(body []byte) error {
			all, is, err := envelope.ReadSources(body)
			for _, s := range all {
				if s.Domain == "@d" && s.Instance == "as-1" && len(s.Seen) == 2 {
					recorded++
				}
			}
			if is {
				return err
			}
			decisions, err := envelope.ReadDecisions(body)
			for _, d := range decisions {
				if d.Late == envelope.RescueSent {
					rescued++
				}
			}
			return err
		}); err != nil || recorded == 0 || rescued < 500 {
			t.Errorf("%s: the sources of as-1 are recorded %d times, %d traces are rescued, %v", name, recorded, rescued, err)
		}
		t.Logf("%s: %d of %d spans kept", name, len(k.spans), spans)
	}
	for name, got := range kept {
		if !maps.Equal(got, kept["live"]) {
			t.Errorf("%s: other spans are kept than live", name)
		}
	}
	if n := len(kept["live"]); n < spans/10 || n > spans*9/10 {
		t.Errorf("%d of %d spans kept: the policies decide nothing", n, spans)
	}
}
