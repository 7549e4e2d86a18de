package policy

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// shared is a trace of spans with an attribute of a size and so many events, which may have one, too; the resource and the scope have one
// of another size.
func shared(t testing.TB, resource, scope, spans, span, events int, event ...int) *Trace {
	t.Helper()
	attribute := func(n int) []*commonpb.KeyValue {
		if n == 0 {
			return nil
		}
		return []*commonpb.KeyValue{{Key: "x", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: strings.Repeat("a", n)}}}}
	}
	all := make([]*tracepb.Span, spans)
	for i := range all {
		all[i] = &tracepb.Span{TraceId: bytes.Repeat([]byte{1}, 16), SpanId: fmt.Appendf(nil, "%08d", i), Attributes: attribute(span)}
		for range events {
			all[i].Events = append(all[i].Events, &tracepb.Span_Event{Attributes: attribute(append(event, 0)[0])})
		}
	}
	payload, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{
		Resource:   &resourcepb.Resource{Attributes: attribute(resource)},
		ScopeSpans: []*tracepb.ScopeSpans{{Scope: &commonpb.InstrumentationScope{Attributes: attribute(scope)}, Spans: all}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	tr := new(Trace)
	tr.Reset([16]byte{1}, spans, payload, 0)
	return tr
}

func conditions(t testing.TB, mode, pattern string) (spans, events *Set) {
	t.Helper()
	parse := func(what, condition string) *Set {
		set, err := Parse("t", fmt.Appendf(nil, "policies: [{name: o, type: ottl_condition, ottl_condition: {error_mode: %s, %s: [%q]}}, {name: rest, type: span_count, span_count: {min_spans: 1000000}}]", mode, what, condition))
		if err != nil {
			t.Fatal(err)
		}
		return set
	}
	return parse("span", fmt.Sprintf(`IsMatch(resource.attributes["x"], %q)`, pattern)), parse("spanevent", fmt.Sprintf(`IsMatch(span.attributes["x"], %q)`, pattern))
}

// TestConditionsReadWithinABound: what many spans share, or many events, is not read again with each of them without a bound, and a
// trace of another shape is evaluated whatever its size.
func TestConditionsReadWithinABound(t *testing.T) {
	spans, events := conditions(t, "ignore", "a")
	for name, c := range map[string]struct {
		trace         *Trace
		spans, events bool
	}{
		"small spans, a usual resource": {shared(t, 4<<10, 100, 3000, 120, 2), true, true},
		"few spans, a large resource":   {shared(t, 1<<20, 0, 60, 100, 1), true, true},
		"log records as events":         {shared(t, 2<<10, 0, 40, 200, 128, 300), true, true},
		"stack traces as events":        {shared(t, 2<<10, 0, 4, 200, 128, 4<<10), true, true},
		"arguments of a Java process":   {shared(t, 50<<10, 0, 1500, 450, 1), true, true},
		"a small trace":                 {shared(t, 16<<10, 0, 200, 1, 1), true, true},
		"many spans, a large resource":  {shared(t, 100<<10, 0, 2000, 1, 0), false, false},
		"many spans, a large scope":     {shared(t, 10, 100<<10, 2000, 1, 0), false, false},
		"many events, a large span":     {shared(t, 10, 0, 2, 200<<10, 20000), true, false},
	} {
		if got := spans.Decide(c.trace, new(Budgets)).Keep; got != c.spans {
			t.Errorf("%s: the condition on spans says %v", name, got)
		}
		if got := events.Decide(c.trace, new(Budgets)).Keep; got != c.events {
			t.Errorf("%s: the condition on events says %v", name, got)
		}
	}
	strict, _ := conditions(t, "propagate", "a")
	negated := Set{policies: []named{{"not", not{strict.policies[0].eval}}}}
	if negated.Decide(shared(t, 100<<10, 0, 2000, 1, 0), new(Budgets)).Keep {
		t.Error("with error_mode propagate it is no failure")
	}
}

// BenchmarkConditions compares what a byte of a trace costs that is made to be dear with one of a usual trace: what one instance can
// cost the others of its partition. Those within the bound are about as dear as may be, those beyond it are not evaluated.
//
//	go test ./pkg/sampling/policy -run '^$' -bench Conditions
func BenchmarkConditions(b *testing.B) {
	spans, events := conditions(b, "ignore", "(a|b)*(a|c)*!")
	for _, c := range []struct {
		name  string
		set   *Set
		trace *Trace
	}{
		{"usual", spans, shared(b, 1<<10, 50, 3000, 300, 1)},
		{"spans, within the bound", spans, shared(b, 60<<10, 0, 135, 1, 0)},
		{"events, within the bound", events, shared(b, 10, 0, 1, 60<<10, 125)},
		{"spans, beyond", spans, shared(b, 500<<10, 0, 17000, 1, 0)},
		{"events, beyond", events, shared(b, 10, 0, 1, 500<<10, 200000)},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(len(c.trace.Payload)))
			for b.Loop() {
				c.trace.Reset(c.trace.ID, c.trace.Spans, c.trace.Payload, 0)
				c.set.Decide(c.trace, new(Budgets))
			}
		})
	}
}
