package integration

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/tempo"
)

// TestBusyInstancesDoNotHoldASilentOne sends one trace from an instance that
// then falls silent while another keeps every partition busy: the trace of the
// silent one is decided all the same.
func TestBusyInstancesDoNotHoldASilentOne(t *testing.T) {
	t.Parallel()
	tmp := tempo.Start(t)
	p := startPipeline(t, func(c *sink.Config) { c.Tempo.Endpoint = tmp.Addr })
	silent := p.startEdge(t, edge.InstanceConfig{ID: "silent"})
	busy := p.startEdge(t, edge.InstanceConfig{ID: "busy"})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for range 4 {
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				_ = post(ctx, busy.http, otlpwire.Traces, numbered(otlpwire.Traces, n))
			}
		})
	}
	if err := post(t.Context(), silent.http, otlpwire.Traces, numbered(otlpwire.Traces, 1)); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the silent instance's trace arrives", func() error {
		for _, s := range tmp.Spans() {
			if s.Attribute("instance.id") == "silent" {
				return nil
			}
		}
		return context.DeadlineExceeded
	})
}
