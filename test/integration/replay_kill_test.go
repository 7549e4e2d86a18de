package integration

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/test/backend"
	"github.com/penstock/penstock/test/backend/loki"
	"github.com/penstock/penstock/test/backend/tempo"
	"github.com/penstock/penstock/test/daemon"
)

// heartbeat sends a log record of as-9 every 20 ms until ctx ends, and returns how many
// the hub has.
func heartbeat(ctx context.Context, conn *bus.Conn) (sent int, err error) {
	for tick := time.NewTicker(20 * time.Millisecond); ; {
		select {
		case <-ctx.Done():
			tick.Stop()
			return sent, nil
		case <-tick.C:
		}
		now := time.Now()
		body, err := proto.Marshal(&logspb.LogsData{ResourceLogs: []*logspb.ResourceLogs{{Resource: resourceOf("as-9"), ScopeLogs: []*logspb.ScopeLogs{{LogRecords: []*logspb.LogRecord{{
			TimeUnixNano: uint64(now.UnixNano()), Body: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: fmt.Sprint(sent)}},
		}}}}}}})
		if err != nil {
			return sent, err
		}
		if _, err := conn.Publish(context.WithoutCancel(ctx), bus.Message{Subject: bus.Subject(otlpwire.Logs, "as-9"), Body: body, Header: envelope.Header{
			ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: now.UnixNano(), ID: fmt.Sprint("live-", sent),
		}}); err != nil {
			return sent, err
		}
		sent++
	}
}

// latencies returns how long the heartbeats that were sent from a moment on took, the
// shortest first.
func latencies(l *loki.Server, from time.Time) (all []time.Duration) {
	for _, e := range l.Entries() {
		if e.Labels["instance_id"] == "as-9" && e.At.After(from) {
			all = append(all, e.Came.Sub(e.At))
		}
	}
	slices.Sort(all)
	return all
}

