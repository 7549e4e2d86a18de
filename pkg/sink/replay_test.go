package sink

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/sampler"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/pkg/tally"
)

// TestReplaysMakeRoom: a lane reads at its share of the rate, and much slower while live lanes have a
// backlog.
func TestReplaysMakeRoom(t *testing.T) { synctest.Test(t, testReplaysMakeRoom) }

func testReplaysMakeRoom(t *testing.T) {
	log, led := slog.New(slog.DiscardHandler), ledger.New(prometheus.NewRegistry())
	ls := &lanes{log: log, led: led, members: membership.New(bus.NewHub(bus.Config{}, bus.DefaultTopology(), log), "sink", "a", led, log)}
	r := newReplays(ls, Writers{})
	behind := uint64(0)
	r.behind = func() uint64 { return behind }

	job := &replay.Job{State: replay.Running, Request: replay.Request{From: replay.Point{Seq: 1}, To: replay.Point{Seq: 9}, Signals: []string{"logs"}}}
	job.ID = job.JobID()
	plan := replay.Plan{Lanes: []replay.Lane{{Signal: "logs", Partition: 0, Last: 100}, {Signal: "logs", Partition: 1, Last: 100}, {Signal: "logs", Partition: 2, Last: 100}}}
	set := func(key string, v any) {
		t.Helper()
		b, _ := json.Marshal(v)
		if err := r.table.Set(key, b); err != nil {
			t.Fatal(err)
		}
	}
	read := func(rate int64, n int) time.Duration {
		t.Helper()
		job.Rate = rate
		e := &excerpt{replays: r, job: replay.Status{Job: job, Plan: &plan}, lane: plan.Lanes[0]}
		start := time.Now()
		for range n {
			if !e.wait(t.Context(), bus.Delivery{Seq: 1, Size: 10_000, Pending: 1}) {
				t.Fatal("ended")
			}
		}
		return time.Since(start)
	}
	// The table has no such job: this lane is the only one.
	if took := read(200_000, 20); took != time.Second-pacing {
		t.Errorf("200 kB at 200 kB/s took %v", took)
	}
	b, _ := json.Marshal(&replay.Job{State: replay.Running, Request: job.Request})
	if err := r.table.Set("job._all."+job.JobID(), b); err != nil {
		t.Fatal(err)
	}
	// Two lanes are left of three: each has half of the rate.
	set(job.PlanKey(), plan)
	set(job.LaneKey(plan.Lanes[2]), replay.Progress{Done: true})
	if took := read(200_000, 10); took != time.Second-pacing {
		t.Errorf("100 kB at half of 200 kB/s took %v", took)
	}
	behind = maxBehind + 1
	if took := read(0, 5); took != 5*yield {
		t.Errorf("five messages while live traffic is behind took %v", took)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	e := &excerpt{replays: r, job: replay.Status{Job: job, Plan: &plan}, lane: plan.Lanes[0]}
	if e.wait(ctx, bus.Delivery{Seq: 1}) {
		t.Error("goes on after its end")
	}
}

// TestExcerptsEnd: an excerpt ends after its last sequence, when the hub has nothing left, and
// with the last message of the stream. Live traffic has no end.
func TestExcerptsEnd(t *testing.T) {
	for name, tc := range map[string]struct {
		d          bus.Delivery
		has        uint64
		ends, last bool
	}{
		"in the middle":   {bus.Delivery{Seq: 5, Pending: 3}, 10, false, false},
		"the last one":    {bus.Delivery{Seq: 10, Pending: 3}, 10, false, false},
		"after it":        {bus.Delivery{Seq: 11, Pending: 3}, 10, true, false},
		"nothing after":   {bus.Delivery{Seq: 5}, 10, false, true},
		"nothing is left": {bus.Delivery{Idle: true, Pending: 1}, 10, true, false},
		"miscounted":      {bus.Delivery{Idle: true, Pending: 1}, 9, false, false},
		"not answered":    {bus.Delivery{Idle: true, Pending: 1}, 0, false, false},
	} {
		e := &excerpt{replays: &replays{lanes: &lanes{}, log: slog.New(slog.DiscardHandler), behind: func() uint64 { return 0 }}, job: replay.Status{Job: &replay.Job{}}, lane: replay.Lane{Last: 10}}
		e.has = func(_ context.Context, _, seq uint64) (bool, error) {
			if tc.has == 0 {
				return false, errors.New("no answer")
			}
			return tc.has >= seq, nil
		}
		if err := e.next(t.Context(), tc.d); errors.Is(err, errEnd) != tc.ends || err != nil && !tc.ends {
			t.Errorf("%s: %v", name, err)
		}
		if got := e.last(tc.d); got != tc.last {
			t.Errorf("%s: last %v", name, got)
		}
		if err := (live{}).next(t.Context(), tc.d); err != nil || (live{}).last(tc.d) {
			t.Errorf("%s: live traffic ends, %v", name, err)
		}
	}
}

// TestOneWriterOfProgress: a sink that has lost a lane does not overwrite the next owner's
// progress, and nothing undoes that the lane is done.
func TestOneWriterOfProgress(t *testing.T) {
	d, conn := testExporter(t, &picky{})
	hub := bus.NewHub(bus.Config{}, bus.DefaultTopology(), d.Log)
	hub.Conn = conn
	job := &replay.Job{State: replay.Running, Request: replay.Request{From: replay.Point{Seq: 1}, To: replay.Point{Seq: 9}, Signals: []string{"logs"}}}
	job.ID = job.JobID()
	open := func(name string) *excerpt {
		ls := &lanes{log: d.Log, led: d.Ledger, hub: hub, members: membership.New(hub, "sink", name, ledger.New(prometheus.NewRegistry()), d.Log)}
		e := &excerpt{replays: newReplays(ls, Writers{}), job: replay.Status{Job: job}, lane: replay.Lane{Signal: "logs", First: 1, Last: 9}, sig: otlpwire.Logs}
		e.owned = func() bool { return true }
		return e
	}
	ctx := t.Context()
	stored := func() (p replay.Progress) {
		t.Helper()
		b, err := conn.OpenBucket(ctx, replay.Bucket, 1)
		if err != nil {
			t.Fatal(err)
		}
		value, _, err := b.Get(ctx, job.LaneKey(replay.Lane{Signal: "logs"}))
		if err == nil {
			err = json.Unmarshal(value, &p)
		}
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	a, b := open("a"), open("b")
	if err := a.write(ctx); !errors.Is(err, errLost) {
		t.Errorf("written before the lane is claimed: %v", err)
	}
	if first, err := a.claim(ctx); err != nil || !first {
		t.Fatalf("claimed: %v, the first one: %v", err, first)
	}
	a.Ended(tally.Delivered, "", 3)
	if err := errors.Join(a.write(ctx), a.write(ctx)); err != nil {
		t.Fatal(err)
	}
	// B takes over while A still has something to write: B's counts remain.
	if first, err := b.claim(ctx); err != nil || first || b.progress().Delivered != 3 {
		t.Fatalf("%v, the first one: %v, %+v", err, first, b.progress())
	}
	if err := a.write(ctx); err != nil {
		t.Fatal(err)
	}
	b.Ended(tally.Delivered, "", 4)
	if err := b.write(ctx); err == nil || errors.Is(err, errLost) {
		t.Errorf("the owner's first try: %v", err)
	}
	if err := b.write(ctx); err != nil || stored().Delivered != 7 || stored().Owner != "b" {
		t.Errorf("%v, %+v", err, stored())
	}
	a.owned = func() bool { return false }
	if err := a.write(ctx); !errors.Is(err, errLost) || stored().Owner != "b" {
		t.Errorf("one who has lost the lane: %v, %+v", err, stored())
	}
	if a.finish(ctx) || stored().Done {
		t.Error("one who has lost the lane has called it done")
	}
	// The last report was stored in the bucket, but its answer was not waited for, and the
	// lane is closed by now: nobody else owns it.
	revision := b.mu.revision
	if err := b.write(ctx); err != nil {
		t.Fatal(err)
	}
	b.mu.revision = revision
	b.owned = func() bool { return false }
	if !b.finish(ctx) || !stored().Done {
		t.Errorf("the owner cannot call it done: %+v", stored())
	}
	// A later owner finds it done.
	a.owned = func() bool { return true }
	if err := a.write(ctx); !errors.Is(err, errLost) || !stored().Done {
		t.Errorf("%v, %+v", err, stored())
	}
	if _, err := open("c").claim(ctx); !errors.Is(err, errEnd) {
		t.Errorf("what is done is begun again: %v", err)
	}
}

// TestOthersAreLeftOut: where a lane reads the whole partition, data of instances that the job
// is not for reaches neither the samplers nor the backend.
func TestOthersAreLeftOut(t *testing.T) {
	d, _ := testExporter(t, &picky{})
	ls := &lanes{log: d.Log, led: d.Ledger, members: membership.New(bus.NewHub(bus.Config{}, bus.DefaultTopology(), d.Log), "sink", "a", d.Ledger, d.Log)}
	job := &replay.Job{Request: replay.Request{From: replay.Point{Seq: 1}, To: replay.Point{Seq: 9}, Signals: []string{"traces"}, Instances: []string{"shop-*"}}}
	e := &excerpt{replays: newReplays(ls, Writers{}), job: replay.Status{Job: job}, lane: replay.Lane{Signal: "traces", Last: 9}, sig: otlpwire.Traces, sampled: true}
	set := policy.KeepAll(time.Second)
	set.Partitions = 2
	l := &traceLane{exporter: d, count: e, policies: versions.Fixed(set), feed: e, frames: received, sampler: sampler.NewSamplers(set, partition.Spread{N: 2}, 1<<20, 0, nil)}
	payload, _ := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{
		{TraceId: []byte("0123456789abcdef"), SpanId: []byte("01234567"), Name: "x"},
	}}}}}})
	for seq, instance := range []string{"other-1", "shop-1"} {
		m := bus.Delivery{Seq: uint64(seq + 1), Subject: "otlp.traces.0." + instance, Body: payload, Pending: 5, Header: envelope.Header{Items: 1, Arrival: 1e9}}
		if err := l.take(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		if traces, _ := l.sampler.Held(); traces != seq {
			t.Errorf("%d traces are held after one of %s", traces, instance)
		}
	}
	if n := e.progress().Unchosen; n != 1 {
		t.Errorf("%d items are not asked for, want 1", n)
	}
	// Where nothing is sampled, messages outside the range are left out, too.
	e.sampled = false
	e.job.From, e.job.To = replay.Point{Seq: 5}, replay.Point{Seq: 9}
	for seq, asked := range map[uint64]bool{4: false, 5: true} {
		if e.admits(bus.Delivery{Seq: seq, Subject: "otlp.traces.0.shop-1"}) != asked {
			t.Errorf("message %d is asked for: %v", seq, !asked)
		}
	}
}
