package integration

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend"
	"github.com/penstock/penstock/test/backend/loki"
)

// binaries builds the commands once for all tests.
var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "penstock-bin-")
	if err != nil {
		return "", err
	}
	out, err := exec.Command("go", "build", "-C", filepath.Join("..", ".."), "-o", dir, "./cmd/...").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return dir, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := binaries(); err == nil {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

// process is a running command.
type process struct {
	*exec.Cmd
	out *logtest.Log
}

func run(t *testing.T, env []string, name string, args ...string) *process {
	t.Helper()
	dir, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{exec.Command(filepath.Join(dir, name), args...), new(logtest.Log)}
	p.Dir = t.TempDir()
	p.Env = append(os.Environ(), env...)
	p.Stdout, p.Stderr = p.out, p.out
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p.ProcessState == nil {
			_ = p.Process.Kill()
			_ = p.Wait()
		}
		if t.Failed() {
			t.Logf("%s %v:\n%s", name, args, tail(p.out.String(), 4<<10))
		}
	})
	return p
}

func (p *process) kill(t *testing.T) {
	t.Helper()
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = p.Wait()
}

// exit waits for the end and returns the exit code.
func (p *process) exit(t *testing.T, patience time.Duration) int {
	t.Helper()
	timer := time.AfterFunc(slow*patience, func() { t.Errorf("%v does not end", p.Args); _ = p.Process.Kill() })
	defer timer.Stop()
	_ = p.Wait()
	return p.ProcessState.ExitCode()
}

// upConfig writes a configuration of `penstock up` with ports that are free.
type upFiles struct {
	config, data, otlp, admin string
}

func newUp(t *testing.T) upFiles {
	t.Helper()
	f := upFiles{data: t.TempDir(), otlp: backend.FreeAddr(t), admin: backend.FreeAddr(t)}
	f.config = writeFile(t, "up.yaml", fmt.Sprintf(`
admin: {listen: %q}
nats: {listen: %q}
receive:
  grpc: {listen: %q}
  http: {listen: %q}
streams: {partitions: 2}
report_interval: 1s
`, f.admin, backend.FreeAddr(t), backend.FreeAddr(t), f.otlp))
	return f
}

func (f upFiles) start(t *testing.T, args ...string) *process {
	t.Helper()
	p := run(t, nil, "penstock", append([]string{"up", "-config.file", f.config, "-data-dir", f.data, "-instance-id", "as-9"}, args...)...)
	eventually(t, 60*time.Second, "up is ready", func() error { return get("http://"+f.admin+"/ready", nil) })
	return p
}

func get(url string, into *string) error {
	res, err := http.Get(url)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	if into != nil {
		*into = string(b)
	}
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", res.Status, b)
	}
	return err
}

// readmeCurl takes the body of the README's curl example.
func readmeCurl(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, after, found := strings.Cut(string(text), "-d '")
	body, _, closed := strings.Cut(after, "'")
	if !found || !closed {
		t.Fatal("README.md has no curl example with -d '…'")
	}
	return body
}

// TestReadmeExample sends the README's request to `penstock up` and finds it in
// traces.jsonl with the instance's attributes; the report and the metrics tell.
func TestReadmeExample(t *testing.T) {
	f := newUp(t)
	p := f.start(t)
	res, err := http.Post("http://"+f.otlp+"/v1/traces", "application/json", strings.NewReader(readmeCurl(t)))
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Fatal(res.Status)
	}
	path := filepath.Join(f.data, "traces.jsonl")
	var line []byte
	eventually(t, 30*time.Second, "the trace is in traces.jsonl", func() (err error) {
		if line, err = os.ReadFile(path); err == nil && len(line) == 0 {
			err = fmt.Errorf("%s is empty", path)
		}
		return err
	})
	for _, want := range []string{`"key":"instance.id","value":{"stringValue":"as-9"}`, `"key":"service.namespace","value":{"stringValue":"appserver"}`, `"code":2`} {
		if !bytes.Contains(line, []byte(want)) {
			t.Errorf("traces.jsonl lacks %s:\n%s", want, line)
		}
	}
	eventually(t, 10*time.Second, "the report counts it", func() error {
		if !strings.Contains(p.out.String(), "in 1 (") || !strings.Contains(p.out.String(), "delivered 1 ") {
			return fmt.Errorf("output: %s", p.out.String())
		}
		return nil
	})
	var metrics string
	if err := get("http://"+f.admin+"/metrics", &metrics); err != nil || !strings.Contains(metrics, `penstock_delivered_items_total{backend="file",signal="traces"} 1`) {
		t.Errorf("metrics: %v\n%s", err, metrics)
	}
	// Ctrl-C right after an answer: the stop drains, decisions included.
	for n := range 10 {
		if err := post(t.Context(), f.otlp, otlpwire.Traces, numbered(otlpwire.Traces, n)); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code := p.exit(t, 30*time.Second); code != 0 {
		t.Errorf("exit code %d after Ctrl-C", code)
	}
	if have := names(t, path, otlpwire.Traces); len(have) != 11 {
		t.Errorf("after the stop traces.jsonl holds %v, want the example and 0 to 9", have)
	}
	if !strings.Contains(p.out.String(), "in 11 (0/s)  kept 11 spans  sampled out 0  delivered 11  dead 0  lag 0 messages") {
		t.Errorf("the last line of the report does not say so: %s", tail(p.out.String(), 400))
	}
}

