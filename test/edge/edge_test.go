// Package edge runs the edge as a process on disks that fail and against hubs that
// can be reached in every way there is.
package edge

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	collectorlogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/test/daemon"
)

var binary = daemon.NewBinary("", "edge")

func TestMain(m *testing.M) { binary.Main(m) }

// edge is the process under test and what it has acknowledged.
type edge struct {
	daemon.Process
	t     *testing.T
	admin string
	http  string
	next  int
	acked []int
}

// newEdge writes a configuration; more is YAML behind it. before is put before the
// command, such as strace.
func newEdge(t *testing.T, hubURL, spool, more string, before ...string) *edge {
	t.Helper()
	bin, err := binary.Path()
	if err != nil {
		t.Fatal(err)
	}
	e := &edge{t: t, admin: daemon.FreeAddr(), http: daemon.FreeAddr()}
	config := fmt.Sprintf("admin: {listen: %q}\ninstance: {id: as-1}\nreceive: {grpc: {listen: \"\"}, http: {listen: %q}}\ndrain_timeout: 1s\n", e.admin, e.http)
	if !strings.Contains(more, "hub:") {
		config += fmt.Sprintf("hub: {url: %q}\n", hubURL)
	}
	if !strings.Contains(more, "spool:") {
		config += fmt.Sprintf("spool: {dir: %q, max_bytes: 32MiB, disk_reserve: 1MiB}\n", spool)
	}
	path := filepath.Join(t.TempDir(), "edge.yaml")
	if err := os.WriteFile(path, []byte(config+more), 0o600); err != nil {
		t.Fatal(err)
	}
	e.Args = append(before, bin, "-config.file", path)
	e.Log = filepath.Join(filepath.Dir(path), "log")
	t.Cleanup(func() {
		if e.Done != nil {
			e.Signal(syscall.SIGCONT)
			e.End(syscall.SIGKILL)
		}
		if t.Failed() {
			t.Logf("the edge's log:\n%s", e.log())
		}
	})
	return e
}

func (e *edge) log() string {
	text, _ := os.ReadFile(e.Log)
	return string(text[max(0, len(text)-6<<10):])
}

func (e *edge) start() {
	e.t.Helper()
	if err := e.Start(); err != nil {
		e.t.Fatal(err)
	}
	if err := daemon.Until(e.t.Context(), 30*time.Second, func() error { return daemon.Running(e.admin) }); err != nil {
		e.t.Fatalf("the edge does not start: %v\n%s", err, e.log())
	}
}

var client = &http.Client{Timeout: 15 * time.Second}

// send posts the next number and returns the status; 0 for none.
func (e *edge) send() int { return e.post(strings.Repeat("x", 200)) }

// noise is text that does not compress much, another for every n.
func noise(n, size int) string {
	b := make([]byte, size)
	for i := range b {
		b[i] = "abcdefghijklmnopqrstuvwxyzABCDEF"[(uint64(i+n*size+1)*0x9E3779B97F4A7C15>>59)&31]
	}
	return string(b)
}

func (e *edge) post(pad string) int {
	n := e.next
	e.next++
	code, retryAfter := post(e.http, n, pad)
	if code == http.StatusOK {
		e.acked = append(e.acked, n)
	}
	if code == http.StatusServiceUnavailable && retryAfter == "" {
		e.t.Error("503 without Retry-After")
	}
	return code
}

