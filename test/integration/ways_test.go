package integration

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/penstock/penstock/test/backend"
	"github.com/penstock/penstock/test/backend/loki"
	"github.com/penstock/penstock/test/backend/tempo"
)

// backendSet is one of each kind. Prometheus is a server that takes every write.
type backendSet struct {
	tempo *tempo.Server
	loki  *loki.Server
	prom  *httptest.Server

	mu     sync.Mutex
	writes int
}

func startBackends(t *testing.T) *backendSet {
	t.Helper()
	b := &backendSet{tempo: tempo.Start(t), loki: loki.Start(t)}
	b.prom = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/api/v1/write" {
			b.mu.Lock()
			b.writes++
			b.mu.Unlock()
		}
		w.Header().Set("X-Prometheus-Remote-Write-Samples-Written", "1000000")
		w.WriteHeader(http.StatusNoContent)
	}))
	t.Cleanup(b.prom.Close)
	return b
}

// reached names the backendSet that have got something.
func (b *backendSet) reached() (names []string) {
	b.mu.Lock()
	writes := b.writes
	b.mu.Unlock()
	for name, has := range map[string]bool{"tempo": len(b.tempo.Spans()) > 0, "prometheus": writes > 0, "loki": len(b.loki.Entries()) > 0} {
		if has {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

var backendNames = []string{"loki", "prometheus", "tempo"}

// ways are how a backend is named: flags, variables, and lines of YAML.
func (b *backendSet) way(way, name string) (flag, env, yaml string) {
	values := map[string][3]string{
		"tempo":      {"-tempo-endpoint=" + b.tempo.Addr, "TEMPO_ENDPOINT=" + b.tempo.Addr, "tempo: {endpoint: '" + b.tempo.Addr + "'}\n"},
		"prometheus": {"-prometheus-url=" + b.prom.URL, "PROMETHEUS_URL=" + b.prom.URL, "prometheus: {url: '" + b.prom.URL + "'}\n"},
		"loki":       {"-loki-url=" + b.loki.URL, "LOKI_URL=" + b.loki.URL, "loki: {url: '" + b.loki.URL + "'}\n"},
	}[name]
	switch way {
	case "flag":
		return values[0], "", ""
	case "environment":
		return "", values[1], ""
	}
	return "", "", values[2]
}

// TestEveryWayToNameABackend runs penstock up, and the roles as processes of their own,
// with every backend named by flag, by variable and by file, and sends all signals.
func TestEveryWayToNameABackend(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"flag", "environment", "file"} {
		t.Run("up/"+way, func(t *testing.T) {
			t.Parallel()
			b := startBackends(t)
			f := newUp(t)
			var flags, env []string
			before, err := os.ReadFile(f.config)
			if err != nil {
				t.Fatal(err)
			}
			text := string(before)
			for _, name := range backendNames {
				flag, variable, yaml := b.way(way, name)
				if text += yaml; flag != "" {
					flags = append(flags, flag)
				}
				if variable != "" {
					env = append(env, variable)
				}
			}
			f.config = writeFile(t, "up.yaml", text)
			run(t, env, "penstock", append([]string{"up", "-config.file", f.config, "-data-dir", f.data, "-instance-id", "as-9"}, flags...)...)
			reaches(t, b, f.admin, f.otlp)
		})
	}
	for _, way := range []string{"environment", "file"} {
		t.Run("roles/"+way, func(t *testing.T) {
			t.Parallel()
			b := startBackends(t)
			log, _ := newLog(t)
			hub := startHub(t, log)
			otlp, admin := backend.FreeAddr(t), backend.FreeAddr(t)
			common := fmt.Sprintf("hub: {url: '%s'}\n", hub.url)
			central := common + "admin: {listen: ''}\nstreams: {partitions: 2}\n"
			env, sink := []string(nil), central
			for _, name := range backendNames {
				_, variable, yaml := b.way(way, name)
				if sink += yaml; variable != "" {
					env = append(env, variable)
				}
			}
			run(t, env, "sink", "-config.file", writeFile(t, "sink.yaml", sink))
			run(t, nil, "router", "-config.file", writeFile(t, "router.yaml", central))
			run(t, nil, "edge", "-config.file", writeFile(t, "edge.yaml", common+fmt.Sprintf(
				"admin: {listen: %q}\ninstance: {id: as-9}\nreceive: {grpc: {listen: ''}, http: {listen: %q}}\nspool: {dir: %q}\n", admin, otlp, filepath.Join(t.TempDir(), "spool"))))
			reaches(t, b, admin, otlp)
		})
	}
	t.Run("edge/local", func(t *testing.T) {
		t.Parallel()
		b := startBackends(t)
		otlp, admin := backend.FreeAddr(t), backend.FreeAddr(t)
		local := "local:\n"
		for _, name := range backendNames {
			_, _, yaml := b.way("file", name)
			local += "  " + yaml
		}
		run(t, nil, "edge", "-config.file", writeFile(t, "edge.yaml", local+fmt.Sprintf(
			"hub: {url: 'nats://127.0.0.1:1'}\nadmin: {listen: %q}\ninstance: {id: as-9}\nreceive: {grpc: {listen: ''}, http: {listen: %q}}\nspool: {dir: %q}\ndrain_timeout: 1s\n", admin, otlp, filepath.Join(t.TempDir(), "spool"))))
		reaches(t, b, admin, otlp)
	})
}

// reaches waits until the process listens, sends the shop's traffic once and waits until
// every backend has some of it.
func reaches(t *testing.T, b *backendSet, admin, otlp string) {
	t.Helper()
	eventually(t, 60*time.Second, "the process is ready", func() error { return get("http://"+admin+"/services", nil) })
	gen := run(t, nil, "penstock", "generate", "-endpoint", "http://"+otlp, "-rate", "20", "-for", "2s", "-wait", "30s")
	if code := gen.exit(t, 60*time.Second); code != 0 {
		t.Fatalf("generate ended with %d", code)
	}
	eventually(t, 60*time.Second, "every backend has something", func() error {
		if got := b.reached(); !slices.Equal(got, backendNames) {
			return fmt.Errorf("only %s", strings.Join(got, ", "))
		}
		return nil
	})
}
