package integration

import (
	"bytes"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/otlpwire"
	rules "github.com/penstock/penstock/pkg/processor"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/loki"
)

// TestProcessing: what an edge takes out stands on no disk, what a sink takes out reaches no
// backend, and every item is accounted for.
func TestProcessing(t *testing.T) {
	t.Parallel()
	l := loki.Start(t)
	p := startPipeline(t, func(c *sink.Config) {
		c.Loki.URL = l.URL
		c.Processing = rules.Config{
			Attributes: []rules.AttributesConfig{{Actions: []rules.Action{{Key: "region", Action: "insert", Value: "eu"}, {Key: "user", Action: "hash"}}}},
			Filter:     rules.FilterConfig{Logs: rules.Filter{Exclude: &rules.Match{Type: "regexp", LogBodies: []string{"^at the sink"}}}},
		}
	})
	dir := t.TempDir()
	e := startEdgeWith(t, p.log, p.hub.url, dir, edge.InstanceConfig{ID: "as-1"}, func(c *edge.Config) {
		c.Processing = rules.Config{
			Redaction: rules.RedactionConfig{BlockedValues: []string{`://[^/@\s]+@`}},
			Filter:    rules.FilterConfig{Logs: rules.Filter{Include: &rules.Match{Type: "strict", Severity: &rules.Severity{Min: 9}}}},
		}
	})
	var records []string
	for i, line := range []string{"keep postgres://joe:hunter2@db/x", "at the sink", "debug", "keep too"} {
		severity := 9
		if line == "debug" {
			severity = 5
		}
		records = append(records, fmt.Sprintf(`{"timeUnixNano":"%d","severityNumber":%d,"body":{"stringValue":%q},"attributes":[{"key":"user","value":{"stringValue":"joe"}}]}`, time.Now().UnixNano()+int64(i), severity, line))
	}
	post := func(records string) {
		res, err := http.Post("http://"+e.http+"/v1/logs", "application/json", strings.NewReader(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[`+records+`]}]}]}`))
		if err != nil || res.StatusCode != 200 {
			t.Fatalf("%v, %v", res, err)
		}
		_ = res.Body.Close()
	}
	post(strings.Join(records, ","))
	post(records[2]) // nothing is left of it, and its sender is told success
	eventually(t, 30*time.Second, "two lines are there", func() error {
		if n := len(l.Entries()); n != 2 {
			return fmt.Errorf("%d lines", n)
		}
		return nil
	})
	for i, want := range []string{"keep postgres****db/x", "keep too"} {
		got := l.Entries()[i]
		if got.Line != want || got.Metadata["region"] != "eu" || len(got.Metadata["user"]) != 64 {
			t.Errorf("line %d: %q %v", i, got.Line, got.Metadata)
		}
	}
	at := func(r *role) int { return count(t, otlpwire.Logs, "penstock_filtered_items_total", r) }
	eventually(t, 10*time.Second, "every item is accounted for", func() error {
		accepted := count(t, otlpwire.Logs, "penstock_accepted_items_total", e.role)
		if accepted != 5 || at(e.role) != 2 || at(p.sink) != 1 {
			return fmt.Errorf("%v accepted, %v filtered at the edge, %v at the sink", accepted, at(e.role), at(p.sink))
		}
		return nil
	})
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		if bytes.Contains(text, []byte("hunter2")) {
			t.Errorf("%s holds the password", path)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}
