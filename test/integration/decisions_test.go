package integration

import (
	"fmt"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/tempo"
)

// TestLateSpansFollowTheDecisionOfTheSinkBefore decides two traces, replaces the
// sink, and sends a late span of each: an error of the dropped trace, which alone
// would be kept, and a harmless one of the kept trace, which alone would not. Late errors bring nothing back here.
func TestLateSpansFollowTheDecisionOfTheSinkBefore(t *testing.T) {
	tmp := tempo.Start(t)
	policies := writeFile(t, "sampling.yaml", `
decision_wait: 1s
policies:
  - {name: errors, type: status_code, status_code: {status_codes: [ERROR]}}
`)
	configure := func(c *sink.Config) {
		c.Tempo.Endpoint, c.Sampling.File, c.Sampling.Late.MaxTraces = tmp.Addr, policies, 0
	}
	p := startPipeline(t, configure)
	e := p.startEdge(t, edge.InstanceConfig{ID: "as-1"})
	send := func(trace, span byte, failed bool) {
		t.Helper()
		sp := &tracepb.Span{TraceId: append(make([]byte, 15), trace), SpanId: append(make([]byte, 7), span), Name: fmt.Sprintf("%d/%d", trace, span)}
		if failed {
			sp.Status = &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR}
		}
		req := &tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{sp}}}}}}
		if err := post(t.Context(), e.http, otlpwire.Traces, req); err != nil {
			t.Fatal(err)
		}
	}
	outcome := func(what string) {
		t.Helper()
		eventually(t, 30*time.Second, what, func() error {
			out, kept := count(t, otlpwire.Traces, "penstock_sampled_out_items_total", p.sink), count(t, otlpwire.Traces, "penstock_delivered_items_total", p.sink)
			if out != 1 || kept != 1 {
				return fmt.Errorf("sampled out %d, delivered %d; want 1 and 1", out, kept)
			}
			return nil
		})
	}
	const dropped, kept = 1, 2
	send(dropped, 1, false)
	send(kept, 1, true)
	outcome("the first sink decides")
	p.sink.stop()
	p.startSink(t, configure)
	send(dropped, 2, true)
	send(kept, 2, false)
	outcome("the second sink follows")
	for _, s := range tmp.Spans() {
		if s.Span.GetTraceId()[15] != kept {
			t.Errorf("span %s arrived, although its trace was dropped", s.Span.GetName())
		}
	}
}
