package forward

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/edge/edgetest"
	"github.com/penstock/penstock/pkg/edge/spool"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestLocalBackendsReadTheSpool: the hub is unavailable and one local backend is dead; the
// others get everything, once, also across a restart.
func TestLocalBackendsReadTheSpool(t *testing.T) {
	var asked atomic.Int64
	dead := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	defer dead.Close()
	cfg := newConfig(t)
	local := backend.DefaultConfig()
	local.Loki.URL, local.File.Dir = dead.URL, t.TempDir()
	lines := func() int {
		text, _ := os.ReadFile(filepath.Join(local.File.Dir, "traces.jsonl"))
		return strings.Count(string(text), "\n")
	}
	trace := []byte(`{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"0102030405060708090a0b0c0d0e0f10","spanId":"0102030405060708","name":"x"}]}]}]}`)
	for round := range 2 {
		s, led, stop := runSpool(t, cfg.Spool)
		svc := NewLocal(local, "as-1", s, led, silent).Service()
		if err := services.StartAndAwaitRunning(t.Context(), svc); err != nil {
			t.Fatal(err)
		}
		for range 10 {
			b := edgetest.Log(t, 0, 10)
			b.Signal = otlpwire.Traces
			var err error
			if b.Payload, _, err = otlpwire.FromJSON(nil, otlpwire.Traces, trace, otlpwire.DefaultLimits); err != nil {
				t.Fatal(err)
			}
			if err := s.Accept(t.Context(), b); err != nil {
				t.Fatal(err)
			}
			accept(t, s, 0, 1) // a log record for the dead one
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		counted := func() float64 { return testutil.ToFloat64(led.Local(otlpwire.Traces, "file")(ledger.LocalDelivered)) }
		if !backoff.Until(ctx, func() bool { return lines() == 10*(round+1) && counted() == 10 && asked.Load() > 0 }) {
			t.Errorf("round %d: %d lines of traces, %v counted, the dead backend was asked %d times", round, lines(), counted(), asked.Load())
		}
		cancel()
		// Forwarding to the hub is not affected.
		s.Advance(spool.Hub, otlpwire.Logs, 10, 0)
		if !s.Empty(otlpwire.Logs) && round == 0 {
			t.Error("a dead local backend holds the spool back")
		}
		if err := services.StopAndAwaitTerminated(context.Background(), svc); err != nil {
			t.Fatal(err)
		}
		stop()
	}
}

// TestLocalBackendMissesWhatIsGone: a backend that was unavailable misses messages, and they
// are counted.
func TestLocalBackendMissesWhatIsGone(t *testing.T) {
	cfg := newConfig(t)
	local := backend.DefaultConfig()
	local.File.Dir = t.TempDir()
	cfg.Spool.Retain = 0
	s, led, _ := runSpool(t, cfg.Spool)
	accept(t, s, 0, 10)
	s.Advance(localReader+"file", otlpwire.Logs, 2, 0)
	st := current(t, s)
	s.Forwarded(otlpwire.Logs, 5, 0, 0)
	purging, stop := context.WithCancel(t.Context())
	stop() // once is enough
	s.Purge(purging, st, otlpwire.Logs)
	svc := NewLocal(local, "as-1", s, led, silent).Service()
	if err := services.StartAndAwaitRunning(t.Context(), svc); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = services.StopAndAwaitTerminated(context.Background(), svc) }()
	count := led.Local(otlpwire.Logs, "file")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if !backoff.Until(ctx, func() bool { return testutil.ToFloat64(count(ledger.LocalDelivered)) == 5 }) {
		t.Errorf("%v delivered, want 5", testutil.ToFloat64(count(ledger.LocalDelivered)))
	}
	if n := testutil.ToFloat64(count(ledger.LocalMissed)); n != 3 {
		t.Errorf("%v messages counted as missed, want 3", n)
	}
}
