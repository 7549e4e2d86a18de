package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"

	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/ptrace"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// corpus returns the tests' traces, those that single configurations ask about, and n
// generated ones.
func corpus(tests string, n int, seed uint64) ([]*trace, error) {
	text, err := os.ReadFile(tests)
	if err != nil {
		return nil, err
	}
	payload, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, text, otlpwire.DefaultLimits)
	if err != nil {
		return nil, err
	}
	td, err := new(ptrace.ProtoUnmarshaler).UnmarshalTraces(payload)
	if err != nil {
		return nil, err
	}
	var all []*trace
	for _, one := range byTrace(td) {
		all = append(all, newTrace("", one))
	}
	for _, spans := range []int{5, 29} {
		all = append(all, newTrace(fmt.Sprintf("%d spans", spans), row(spans)))
	}
	g := generator{rand.New(rand.NewPCG(seed, 2))}
	for i := range n {
		all = append(all, newTrace("", g.trace(i)))
	}
	return all, nil
}

// byTrace cuts a request into one for each trace, in the order in which they come up.
func byTrace(td ptrace.Traces) (all []ptrace.Traces) {
	place := map[pcommon.TraceID]int{}
	for _, rs := range td.ResourceSpans().All() {
		for _, ss := range rs.ScopeSpans().All() {
			for _, sp := range ss.Spans().All() {
				at, known := place[sp.TraceID()]
				if !known {
					at = len(all)
					place[sp.TraceID()] = at
					all = append(all, ptrace.NewTraces())
				}
				out := all[at].ResourceSpans()
				if out.Len() == 0 { // none of the tests' traces has two resources
					rs.Resource().CopyTo(out.AppendEmpty().Resource())
					ss.Scope().CopyTo(out.At(0).ScopeSpans().AppendEmpty().Scope())
				}
				sp.CopyTo(out.At(0).ScopeSpans().At(0).Spans().AppendEmpty())
			}
		}
	}
	return all
}

// row is a trace of n spans and nothing more.
func row(n int) ptrace.Traces {
	td := ptrace.NewTraces()
	spans := td.ResourceSpans().AppendEmpty().ScopeSpans().AppendEmpty().Spans()
	for i := range n {
		sp := spans.AppendEmpty()
		sp.SetTraceID(pcommon.TraceID{1, byte(n)})
		sp.SetSpanID(pcommon.SpanID{byte(i + 1)})
	}
	return td
}

// generator makes traces that lie on the edges of the policies in sets.go.
type generator struct{ *rand.Rand }

func pick[T any](g generator, from ...T) T { return from[g.IntN(len(from))] }

func (g generator) trace(n int) ptrace.Traces {
	td := ptrace.NewTraces()
	var id pcommon.TraceID
	binary.BigEndian.PutUint64(id[:], g.Uint64())
	binary.BigEndian.PutUint64(id[8:], uint64(n+1))
	for range pick(g, 1, 1, 1, 2) {
		rs := td.ResourceSpans().AppendEmpty()
		g.attributes(rs.Resource().Attributes(), "service.name", "k")
		for range pick(g, 1, 1, 2) {
			ss := rs.ScopeSpans().AppendEmpty()
			ss.Scope().SetName(pick(g, "", "lib", "other"))
			g.attributes(ss.Scope().Attributes(), "k")
			for range pick(g, 1, 1, 2, 3, 6) {
				g.span(id, ss.Spans().AppendEmpty())
			}
			if spans := ss.Spans(); g.IntN(20) == 0 { // sent twice
				spans.At(g.IntN(spans.Len())).CopyTo(spans.AppendEmpty())
			}
		}
	}
	return td
}

func (g generator) span(id pcommon.TraceID, sp ptrace.Span) {
	sp.SetTraceID(id)
	var own pcommon.SpanID
	binary.BigEndian.PutUint64(own[:], g.Uint64()|1)
	sp.SetSpanID(own)
	if g.IntN(3) > 0 {
		sp.SetParentSpanID(pcommon.SpanID{byte(g.IntN(255) + 1)})
	}
	sp.SetName(pick(g, "op", "GET /", "checkout", ""))
	sp.SetKind(ptrace.SpanKind(g.IntN(6)))
	const began = 1_764_360_000_000_000_000
	start := pcommon.Timestamp(began + g.Int64N(3)*50_000_000)
	took := pick(g, 0, 1_000_000, 9_999_999, 10_000_000, 99_999_999, 100_000_000, 100_900_000, 101_000_000, 200_000_000, 6_000_000_000, -50_000_000)
	sp.SetStartTimestamp(start)
	sp.SetEndTimestamp(pcommon.Timestamp(int64(start) + int64(took)))
	switch g.IntN(40) {
	case 0:
		sp.SetStartTimestamp(0)
	case 1:
		sp.SetEndTimestamp(0)
	case 2:
		sp.SetStartTimestamp(0)
		sp.SetEndTimestamp(0)
	}
	sp.Status().SetCode(ptrace.StatusCode(pick(g, 0, 0, 0, 1, 2, 3)))
	sp.SetFlags(pick[uint32](g, 0, 0, 1, 0x100, 0x101, 0x300))
	sp.TraceState().FromRaw(pick(g, "", "", "", "k=value1", "k=x,a=b", "a=b , k=value1", "a=b,c=d", "t1@sys=v", "k=value1,k=x", "A B,k=value1", "k", "=", "k=value1,", "k=other"))
	g.attributes(sp.Attributes(), "k", "n", "http.route", "flag")
	for range g.IntN(3) {
		e := sp.Events().AppendEmpty()
		e.SetName(pick(g, "exception", "exc", "log"))
		g.attributes(e.Attributes(), "k")
	}
}

// attributes puts each of the keys, with a value of any type, or none.
func (g generator) attributes(m pcommon.Map, keys ...string) {
	for _, key := range keys {
		switch g.IntN(12) {
		case 0:
			m.PutInt(key, pick[int64](g, 0, 1, -3, 5, 6, 10, 11, 500, -10))
		case 1:
			m.PutDouble(key, pick(g, 0, 5, 5.5, -1))
		case 2:
			m.PutBool(key, g.IntN(2) == 0)
		case 3:
			m.PutEmpty(key)
		case 4:
			m.PutEmptySlice(key).AppendEmpty().SetStr("value1")
		case 5:
			m.PutEmptyMap(key).PutStr("a", "value1")
		case 6:
			m.PutEmptyBytes(key).Append('x')
		case 7, 8, 9:
			m.PutStr(key, pick(g, "value1", "value10", "xx", "", "/a", "/b", "s", "cart", "5", "ж"))
		}
	}
}
