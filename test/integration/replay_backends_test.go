package integration

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/router"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend"
	"github.com/penstock/penstock/test/backend/loki"
	"github.com/penstock/penstock/test/backend/tempo"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestReplayAsksPrometheus: the real Prometheus without an out-of-order window says no
// before the first item, and means it; with one it takes what is replayed.
func TestReplayAsksPrometheus(t *testing.T) {
	t.Parallel()
	h := newPast(t, "as-1")
	from, to := h.base.Add(20*time.Minute), h.base.Add(40*time.Minute)
	wanted := []string{"--from", from.Format(time.RFC3339), "--to", to.Format(time.RFC3339), "--signal", "metrics", "--rate", "0"}
	points := len(h.within(h.points, "as-1", from, to))

	// All that came before is there; then its series of the range are deleted by nobody:
	// a replay brings samples older than what the head has.
	strict := backend.StartPrometheus(t)
	p := startPipeline(t, func(c *sink.Config) { c.Prometheus.URL = strict.URL })
	h.send(t, p.hub.url)
	eventually(t, time.Minute, "all is delivered", func() error {
		if n := count(t, otlpwire.Metrics, "penstock_delivered_items_total", p.sink); n != len(h.points) {
			return fmt.Errorf("%d of %d", n, len(h.points))
		}
		return nil
	})
	code, out := penstockReplay(t, p.hub.url, wanted...)
	if code != 1 || !strings.Contains(out, "out_of_order_time_window") || !strings.Contains(out, "nothing was sent") {
		t.Errorf("exit %d:\n%s", code, out)
	}
	if code, out = penstockReplay(t, p.hub.url, "list"); code != 0 || strings.Contains(out, "metrics") {
		t.Errorf("a refused job is left behind:\n%s", out)
	}
	// It is right: what is sent all the same is refused, and is in DEADLETTER.
	code, out = penstockReplay(t, p.hub.url, append(wanted, "--accept-loss")...)
	if code != 0 || !strings.Contains(out, fmt.Sprintf("%d dead-lettered", points)) {
		t.Errorf("exit %d, want %d dead letters:\n%s", code, points, out)
	}
	p.sink.stop()

	wide := backend.StartPrometheusWith(t, "storage: {tsdb: {out_of_order_time_window: 2h}}\n")
	p.startSink(t, func(c *sink.Config) { c.Prometheus.URL = wide.URL })
	// A job of its own: the one before is done.
	code, out = penstockReplay(t, p.hub.url, append(wanted, "--instance", "as-1")...)
	if code != 0 || !strings.Contains(out, fmt.Sprintf("%d items delivered", points)) || !strings.Contains(out, " 0 dead-lettered") {
		t.Errorf("exit %d, want %d points:\n%s", code, points, out)
	}
	eventually(t, 10*time.Second, "all is found", func() error {
		got, err := wide.Query(fmt.Sprintf(`sum(count_over_time(n[1h] @ %d))`, to.Unix()+60))
		if err != nil || len(got) != 1 || got[0].Value[1] != fmt.Sprint(points) {
			return fmt.Errorf("%v, %v; want %d samples", got, err, points)
		}
		return nil
	})
}

