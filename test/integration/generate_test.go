package integration

import (
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/generate"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
)

// TestGeneratedTraffic sends the shop's traffic over both transports to the file
// backend and compares what was acknowledged with the ledger.
func TestGeneratedTraffic(t *testing.T) {
	t.Parallel()
	p := startPipeline(t, func(*sink.Config) {})
	var edges []*edgeAddrs
	var acked [3]int
	for i, id := range []string{"grpc", "http"} {
		e := p.startEdge(t, edge.InstanceConfig{ID: id})
		edges = append(edges, e)
		st, err := generate.Run(t.Context(), generate.Config{Endpoint: []string{"grpc://" + e.grpc, "http://" + e.http}[i], Rate: 40, For: 3 * time.Second, Seed: uint64(i), Wait: 10 * time.Second})
		if err != nil || st.Rejected > 0 {
			t.Fatalf("%s: %+v, %v", id, st, err)
		}
		for s, n := range st.Acked {
			acked[s] += n
		}
	}
	p.balanced(t, 60*time.Second, edges...)
	for _, sig := range otlpwire.Signals {
		accepted := count(t, sig, "penstock_accepted_items_total", edges[0].role, edges[1].role)
		delivered := count(t, sig, "penstock_delivered_items_total", p.sink)
		// The last request may be answered after the generator's time is over.
		if acked[sig] == 0 || accepted < acked[sig] || delivered != accepted {
			t.Errorf("%v: %d acknowledged, %d accepted, %d delivered", sig, acked[sig], accepted, delivered)
		}
	}
}