// post sends number n and returns the status, 0 for none, and the header Retry-After.
func post(addr string, n int, pad string) (code int, retryAfter string) {
	body := fmt.Sprintf(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"intValue":%d},"attributes":[{"key":"pad","value":{"stringValue":%q}}]}]}]}]}`, n, pad)
	res, err := client.Post("http://"+addr+"/v1/logs", "application/json", strings.NewReader(body))
	if err != nil {
		return 0, ""
	}
	_, _ = io.Copy(io.Discard, res.Body)
	_ = res.Body.Close()
	return res.StatusCode, res.Header.Get("Retry-After")
}

// sendAll wants n requests to be taken.
func (e *edge) sendAll(n int) {
	e.t.Helper()
	for range n {
		if code := e.send(); code != http.StatusOK {
			e.t.Fatalf("answered %d, want 200", code)
		}
	}
}

// until sends until a request is answered with the code.
func (e *edge) until(code int) {
	e.t.Helper()
	if err := daemon.Until(e.t.Context(), 30*time.Second, func() error {
		if got := e.send(); got != code {
			return fmt.Errorf("answered %d, want %d", got, code)
		}
		return nil
	}); err != nil {
		e.t.Fatal(err)
	}
}

// startHub runs a hub until the test ends.
func startHub(t *testing.T) (url string) {
	t.Helper()
	b, err := broker.Start(broker.Config{Name: "hub", Dir: t.TempDir(), Listen: "127.0.0.1:0", MaxPayload: 8 << 20}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	operator(t, bus.Config{URL: b.URL(), Name: "operator"}) // makes the streams
	return b.URL()
}

func operator(t *testing.T, cfg bus.Config) *bus.Conn {
	t.Helper()
	top := bus.DefaultTopology()
	top.Partitions, top.MaxBytes = 1, 256<<20
	conn, err := bus.OpenHub(t.Context(), cfg, top, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn
}

// arrived wants the hub to hold everything that was acknowledged, in order.
func (e *edge) arrived(hub bus.Config) {
	e.t.Helper()
	if got := e.held(hub); !slices.IsSorted(got) {
		e.t.Error("out of order at the hub")
	}
}

// held wants the hub to hold everything that was acknowledged, and returns what it holds.
func (e *edge) held(hub bus.Config) (got []int) {
	e.t.Helper()
	hub.Name = "operator"
	conn := operator(e.t, hub)
	err := daemon.Until(e.t.Context(), 30*time.Second, func() error {
		got = stored(e.t, conn)
		missing := 0
		for _, n := range e.acked {
			if !slices.Contains(got, n) {
				missing++
			}
		}
		if missing > 0 {
			return fmt.Errorf("%d of %d acknowledged are not at the hub", missing, len(e.acked))
		}
		return nil
	})
	if err != nil {
		e.t.Error(err)
	}
	if len(e.acked) == 0 {
		e.t.Error("nothing was acknowledged")
	}
	return got
}

// stored reads the numbers that the hub holds; what came twice counts once.
func stored(t *testing.T, conn *bus.Conn) (all []int) {
	t.Helper()
	state, err := conn.State(t.Context(), "LOGS")
	if err != nil || state.Messages == 0 {
		return nil
	}
	r, err := conn.OpenReader(t.Context(), "LOGS", 1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	seen := map[int]bool{}
	for {
		d, err := r.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		body, err := envelope.Decompress(nil, d.Body, d.Header.Encoding)
		if err != nil {
			t.Fatal(err)
		}
		var m collectorlogs.ExportLogsServiceRequest
		if err := proto.Unmarshal(body, &m); err != nil {
			t.Fatal(err)
		}
		for _, res := range m.GetResourceLogs() {
			for _, sc := range res.GetScopeLogs() {
				for _, rec := range sc.GetLogRecords() {
					if n := int(rec.GetBody().GetIntValue()); !seen[n] {
						seen[n] = true
						all = append(all, n)
					}
				}
			}
		}
		if d.Pending == 0 {
			return all
		}
	}
}

// away is the URL of a hub that is not there.
const away = "nats://127.0.0.1:1"

func metric(t *testing.T, e *edge, name string, sig otlpwire.Signal) string {
	t.Helper()
	v, err := daemon.Metric(e.admin, fmt.Sprintf("%s{signal=%q}", name, sig))
	if err != nil {
		t.Fatal(err)
	}
	return v
}
