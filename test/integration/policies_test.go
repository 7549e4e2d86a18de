package integration

import (
	"context"
	"fmt"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/tempo"
)

// TestPoliciesAreSwitchedWithoutARestart keeps all, pushes a version that keeps a
// part, puts one into the bucket that nobody can read, and looks at what arrives.
func TestPoliciesAreSwitchedWithoutARestart(t *testing.T) {
	t.Parallel()
	tmp := tempo.Start(t)
	p := startPipeline(t, func(c *sink.Config) {
		c.Tempo.Endpoint, c.Sampling.PolicyAttribute = tmp.Addr, "tailsampling.policy"
		c.Sampling.File = writeFile(t, "all.yaml", "decision_wait: 1s\npolicies: [{name: all, type: always_sample}]\n")
	})
	e := p.startEdge(t, edge.InstanceConfig{ID: "as-1"})
	sent := 0
	send := func(n int, failing bool) {
		t.Helper()
		for range n {
			sent++
			sp := &tracepb.Span{TraceId: []byte(fmt.Sprintf("%016d", sent*7919)), SpanId: []byte(fmt.Sprintf("%08d", sent)), Name: "x", TraceState: "a=b"}
			if failing {
				sp.Status = &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR}
			}
			req := &tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{sp}}}}}}
			if err := post(t.Context(), e.http, otlpwire.Traces, req); err != nil {
				t.Fatal(err)
			}
		}
	}
	outcome := func(kept, sampledOut int) {
		t.Helper()
		eventually(t, 30*time.Second, "all are decided", func() error {
			out, in := count(t, otlpwire.Traces, "penstock_sampled_out_items_total", p.sink), count(t, otlpwire.Traces, "penstock_delivered_items_total", p.sink)
			if out != sampledOut || in != kept {
				return fmt.Errorf("kept %d, sampled out %d; want %d and %d", in, out, kept, sampledOut)
			}
			return nil
		})
	}
	send(3, false)
	outcome(3, 0)

	nc, err := nats.Connect(p.hub.url)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	kv, err := js.KeyValue(ctx, "POLICIES")
	if err != nil {
		t.Fatal(err)
	}
	file := writeFile(t, "next.yaml", `
decision_wait: 1s
policies:
  - {name: errors, type: status_code, status_code: {status_codes: [ERROR]}}
  - {name: none, type: probabilistic, probabilistic: {sampling_percentage: 0}}
`)
	if code := run(t, nil, "penstock", "policies", "push", file, "-hub", p.hub.url).exit(t, 30*time.Second); code != 0 {
		t.Fatalf("exit %d", code)
	}
	if code := run(t, nil, "penstock", "policies", "push", writeFile(t, "bad.yaml", "policies: [{name: x, type: nonsense}]\n"), "-hub", p.hub.url).exit(t, 30*time.Second); code != 1 {
		t.Errorf("a bad file: exit %d, want 1", code)
	}
	if _, err := kv.Put(ctx, "2", []byte(`{"from":1,"at":"2026-01-31T08:00:00Z","text":"policies: [{name: x, type: nonsense}]"}`)); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "the bad version is refused", func() error {
		if n := value(t, p.sink, "penstock_policies_refused_total"); n != 1 {
			return fmt.Errorf("%v refused", n)
		}
		return nil
	})
	send(4, false)
	send(2, true)
	outcome(5, 4)
	if n := value(t, p.sink, "penstock_policies_version"); n != 1 {
		t.Errorf("version %v is in force, want 1", n)
	}
	by := map[string]int{}
	for _, s := range tmp.Spans() {
		for _, kv := range s.Span.GetAttributes() {
			by[kv.GetKey()+" "+kv.GetValue().GetStringValue()]++
		}
		if s.Span.GetTraceState() != "a=b" {
			t.Errorf("trace state %q of a trace that is sure to be kept", s.Span.GetTraceState())
		}
	}
	if by["tailsampling.policy all"] != 3 || by["tailsampling.policy errors"] != 2 {
		t.Errorf("policies on the spans: %v", by)
	}
}

// value returns a metric without labels.
func value(t *testing.T, r *role, name string) float64 {
	t.Helper()
	families, err := r.Registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue() + f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}