// TestReplaySurvivesKills: an hour is replayed while other data flows; a sink, the
// command and the router are killed in the middle. Everything comes.
func TestReplaySurvivesKills(t *testing.T) {
	t.Parallel()
	h := newPast(t, "as-1")
	log, _ := newLog(t)
	hub := startHub(t, log)
	tmp, l := tempo.Start(t), loki.Start(t)
	l.SetMaxChunkAge(4 * time.Hour)
	env := []string{"HUB_URL=" + hub.url, "TEMPO_ENDPOINT=" + tmp.Addr, "LOKI_URL=" + l.URL}
	policies := writeFile(t, "policies.yaml", pastPolicies)
	var dirs, admins []string
	central := func(name, more string) func() *process {
		admin := backend.FreeAddr(t)
		admins = append(admins, admin)
		file := writeFile(t, name+".yaml", fmt.Sprintf("admin: {listen: %q}\nmember: %s\n%s", admin, name, more))
		return func() *process {
			role, _, _ := strings.Cut(name, "-")
			p := run(t, env, role, "-config.file", file)
			eventually(t, 60*time.Second, name+" is ready", func() error { return get("http://"+admin+"/ready", nil) })
			return p
		}
	}
	sink := func(name string) func() *process {
		dirs = append(dirs, t.TempDir())
		return central(name, fmt.Sprintf("sampling: {file: %q}\nfile: {dir: %q}\n", policies, dirs[len(dirs)-1]))
	}
	startRouter, startA, startB := central("router-1", ""), sink("sink-a"), sink("sink-b")
	router, a, _ := startRouter(), startA(), startB()
	h.send(t, hub.url)

	conn, err := bus.OpenHub(t.Context(), bus.Config{URL: hub.url, Name: "check"}, bus.DefaultTopology(), log)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	points := func() map[uint64]bool {
		all := map[uint64]bool{}
		for _, dir := range dirs {
			for n := range pointNumbers(t, dir) {
				all[n] = true
			}
		}
		return all
	}
	eventually(t, time.Minute, "the hour is delivered", func() error {
		if _, n := logNumbers(l); n < len(h.logs) || len(points()) < len(h.points) {
			return fmt.Errorf("%d of %d records", n, len(h.logs))
		}
		return nil
	})
	eventually(t, time.Minute, "all traces are decided", func() error {
		decided := 0.0
		for _, admin := range admins {
			for _, name := range []string{`penstock_sampled_out_items_total{signal="traces"}`, `penstock_delivered_items_total{backend="tempo",signal="traces"}`} {
				n, err := daemon.Metric(admin, name)
				if err != nil {
					continue // of the router
				}
				v, err := strconv.ParseFloat(n, 64)
				if err != nil {
					return err
				}
				decided += v
			}
		}
		// More, where a sink has counted what another had taken over.
		if int(decided) < len(h.spans) {
			return fmt.Errorf("%.0f of %d spans", decided, len(h.spans))
		}
		for _, admin := range admins {
			for p := range bus.DefaultTopology().Partitions {
				if n, err := daemon.Metric(admin, fmt.Sprintf(`penstock_sampler_held_traces{partition="%d"}`, p)); err == nil && n != "0" {
					return fmt.Errorf("%s traces of partition %d wait for their decision", n, p)
				}
			}
		}
		return nil
	})
	live := spanBytes(t, tmp)

	beating, stopBeating := context.WithCancel(t.Context())
	var beats sync.WaitGroup
	sent := 0
	beats.Go(func() {
		var err error
		if sent, err = heartbeat(beating, conn); err != nil {
			t.Error(err)
		}
	})
	defer stopBeating()
	calm := time.Now()
	eventually(t, 30*time.Second, "other data flows", func() error {
		if n := len(latencies(l, calm)); n < 200 {
			return fmt.Errorf("%d heartbeats", n)
		}
		return nil
	})
	before := latencies(l, calm)

	started := time.Now()
	command := run(t, nil, "penstock", "replay", "--from", h.base.Format(time.RFC3339), "--to", h.base.Add(time.Hour).Format(time.RFC3339), "--instance", "as-1", "--rate", "100kB/s", "-hub", hub.url)
	jobs, err := replay.Open(t.Context(), conn, bus.DefaultTopology())
	if err != nil {
		t.Fatal(err)
	}
	upTo := func(share float64, phase string) (s replay.Status) {
		t.Helper()
		// Asked seldom: to ask costs the hub something, and latencies are measured.
		deadline := time.Now().Add(2 * time.Minute)
		for ask := time.NewTicker(500 * time.Millisecond); time.Now().Before(deadline); <-ask.C {
			table, err := jobs.Table(t.Context())
			if err != nil || len(table.Jobs()) != 1 {
				continue
			}
			s = table.Jobs()[0]
			if _, got := s.Sum(""); got >= share && (phase == "" || s.Phase() == phase) {
				ask.Stop()
				return s
			}
		}
		t.Fatalf("%.0f %% are not replayed after two minutes", 100*share)
		return s
	}
	upTo(0.3, "")
	alone := latencies(l, started)
	a.kill(t)
	upTo(0.5, "")
	command.kill(t)
	startA()
	router.kill(t)
	if _, share := upTo(0.6, "").Sum(""); share == 1 {
		t.Error("it was over before everything was killed: nothing is proven")
	}
	startRouter()
	done := upTo(1, replay.Done)
	took := time.Since(started)
	during := latencies(l, started)
	stopBeating()
	beats.Wait()

	seen := map[uint64]int{}
	for _, s := range tmp.Spans() {
		seen[binary.BigEndian.Uint64(s.Span.GetSpanId())]++
	}
	for n, b := range spanBytes(t, tmp) {
		if live[n] != b {
			t.Fatalf("span %d was not kept, or another, the first time", n)
		}
		if seen[n] < 2 {
			t.Errorf("span %d was not replayed", n)
		}
	}
	twice := map[string]int{}
	for _, e := range l.Entries() {
		twice[e.Labels["instance_id"]+" "+e.Line]++
	}
	for n := range h.logs {
		if twice[fmt.Sprint("as-1 ", n)] < 2 {
			t.Fatalf("record %d was not replayed", n)
		}
	}
	eventually(t, 30*time.Second, "all heartbeats arrive", func() error {
		got := map[string]bool{}
		for _, e := range l.Entries() {
			if e.Labels["instance_id"] == "as-9" {
				got[e.Line] = true
			}
		}
		if len(got) != sent {
			return fmt.Errorf("%d of %d", len(got), sent)
		}
		return nil
	})
	same(t, "data points", points(), h.within(h.points, "as-1", h.base, h.base.Add(time.Hour)))
	sum, _ := done.Sum("")
	p99 := func(all []time.Duration) time.Duration { return all[len(all)*99/100] }
	t.Logf("%d items replayed in %v; p99 of live latency %v before, %v while replaying, %v with three kills (%d, %d and %d records)",
		sum.Delivered, took.Round(time.Second), p99(before), p99(alone), p99(during), len(before), len(alone), len(during))
}
