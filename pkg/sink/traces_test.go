package sink

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/sampler"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/pkg/sink/horizon"
)

// TestOneInstanceARequest: kept traces of two instances are never in one request, and no
// request of several is larger than maxRequest.
func TestOneInstanceARequest(t *testing.T) {
	s := sampler.NewSamplers(policy.KeepAll(time.Second), partition.Spread{N: 1}, 64<<20, 0, nil)
	for i, trace := range []struct {
		instance string
		kib      int
	}{{"a", 300}, {"a", 300}, {"a", 300}, {"a", 300}, {"b", 300}, {"c", 2000}, {"c", 1}} {
		payload, _ := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{
			{TraceId: []byte("0123456789abcde" + string(rune('a'+i))), SpanId: []byte("01234567"), Name: strings.Repeat("x", trace.kib<<10)},
		}}}}}})
		if _, err := s.Add(uint64(i+1), envelope.Frame{Instance: trace.instance, Arrival: int64(i + 1), Seq: uint64(i + 1), Payload: payload}); err != nil {
			t.Fatal(err)
		}
	}
	exports := s.Finish().Exports
	slices.SortFunc(exports, func(a, b sampler.Export) int { return int(a.Seq) - int(b.Seq) })
	var got []string
	for len(exports) > 0 {
		n, spans, size := together(exports)
		if bytes := len(exports[0].Append(nil)); n == 1 && size != bytes || spans != n {
			t.Errorf("%d traces: %d spans, %d bytes, want %d", n, spans, size, bytes)
		}
		got = append(got, strings.Repeat(exports[0].Instance, n))
		exports = exports[n:]
	}
	if want := []string{"aaa", "a", "b", "c", "c"}; !slices.Equal(got, want) {
		t.Errorf("requests of %q, want %q", got, want)
	}
}

// TestABacklogHoldsUpItsOwnPartition: one of two partitions of TRACES is not routed. The last
// trace of a silent instance in the other one is decided; that of an instance in the same one is
// not, because the backlog may have the rest of it, until the backlog is routed.
func TestABacklogHoldsUpItsOwnPartition(t *testing.T) {
	t.Parallel()
	k := &spanSet{spans: map[uint64]bool{}}
	d, conn := testPartitions(t, k, 2)
	d.Signal = otlpwire.Traces
	top := bus.DefaultTopology()
	top.Partitions = 2
	hub := bus.NewHub(bus.Config{}, top, d.Log)
	hub.Conn = conn
	openLane := func(cfg bus.LaneConfig) *bus.Lane {
		t.Helper()
		lane, err := conn.OpenLane(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		return lane
	}
	router := func(p int) *bus.Lane {
		t.Helper()
		return openLane(bus.LaneConfig{Stream: bus.Stream(otlpwire.Traces), Filter: bus.PartitionFilter(otlpwire.Traces, p), Name: bus.RouterLane + strconv.Itoa(p)})
	}
	route := func(p int) { // routes the partition's only message
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		lane := router(p)
		defer lane.Close()
		lane.Run(ctx, func(m bus.Delivery) bool { return m.Seq == 0 || lane.Ack(m.Seq) != nil })
		if ctx.Err() != nil {
			t.Fatalf("nothing to be routed in partition %d", p)
		}
	}

	// An instance in each partition has sent one message, whose spans are in SPANS: for the
	// backlog, as by a router that was killed before it could acknowledge the message.
	names := make([]string, 2)
	for i := 0; slices.Contains(names, ""); i++ {
		name := fmt.Sprint("as-", i)
		names[partition.OfInstance(name, 2)] = name
	}
	send := func(p int, span uint64) {
		t.Helper()
		name, id := names[p], binary.BigEndian.AppendUint64(nil, span)
		payload, _ := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{
			{TraceId: append([]byte("01234567"), id...), SpanId: id, Name: "last"},
		}}}}}})
		h := envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: time.Now().UnixNano()}
		seq, err := conn.Publish(t.Context(), bus.Message{Subject: bus.Subject(otlpwire.Traces, name), Header: h, Body: payload})
		if err != nil {
			t.Fatal(err)
		}
		h.ContentType = envelope.ContentTypeFrames
		if _, err := conn.Publish(t.Context(), bus.Message{Subject: bus.SpansSubject(0), Header: h, Body: envelope.AppendFrame(nil, envelope.Frame{Instance: name, Arrival: h.Arrival, Seq: seq, Payload: payload})}); err != nil {
			t.Fatal(err)
		}
	}
	send(0, 1)
	send(1, 2)
	router(0).Close() // the backlog
	route(1)

	horizon := horizon.New(hub, versions.DefaultConfig().Late, d.Ledger, d.Log)
	spans := openLane(bus.LaneConfig{Stream: bus.Spans, Filter: bus.SpansSubject(0), Name: "tempo-0"})
	l := newTraceLane(spans, d, liveCounterOf(d), versions.Fixed(policy.KeepAll(time.Second)), bus.DecisionsSubject(0), horizon, nil)
	l.maxBytes = 64 << 20
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { horizon.Run(ctx) })
	wg.Go(func() { _ = l.run(ctx) })
	decided := func() []bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return []bool{k.spans[1], k.spans[2], k.spans[3]}
	}
	await := func(what string, want ...bool) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		if !backoff.Until(ctx, func() bool { return slices.Equal(decided(), want) }) {
			t.Fatalf("%s: decided are %v, want %v", what, decided(), want)
		}
	}
	await("the backlog stays", false, true, false)
	send(1, 3) // the lane reaches later and later marks
	route(1)
	await("the backlog stays, later", false, true, true)
	route(0)
	await("the backlog is routed", true, true, true)
}
