package forward

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestACentreThatStoresNothing: a hub that is connected and has no stream, and a gateway that
// is not running, are reported; a signal of which nothing is spooled does not count as stalled.
func TestACentreThatStoresNothing(t *testing.T) {
	t.Parallel()
	for centre, why := range map[string]string{"hub": "no stream stores the subject", "gateway": "connection refused"} {
		t.Run(centre, func(t *testing.T) {
			t.Parallel()
			b, err := broker.Start(broker.Config{Name: "hub", Dir: t.TempDir(), MaxPayload: 8 << 20}, silent)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(b.Stop)
			cfg := newConfig(t)
			cfg.Forward.Hub, cfg.Forward.Drain = bus.Config{InProcess: b, Name: "edge-as-1"}, 0
			if centre == "gateway" {
				cfg.Forward.Central = CentralConfig{Endpoint: "http://127.0.0.1:1", Token: "x", Protocol: "http", Insecure: true}
			}
			s, led, _ := runSpool(t, cfg.Spool)
			var said logtest.Log
			fw, err := New(cfg.Forward, s, led, said.Logger(slog.LevelInfo))
			if err != nil {
				t.Fatal(err)
			}
			service := fw.Service()
			if err := services.StartAndAwaitRunning(t.Context(), service); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = services.StopAndAwaitTerminated(context.Background(), service) }()
			until := func(what string, done func() bool) {
				t.Helper()
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
				defer cancel()
				if !backoff.Until(ctx, done) {
					t.Fatalf("%s: never; said %s", what, &said)
				}
			}
			accept(t, s, 0, 1)
			seconds, stalls := led.Stall("logs", "", centre)
			until("a stall", func() bool {
				return testutil.ToFloat64(seconds) >= 8 && testutil.ToFloat64(stalls) == 1 && said.Says("msg=stalled", "signal=logs", "backend="+centre, why)
			})
			if other, _ := led.Stall("metrics", "", centre); testutil.ToFloat64(other) > 0 {
				t.Error("metrics, of which there are none, stand")
			}
			if connected := testutil.ToFloat64(led.HubConnected) == 1; connected != (centre == "hub") {
				t.Errorf("connected: %v", connected)
			}
			if centre == "gateway" {
				return
			}
			top := bus.DefaultTopology()
			top.Partitions, top.MaxBytes = 1, 64<<20
			conn, err := bus.OpenHub(t.Context(), bus.Config{Name: "test", InProcess: b}, top, silent)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			until("it goes on", func() bool {
				return testutil.ToFloat64(seconds) == 0 && s.Empty(otlpwire.Logs) && said.Says("no longer stalled", "signal=logs")
			})
		})
	}
}
