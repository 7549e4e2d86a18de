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

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
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
	log := quiet
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	s := newSpool(cfg, ledger.New(prometheus.NewRegistry()), log)
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
	text := fmt.Sprintf(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"stringValue":"n=%d %s"}}]}]}]}`, n, incompressible(size))
	p, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(text), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	return receive.Batch{Signal: otlpwire.Logs, Instance: "as-1", Items: 1, Payload: p}
}

// incompressible returns text that s2 cannot shrink much.
func incompressible(n int) string { return noise()[:n] }

var noise = sync.OnceValue(func() string {
	var b strings.Builder
	for x := uint64(88172645463325252); b.Len() < 1<<20; {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		fmt.Fprintf(&b, "%x", x)
	}
	return b.String()
})

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
	st, err := s.current.Load().conn.State(t.Context(), bus.SpoolStream(otlpwire.Logs))
	if err != nil || st.Messages == 0 || st.Messages >= n {
		t.Errorf("%d requests became %d messages (%v): no group was formed", n, st.Messages, err)
	}
	t.Logf("%d requests in %d messages", n, st.Messages)
}

// TestGroupIsCut: by bytes, items and linger; what does not fit begins the next one.
func TestGroupIsCut(t *testing.T) {
	cfg := testConfig(t, t.TempDir()).Spool
	cfg.MaxItems = 10
	s := newSpool(cfg, ledger.New(prometheus.NewRegistry()), quiet)
	put := func(items, bytes int) *request {
		return &request{batch: receive.Batch{Signal: otlpwire.Logs, Items: items, Payload: make([]byte, bytes)}}
	}
	gather := func(first *request, more ...*request) (int, int, *request) {
		for _, r := range more {
			s.queues[otlpwire.Logs] <- r
		}
		group, body, next := s.gather(otlpwire.Logs, []*request{first}, append([]byte(nil), first.batch.Payload...))
		for len(s.queues[otlpwire.Logs]) > 0 {
			<-s.queues[otlpwire.Logs]
		}
		return len(group), len(body), next
	}
	if n, size, next := gather(put(4, 100), put(4, 100), put(2, 100)); n != 3 || size != 300 || next != nil {
		t.Errorf("what fits: %d requests, %d bytes, next %v", n, size, next)
	}
	third := put(4, 100)
	if n, _, next := gather(put(4, 100), put(4, 100), third); n != 2 || next != third {
		t.Errorf("too many items: %d requests, next %v", n, next)
	}
	if n, size, next := gather(put(1, envelope.MaxPayload-10), put(1, 11)); n != 1 || size > envelope.MaxPayload || next == nil {
		t.Errorf("too many bytes: %d requests, %d bytes, next %v", n, size, next)
	}
	if n, _, next := gather(put(100, 10), put(1, 10)); n != 1 || next == nil {
		t.Errorf("one with more items than a group: %d requests, next %v", n, next)
	}
	s.cfg.Linger = 50 * time.Millisecond
	late := time.AfterFunc(5*time.Millisecond, func() { s.queues[otlpwire.Logs] <- put(1, 10) })
	defer late.Stop()
	if n, _, _ := gather(put(1, 10)); n != 2 {
		t.Errorf("%d requests in a group that waits for 50 ms", n)
	}
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
	epoch := s.current.Load().nonce()
	stop()
	if err := s.Accept(t.Context(), logBatch(t, 99, 10)); err == nil {
		t.Error("accepted after the stop")
	}
	s, _ = startSpool(t, cfg)
	if s.current.Load().nonce() != epoch {
		t.Error("another epoch for the same directory")
	}
	wantLogs(t, s, 0, 20)
}

// wantLogs reads the spool and wants the log records numbered from to to, in order.
func wantLogs(t testing.TB, s *spool, from, to int) {
	t.Helper()
	r, err := s.current.Load().conn.OpenReader(t.Context(), bus.SpoolStream(otlpwire.Logs), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for i := from; i < to; {
		d, err := r.Next(ctx)
		if err != nil {
			t.Fatalf("log record %d: %v", i, err)
		}
		body, err := envelope.Decompress(nil, d.Body, d.Header.Encoding)
		if err != nil {
			t.Fatal(err)
		}
		for item := range otlpwire.Items(body) {
			if !strings.Contains(string(item), fmt.Sprintf("n=%d ", i)) {
				t.Fatalf("log record %d: got %.40q", i, item)
			}
			i++
		}
		if d.Pending == 0 && i < to {
			t.Fatalf("the spool ends before log record %d", i)
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
	if err := s.current.Load().conn.PurgeBelow(t.Context(), bus.SpoolStream(otlpwire.Logs), 3); err != nil {
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

func TestConfig(t *testing.T) {
	for want, change := range map[string]func(*Config){
		"":                            func(*Config) {},
		"instance.id is not set":      func(c *Config) { c.Instance.ID = "" },
		"NATS subject":                func(c *Config) { c.Instance.ID = "a.b" },
		"spool.durability":            func(c *Config) { c.Spool.Durability = "maybe" },
		"spool.compression":           func(c *Config) { c.Spool.Compression = "lzma" },
		"spool.max_bytes":             func(c *Config) { c.Spool.MaxBytes = 1 },
		"spool.on_full":               func(c *Config) { c.Spool.OnFull = "forget" },
		"spool.shares":                func(c *Config) { c.Spool.Shares.Logs = 90 },
		"spool.linger":                func(c *Config) { c.Spool.Linger = time.Hour },
		"spool.retain_after_ack":      func(c *Config) { c.Spool.Retain = -1 },
		"hub.url":                     func(c *Config) { c.Hub.URL = "http://h:1" },
		"hub.creds":                   func(c *Config) { c.Hub.User, c.Hub.Token = "u", "t" },
		"hub.tls.ca_file":             func(c *Config) { c.Hub.TLS.CA = "nowhere" },
		"central.token":               func(c *Config) { c.Central.Endpoint = "https://h:4317" },
		"central.insecure":            func(c *Config) { c.Central.Endpoint, c.Central.Token = "http://h:4317", "t" },
		"local backends":              func(c *Config) { c.Local.File.Dir, c.Spool.Retain = "x", 0 },
		"local.loki.url":              func(c *Config) { c.Local.Loki.URL = "nonsense" },
		"central.protocol":            func(c *Config) { c.Central = CentralConfig{Endpoint: "https://h:1", Token: "t", Protocol: "x"} },
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