// TestKillNine kills `penstock up` again and again under load: every log record
// and every span that was acknowledged is in the files in the end.
func TestKillNine(t *testing.T) {
	f := newUp(t)
	p := f.start(t)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var mu sync.Mutex
	acked := map[otlpwire.Signal]map[string]bool{otlpwire.Traces: {}, otlpwire.Logs: {}}
	for _, sig := range []otlpwire.Signal{otlpwire.Traces, otlpwire.Logs} {
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				if post(context.Background(), f.otlp, sig, numbered(sig, n)) == nil {
					mu.Lock()
					acked[sig][strconv.Itoa(n)] = true
					mu.Unlock()
				} else {
					time.Sleep(10 * time.Millisecond) // the sender's own backoff
				}
			}
		})
	}
	const kills = 5
	for i := range kills {
		time.Sleep(time.Duration(300+170*i) * time.Millisecond) // the moments of the kills
		p.kill(t)
		p = f.start(t)
	}
	cancel()
	wg.Wait()
	eventually(t, 60*time.Second, "everything acknowledged is in the files", func() error {
		for sig, want := range acked {
			have := names(t, filepath.Join(f.data, sig.String()+".jsonl"), sig)
			missing := 0
			for n := range want {
				if !have[n] {
					missing++
				}
			}
			if missing > 0 || len(want) < kills {
				return fmt.Errorf("%v: %d of %d acknowledged items are missing", sig, missing, len(want))
			}
		}
		return nil
	})
	t.Logf("%d spans and %d log records acknowledged over %d kills, none missing", len(acked[otlpwire.Traces]), len(acked[otlpwire.Logs]), kills)
}

// names lists the span names or log bodies of a file; a line that a kill has
// cut short is passed over: its items must stand in another.
func names(t *testing.T, path string, sig otlpwire.Signal) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	file, err := os.Open(path)
	if err != nil {
		return out
	}
	defer func() { _ = file.Close() }()
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		var req struct {
			ResourceSpans []struct {
				ScopeSpans []struct{ Spans []struct{ Name string } }
			}
			ResourceLogs []struct {
				ScopeLogs []struct {
					LogRecords []struct{ Body struct{ StringValue string } }
				}
			}
		}
		if json.Unmarshal(lines.Bytes(), &req) != nil {
			continue
		}
		for _, r := range req.ResourceSpans {
			for _, s := range r.ScopeSpans {
				for _, sp := range s.Spans {
					out[sp.Name] = true
				}
			}
		}
		for _, r := range req.ResourceLogs {
			for _, s := range r.ScopeLogs {
				for _, rec := range s.LogRecords {
					out[rec.Body.StringValue] = true
				}
			}
		}
	}
	return out
}