// TestReplayAsksLoki: too far behind the newest is said before, and what --backend
// names must be what the sinks write to.
func TestReplayAsksLoki(t *testing.T) {
	t.Parallel()
	h := newPast(t, "as-1")
	l := loki.Start(t)
	p := startPipeline(t, func(c *sink.Config) { c.Loki.URL = l.URL })
	h.send(t, p.hub.url)
	l.SetMaxChunkAge(30 * time.Minute)
	wanted := []string{"--from", h.base.Format(time.RFC3339), "--to", h.base.Add(10 * time.Minute).Format(time.RFC3339), "--signal", "logs"}
	code, out := penstockReplay(t, p.hub.url, wanted...)
	if code != 1 || !strings.Contains(out, "ingester.max_chunk_age") {
		t.Errorf("exit %d:\n%s", code, out)
	}
	l.SetMaxChunkAge(3 * time.Hour)
	code, out = penstockReplay(t, p.hub.url, append(wanted, "--backend", "loki,tempo")...)
	if n := len(h.within(h.logs, "as-1", h.base, h.base.Add(10*time.Minute))); code != 0 || !strings.Contains(out, fmt.Sprintf("%d items delivered", n)) {
		t.Errorf("exit %d, want %d records:\n%s", code, n, out)
	}
	code, out = penstockReplay(t, p.hub.url, append(wanted, "--backend", "file")...)
	if code != 1 || !strings.Contains(out, "the sinks write logs to loki, not to file") {
		t.Errorf("exit %d:\n%s", code, out)
	}
	l.Fail(503)
	code, out = penstockReplay(t, p.hub.url, append(wanted, "--late", "1h")...)
	if code != 1 || !strings.Contains(out, "does not answer whether it accepts data that old") {
		t.Errorf("exit %d:\n%s", code, out)
	}
}

// TestReplayWithinRights: with the permissions of deploy/nats, who may have one instance
// replayed can file that and nothing else, and the sinks do it with theirs.
func TestReplayWithinRights(t *testing.T) {
	deployEnv(t)
	s := startFromFile(t, "nats-server.conf", func(o *server.Options) {
		o.Port, o.StoreDir = server.RANDOM_PORT, t.TempDir()
	})
	h := newPast(t, "as-1", "as-2")
	as := func(user string) string {
		return strings.Replace(s.ClientURL(), "nats://", "nats://"+user+":"+password+"@", 1)
	}
	log, _ := newLog(t)
	rc, sc := router.DefaultConfig(), sink.DefaultConfig()
	rc.Hub = bus.Config{URL: s.ClientURL(), User: "router", Pass: password}
	sc.Hub = bus.Config{URL: s.ClientURL(), User: "sink", Pass: password}
	rc.Admin.Listen, sc.Admin.Listen, sc.File.Dir = "", "", t.TempDir()
	rp := app.NewProcess(log.With("role", "router"), &rc)
	stages, err := router.Build(rp, rc)
	start(t, rp, stages, err)
	sp := app.NewProcess(log.With("role", "sink"), &sc)
	stages, err = sink.Build(sp, sc)
	start(t, sp, stages, err)
	h.send(t, as("admin"))

	from, to := h.base.Add(20*time.Minute), h.base.Add(30*time.Minute)
	wanted := []string{"--from", from.Format(time.RFC3339), "--to", to.Format(time.RFC3339), "--rate", "0"}
	own := []string{"-as", "as-1"}
	for _, other := range [][]string{{"--instance", "as-2"}, {"--instance", "as-*"}, {"--instance", "as-1,as-2"}} {
		if code, out := penstockReplay(t, as("replay-as-1"), append(append(wanted, other...), own...)...); code != 1 || !strings.Contains(out, "name that one instance") {
			t.Errorf("%q, exit %d:\n%s", other, code, out)
		}
	}
	for _, other := range [][]string{{"-as", "as-2", "-inbox-prefix", "_INBOX_replay-as-1"}, {"-inbox-prefix", "_INBOX_replay-as-1"}} {
		if code, out := penstockReplay(t, as("replay-as-1"), append(wanted, other...)...); code != 1 {
			t.Errorf("%q, exit %d:\n%s", other, code, out)
		}
	}
	code, out := penstockReplay(t, as("replay-as-1"), append(append(wanted, "--instance", "as-1", "--signal", "logs,traces"), own...)...)
	if code != 0 || !strings.Contains(out, " is done: ") {
		t.Errorf("its own, exit %d:\n%s", code, out)
	}
	if code, out = penstockReplay(t, as("operator"), append(wanted, "--dry-run")...); code != 0 || !strings.Contains(out, "as-2") {
		t.Errorf("dry run, exit %d:\n%s", code, out)
	}
	if code, out = penstockReplay(t, as("operator"), append(wanted, "--instance", "as-*")...); code != 0 || !strings.Contains(out, " is done: ") {
		t.Errorf("operator, exit %d:\n%s", code, out)
	}
	if code, out = penstockReplay(t, as("replay-as-1"), append([]string{"list"}, own...)...); code != 0 || strings.Count(out, " done ") != 1 || strings.Contains(out, "as-*") {
		t.Errorf("its own list, exit %d:\n%s", code, out)
	} else {
		id := strings.Fields(strings.Split(out, "\n")[1])[0]
		if code, out = penstockReplay(t, as("replay-as-1"), append([]string{"status", id}, own...)...); code != 0 || !strings.Contains(out, "as-1: ") || !strings.Contains(out, "filed") {
			t.Errorf("its own status, exit %d:\n%s", code, out)
		}
	}
	if code, out = penstockReplay(t, as("operator"), "list"); code != 0 || strings.Count(out, " done ") != 2 {
		t.Errorf("list, exit %d:\n%s", code, out)
	}
	p := run(t, nil, "penstock", "whatif", "--policies", writeFile(t, "p.yaml", pastPolicies), "--from", from.Format(time.RFC3339), "--to", to.Format(time.RFC3339), "-hub", as("operator"))
	if code := p.exit(t, time.Minute); code != 0 || !strings.Contains(p.out.String(), "errors") {
		t.Errorf("whatif, exit %d:\n%s", code, p.out)
	}
}

