package sampler

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// traceOf makes a trace of n spans.
func traceOf(rng *rand.Rand, n int) []byte {
	id := make([]byte, 16)
	binary.LittleEndian.PutUint64(id, rng.Uint64())
	binary.LittleEndian.PutUint64(id[8:], rng.Uint64())
	var spans []*tracepb.Span
	for i := range n {
		spans = append(spans, &tracepb.Span{TraceId: id, SpanId: fmt.Appendf(nil, "%08d", i+1), Name: "x"})
	}
	b, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: spans}}}}})
	if err != nil {
		panic(err)
	}
	return b
}

// TestBudgetsOverPartitions sends traces of 20 spans through edges that stamp their load and
// samplers of eight partitions, at a rate of 35 spans a second.
func TestBudgetsOverPartitions(t *testing.T) {
	const seconds = 40
	for _, tc := range []struct {
		name        string
		edges       int // one after the other
		perSecond   int // traces
		stamp       func(envelope.Load) envelope.Load
		least, most int // traces kept
	}{
		{"below the rate", 1, 1, nil, seconds, seconds},
		{"below the rate, over two edges", 2, 1, nil, seconds, seconds},
		{"each edge below the rate, both above", 2, 3, nil, seconds * 35 / 20 * 6 / 10, seconds * 35 / 20 * 14 / 10},
		{"ten times the rate", 1, 18, nil, seconds * 35 / 20 * 6 / 10, seconds * 35 / 20 * 14 / 10},
		{"a lie", 1, 180, func(envelope.Load) envelope.Load { return envelope.Load{1, 1, 1, 1} }, 0, seconds * 35 / 20 * 8 * 3 / 2}, // no more than each partition sees
		{"nobody says", 1, 1, func(envelope.Load) envelope.Load { return envelope.Load{} }, seconds / 4, seconds},
	} {
		for seed := range uint64(8) {
			policies, err := policy.Parse("p", []byte("decision_wait: 5s\npolicies: [{name: r, type: rate_limiting, rate_limiting: {spans_per_second: 35}}]"))
			if err != nil {
				t.Fatal(err)
			}
			const partitions = 8
			policies.Partitions = partitions
			rng := rand.New(rand.NewPCG(seed, 7))
			s := NewSamplers(policies, partition.Spread{N: partitions}, 1<<30, 0, nil)
			meters, kept, seq := make([]envelope.Meter, tc.edges), 0, uint64(0)
			note := func(o Output, err error) {
				if err != nil {
					t.Fatal(err)
				}
				kept += len(o.Exports)
			}
			start := int64(1_000_000_000_000) + rng.Int64N(60e9)
			for second := range int64(seconds) {
				for n := range tc.perSecond {
					seq++
					at := start + second*1e9 + int64(n)*1e9/int64(tc.perSecond)
					edge := int(seq) % tc.edges
					load := meters[edge].Add(at, 20)
					if tc.stamp != nil {
						load = tc.stamp(load)
					}
					note(s.Add(seq, envelope.Frame{Instance: "i", Arrival: at, Seq: seq, Source: uint32(edge), Load: load, Payload: traceOf(rng, 20)}))
				}
			}
			note(s.Finish(), nil)
			if kept < tc.least || kept > tc.most {
				t.Errorf("%s (seed %d): %d traces kept of %d, want %d to %d", tc.name, seed, kept, seq, tc.least, tc.most)
			}
		}
	}
}

// TestLoads of several sources add up, each for as long as its window; a source that does not
// say leaves it open.
func TestLoads(t *testing.T) {
	const second = int64(1e9)
	in := new(instance)
	for i, tc := range []struct {
		source uint32
		at     int64
		load   envelope.Load
		want   envelope.Load
	}{
		{1, 100 * second, envelope.Load{1, 2, 3, 4}, envelope.Load{1, 2, 3, 4}},
		{2, 100 * second, envelope.Load{10, 20, 30, 40}, envelope.Load{11, 22, 33, 44}},
		{1, 102 * second, envelope.Load{5, 5, 5, 5}, envelope.Load{5, 25, 35, 45}},
		{1, 110 * second, envelope.Load{5, 5, 5, 5}, envelope.Load{5, 5, 35, 45}},
		{3, 111 * second, envelope.Load{}, envelope.Load{}},
		{1, 130 * second, envelope.Load{5, 5, 5, 5}, envelope.Load{5, 5, 5, 45}},
		{1, 170 * second, envelope.Load{5, 5, 5, 5}, envelope.Load{5, 5, 5, 5}},
		{4, 60 * second, envelope.Load{1, 1, 1, 1}, envelope.Load{1, 1, 1, 1}}, // the clock of 1 was far ahead
	} {
		if got := in.load(envelope.Frame{Source: tc.source, Arrival: tc.at, Load: tc.load}, 0); got != tc.want {
			t.Errorf("step %d: %v, want %v", i, got, tc.want)
		}
	}
	// What came here counts, whatever a source says.
	if got := in.load(envelope.Frame{Source: 1, Arrival: 1000 * second, Load: envelope.Load{1, 1, 1, 1}}, 50); got != (envelope.Load{50, 50, 50, 50}) {
		t.Errorf("got %v", got)
	}
	for source := range uint32(3 * maxSources) {
		in.load(envelope.Frame{Source: source, Arrival: 2000 * second, Load: envelope.Load{1, 1, 1, 1}}, 0)
		if len(in.sources) > maxSources {
			t.Fatalf("%d sources are held", len(in.sources))
		}
	}
}

// TestATraceOfASilentSender: one frame without a load leaves open what its instance sent.
func TestATraceOfASilentSender(t *testing.T) {
	s := New(policy.KeepAll(time.Second), 1<<20, 0)
	payload := traceOf(rand.New(rand.NewPCG(1, 1)), 2)
	for seq, load := range []envelope.Load{{5, 5, 5, 5}, {}} {
		f := envelope.Frame{Instance: "i", Arrival: int64(seq + 1), Seq: uint64(seq + 1), Load: load, Payload: payload}
		if seq == 1 {
			f.Payload = bytes.Replace(payload, []byte("00000001"), []byte("00000009"), 1) // another span
		}
		if _, err := s.Add(f.Seq, f); err != nil {
			t.Fatal(err)
		}
		for _, tr := range s.domains["i"].traces {
			if tr.shares[0].silent != (seq == 1) || tr.shares[0].load != (envelope.Load{5, 5, 5, 5}) {
				t.Errorf("after frame %d: %v, %v", seq, tr.shares[0].silent, tr.shares[0].load)
			}
		}
	}
}
