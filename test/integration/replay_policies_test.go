package integration

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/tempo"
)

// TestReplayFollowsThePoliciesOfThen switches the policies in the middle of the hour. A
// replay, stopped in the middle and resumed, keeps what was kept, by both versions; one
// with policies of its own keeps what whatif has said that they would.
func TestReplayFollowsThePoliciesOfThen(t *testing.T) {
	t.Parallel()
	h := newPast(t, "as-1")
	first, second := tempo.Start(t), tempo.Start(t)
	file := writeFile(t, "policies.yaml", pastPolicies)
	p := startPipeline(t, func(c *sink.Config) { c.Tempo.Endpoint, c.Sampling.File = first.Addr, file })
	conn, err := bus.OpenHub(t.Context(), bus.Config{URL: p.hub.url, Name: "check"}, bus.DefaultTopology(), p.log)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	routed := func(want int) {
		t.Helper()
		eventually(t, time.Minute, "all is routed", func() error {
			if n := count(t, otlpwire.Traces, "penstock_routed_items_total", p.router); n != want {
				return fmt.Errorf("%d of %d", n, want)
			}
			return nil
		})
	}
	// In the silence: every window that is open in one half closes before the other.
	half := slices.IndexFunc(h.messages, func(m bus.Message) bool { return m.Header.Arrival >= h.base.Add(30*time.Minute).UnixNano() })
	publish(t, p.hub.url, h.messages[:half])
	spans := 0
	for _, m := range h.messages[:half] {
		if strings.HasPrefix(m.Subject, "otlp.traces.") {
			spans += m.Header.Items
		}
	}
	routed(spans)
	next := writeFile(t, "next.yaml", "decision_wait: 10s\npolicies: [{name: other, type: probabilistic, probabilistic: {hash_salt: x, sampling_percentage: 20}}]\n")
	if code := run(t, nil, "penstock", "policies", "push", next, "-hub", p.hub.url).exit(t, 30*time.Second); code != 0 {
		t.Fatalf("push: exit %d", code)
	}
	eventually(t, 10*time.Second, "the version is known", func() error {
		if n := value(t, p.sink, "penstock_policies_version"); n != 1 {
			return fmt.Errorf("version %v", n)
		}
		return nil
	})
	publish(t, p.hub.url, h.messages[half:])
	routed(len(h.spans))
	eventually(t, time.Minute, "all is decided", func() error {
		if n := count(t, otlpwire.Traces, "penstock_sampled_out_items_total", p.sink) + count(t, otlpwire.Traces, "penstock_delivered_items_total", p.sink); n != len(h.spans) {
			return fmt.Errorf("%d of %d", n, len(h.spans))
		}
		return nil
	})
	p.sink.stop()
	live := spanBytes(t, first)
	p.startSink(t, func(c *sink.Config) { c.Tempo.Endpoint, c.Sampling.File = second.Addr, file })

	hour := []string{"--from", h.base.Format(time.RFC3339), "--to", h.base.Add(time.Hour).Format(time.RFC3339)}
	traces := append(hour[:4:4], "--signal", "traces")
	command := run(t, nil, "penstock", append([]string{"replay", "--rate", "300kB/s", "-hub", p.hub.url}, traces...)...)
	jobs, err := replay.Open(t.Context(), conn, bus.DefaultTopology())
	if err != nil {
		t.Fatal(err)
	}
	status := func() replay.Status { return onlyJob(t, jobs) }
	eventually(t, time.Minute, "a part is replayed", func() error {
		if _, share := status().Sum(""); share < 0.3 {
			return fmt.Errorf("%.2f", share)
		}
		return nil
	})
	// Ctrl-C leaves the job running.
	if err := command.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if code := command.exit(t, 10*time.Second); code != 0 || !strings.Contains(command.out.String(), "the job continues: penstock replay status") || status().Phase() != replay.Running {
		t.Errorf("Ctrl-C: exit %d, the job is %s:\n%s", code, status().Phase(), command.out)
	}
	id := status().ID
	if code, out := penstockReplay(t, p.hub.url, "stop", id); code != 0 {
		t.Fatalf("stop, exit %d:\n%s", code, out)
	}
	p.sink.stop() // what it had begun has ended
	stopped := len(second.Spans())
	if _, share := status().Sum(""); status().Phase() != replay.Stopped || share > 0.95 || stopped == 0 {
		t.Fatalf("stopped: %s, %.2f, %d spans", status().Phase(), share, stopped)
	}
	p.startSink(t, func(c *sink.Config) { c.Tempo.Endpoint, c.Sampling.File = second.Addr, file })
	if code, out := penstockReplay(t, p.hub.url, "resume", id); code != 0 || !strings.Contains(out, "is done") {
		t.Fatalf("resume, exit %d:\n%s", code, out)
	}
	again, got := map[uint64]bool{}, spanBytes(t, second)
	for n := range got {
		again[n] = true
	}
	want := map[uint64]bool{}
	for n := range live {
		want[n] = true
	}
	same(t, "spans", again, want)

	errorsOnly := errorsAfter(t, "10s")
	w := run(t, nil, "penstock", append([]string{"whatif", "--policies", errorsOnly, "--running", file, "-hub", p.hub.url}, hour...)...)
	if code := w.exit(t, time.Minute); code != 0 {
		t.Fatalf("whatif: exit %d", code)
	}
	// The sinks have told the hub what they keep: the same without the file. How often the bar is
	// drawn is a matter of time.
	bar := regexp.MustCompile(`(?m)^reading \[.*\n`)
	told := run(t, nil, "penstock", append([]string{"whatif", "--policies", errorsOnly, "-hub", p.hub.url}, hour...)...)
	if code := told.exit(t, time.Minute); code != 0 || bar.ReplaceAllString(told.out.String(), "") != bar.ReplaceAllString(w.out.String(), "") {
		t.Errorf("whatif without --running: exit %d\n%s\nwith it:\n%s", code, told.out, w.out)
	}
	if !strings.Contains(w.out.String(), "100 %") {
		t.Errorf("the bar does not come to its end:\n%s", w.out)
	}
	total := regexp.MustCompile(`together\s+\S+ %\s+(\d+)\s+(\d+)\s+\S+ \S+\s+\S+ %\s+(\d+)\s+(\d+)`).FindStringSubmatch(w.out.String())
	if total == nil {
		t.Fatalf("whatif:\n%s", w.out)
	}
	if total[2] != strconv.Itoa(len(live)) || !strings.Contains(w.out.String(), "kept by other and not by these: ") || !strings.Contains(w.out.String(), "kept by share and not by these: ") {
		t.Errorf("whatif says that the running policies keep %s spans, live they kept %d:\n%s", total[2], len(live), w.out)
	}
	before := len(second.Spans())
	code, out := penstockReplay(t, p.hub.url, append(traces, "--policies", errorsOnly, "--rate", "0")...)
	if n := strconv.Itoa(len(second.Spans()) - before); code != 0 || n != total[4] {
		t.Errorf("exit %d, %s spans by policies of its own, whatif said %s:\n%s", code, n, total[4], out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	entries, err := jobs.Audit(ctx, id)
	var what []string
	for _, e := range entries {
		what = append(what, e.What)
	}
	if err != nil || strings.Join(what, ", ") != "filed, stopped, resumed, lane finished" {
		t.Errorf("audit: %q, %v", what, err)
	}
}