// TestBackendsAwayForAnHour: no command is needed. An hour's worth comes while Tempo and
// Loki are away; when they are back they get everything, in order, and the lanes have
// said that they are behind and when they will not be.
func TestBackendsAwayForAnHour(t *testing.T) {
	t.Parallel()
	h := newPast(t, "as-1", "as-2")
	tmp, l := tempo.Start(t), loki.Start(t)
	tmp.Fail(status.Error(codes.Unavailable, "away"))
	l.Fail(503)
	p := startPipeline(t, func(c *sink.Config) {
		c.Tempo.Endpoint, c.Loki.URL = tmp.Addr, l.URL
		c.Sampling.File = writeFile(t, "all.yaml", "decision_wait: 2s\npolicies: [{name: all, type: always_sample}]\n")
	})
	h.send(t, p.hub.url)
	gauge := func(name string) (most float64) {
		families, err := p.sink.Registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if f.GetName() == name {
					most = max(most, m.GetGauge().GetValue())
				}
			}
		}
		return most
	}
	eventually(t, 30*time.Second, "the lanes say that they are behind", func() error {
		if lag, eta := gauge("penstock_lane_lag_messages"), gauge("penstock_lane_catch_up_seconds"); lag < 100 || !math.IsInf(eta, 1) {
			return fmt.Errorf("lag %v, caught up in %v s", lag, eta)
		}
		return nil
	})
	tmp.Fail(nil)
	l.Fail(0)
	eventually(t, 2*time.Minute, "all has come", func() error {
		if spans, logs := len(tmp.Spans()), len(l.Entries()); spans < len(h.spans) || logs < len(h.logs) {
			return fmt.Errorf("%d of %d spans, %d of %d records", spans, len(h.spans), logs, len(h.logs))
		}
		return nil
	})
	last := map[string]uint64{}
	for _, e := range l.Entries() {
		var n uint64
		_, _ = fmt.Sscan(e.Line, &n)
		if who := e.Labels["instance_id"]; n <= last[who] {
			t.Fatalf("%s: record %d came behind %d", who, n, last[who])
		} else {
			last[who] = n
		}
	}
	if len(last) != 2 || len(l.Entries()) != len(h.logs) {
		t.Errorf("%d instances, %d records of %d", len(last), len(l.Entries()), len(h.logs))
	}
	eventually(t, 30*time.Second, "the lanes say that they have caught up", func() error {
		if eta := gauge("penstock_lane_catch_up_seconds"); eta != 0 {
			return fmt.Errorf("in %v s", eta)
		}
		return nil
	})
}
