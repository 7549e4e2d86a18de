package generate

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
)

func TestCheckoutsAreWholeTraces(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	a, b := NewShop(7, now), NewShop(7, now)
	kinds := map[Kind]int{}
	const n = 5000
	for range n {
		c, same := a.Checkout(now), b.Checkout(now)
		if !proto.Equal(c.Spans, same.Spans) || !proto.Equal(c.Logs, same.Logs) {
			t.Fatal("the same seed gives other traffic")
		}
		kinds[c.Kind]++
		spans, failed, roots := map[string]bool{}, 0, 0
		var shortest, longest uint64 = 1 << 63, 0
		for _, rs := range c.Spans.ResourceSpans {
			for _, sp := range rs.ScopeSpans[0].Spans {
				spans[string(sp.SpanId)] = true
				if sp.Status.GetCode() == 2 {
					failed++
				}
				shortest, longest = min(shortest, sp.StartTimeUnixNano), max(longest, sp.EndTimeUnixNano)
			}
		}
		for _, rs := range c.Spans.ResourceSpans {
			for _, sp := range rs.ScopeSpans[0].Spans {
				if len(sp.ParentSpanId) == 0 {
					roots++
				} else if !spans[string(sp.ParentSpanId)] {
					t.Fatalf("span %s has a parent of another trace", sp.Name)
				}
			}
		}
		lasts := time.Duration(longest - shortest)
		if len(spans) != SpansPerCheckout || len(c.Spans.ResourceSpans) != len(Services) || roots != 1 || (failed > 0) != (c.Kind == Failed) || (lasts > time.Second) != (c.Kind == Slow) {
			t.Fatalf("kind %d: %d spans of %d services, %d roots, %d failed, %v long", c.Kind, len(spans), len(c.Spans.ResourceSpans), roots, failed, lasts)
		}
		for _, rl := range c.Logs.ResourceLogs {
			body := rl.ScopeLogs[0].LogRecords[0].Body.GetStringValue()
			if !strings.HasPrefix(body, `{"level":`) || !strings.Contains(body, `"trace_id":`) {
				t.Fatalf("log line %s", body)
			}
		}
	}
	if kinds[Failed] < n*2/100 || kinds[Failed] > n*4/100 || kinds[Slow] < n*4/100 || kinds[Slow] > n*6/100 {
		t.Errorf("kinds %v of %d, want 3 %% failed and 5 %% slow", kinds, n)
	}
	if m := a.Metrics(now); len(m.ResourceMetrics) != len(Services) || m.ResourceMetrics[0].ScopeMetrics[0].Metrics[0].Name != "appserver.http.requests" {
		t.Errorf("metrics %v", m)
	}
}

func TestConfigErrors(t *testing.T) {
	for _, cfg := range []Config{{Endpoint: "nonsense", Rate: 1}, {Endpoint: "ftp://h", Rate: 1}, {Endpoint: "http://127.0.0.1:1", Rate: 0}, {Endpoint: "http://127.0.0.1:1", Rate: 1}, {Endpoint: "grpc://127.0.0.1:1", Rate: 1}} {
		if _, err := Run(t.Context(), cfg); err == nil {
			t.Errorf("%+v: no error", cfg)
		}
	}
}
