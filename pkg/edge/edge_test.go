package edge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/proc"
	"github.com/penstock/penstock/pkg/receive"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func testConfig(t testing.TB, dir string) Config {
	t.Helper()
	c := DefaultConfig()
	c.Instance.ID = "as-1"
	c.Spool.Dir, c.Spool.MaxBytes, c.Spool.Reserve = filepath.Join(dir, "spool"), 24<<20, 0
	return c
}

func startSpool(t testing.TB, cfg SpoolConfig) (*spool, func()) {
	t.Helper()
	s := newSpool(cfg, ledger.New(prometheus.NewRegistry()), quiet)
	svc := s.service()
	if err := services.StartAndAwaitRunning(t.Context(), svc); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	stop := func() {
		once.Do(func() {
			if err := services.StopAndAwaitTerminated(context.Background(), svc); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(stop)
	return s, stop
}

func logBatch(t testing.TB, n, size int) receive.Batch {
	t.Helper()
	text := fmt.Sprintf(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"stringValue":"%d %s"}}]}]}]}`, n, incompressible(size))
	p, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(text), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	return receive.Batch{Signal: otlpwire.Logs, Instance: "as-1", Items: 1, Payload: p}
}

// incompressible makes text that s2 cannot shrink much.
func incompressible(n int) string {
	var b strings.Builder
	x := uint64(88172645463325252)
	for b.Len() < n {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		fmt.Fprintf(&b, "%x", x)
	}
	return b.String()[:n]
}

// TestRequestsShareMessages sends from many goroutines at once: all are
// answered, and there are fewer messages than requests.
func TestRequestsShareMessages(t *testing.T) {
	s, _ := startSpool(t, testConfig(t, t.TempDir()).Spool)
	const n = 200
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if err := s.Accept(t.Context(), logBatch(t, i, 10)); err != nil {
				t.Errorf("request %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	st, err := s.conn.State(t.Context(), bus.SpoolStream(otlpwire.Logs))
	if err != nil || st.Messages == 0 || st.Messages >= n {
		t.Errorf("%d requests became %d messages (%v): no group was formed", n, st.Messages, err)
	}
	t.Logf("%d requests in %d messages", n, st.Messages)
}

// TestSpoolKeepsWhatItAcknowledged stops the spool, opens it again and reads.
func TestSpoolKeepsWhatItAcknowledged(t *testing.T) {
	cfg := testConfig(t, t.TempDir()).Spool
	s, stop := startSpool(t, cfg)
	for i := range 20 {
		if err := s.Accept(t.Context(), logBatch(t, i, 10)); err != nil {
			t.Fatal(err)
		}
	}
	epoch := s.epoch
	stop()
	if err := s.Accept(t.Context(), logBatch(t, 99, 10)); err == nil {
		t.Error("accepted after the stop")
	}
	s, _ = startSpool(t, cfg)
	if s.epoch != epoch {
		t.Error("another epoch for the same directory")
	}
	lane, err := s.conn.OpenLane(t.Context(), bus.LaneConfig{Stream: bus.SpoolStream(otlpwire.Logs), Name: "forward"})
	if err != nil {
		t.Fatal(err)
	}
	defer lane.Close()
	for i := 0; i < 20; {
		d, err := lane.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for item := range otlpwire.Items(d.Body) {
			if !strings.Contains(string(item), fmt.Sprintf("%d ", i)) {
				t.Fatalf("item %d: got %q", i, item)
			}
			i++
		}
	}
}

func TestFullSpoolRefusesAndTakesAgain(t *testing.T) {
	cfg := testConfig(t, t.TempDir()).Spool
	cfg.MaxBytes = 16 << 20
	s, _ := startSpool(t, cfg)
	var err error
	accepted := 0
	for i := 0; i < 20 && err == nil; i++ {
		if err = s.Accept(t.Context(), logBatch(t, i, 900<<10)); err == nil {
			accepted++
		}
	}
	if !errors.Is(err, receive.ErrFull) || accepted < 3 {
		t.Fatalf("after %d batches: %v, want %v", accepted, err, receive.ErrFull)
	}
	// Another signal has its own share.
	other := logBatch(t, 0, 10)
	other.Signal = otlpwire.Traces
	if err := s.Accept(t.Context(), other); err != nil {
		t.Errorf("traces are refused because logs are full: %v", err)
	}
	if err := s.conn.PurgeBelow(t.Context(), bus.SpoolStream(otlpwire.Logs), 3); err != nil {
		t.Fatal(err)
	}
	if err := s.Accept(t.Context(), logBatch(t, 0, 900<<10)); err != nil {
		t.Errorf("after the hub took some: %v", err)
	}
}

func TestDiskReserveRefuses(t *testing.T) {
	cfg := testConfig(t, t.TempDir()).Spool
	cfg.Reserve = 1 << 60 // no disk has that
	s, _ := startSpool(t, cfg)
	if err := s.Accept(t.Context(), logBatch(t, 0, 10)); !errors.Is(err, receive.ErrFull) || !strings.Contains(err.Error(), "free") {
		t.Errorf("got %v", err)
	}
}

func TestTwoEdgesOnOneDirectory(t *testing.T) {
	cfg := testConfig(t, t.TempDir()).Spool
	startSpool(t, cfg)
	second := newSpool(cfg, ledger.New(prometheus.NewRegistry()), quiet)
	if err := services.StartAndAwaitRunning(t.Context(), second.service()); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("got %v", err)
	}
}

// TestForwardKeepsOrderAcrossHubRestarts forwards while the hub is stopped and
// started; the stream holds every message once, in order.
func TestForwardKeepsOrderAcrossHubRestarts(t *testing.T) {
	hubCfg := broker.Config{Name: "hub", Dir: t.TempDir(), Listen: "127.0.0.1:0", Sync: true, MaxPayload: 8 << 20}
	hub, err := broker.Start(hubCfg, quiet)
	if err != nil {
		t.Fatal(err)
	}
	hubCfg.Listen = strings.TrimPrefix(hub.URL(), "nats://")
	top := bus.DefaultTopology()
	top.Partitions, top.MaxBytes = 1, 256<<20
	conn, err := bus.OpenHub(t.Context(), bus.Config{Name: "test", URL: hub.URL()}, top, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	cfg := testConfig(t, t.TempDir())
	cfg.Hub = bus.Config{URL: "nats://" + hubCfg.Listen, Name: "edge-as-1"}
	s, _ := startSpool(t, cfg.Spool)
	led := ledger.New(prometheus.NewRegistry())
	fwd := newForward(cfg, s, led, quiet).service()
	if err := services.StartAndAwaitRunning(t.Context(), fwd); err != nil {
		t.Fatal(err)
	}
	const n = 300
	for i := range n {
		if i%100 == 50 {
			hub.Stop()
		}
		if i%100 == 80 {
			if hub, err = broker.Start(hubCfg, quiet); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Accept(t.Context(), logBatch(t, i, 10)); err != nil {
			t.Fatal(err)
		}
	}
	defer func() { hub.Stop() }()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if !proc.Until(ctx, func() bool { return s.empty(ctx, otlpwire.Logs) && conn.Connected() }) {
		t.Error("the hub is back, but the spool is not empty")
	}
	if err := services.StopAndAwaitTerminated(context.Background(), fwd); err != nil {
		t.Fatal(err)
	}
	if got := testutil.ToFloat64(led.Of(otlpwire.Logs).Forwarded); got != n {
		t.Errorf("forwarded counter %v, want %d", got, n)
	}
	if st, err := s.conn.State(t.Context(), bus.SpoolStream(otlpwire.Logs)); err != nil || st.Messages != 0 {
		t.Errorf("the spool still holds %+v, %v", st, err)
	}
	lane, err := conn.OpenLane(t.Context(), bus.LaneConfig{Stream: "LOGS", Name: "check"})
	if err != nil {
		t.Fatal(err)
	}
	defer lane.Close()
	for i := 0; i < n; {
		d, err := lane.Next(ctx)
		if err != nil {
			t.Fatalf("item %d: %v", i, err)
		}
		if d.Claimed {
			i = 0
		}
		if d.Seq == 0 {
			continue
		}
		for item := range otlpwire.Items(d.Body) {
			if !strings.Contains(string(item), fmt.Sprintf("%d ", i)) {
				t.Fatalf("item %d: got %q", i, item)
			}
			i++
		}
		if d.Pending == 0 && i < n {
			t.Fatalf("the stream ends after %d of %d items", i, n)
		}
	}
}

func TestConfig(t *testing.T) {
	for want, change := range map[string]func(*Config){
		"":                            func(*Config) {},
		"instance.id is not set":      func(c *Config) { c.Instance.ID = "" },
		"NATS subject":                func(c *Config) { c.Instance.ID = "a.b" },
		"spool.durability":            func(c *Config) { c.Spool.Durability = "maybe" },
		"spool.compression":           func(c *Config) { c.Spool.Compression = "lzma" },
		"spool.max_bytes":             func(c *Config) { c.Spool.MaxBytes = 1 },
		"receive.http.listen":         func(c *Config) { c.Receive.HTTP.Listen = "0.0.0.0:4318" },
		"receive.max_in_flight_bytes": func(c *Config) { c.Receive.MaxInFlight = 1 },
	} {
		c := testConfig(t, "x")
		change(&c)
		err := c.Validate()
		if (want == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), want)) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	c := DefaultConfig()
	c.ApplyEnv(func(k string) string {
		return map[string]string{"INSTANCE_ID": "i", "CUSTOMER_ID": "c", "HUB_URL": "nats://h:1"}[k]
	})
	if c.Instance.ID != "i" || c.Instance.Customer != "c" || c.Hub.URL != "nats://h:1" || c.Instance.Namespace != "appserver" {
		t.Errorf("got %+v", c.Instance)
	}
}
