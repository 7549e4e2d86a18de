package sink

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink/export"
)

// picky is a backend that refuses payloads that hold a poisoned line, and fails a given number of times.
type picky struct {
	mu     sync.Mutex
	stored []string
	writes int
	fail   int
}

func (p *picky) Name() string { return "loki" }
func (p *picky) Close() error { return nil }

func (p *picky) Write(_ context.Context, _ string, payload []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.writes++
	if p.fail > 0 {
		p.fail--
		return errors.New("not now")
	}
	if bytes.Contains(payload, []byte("poison")) {
		return fault.Permanent(ledger.DeadRefused, errors.New("400: entry refused"))
	}
	for item := range otlpwire.Items(payload) {
		p.stored = append(p.stored, string(item))
	}
	return nil
}

func testExporter(t *testing.T, w backend.Writer) (*export.Exporter, *bus.Conn) {
	return testPartitions(t, w, 1)
}

func testPartitions(t *testing.T, w backend.Writer, n int) (*export.Exporter, *bus.Conn) {
	t.Helper()
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	b, err := broker.Start(broker.Config{Name: "hub", Dir: t.TempDir(), MaxPayload: 2 << 20}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	top := bus.DefaultTopology()
	top.Partitions, top.MaxBytes = n, 64<<20
	conn, err := bus.OpenHub(t.Context(), bus.Config{Name: "sink", InProcess: b}, top, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	d := &export.Exporter{Signal: otlpwire.Logs, Writer: w, Conn: func() *bus.Conn { return conn }, Ledger: ledger.New(prometheus.NewRegistry()), Log: quiet, Quota: new(bus.Quota)}
	d.Count = liveCounterOf(d)
	return d, conn
}

func liveCounterOf(d *export.Exporter) counter {
	return liveCounter{d.Ledger, d.Signal, d.Writer.Name()}
}

func lines(t *testing.T, texts ...string) []byte {
	t.Helper()
	var recs []string
	for _, s := range texts {
		recs = append(recs, fmt.Sprintf(`{"body":{"stringValue":%q}}`, s))
	}
	p, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[`+strings.Join(recs, ",")+`]}]}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestOnlyTheCulpritIsDeadLettered puts one poisoned line among a hundred.
func TestOnlyTheCulpritIsDeadLettered(t *testing.T) {
	w := &picky{fail: 2}
	d, conn := testExporter(t, w)
	var texts []string
	for i := range 100 {
		texts = append(texts, fmt.Sprintf("line %03d", i))
	}
	texts[37] = "poison"
	if !d.Write(t.Context(), "as-1", lines(t, texts...), len(texts), export.Origin{Stream: bus.Stream(otlpwire.Logs), Seq: 1, Arrival: 7}) {
		t.Fatal("not finished")
	}
	if len(w.stored) != 99 || w.writes > 2+2*7+2 {
		t.Errorf("%d lines stored in %d writes", len(w.stored), w.writes)
	}
	for i := 1; i < len(w.stored); i++ {
		if w.stored[i] < w.stored[i-1] {
			t.Fatalf("order is lost: %q after %q", w.stored[i], w.stored[i-1])
		}
	}
	led := d.Ledger.Of(otlpwire.Logs)
	if n, m := testutil.ToFloat64(led.Delivered("loki")), testutil.ToFloat64(led.Dead(ledger.DeadRefused)); n != 99 || m != 1 {
		t.Errorf("delivered %v, dead %v", n, m)
	}
	lane, err := conn.OpenLane(t.Context(), bus.LaneConfig{Stream: bus.DeadLetter, Name: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer lane.Close()
	if d, err := lane.Next(t.Context()); err != nil || !d.Claimed {
		t.Fatalf("%+v, %v", d, err)
	}
	dead, err := lane.Next(t.Context())
	if err != nil || dead.Subject != "dead.logs.as-1" || dead.Header.Items != 1 || !bytes.Contains(dead.Body, []byte("poison")) {
		t.Errorf("dead letter %+v, %v", dead, err)
	}
}

func TestWriteEndsWithItsContext(t *testing.T) {
	w := &picky{fail: 1 << 30}
	d, _ := testExporter(t, w)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if d.Write(ctx, "as-1", lines(t, "a"), 1, export.Origin{}) {
		t.Error("a failing backend has taken data")
	}
	if w.writes < 2 {
		t.Errorf("tried %d times", w.writes)
	}
}

func TestConfig(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.yaml")
	if err := os.WriteFile(bad, []byte("policies:\n  - {name: a, type: nonsense}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Config){
		"":                                 func(*Config) {},
		"bad.yaml:2":                       func(c *Config) { c.Sampling.File = bad },
		"no such file":                     func(c *Config) { c.Sampling.File = "/does/not/exist" },
		"hub.url":                          func(c *Config) { c.Hub.URL = "http://h:4222" },
		"hub.creds":                        func(c *Config) { c.Hub.User, c.Hub.Token = "u", "t" },
		"tempo.endpoint":                   func(c *Config) { c.Tempo.Endpoint = "nonsense" },
		"prometheus":                       func(c *Config) { c.Prometheus.URL = "nonsense" },
		"loki":                             func(c *Config) { c.Loki.URL = "file:///etc/passwd" },
		"streams.max_age":                  func(c *Config) { c.Streams.MaxAge = 1 },
		"sampling.max_bytes_per_partition": func(c *Config) { c.Sampling.MaxBytes = 0 },
		"aside.max_instances":              func(c *Config) { c.Aside.MaxInstances = -1 },
		"aside.slow_after":                 func(c *Config) { c.Aside.SlowAfter = time.Hour },
		"requests_per_lane":                func(c *Config) { c.Requests = 0 },
		"poison.after":                     func(c *Config) { c.Poison.After = -1 },
		"poison.tries":                     func(c *Config) { c.Poison.Tries = 2 },
	} {
		c := DefaultConfig()
		change(&c)
		err := c.Validate()
		if (want == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), want)) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}
