package backend

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestTakes asks backends that answer as the real ones do, and some that do not.
func TestTakes(t *testing.T) {
	now := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	prometheus := func(window string) string {
		yaml := "global:\n  scrape_interval: 1m\n"
		if window != "" {
			yaml += "storage:\n  tsdb:\n    out_of_order_time_window: " + window + "\n"
		}
		b, _ := json.Marshal(map[string]any{"status": "success", "data": map[string]string{"yaml": yaml}})
		return string(b)
	}
	loki := func(limits, ingester string) string {
		return "target: all\nlimits_config:\n" + limits + "ingester:\n  flush_op_timeout: 10m0s\n" + ingester
	}
	for _, tc := range []struct {
		name   string
		sig    otlpwire.Signal
		status int
		page   string
		age    time.Duration
		ok     bool
		text   string // a part of it
		fails  string // a part of the error
	}{
		{name: "prometheus, no window", sig: otlpwire.Metrics, page: prometheus(""), age: time.Minute, text: "up to 0s old"},
		{name: "prometheus, a short window", sig: otlpwire.Metrics, page: prometheus("30m"), age: time.Hour, text: "out_of_order_time_window to 3h"},
		{name: "prometheus, a long window", sig: otlpwire.Metrics, page: prometheus("1d"), age: time.Hour, ok: true},
		{name: "prometheus, a window that is none", sig: otlpwire.Metrics, page: prometheus("long"), age: time.Hour, fails: "out_of_order_time_window"},
		{name: "prometheus, no JSON", sig: otlpwire.Metrics, page: "<html>", age: time.Hour, fails: "configuration"},
		{name: "something else", sig: otlpwire.Metrics, status: 404, page: "no such page", age: time.Hour, fails: "404"},
		{name: "loki by default", sig: otlpwire.Logs, page: loki("", ""), age: 59 * time.Minute, ok: true},
		{name: "loki by default, older", sig: otlpwire.Logs, page: loki("", ""), age: 61 * time.Minute, text: "max_chunk_age"},
		{name: "loki with large chunks", sig: otlpwire.Logs, page: loki("", "  max_chunk_age: 48h0m0s\n"), age: 23 * time.Hour, ok: true},
		{name: "loki, too old", sig: otlpwire.Logs, page: loki("  reject_old_samples_max_age: 1d\n", "  max_chunk_age: 1w\n"), age: 25 * time.Hour, text: "reject_old_samples_max_age"},
		{name: "loki, any age", sig: otlpwire.Logs, page: loki("  reject_old_samples: false\n  reject_old_samples_max_age: 1d\n", "  max_chunk_age: 1w\n"), age: 25 * time.Hour, ok: true},
		{name: "loki, in order only", sig: otlpwire.Logs, page: loki("  unordered_writes: false\n", ""), age: time.Minute, text: "unordered_writes"},
		{name: "loki, no YAML", sig: otlpwire.Logs, page: "\t<html>", age: time.Hour, fails: "configuration"},
		{name: "tempo by default", sig: otlpwire.Traces, page: "target: all\n", age: time.Hour, text: "it is 2m"},
		{name: "tempo with slack", sig: otlpwire.Traces, page: "storage:\n  trace:\n    wal:\n      ingestion_time_range_slack: 2h0m0s\n", age: time.Hour, ok: true},
		{name: "tempo is away", sig: otlpwire.Traces, status: 503, age: time.Hour, fails: "503"},
	} {
		paths := map[otlpwire.Signal]string{otlpwire.Metrics: "/api/v1/status/config", otlpwire.Logs: "/config", otlpwire.Traces: "/status/config"}
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet || r.URL.Path != paths[tc.sig] {
				t.Errorf("%s: %s %s", tc.name, r.Method, r.URL)
			}
			if tc.status != 0 {
				w.WriteHeader(tc.status)
			}
			_, _ = fmt.Fprint(w, tc.page)
		}))
		cfg := DefaultConfig()
		cfg.Prometheus.URL, cfg.Loki.URL, cfg.Tempo.Endpoint, cfg.Tempo.StatusURL = srv.URL, srv.URL+"/loki/api/v1/push", "localhost:4317", srv.URL
		w, err := cfg.Open(tc.sig)
		if err != nil {
			t.Fatal(err)
		}
		ok, text, err := w.(Asked).Takes(t.Context(), now.Add(-tc.age), now)
		if ok != tc.ok || !strings.Contains(text, tc.text) || (err != nil) != (tc.fails != "") || (err != nil && !strings.Contains(err.Error(), tc.fails)) {
			t.Errorf("%s: %v, %q, %v", tc.name, ok, text, err)
		}
		srv.Close()
		_ = w.Close()
	}
	// A Tempo of which no page is known takes everything, with a remark.
	cfg := DefaultConfig()
	cfg.Tempo.Endpoint = "localhost:4317"
	w, err := cfg.Open(otlpwire.Traces)
	if err != nil {
		t.Fatal(err)
	}
	if ok, text, err := w.(Asked).Takes(t.Context(), now.Add(-time.Hour), now); !ok || err != nil || !strings.Contains(text, "tempo.status_url") {
		t.Errorf("%v, %q, %v", ok, text, err)
	}
	_ = w.Close()
	// One behind a path of its own cannot be asked.
	cfg.Prometheus.URL = "http://localhost:9009/api/v1/push"
	w, err = cfg.Open(otlpwire.Metrics)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := w.(Asked).Takes(t.Context(), now, now); err == nil || !strings.Contains(err.Error(), "cannot be queried") {
		t.Errorf("%v", err)
	}
}