// TestBadStarts has one row a mistake of an operator: the process says what is
// wrong and where, and ends.
func TestBadStarts(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	policies := writeFile(t, "policies.yaml", "policies:\n  - {name: a, type: latency}\n")
	up := newUp(t)
	for _, tc := range []struct {
		name string
		env  []string
		cmd  []string
		code int
		want string
	}{
		{"no instance id", nil, []string{"edge", "-config.check"}, 2, "instance.id is not set"},
		{"instance id that is no token", []string{"INSTANCE_ID=a.b"}, []string{"edge", "-config.check"}, 2, "NATS subject"},
		{"unknown key", []string{"INSTANCE_ID=a"}, []string{"edge", "-config.check", "-config.file", writeFile(t, "e.yaml", "spool:\n  dri: x\n")}, 2, "e.yaml:2: spool.dri: unknown key; known here: compression, dir, disk_reserve"},
		{"value out of bounds", []string{"INSTANCE_ID=a"}, []string{"edge", "-config.check", "-config.file", writeFile(t, "e.yaml", "spool:\n  max_bytes: 1MiB\nreceive:\n  http: {listen: \"0.0.0.0:4318\"}\n")}, 2, "e.yaml:2: spool.max_bytes is 1MiB, want at least 14MiB"},
		{"listening to all without TLS", []string{"INSTANCE_ID=a"}, []string{"edge", "-config.check", "-config.file", writeFile(t, "e.yaml", "receive:\n\n  http: {listen: \"0.0.0.0:4318\"}\n")}, 2, "e.yaml:3: receive.http.listen is 0.0.0.0:4318, which others can reach"},
		{"backend that is no URL", nil, []string{"sink", "-config.check", "-config.file", writeFile(t, "s.yaml", "loki:\n  url: nonsense\n")}, 2, "s.yaml:2: loki.url: backend URL"},
		{"no such file", nil, []string{"edge", "-config.file", "/does/not/exist.yaml"}, 2, "/does/not/exist.yaml"},
		{"unset variable", nil, []string{"router", "-config.check", "-config.file", writeFile(t, "r.yaml", "hub:\n  url: ${PENSTOCK_UNSET}\n")}, 2, "r.yaml:2: hub.url: environment variable PENSTOCK_UNSET is not set"},
		{"policy that does not parse", nil, []string{"penstock", "up", "-config.check", "-sampling.file", policies}, 2, "policies.yaml:2: policy \"a\": type is latency, but there is no section latency"},
		{"tokens that are none", []string{"CENTRAL_TOKENS_FILE=" + policies}, []string{"router"}, 2, "policies: unknown key; known here: tokens"},
		{"argument", nil, []string{"sink", "start"}, 2, `unexpected argument "start"`},
		{"flag", nil, []string{"sink", "-nonsense"}, 2, "flag provided but not defined"},
		{"unknown command", nil, []string{"penstock", "down"}, 2, `unknown command "down"`},
		{"port in use", nil, []string{"penstock", "up", "-data-dir", t.TempDir(), "-config.file", writeFile(t, "up.yaml", fmt.Sprintf("nats: {listen: %q}\nadmin: {listen: \"\"}\n", taken.Addr()))}, 1, "listen for NATS on " + taken.Addr().String()},
		{"valid", []string{"INSTANCE_ID=a"}, []string{"edge", "-config.check"}, 0, "configuration is valid"},
		{"valid up", nil, []string{"penstock", "up", "-config.check", "-config.file", up.config}, 0, "configuration is valid"},
		{"help", nil, []string{"penstock", "token", "-help"}, 0, "Usage: penstock token"},
		{"help of a role", nil, []string{"router", "-help"}, 0, "Usage: router"},
		{"version", nil, []string{"edge", "-version"}, 0, "edge devel go1"},
	} {
		p := run(t, append(tc.env, "PENSTOCK_TEST=1"), tc.cmd[0], tc.cmd[1:]...)
		code := p.exit(t, 30*time.Second)
		if code == tc.code && strings.Contains(p.out.String(), tc.want) {
			continue
		}
		t.Errorf("%s: exit code %d, want %d; output, want %q:\n%s", tc.name, code, tc.code, tc.want, p.out.String())
	}
}

// TestEdgeWithoutHub starts an edge whose hub is not there: it takes data, says
// once that it spools, and a second start finds the data.
func TestEdgeWithoutHub(t *testing.T) {
	log, text := newLog(t)
	dir := t.TempDir()
	addr := backend.FreeAddr(t)
	e := startEdge(t, log, "nats://"+addr, dir, edge.InstanceConfig{ID: "as-1"})
	for n := range 20 {
		if err := post(t.Context(), e.http, otlpwire.Logs, numbered(otlpwire.Logs, n)); err != nil {
			t.Fatal(err)
		}
	}
	e.stop()
	if n := strings.Count(text.String(), "hub unreachable, spooling"); n != 1 {
		t.Errorf("said %d times that the hub is away", n)
	}
	lok := loki.Start(t)
	p := startPipeline(t, func(c *sink.Config) { c.Loki.URL = lok.URL })
	startEdge(t, log, p.hub.url, dir, edge.InstanceConfig{ID: "as-1"})
	eventually(t, 30*time.Second, "the spooled items arrive", func() error {
		if n := len(lok.Entries()); n != 20 {
			return fmt.Errorf("%d of 20", n)
		}
		return nil
	})
}

func penstockBinary(t *testing.T) string {
	t.Helper()
	dir, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "penstock")
}
