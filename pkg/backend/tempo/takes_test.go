package tempo

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// tempo2 is what counts of a page of Tempo 2, tempo3 of Tempo 3, in the order in which
// they are printed, with what else has such a key.
const (
	tempo2 = `GET /status/config
---
target: all
server:
    http_listen_port: 3200
distributor:
    ingester_write_path_enabled: true
    kafka_write_path_enabled: %s
ingester:
    max_block_duration: 30m0s
metrics_generator:
    metrics_ingestion_time_range_slack: 30s
    traces_storage:
        path: ""
        ingestion_time_range_slack: 0s
block_builder:
    wal:
        path: /var/tempo/block-builder/traces
        ingestion_time_range_slack: 2m0s
storage:
    trace:
        wal:
            path: /var/tempo/wal
            v2_encoding: snappy
            ingestion_time_range_slack: %s
            version: vParquet4
live_store:
    wal:
        ingestion_time_range_slack: 2m0s

`
	tempo3 = `GET /status/config
---
target: %s
server:
    http_listen_port: 3200
distributor:
    kafka_config:
        address: ""
block_builder:
    wal:
        path: /var/tempo/block-builder/traces
        ingestion_time_range_slack: %s
storage:
    trace:
        wal:
            path: /var/tempo/wal
            ingestion_time_range_slack: 2m0s
overrides:
    defaults:
        metrics_generator:
            ingestion_time_range_slack: 0s
live_store:
    wal:
        path: /var/tempo/live-store/traces
        ingestion_time_range_slack: %s
        version: vParquet4

`
)

// TestPagesOfTempo asks for spans that are an hour old.
func TestPagesOfTempo(t *testing.T) {
	for _, tc := range []struct {
		name, page string
		ok         bool
		text       string // a part of it, or of the error
	}{
		{"2, by default", fmt.Sprintf(tempo2, "false", "2m0s"), false, keyStorage + " only under the time of their arrival: it is 2m, and these are 1h0m0s old"},
		{"2, a day", fmt.Sprintf(tempo2, "false", "24h0m0s"), true, ""},
		{"2, an hour", fmt.Sprintf(tempo2, "false", "1h0m0s"), true, ""},
		{"2, less", fmt.Sprintf(tempo2, "false", "59m59s"), false, keyStorage},
		{"2, a day, and Kafka", fmt.Sprintf(tempo2, "true", "24h0m0s"), false, keyLiveStore},
		{"2, none, and Kafka", fmt.Sprintf(tempo2, "true", "0s"), false, keyStorage + " only under the time of their arrival: it is 0s"},
		{"3, by default", fmt.Sprintf(tempo3, "all", "2m0s", "2m0s"), false, keyLiveStore + " only under the time of their arrival: it is 2m"},
		{"3, a day", fmt.Sprintf(tempo3, "all", "2m0s", "24h0m0s"), true, ""},
		{"3, the wrong key", fmt.Sprintf(tempo3, "all", "24h0m0s", "2m0s"), false, keyLiveStore},
		{"3, services, one of two keys", fmt.Sprintf(tempo3, "live-store", "2m0s", "24h0m0s"), false, keyBlockBuilder},
		{"3, services, the other", fmt.Sprintf(tempo3, "distributor", "24h0m0s", "2m0s"), false, keyLiveStore},
		{"3, services, both", fmt.Sprintf(tempo3, "distributor", "24h0m0s", "1d"), true, ""},
		{"no heading", strings.TrimPrefix(fmt.Sprintf(tempo3, "all", "2m0s", "24h0m0s"), "GET /status/config\n---\n"), true, ""},
		{"a heading of another path", strings.Replace(fmt.Sprintf(tempo3, "all", "2m0s", "24h0m0s"), "GET /", "GET /tempo/", 1), true, ""},
		{"no slack at all", "GET /status/config\n---\ntarget: all\n", false, keyLiveStore + " (Tempo 2: " + keyStorage + ") only under"},
		{"only storage", "GET /status/config\n---\nstorage: {trace: {wal: {ingestion_time_range_slack: 2h}}}\n", true, ""},
		{"a slack that is none", fmt.Sprintf(tempo3, "all", "2m0s", "long"), false, "tempo's " + keyLiveStore + ": "},
		{"no configuration", "GET /status/config\n---\n", false, "tempo's configuration: not found"},
		{"an empty page", "", false, "tempo's configuration: not found"},
		{"no YAML", "GET /status/config\n---\n\t<html>", false, "tempo's configuration: "},
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprint(w, tc.page) }))
		cfg := DefaultConfig()
		cfg.Endpoint, cfg.StatusURL = "localhost:4317", srv.URL
		w, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		now := time.Now()
		ok, text, err := w.Takes(t.Context(), now.Add(-time.Hour), now)
		if err != nil {
			text += err.Error()
		}
		if ok != tc.ok || !strings.Contains(text, tc.text) || ok != (text == "") {
			t.Errorf("%s: %v, %q, %v; want %v, %q", tc.name, ok, text, err, tc.ok, tc.text)
		}
		srv.Close()
		_ = w.Close()
	}
}
