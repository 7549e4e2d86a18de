package replay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

func openHub(t *testing.T, top bus.Topology) *bus.Conn {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	b, err := broker.Start(broker.Config{Name: "test", Dir: t.TempDir(), MaxPayload: 2 << 20}, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	conn, err := bus.OpenHub(t.Context(), bus.Config{Name: "test", InProcess: b}, top, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn
}

func publish(t *testing.T, conn *bus.Conn, sig otlpwire.Signal, instance string, n, size int, arrival time.Time) {
	t.Helper()
	m := bus.Message{Subject: bus.Subject(sig, instance), Body: make([]byte, size), Header: envelope.Header{
		ContentType: envelope.ContentTypeOTLP, Items: 3, Arrival: arrival.UnixNano(), ID: fmt.Sprint(sig, instance, n),
	}}
	if _, err := conn.Publish(t.Context(), m); err != nil {
		t.Fatal(err)
	}
}

// TestPlan fills streams over a while and asks for parts of it. The bounds that it asks
// for lie between one message and the next, however long it takes to store one.
func TestPlan(t *testing.T) {
	before := [2]time.Duration{leadIn, skew}
	t.Cleanup(func() { leadIn, skew = before[0], before[1] })
	skew = 10 * time.Millisecond
	top := bus.DefaultTopology()
	top.Partitions = 4
	conn := openHub(t, top)
	plan := func(change func(*Request)) (*Plan, error) {
		r := Request{Signals: []string{"traces", "metrics", "logs"}, From: Point{Time: time.Now().Add(-time.Hour)}, To: Point{Time: time.Now()}}
		change(&r)
		return MakePlan(t.Context(), conn, r, 0, nil, time.Now())
	}
	refused := func(want string, change func(*Request)) {
		t.Helper()
		_, err := plan(change)
		if r, is := errors.AsType[*Refusal](err); !is || !strings.Contains(r.Text, want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	refused("no instance", func(*Request) {})

	var at, gap [10]time.Time // when message i was sent, and a moment between it and the one before
	stored := time.Now()
	clock := time.NewTicker(20 * time.Millisecond)
	for i := range at {
		<-clock.C
		at[i] = time.Now()
		gap[i] = stored.Add(at[i].Sub(stored) / 2)
		for _, instance := range []string{"as-1", "as-2"} {
			publish(t, conn, otlpwire.Traces, instance, i, 100, at[i])
			publish(t, conn, otlpwire.Logs, instance, i, 100, at[i])
		}
		stored = time.Now()
	}
	clock.Stop()
	seq := func(i int) uint64 { return uint64(2*i + 1) } // of the first message stored then
	// between asks for what makes the plan begin with message from, as clocks may differ.
	between := func(from, to int) func(*Request) {
		return func(r *Request) { r.From.Time, r.To.Time = gap[from].Add(skew), gap[to].Add(time.Minute) }
	}
	leadIn = gap[5].Sub(gap[2])
	lane := func(p *Plan, signal string) *Lane {
		for i := range p.Lanes {
			if p.Lanes[i].Signal == signal {
				return &p.Lanes[i]
			}
		}
		return &Lane{}
	}
	check := func(what string, p *Plan, err error, signal string, first, last uint64) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if l := lane(p, signal); l.First != first || l.Last != last {
			t.Errorf("%s, %s: %d to %d, want %d to %d", what, signal, l.First, l.Last, first, last)
		}
	}
	p, err := plan(between(5, 8))
	check("a range", p, err, "logs", seq(5), 20)   // edges may be late
	check("a range", p, err, "traces", seq(2), 20) // windows are open from before
	check("a range", p, err, "metrics", 0, 0)      // there are none
	if l := lane(p, "logs"); len(l.Instances) != 0 || l.Messages != 10 && l.Messages != 20 {
		t.Errorf("%+v", l)
	}
	p, err = plan(func(r *Request) { between(5, 8)(r); r.NoSampling = true })
	check("without sampling", p, err, "traces", seq(5), 20)
	p, err = plan(func(r *Request) {
		between(3, 4)(r)
		r.Late = time.Hour
		r.To.Time = gap[6].Add(-time.Hour)
		r.From.Time = r.To.Time.Add(-time.Hour)
	})
	check("with a bound", p, err, "logs", 1, seq(6)-1)
	p, err = plan(func(r *Request) {
		r.From.Time, r.To.Time = gap[3].Add(skew), gap[3].Add(skew+1)
		r.Late = gap[6].Sub(r.To.Time)
	})
	check("with a bound", p, err, "logs", seq(3), seq(6)-1)
	p, err = plan(func(r *Request) { between(0, 9)(r); r.Instances = []string{"*-2"} })
	check("from the start", p, err, "traces", 1, 20)
	if l := lane(p, "logs"); len(p.Lanes) != 2 || len(l.Instances) != 1 || l.Instances[0] != "as-2" || l.Filters()[0] != fmt.Sprintf("otlp.logs.%d.as-2", l.Partition) || l.Messages != 10 {
		t.Errorf("%+v", p.Lanes)
	}
	if f := (Lane{Signal: "logs", Partition: 3}).Filters(); len(f) != 1 || f[0] != "otlp.logs.3.*" {
		t.Errorf("%q", f)
	}
	refused(`the streams hold ["as-1" "as-2"]`, func(r *Request) { r.Instances = []string{"x-*"} })
	refused(`is of ["as-3"]`, func(r *Request) { r.Instances = []string{"as-3"} })
	refused("is empty", func(r *Request) { r.To = r.From })
	p, err = plan(func(r *Request) { r.Signals, r.From, r.To = []string{"logs"}, Point{Seq: 7}, Point{Seq: 9} })
	check("by sequence", p, err, "logs", 7, 9)
	if !p.Oldest.Equal(at[3]) {
		t.Errorf("the oldest is of %v, want %v", p.Oldest, at[3])
	}
	leadIn = at[8].Add(-skew).Sub(gap[4])
	p, err = plan(func(r *Request) { r.Signals, r.From, r.To = []string{"traces"}, Point{Seq: 17}, Point{Seq: 18} })
	check("traces by sequence", p, err, "traces", seq(4), 20)
	refused("holds the sequences 1 to 20, not 21", func(r *Request) { r.Signals, r.From, r.To = []string{"logs"}, Point{Seq: 21}, Point{Seq: 22} })

	counts, err := p.Count(t.Context(), conn, Request{Signals: []string{"traces"}, From: Point{Seq: 17}, To: Point{Seq: 18}}, func(float64) {})
	if err != nil || len(counts) != 2 || counts[0] != (Count{Signal: "traces", Instance: "as-1", Messages: 1, Items: 3, Bytes: 100}) {
		t.Errorf("%+v, %v", counts, err)
	}
}

// TestOlderThanWhatThereIs: a range that begins before what the stream still has names
// the oldest message; one that begins behind it is fine.
func TestOlderThanWhatThereIs(t *testing.T) {
	conn := openHub(t, bus.DefaultTopology())
	begin := time.Now()
	arrival := time.Now().UTC().Truncate(time.Second).Add(-30 * 24 * time.Hour)
	for i := range 30 {
		publish(t, conn, otlpwire.Logs, "as-1", i, 64<<10, arrival.Add(time.Duration(i)*time.Second))
	}
	if err := conn.Remove(t.Context(), "LOGS", "", 15); err != nil { // as a keeper does
		t.Fatal(err)
	}
	state, err := conn.State(t.Context(), "LOGS")
	if err != nil || state.FirstSeq != 16 {
		t.Fatalf("%+v, %v", state, err)
	}
	oldest := arrival.Add(time.Duration(state.FirstSeq-1) * time.Second).Format(time.RFC3339)
	r := Request{Signals: []string{"logs"}, From: Point{Time: begin.Add(-time.Hour)}, To: Point{Time: time.Now()}}
	_, err = MakePlan(t.Context(), conn, r, 0, nil, time.Now())
	if _, is := errors.AsType[*Refusal](err); !is || !strings.Contains(err.Error(), "arrived at its edge at "+oldest) {
		t.Errorf("%v, want %s", err, oldest)
	}
	r.From.Time = state.FirstTime
	p, err := MakePlan(t.Context(), conn, r, 0, nil, time.Now())
	if err != nil || p.Lanes[0].First != state.FirstSeq {
		t.Errorf("%+v, %v", p, err)
	}
	r.From, r.To = Point{Seq: 1}, Point{Seq: 30}
	if _, err = MakePlan(t.Context(), conn, r, 0, nil, time.Now()); err == nil || !strings.Contains(err.Error(), "not 1") {
		t.Errorf("by sequence: %v", err)
	}
}

// TestFiling: the same job twice is one; what was done with it is written down.
func TestFiling(t *testing.T) {
	conn := openHub(t, bus.DefaultTopology())
	jobs, err := Open(t.Context(), conn, bus.DefaultTopology())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	file := func(by string, accept bool) (*Job, bool) {
		t.Helper()
		j, filed, err := jobs.File(ctx, &Job{Request: request(nil), AcceptLoss: accept}, by, noon)
		if err != nil {
			t.Fatal(err)
		}
		return j, filed
	}
	one, filed := file("ann", false)
	if !filed || one.By != "ann" {
		t.Errorf("%+v, %v", one, filed)
	}
	if two, filed := file("bob", false); filed || two.ID != one.ID || two.By != "ann" || two.AcceptLoss {
		t.Errorf("%+v, %v", two, filed)
	}
	if three, filed := file("bob", true); filed || !three.AcceptLoss {
		t.Errorf("%+v, %v", three, filed)
	}
	if err := errors.Join(jobs.Stop(ctx, one.ID, "ann", noon), jobs.Resume(ctx, one.ID, "bob", noon)); err != nil {
		t.Error(err)
	}
	if s, err := jobs.Status(ctx, one.ID); err != nil || s.State != Running || s.Phase() != Checking {
		t.Errorf("%+v, %v", s, err)
	}
	if err := jobs.Remove(ctx, one.ID, "ann", noon); err != nil {
		t.Error(err)
	}
	for _, do := range []func() error{
		func() error { return jobs.Stop(ctx, one.ID, "ann", noon) },
		func() error { _, err := jobs.Status(ctx, one.ID); return err },
		func() error { return jobs.Remove(ctx, one.ID, "ann", noon) },
	} {
		if err := do(); err == nil || !strings.Contains(err.Error(), "there is no job") {
			t.Errorf("of a removed job: %v", err)
		}
	}
	entries, err := jobs.Audit(ctx, "*")
	var got []string
	for _, e := range entries {
		got = append(got, e.By+" "+e.What)
	}
	if want := "ann filed, bob told to accept losses, ann stopped, bob resumed, ann removed"; err != nil || strings.Join(got, ", ") != want {
		t.Errorf("%q, %v", got, err)
	}
	if _, filed := file("ann", false); !filed {
		t.Error("a removed job cannot be filed again")
	}
}
