package whatif

import (
	"fmt"
	"strings"
	"testing"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// TestComparison: of 100 traces of two spans, in two services, every tenth has an error and
// every fourth is slow. One side keeps errors, the other slow ones; those that begin in the
// first half count.
func TestComparison(t *testing.T) {
	parse := func(text string) Rules {
		set, err := policy.Parse("p", []byte("decision_wait: 5s\npolicies:\n"+text))
		if err != nil {
			t.Fatal(err)
		}
		return Rules{Base: set}
	}
	c := New(
		parse("  - {name: errors, type: status_code, status_code: {status_codes: [ERROR]}}\n"),
		parse("  - {name: slow, type: latency, latency: {threshold_ms: 500}}\n"),
		Range{Spread: partition.Spread{N: 4}, In: func(first int64, _ uint64) bool { return first <= 50e9 }}, 1<<20)
	for i := range 100 {
		var all []*tracepb.ResourceSpans
		for j, service := range []string{"web", "db"} {
			sp := &tracepb.Span{TraceId: []byte(fmt.Sprintf("%016d", i+1)), SpanId: []byte(fmt.Sprintf("%08d", 2*i+j+1)), Name: "x", StartTimeUnixNano: 1e9, EndTimeUnixNano: 1e9 + 1e6}
			if i%10 == 0 && j == 0 {
				sp.Status = &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR}
			}
			if i%4 == 0 {
				sp.EndTimeUnixNano = 2e9
			}
			all = append(all, &tracepb.ResourceSpans{
				Resource:   &resourcepb.Resource{Attributes: []*commonpb.KeyValue{{Key: "service.name", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: service}}}}},
				ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{sp}}},
			})
		}
		payload, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: all})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Add(uint64(i+1), envelope.Frame{Instance: "as-1", Arrival: int64(i+1) * 1e9, Seq: uint64(i + 1), Payload: payload}); err != nil {
			t.Fatal(err)
		}
	}
	if len(c.open) > 20 {
		t.Errorf("%d decisions wait for the other side", len(c.open))
	}
	r := c.Finish()
	if len(c.open) != 0 || c.Full() {
		t.Errorf("%d decisions have not met", len(c.open))
	}
	// In the first half: 0, 10, 20, 30, 40 have errors; 0, 4, ... 48 are slow; 0, 20, 40 are both.
	if r.Total.All.Traces != 50 || r.Total.All.Spans != 100 || r.Total.Running.Traces != 5 || r.Total.Proposed.Traces != 13 || r.Total.Proposed.Spans != 26 {
		t.Errorf("%+v", r.Total)
	}
	if len(r.Lost) != 1 || r.Lost[0].Policy != "errors" || r.Lost[0].Traces != 2 || len(r.Lost[0].Examples) != 2 || string(r.Lost[0].Examples[0].TraceID[:]) != "0000000000000011" || r.Gained != 10 {
		t.Errorf("%+v, gained %d", r.Lost, r.Gained)
	}
	if len(r.Services) != 2 || r.Services[0].Name != "db" || r.Services[0].All.Traces != 50 || r.Services[1].Running.Spans != 5 {
		t.Errorf("%+v", r.Services)
	}
	if len(r.Policies) != 2 || r.Policies[0].Name != "errors" || r.Policies[0].Running.Spans != 10 || r.Policies[0].Proposed.Spans != 0 || r.Policies[1].Proposed.Traces != 13 {
		t.Errorf("%+v", r.Policies)
	}
}

// TestLateErrorsInAComparison: what late spans bring back counts as kept, on either side, also when the other side has
// decided meanwhile.
func TestLateErrorsInAComparison(t *testing.T) {
	errors, slow := "  - {name: errors, type: status_code, status_code: {status_codes: [ERROR]}}\n", "  - {name: slow, type: latency, latency: {threshold_ms: 500}}\n"
	both := errors + slow
	const late, slowOnes = 6, 3 // of ten traces the first ones have a late error, and half of these are slow
	for _, tc := range []struct {
		running, proposed string
		lost, gained      int64
	}{
		{both, slow, late - slowOnes, 0},
		{slow, both, 0, late - slowOnes},
		{both, both, 0, 0},
		{errors, slow, late - slowOnes, 0},
		{slow, errors, 0, late - slowOnes},
	} {
		rules := func(text string) Rules {
			set, err := policy.Parse("p", []byte("decision_wait: 5s\npolicies:\n"+text))
			if err != nil {
				t.Fatal(err)
			}
			set.Late = policy.Late{Traces: 100, Age: time.Hour}
			return Rules{Base: set}
		}
		c := New(rules(tc.running), rules(tc.proposed), Range{Spread: partition.Spread{N: 4}}, 1<<20)
		seq := uint64(0)
		add := func(at int64, trace int, failed, long bool) {
			seq++
			sp := &tracepb.Span{TraceId: []byte(fmt.Sprintf("%016d", trace+1)), SpanId: []byte(fmt.Sprintf("%08d", seq)), Name: "x", StartTimeUnixNano: 1e9, EndTimeUnixNano: 1e9, Status: &tracepb.Status{}}
			if failed {
				sp.Status.Code = tracepb.Status_STATUS_CODE_ERROR
			}
			if long {
				sp.EndTimeUnixNano = 2e9
			}
			payload, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{sp}}}}}})
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Add(seq, envelope.Frame{Instance: "as-1", Arrival: at * 1e9, Seq: seq, Payload: payload}); err != nil {
				t.Fatal(err)
			}
		}
		for n := range 10 {
			add(100, n, false, n < slowOnes)
		}
		for n := range 10 {
			add(120, 100+n, false, false) // all partitions decide
		}
		for n := range late {
			add(121, n, true, false)
		}
		r := c.Finish()
		var lost int64
		for _, l := range r.Lost {
			lost += l.Traces
			if int64(len(l.Examples)) != min(l.Traces, maxExamples) {
				t.Errorf("running %q: %+v", tc.running, l)
			}
		}
		brings := func(rules string) int64 {
			switch rules {
			case both:
				return late - slowOnes
			case errors:
				return late
			}
			return 0
		}
		if lost != tc.lost || r.Gained != tc.gained || r.Late.Running.Traces != brings(tc.running) || r.Late.Proposed.Traces != brings(tc.proposed) || len(c.open) != 0 {
			t.Errorf("running %q, proposed %q: lost %d, want %d, gained %d, want %d; %+v, %d open", tc.running, tc.proposed, lost, tc.lost, r.Gained, tc.gained, r.Late, len(c.open))
		}
	}
}

// TestAPanicIsNoResult: what the samplers catch, for sinks, ends the comparison.
func TestAPanicIsNoResult(t *testing.T) {
	c := New(Rules{Base: policy.KeepAll(time.Second)}, Rules{Base: policy.KeepAll(time.Second)},
		Range{Spread: partition.Spread{N: 1}, In: func(int64, uint64) bool { panic("what if") }}, 1<<20)
	payload, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{
		{TraceId: []byte("0123456789abcdef"), SpanId: []byte("01234567")},
	}}}}}})
	if err == nil {
		err = c.Add(1, envelope.Frame{Instance: "as-1", Arrival: 1, Seq: 1, Payload: payload})
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if v := fmt.Sprint(recover()); !strings.Contains(v, "what if") || !strings.Contains(v, "whatif_test.go") {
			t.Errorf("it says %s", v)
		}
	}()
	c.Finish()
}
