package forward

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/edge/edgetest"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestAFullStreamKeepsTheOrder: large and small messages alternate, into a stream that sometimes has
// room for small ones only.
func TestAFullStreamKeepsTheOrder(t *testing.T) {
	t.Parallel()
	hub, err := broker.Start(broker.Config{Name: "hub", Dir: t.TempDir(), Listen: "127.0.0.1:0", MaxPayload: 8 << 20}, silent)
	if err != nil {
		t.Fatal(err)
	}
	defer hub.Stop()
	top := bus.DefaultTopology()
	top.Partitions, top.MaxBytes = 1, 1<<20
	conn, err := bus.OpenHub(t.Context(), bus.Config{Name: "test", URL: hub.URL()}, top, silent)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for err == nil {
		_, err = conn.Publish(t.Context(), bus.Message{Subject: bus.Subject(otlpwire.Logs, "as-2"), Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Arrival: 1}, Body: make([]byte, 100_000)})
	}
	if !errors.Is(err, bus.ErrFull) {
		t.Fatal(err)
	}
	cfg := newConfig(t)
	cfg.Forward.Hub = bus.Config{URL: hub.URL(), Name: "edge-as-1"}
	s, _, _ := runSpool(t, cfg.Spool)
	const n = 24
	for i := range n {
		size := 1000
		if i%2 == 0 {
			size = 200_000
		}
		if err := s.Accept(t.Context(), edgetest.Log(t, i, size)); err != nil {
			t.Fatal(err)
		}
	}
	fw, err := New(cfg.Forward, s, ledger.New(prometheus.NewRegistry()), silent)
	if err != nil {
		t.Fatal(err)
	}
	fwd := fw.Service()
	if err := services.StartAndAwaitRunning(t.Context(), fwd); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = services.StopAndAwaitTerminated(context.Background(), fwd) }()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if !backoff.Until(ctx, func() bool { return fw.way.(*hubWay).full[otlpwire.Logs].Load() != 0 }) {
		t.Fatal("the edge has not seen that the stream is full")
	}
	lane, err := conn.OpenLane(t.Context(), bus.LaneConfig{Stream: "LOGS", Name: "check"})
	if err != nil {
		t.Fatal(err)
	}
	defer lane.Close()
	var got []string
	for len(got) < n {
		d, err := lane.Next(ctx)
		if err != nil {
			t.Fatalf("%v, after %v", err, got)
		}
		if d.Seq == 0 {
			continue
		}
		if err := conn.Remove(ctx, "LOGS", "", d.Seq); err != nil { // as a keeper would
			t.Fatal(err)
		}
		for item := range otlpwire.Items(d.Body) {
			number, _, _ := strings.Cut(string(item)[strings.Index(string(item), "n="):], " ")
			if want := fmt.Sprintf("n=%d", len(got)); number != want {
				t.Fatalf("got %s behind %v", number, got)
			}
			got = append(got, number)
		}
	}
}
