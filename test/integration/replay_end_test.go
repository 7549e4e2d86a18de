package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/tempo"
)

// TestReplayIsDoneWhenAllIsSent replays the last seconds of a stream, whose traces are all
// decided at its end, into a Tempo that is away. Stopped then, it is not done; resumed, it
// sends everything. Removed and filed again it sends everything once more.
func TestReplayIsDoneWhenAllIsSent(t *testing.T) {
	t.Parallel()
	h := newPast(t, "as-1")
	live, again := tempo.Start(t), tempo.Start(t)
	file := writeFile(t, "policies.yaml", pastPolicies)
	p := startPipeline(t, func(c *sink.Config) { c.Tempo.Endpoint, c.Sampling.File = live.Addr, file })
	h.send(t, p.hub.url)
	eventually(t, time.Minute, "all is decided", func() error {
		if n := count(t, otlpwire.Traces, "penstock_sampled_out_items_total", p.sink) + count(t, otlpwire.Traces, "penstock_delivered_items_total", p.sink); n != len(h.spans) {
			return fmt.Errorf("%d of %d", n, len(h.spans))
		}
		return nil
	})
	p.sink.stop()
	again.Fail(status.Error(codes.Unavailable, "away"))
	p.startSink(t, func(c *sink.Config) { c.Tempo.Endpoint, c.Sampling.File = again.Addr, file })
	conn, err := bus.OpenHub(t.Context(), bus.Config{URL: p.hub.url, Name: "check"}, bus.DefaultTopology(), p.log)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	jobs, err := replay.Open(t.Context(), conn, bus.DefaultTopology())
	if err != nil {
		t.Fatal(err)
	}
	from, to := h.base.Add(time.Hour-8*time.Second), h.base.Add(time.Hour)
	wanted := []string{"--from", from.Format(time.RFC3339), "--to", to.Format(time.RFC3339), "--signal", "traces", "--rate", "0"}
	if code, out := penstockReplay(t, p.hub.url, append(wanted, "--detach")...); code != 0 {
		t.Fatalf("exit %d:\n%s", code, out)
	}
	status := func() replay.Status { return onlyJob(t, jobs) }
	total := int64(0)
	for _, m := range h.messages {
		if strings.HasPrefix(m.Subject, "otlp.traces.") {
			total += int64(len(m.Body))
		}
	}
	eventually(t, 30*time.Second, "everything is read", func() error {
		if sum, _ := status().Sum(""); sum.Bytes < total {
			return fmt.Errorf("%d of %d bytes", sum.Bytes, total)
		}
		return nil
	})
	id := status().ID
	if code, out := penstockReplay(t, p.hub.url, "stop", id); code != 0 {
		t.Fatalf("stop, exit %d:\n%s", code, out)
	}
	p.sink.stop() // what it had begun has ended
	if s := status(); s.Phase() != replay.Stopped || s.Lanes[0].Done || len(again.Spans()) != 0 {
		t.Fatalf("stopped while Tempo was away: %s, done %v, %d spans", s.Phase(), s.Lanes[0].Done, len(again.Spans()))
	}
	again.Fail(nil)
	p.startSink(t, func(c *sink.Config) { c.Tempo.Endpoint, c.Sampling.File = again.Addr, file })
	if code, out := penstockReplay(t, p.hub.url, "resume", id); code != 0 || !strings.Contains(out, "is done") {
		t.Fatalf("resume, exit %d:\n%s", code, out)
	}
	kept, got := spanBytes(t, live), map[uint64]bool{}
	want := map[uint64]bool{}
	for n := range h.within(h.spans, "as-1", from, to) {
		if _, ok := kept[n]; ok {
			want[n] = true
		}
	}
	for n := range spanBytes(t, again) {
		got[n] = true
	}
	same(t, "spans", got, want)
	if len(want) < 10 {
		t.Errorf("%d spans: nothing is proven", len(want))
	}
	// The whole hour, removed when it is done, and filed again.
	wanted[1] = h.base.Format(time.RFC3339)
	for round := range 2 {
		if code, out := penstockReplay(t, p.hub.url, "remove", id); code != 0 {
			t.Fatalf("remove, exit %d:\n%s", code, out)
		}
		before := len(again.Spans())
		if code, out := penstockReplay(t, p.hub.url, wanted...); code != 0 || strings.Contains(out, "already") || !strings.Contains(out, "is done") {
			t.Fatalf("round %d, exit %d:\n%s", round, code, out)
		}
		if n := len(again.Spans()) - before; n != len(kept) {
			t.Errorf("round %d: %d spans, want %d", round, n, len(kept))
		}
		id = status().ID
	}
}
