package main

import (
	"fmt"
	"strings"

	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/ptrace"
	w3c "go.opentelemetry.io/otel/trace"
)

// difference is one that is meant: docs/sampling.md has it under "What differs".
type difference struct {
	why     string
	applies func(leaf, *trace) bool
	// reads is the trace, or the policy, as the collector reads it: penstock decides as the
	// collector then. nil where nothing can be written that means the same to both.
	reads func(leaf, *trace) (leaf, *trace)
	seen  int
}

// meant are the differences of single policies: which kind of policy, on which kind of
// trace. One that never shows fails the run. A policy that holds others may differ on a
// trace where one of those does, and nowhere else.
var meant = []*difference{
	{
		why: "numeric_attribute: a value of another type is no number; the collector reads it as 0",
		applies: func(l leaf, t *trace) bool {
			return l.kind == "numeric_attribute" && !l.zero && t.has(l.key, isNot(pcommon.ValueTypeInt))
		},
		reads: func(l leaf, t *trace) (leaf, *trace) {
			return l, t.with(l.key, isNot(pcommon.ValueTypeInt), func(v pcommon.Value) { v.SetInt(0) })
		},
	},
	{
		why: "boolean_attribute: a value of another type is no boolean; the collector reads it as false",
		applies: func(l leaf, t *trace) bool {
			return l.kind == "boolean_attribute" && t.has(l.key, isNot(pcommon.ValueTypeBool))
		},
		reads: func(l leaf, t *trace) (leaf, *trace) {
			return l, t.with(l.key, isNot(pcommon.ValueTypeBool), func(v pcommon.Value) { v.SetBool(false) })
		},
	},
	{
		why:     "numeric_attribute: 0 is a bound; to the collector it is none",
		applies: func(l leaf, t *trace) bool { return l.kind == "numeric_attribute" && l.zero },
		reads: func(l leaf, t *trace) (leaf, *trace) {
			l.body = strings.NewReplacer("min_value: 0, ", "", ", max_value: 0", "").Replace(l.body)
			return l, t.with(l.key, isNot(pcommon.ValueTypeInt), func(v pcommon.Value) { v.SetInt(0) })
		},
	},
	{
		why:     "latency with an upper threshold looks at the whole trace; the collector looks after every span",
		applies: func(l leaf, t *trace) bool { return l.kind == "latency" && l.upper && t.spans > 1 },
		reads:   spanAfterSpan,
	},
	{
		why:     "latency: a start time of 0 counts; to the collector it is none when another span follows",
		applies: func(l leaf, t *trace) bool { return l.kind == "latency" && !l.upper && t.startsAtZero && t.spans > 1 },
		reads:   spanAfterSpan,
	},
	{
		why:     "trace_state: a member is found beside one that W3C does not allow; the collector then finds none",
		applies: func(l leaf, t *trace) bool { return l.kind == "trace_state" && t.badState },
		reads: func(l leaf, t *trace) (leaf, *trace) {
			return l, t.edited(func(td ptrace.Traces) {
				for sp := range spansOf(td) {
					if _, err := w3c.ParseTraceState(sp.TraceState().AsRaw()); err != nil {
						sp.TraceState().FromRaw("")
					}
				}
			})
		},
	},
	{
		why: "a span that comes twice counts once; the collector counts both",
		applies: func(l leaf, t *trace) bool {
			return (l.kind == "span_count" || l.kind == "rate_limiting" || l.kind == "bytes_limiting") && t.spans != t.distinct
		},
		reads: func(l leaf, t *trace) (leaf, *trace) {
			every := *t
			every.own, every.distinct = t.payload, t.spans
			return l, &every
		},
	},
	{
		why: "string_attribute: no empty value, and none of another type, of a resource fits a regular expression",
		applies: func(l leaf, t *trace) bool {
			return l.regex && t.onResource(l.key, func(v pcommon.Value) bool { return v.Str() == "" })
		},
	},
}

func isNot(want pcommon.ValueType) func(pcommon.Value) bool {
	return func(v pcommon.Value) bool { return v.Type() != want }
}

// spanAfterSpan is a trace of one span that lasts as long as the collector finds when it
// ends its question: after the first span with which the duration fits, else the last.
func spanAfterSpan(l leaf, t *trace) (leaf, *trace) {
	var begin, end pcommon.Timestamp
	for sp := range spansOf(t.td) {
		if begin == 0 || sp.StartTimestamp() < begin {
			begin = sp.StartTimestamp()
		}
		if end == 0 || sp.EndTimestamp() > end {
			end = sp.EndTimestamp()
		}
		if ms := int64(end-begin) / 1e6; ms > l.over && (!l.upper || ms <= l.upTo) {
			break
		}
	}
	return l, t.edited(func(td ptrace.Traces) {
		one := ptrace.NewSpan()
		for sp := range spansOf(td) {
			sp.CopyTo(one)
			break
		}
		one.SetStartTimestamp(begin)
		one.SetEndTimestamp(end)
		td.ResourceSpans().RemoveIf(func(ptrace.ResourceSpans) bool { return true })
		one.CopyTo(td.ResourceSpans().AppendEmpty().ScopeSpans().AppendEmpty().Spans().AppendEmpty())
	})
}

// The differences of single configurations.
var (
	order   = &difference{why: "composite: policy_order orders the sub-policies; the collector goes by their list"}
	percent = &difference{why: "composite: percentages are not cut by floating point"}
)

// ownDifferences returns those configurations, each with the trace that shows it.
func ownDifferences() []set {
	always := func(name string) string { return "{name: " + name + ", type: always_sample}" }
	return []set{
		{
			text: fmt.Sprintf("policies: [{name: c, type: composite, composite: {max_total_spans_per_second: 100, policy_order: [b, a], composite_sub_policy: [%s, %s], rate_allocation: [{policy: a, percent: 1}, {policy: b, percent: 99}]}}]", always("a"), always("b")),
			only: "5 spans", meant: func(*trace) { order.seen++ },
		},
		{
			text: fmt.Sprintf("policies: [{name: c, type: composite, composite: {max_total_spans_per_second: 100, composite_sub_policy: [%s], rate_allocation: [{policy: a, percent: 29}]}}]", always("a")),
			only: "29 spans", meant: func(*trace) { percent.seen++ },
		},
	}
}

// unseen returns what is meant to differ and does not.
func unseen() (out []string) {
	for _, d := range append([]*difference{order, percent}, meant...) {
		if d.seen == 0 {
			out = append(out, d.why)
		}
	}
	return out
}
