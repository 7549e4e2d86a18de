package edge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/prometheus/client_golang/prometheus"

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
	messages := s.current.Load().logs[otlpwire.Logs].State().Records()
	if messages == 0 || messages >= n {
		t.Errorf("%d requests became %d messages: no group was formed", n, messages)
	}
	t.Logf("%d requests in %d messages", n, messages)
}

// TestGroupIsCut: by bytes and items; what does not fit begins the next one.
func TestGroupIsCut(t *testing.T) {
	type cut struct{ requests, items, bytes int }
	put := func(items, bytes int) receive.Batch {
		return receive.Batch{Signal: otlpwire.Logs, Items: items, Payload: make([]byte, bytes)}
	}
	// written returns the groups that requests become which arrive while one is written.
	written := func(all ...receive.Batch) (cuts []cut) {
		began, goOn := make(chan struct{}), make(chan struct{})
		q := newGroups(10, 0, func(g *group) error {
			if len(cuts) == 0 {
				close(began)
				<-goOn
			}
			cuts = append(cuts, cut{g.requests, g.items, len(g.body)})
			return nil
		})
		var wg sync.WaitGroup
		join := func(b receive.Batch) {
			g, first := q.add(b)
			wg.Go(func() {
				if first {
					q.lead(g)
				}
				<-g.done
			})
		}
		join(put(1, 1))
		<-began
		for _, b := range all {
			join(b)
		}
		close(goOn)
		wg.Wait()
		return cuts[1:]
	}
	sum := func(cuts []cut) (s cut) {
		for _, g := range cuts {
			s = cut{s.requests + g.requests, s.items + g.items, s.bytes + g.bytes}
		}
		return s
	}
	if got := written(put(4, 100), put(4, 100), put(2, 100)); !slices.Equal(got, []cut{{3, 10, 300}}) {
		t.Errorf("what fits: %v", got)
	}
	if got := written(put(4, 100), put(4, 100), put(4, 100)); len(got) != 2 || sum(got) != (cut{3, 12, 300}) {
		t.Errorf("too many items: %v", got)
	}
	if got := written(put(1, envelope.MaxPayload-10), put(1, 11)); len(got) != 2 || sum(got) != (cut{2, 2, envelope.MaxPayload + 1}) {
		t.Errorf("too many bytes: %v", got)
	}
	if got := written(put(100, 10), put(1, 10)); len(got) != 2 || sum(got) != (cut{2, 101, 20}) {
		t.Errorf("one with more items than a group: %v", got)
	}
}

// TestGroupsLinger: a request waits for others as long as it is told to, or until one
// does not fit.
func TestGroupsLinger(t *testing.T) {
	sizes := make(chan int, 2)
	q := newGroups(10, 100*time.Millisecond, func(g *group) error { sizes <- g.requests; return nil })
	b := receive.Batch{Signal: otlpwire.Logs, Items: 1, Payload: []byte("x")}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() { _ = q.join(t.Context(), b) })
	}
	wg.Wait()
	if n := <-sizes; n != 2 {
		t.Errorf("%d requests in a group that waits for 100 ms", n)
	}
	q.linger, b.Items = time.Hour, 10
	for range 2 {
		wg.Go(func() { _ = q.join(t.Context(), b) })
	}
	if n := <-sizes; n != 1 {
		t.Errorf("%d requests in a full group", n)
	}
	q.state.Lock()
	close(q.state.open.closed) // as a third would
	q.state.Unlock()
	wg.Wait()
}

// TestWhoWaitsForAGroupMayLeave: a sender that has given up holds nothing, and its
// request is written all the same.
func TestWhoWaitsForAGroupMayLeave(t *testing.T) {
	began, goOn := make(chan struct{}, 2), make(chan struct{})
	items := 0
	q := newGroups(10, 0, func(g *group) error { began <- struct{}{}; <-goOn; items += g.items; return nil })
	b := receive.Batch{Signal: otlpwire.Logs, Items: 1, Payload: []byte("x")}
	var wg sync.WaitGroup
	wg.Go(func() { _ = q.join(t.Context(), b) })
	<-began
	second, _ := q.add(b) // its goroutine would lead
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := q.join(ctx, b); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	wg.Go(func() { q.lead(second) })
	close(goOn)
	wg.Wait()
	if items != 3 {
		t.Errorf("%d requests were written of 3", items)
	}
}

// TestAWriterThatPanics tells nobody success.
func TestAWriterThatPanics(t *testing.T) {
	joined := make(chan struct{})
	q := newGroups(10, 0, func(*group) error { <-joined; panic("BUG") })
	b := receive.Batch{Signal: otlpwire.Logs, Items: 1, Payload: []byte("x")}
	g, _ := q.add(b)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer func() { _ = recover() }()
		q.lead(g)
	})
	close(joined)
	<-g.done
	if !errors.Is(g.err, errNotWritten) {
		t.Errorf("who waits is told %v", g.err)
	}
	wg.Wait()
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
	r := s.current.Load().read(otlpwire.Logs, 0)
	defer r.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for i := from; i < to; {
		d, err := r.next(ctx)
		if err != nil {
			t.Fatalf("log record %d: %v", i, err)
		}
		body, err := envelope.Decompress(nil, d.Body, d.header.Encoding)
		if err != nil {
			t.Fatal(err)
		}
		for item := range otlpwire.Items(body) {
			if !strings.Contains(string(item), fmt.Sprintf("n=%d ", i)) {
				t.Fatalf("log record %d: got %.40q", i, item)
			}
			i++
		}
		if d.Behind == 0 && i < to {
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
	if err := s.current.Load().logs[otlpwire.Logs].Release(2); err != nil {
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
