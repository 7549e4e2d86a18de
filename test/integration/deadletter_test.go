package integration

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/loki"
)

// TestDeadLetters: what Loki refuses is found, shown, brought to it again when its limit was
// raised, and cleared away, with nothing but the command.
func TestDeadLetters(t *testing.T) {
	t.Parallel()
	strict := loki.Start(t)
	p := startPipeline(t, func(c *sink.Config) { c.Loki.URL = strict.URL })
	message := func(instance string, n int, lines ...string) bus.Message {
		var records []string
		for _, l := range lines {
			records = append(records, fmt.Sprintf(`{"timeUnixNano":"%d","severityNumber":9,"body":{"stringValue":%q}}`, time.Now().UnixNano(), l))
		}
		body, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, fmt.Appendf(nil, `{"resourceLogs":[{"scopeLogs":[{"logRecords":[%s]}]}]}`, strings.Join(records, ",")), otlpwire.DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		return bus.Message{
			Subject: bus.Subject(otlpwire.Logs, instance), Body: body,
			Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: len(lines), Arrival: time.Now().UnixNano(), ID: fmt.Sprint(instance, n)},
		}
	}
	long := strings.Repeat("long ", 60_000) // 300 kB; Loki takes 256 KiB
	publish(t, p.hub.url, []bus.Message{
		message("as-1", 1, "short", long, "another"),
		message("as-2", 1, long),
		message("as-2", 2, "fine"),
	})
	eventually(t, 30*time.Second, "the short ones are there", func() error {
		lines := map[string]bool{} // looking for the culprit some come twice, which Loki knows
		for _, e := range strict.Entries() {
			lines[e.Line] = true
		}
		if len(lines) != 3 {
			return fmt.Errorf("%d lines", len(lines))
		}
		return nil
	})
	command := func(want int, args ...string) string {
		t.Helper()
		c := run(t, nil, "penstock", append(append([]string{"deadletter"}, args...), "-hub", p.hub.url)...)
		if code := c.exit(t, 30*time.Second); code != want {
			t.Fatalf("%v: exit %d, want %d:\n%s", args, code, want, tail(c.out.String(), 2<<10))
		}
		return c.out.String()
	}
	eventually(t, 30*time.Second, "both long ones are dead letters", func() error {
		if out := command(0, "list"); strings.Count(out, "too_large") != 4 { // two of each kind of line
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	list := command(0, "list", "-instance", "as-1")
	for _, want := range []string{"logs", "loki", "too_large", "as-1", "LOGS 1", "max entry size"} {
		if !strings.Contains(list, want) || strings.Contains(list, "as-2") {
			t.Errorf("list lacks %q, or has as-2:\n%s", want, list)
		}
	}
	if out := command(0, "list", "-reason", "refused"); !strings.Contains(out, "no dead letters") {
		t.Errorf("others: %s", out)
	}
	if out := command(0, "show", "1"); !strings.Contains(out, "long long") || !strings.Contains(out, `"logRecords"`) || strings.Contains(out, "another") {
		t.Errorf("show: %s", tail(out, 400))
	}
	if out := command(1, "show", "99"); !strings.Contains(out, "there is no dead letter with that number") {
		t.Errorf("show 99: %s", out)
	}
	if out := command(1, "resend", "-config.file", writeFile(t, "sink.yaml", "loki: {url: "+strict.URL+"}\n")); strings.Count(out, "is refused again, too_large") != 2 {
		t.Errorf("resend: %s", tail(out, 400))
	}
	newer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "out of order sample", 400) }))
	t.Cleanup(newer.Close)
	if out := command(1, "resend", "-config.file", writeFile(t, "newer.yaml", "loki: {url: "+newer.URL+"}\n")); !strings.Contains(out, "0 dead letters were accepted and deleted, 2 refused again") {
		t.Errorf("resend to one that has something newer: %s", tail(out, 400))
	}
	var pushed atomic.Int32
	raised := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		pushed.Add(1)
		w.WriteHeader(http.StatusNoContent)
	}))
	t.Cleanup(raised.Close)
	if out := command(0, "resend", "-instance", "as-1", "-config.file", writeFile(t, "raised.yaml", "loki: {url: "+raised.URL+"}\n")); !strings.Contains(out, "1 dead letters were accepted and deleted, 0 refused again") || pushed.Load() != 1 {
		t.Errorf("resend: %s, %d pushes", out, pushed.Load())
	}
	if out := command(0, "list"); strings.Contains(out, "as-1") || !strings.Contains(out, "as-2") {
		t.Errorf("after resend: %s", out)
	}
	if out := command(1, "purge"); !strings.Contains(out, "delete all 1 dead letters with 1 items for good?") {
		t.Errorf("purge asks nobody: %s", out)
	}
	if out := command(0, "purge", "-yes"); !strings.Contains(out, "1 dead letters were deleted") {
		t.Errorf("purge: %s", out)
	}
	if out := command(0, "list"); !strings.Contains(out, "no dead letters") {
		t.Errorf("after purge: %s", out)
	}
	for _, wrong := range [][]string{{}, {"show"}, {"burn"}, {"list", "1"}} {
		command(2, wrong...)
	}
	if out := command(1, "purge", "x"); !strings.Contains(out, `"x" is not the number of a dead letter`) {
		t.Errorf("purge x: %s", out)
	}
}
