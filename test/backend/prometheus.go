// Package backend starts the real Prometheus for tests; its folders are the
// backends that tests cannot have as they are.
package backend

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/test/daemon"
)

// Prometheus is a running server.
type Prometheus struct {
	URL string
}

// StartPrometheus runs Debian's prometheus on loopback until the test ends. The
// test is skipped, by name, where there is none.
func StartPrometheus(t testing.TB) *Prometheus {
	t.Helper()
	return StartPrometheusWith(t, "")
}

// StartPrometheusWith adds lines to its configuration, and flags.
func StartPrometheusWith(t testing.TB, lines string, flags ...string) *Prometheus {
	t.Helper()
	bin, err := exec.LookPath("prometheus")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("prometheus is not installed")
		}
		t.Skip("prometheus is not installed: apt-get install prometheus")
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(config, []byte("global: {scrape_interval: 1h}\n"+lines), 0o600); err != nil {
		t.Fatal(err)
	}
	addr := FreeAddr(t)
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, append([]string{"--web.listen-address=" + addr, "--web.enable-remote-write-receiver",
		"--storage.tsdb.path=" + filepath.Join(dir, "data"), "--config.file=" + config}, flags...)...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait(); _ = log.Close() })
	p := &Prometheus{URL: "http://" + addr}
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		res, err := http.Get(p.URL + "/-/ready")
		if err == nil {
			_ = res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return p
			}
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(log.Name())
			t.Fatalf("prometheus is not ready: %v\n%s", err, text)
		}
	}
}

// FreeAddr returns a loopback address that nothing listens on.
func FreeAddr(t testing.TB) string {
	t.Helper()
	return daemon.FreeAddr()
}

// Sample is one element of an instant vector.
type Sample struct {
	Metric map[string]string `json:"metric"`
	Value  [2]any            `json:"value"`
}

// Query runs an instant query.
func (p *Prometheus) Query(query string) ([]Sample, error) {
	var out struct {
		Result []Sample `json:"result"`
	}
	err := p.get("/api/v1/query", url.Values{"query": {query}}, &out)
	return out.Result, err
}

// Series runs a series look-up, as Grafana's label_values does.
func (p *Prometheus) Series(match string) ([]map[string]string, error) {
	var out []map[string]string
	err := p.get("/api/v1/series", url.Values{"match[]": {match}}, &out)
	return out, err
}

// Counter returns the sum of one of its own metrics, over all labels.
func (p *Prometheus) Counter(name string) (sum float64, err error) {
	res, err := http.Get(p.URL + "/metrics")
	if err != nil {
		return 0, err
	}
	defer func() { _ = res.Body.Close() }()
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, 1<<20)
	found := false
	for lines.Scan() {
		rest, ok := strings.CutPrefix(lines.Text(), name)
		if !ok || rest == "" || rest[0] != ' ' && rest[0] != '{' {
			continue
		}
		v, err := strconv.ParseFloat(rest[strings.LastIndexByte(rest, ' ')+1:], 64)
		if err != nil {
			return 0, err
		}
		sum, found = sum+v, true
	}
	if err := lines.Err(); err != nil || !found {
		return 0, fmt.Errorf("prometheus has no metric %s (%v)", name, err)
	}
	return sum, nil
}

func (p *Prometheus) get(path string, q url.Values, into any) error {
	res, err := http.Get(p.URL + path + "?" + q.Encode())
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	var answer struct {
		Status string
		Error  string
		Data   json.RawMessage
	}
	if err := json.Unmarshal(text, &answer); err != nil || answer.Status != "success" {
		return fmt.Errorf("%s %s: %s", path, res.Status, text)
	}
	return json.Unmarshal(answer.Data, into)
}
