package sink

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/proc"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sink/backend"
	"github.com/penstock/penstock/pkg/sink/sample"
)

// replays runs the lanes of replay jobs: it follows the bucket, asks the backends
// whether they take data that old, and tells the members which lanes there are.
type replays struct {
	*lanes
	writers []backend.Writer // by signal
	log     *slog.Logger
	behind  func() uint64 // by how many messages a live lane is

	mu      sync.Mutex
	table   *replay.Table
	known   bool            // what was there at the start has been read
	asking  map[string]bool // keys of the checks under way
	running sync.WaitGroup
}

func newReplays(l *lanes, writers []backend.Writer) *replays {
	return &replays{lanes: l, writers: writers, log: l.log.With("component", "replay"), behind: l.members.Behind, table: replay.NewTable(), asking: map[string]bool{}}
}

// run follows the bucket until ctx ends.
func (r *replays) run(ctx context.Context) {
	r.hub.WatchReplays(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.table, r.known = replay.NewTable(), false
	}, func(key string, value []byte) {
		r.mu.Lock()
		defer r.mu.Unlock()
		if key == "" {
			r.known = true
		} else if err := r.table.Set(key, value); err != nil {
			r.log.Error("replay job is passed over", "key", key, "err", err)
		}
		if r.known {
			r.act(ctx)
		}
	})
	r.running.Wait()
}

// act does what the table asks for. r.mu is held.
func (r *replays) act(ctx context.Context) {
	var wanted []bus.Shared
	for _, job := range r.table.Jobs() {
		switch job.Phase() {
		case replay.Checking:
			if job.Plan == nil {
				r.settle(ctx, replay.PlanKey(job.ID), func() any { return r.plan(ctx, job) })
			}
			for _, name := range job.Unasked() {
				r.settle(ctx, replay.CheckKey(job.ID, name), func() any { return r.check(ctx, job, name) })
			}
		case replay.Running:
			for _, l := range job.Lanes {
				if !l.Done {
					wanted = append(wanted, r.lane(job, l))
				}
			}
		}
	}
	r.members.Also(wanted)
	for _, key := range r.table.Orphans() {
		r.background("sweep."+key, func() { r.sweep(ctx, key) })
	}
}

// background runs do once at a time for a key.
func (r *replays) background(key string, do func()) {
	if r.asking[key] {
		return
	}
	r.asking[key] = true
	r.running.Go(func() {
		do()
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.asking, key)
	})
}

// sweep removes what a job has left behind that was removed.
func (r *replays) sweep(ctx context.Context, key string) {
	tokens := strings.Split(key, ".") // lane.<id>.<signal>.<partition>
	if len(tokens) == 4 {
		sig, err := otlpwire.ParseSignal(tokens[2])
		p, numErr := strconv.Atoi(tokens[3])
		if err == nil && numErr == nil {
			if err := r.hub.Conn.DropLane(ctx, bus.Stream(sig), bus.ReplayLane(tokens[1], p)); err != nil {
				return // another change of the table, or another sink, tries again
			}
		}
	}
	if b, err := r.hub.Conn.Replays(ctx, r.cfg.Streams); err == nil {
		_ = b.Delete(ctx, key)
	}
}

// settle finds something out about a job and writes it down; the first sink that knows
// it counts.
func (r *replays) settle(ctx context.Context, key string, find func() any) {
	r.background(key, func() {
		value, _ := json.Marshal(find()) // cannot fail
		if ctx.Err() != nil {
			return
		}
		proc.Retry(ctx, r.log, "write down what is known of a replay job", func() error {
			b, err := r.hub.Conn.Replays(ctx, r.cfg.Streams)
			if err == nil {
				err = b.Create(ctx, key, value)
			}
			if errors.Is(err, bus.ErrExists) {
				return nil
			}
			return err
		})
	})
}

// askTimes is how often a hub or backend that gives no answer is asked.
const askTimes = 4

// plan finds out which lanes a job has.
func (r *replays) plan(ctx context.Context, job replay.Status) *replay.Plan {
	for attempt := 1; ; attempt++ {
		p, err := replay.MakePlan(ctx, r.hub.Conn, job.Request, time.Now())
		if err == nil {
			return p
		}
		_, final := errors.AsType[*replay.Refusal](err)
		if final || attempt == askTimes || !proc.Sleep(ctx, time.Second) {
			return &replay.Plan{At: time.Now().UTC(), Error: err.Error()}
		}
	}
}

// check asks the backend of a signal whether it takes data as old as a job's.
func (r *replays) check(ctx context.Context, job replay.Status, name string) replay.Check {
	sig, _ := otlpwire.ParseSignal(name) // the table holds valid jobs only
	w := r.writers[sig]
	c := replay.Check{OK: true, Backend: w.Name(), At: time.Now().UTC()}
	if len(job.Backends) > 0 && !slices.Contains(job.Backends, w.Name()) {
		c.OK, c.Text = false, fmt.Sprintf("the sinks write %s to %s, not to %s", name, w.Name(), strings.Join(job.Backends, ", "))
		return c
	}
	asked, can := w.(backend.Asked)
	if !can {
		return c
	}
	for attempt := 1; ; attempt++ {
		ok, text, err := asked.Takes(ctx, job.Plan.Oldest, time.Now())
		if err == nil {
			c.OK, c.Text = ok, text
			return c
		}
		if attempt == askTimes || !proc.Sleep(ctx, time.Second) {
			c.OK, c.Text = false, fmt.Sprintf("%s does not say what it takes: %v", w.Name(), err)
			return c
		}
	}
}

// lane returns the lane of a job that the members are to place.
func (r *replays) lane(job replay.Status, l replay.LaneStatus) bus.Shared {
	sig, _ := otlpwire.ParseSignal(l.Signal)
	w := r.writers[sig]
	return bus.Shared{
		LaneConfig: bus.LaneConfig{Stream: bus.Stream(sig), Name: bus.ReplayLane(job.ID, l.Partition), Filters: l.Filters(), Start: max(l.First, 1), Raw: true},
		Signal:     l.Signal, Partition: l.Partition, Partitions: r.cfg.Streams.Partitions, Backend: w.Name(), Quiet: true,
		Run: func(ctx context.Context, lane *bus.Lane) {
			e := &excerpt{replays: r, job: job, lane: l.Lane, sig: sig, backend: w.Name()}
			r.mu.Lock()
			if now, ok := r.table.Status(job.ID); ok {
				for _, at := range now.Lanes {
					if at.Key() == l.Key() {
						e.mu.progress = at.Progress
					}
				}
			}
			r.mu.Unlock()
			e.run(ctx, lane, w)
		},
	}
}

// excerpt is the part of a job in one partition, as its owner runs it. Its methods may
// be called on nil, for live lanes.
type excerpt struct {
	*replays
	job     replay.Status
	lane    replay.Lane
	sig     otlpwire.Signal
	backend string
	end     bool // everything has been read
	// unsettled counts messages of a lane that writes them as they come.
	unsettled int
	due       time.Time // when the next message may be read, by the rate

	mu struct {
		sync.Mutex
		progress replay.Progress
	}
}

// In reports whether something is in the range.
func (e *excerpt) In(arrival int64, seq uint64) bool { return e.job.In(arrival, seq) }

// run does the work until it is done or ctx ends, and writes down how far it is.
func (e *excerpt) run(ctx context.Context, lane *bus.Lane, w backend.Writer) {
	e.change(func(p *replay.Progress) { p.Done, p.Wait = false, "" })
	report, stop := context.WithCancel(context.WithoutCancel(ctx))
	var reporter sync.WaitGroup
	reporter.Go(func() {
		for e.write(report); proc.Sleep(report, time.Second); {
			e.write(report)
		}
	})
	own := *e.delivery(e.sig, w, e.lane.Partition)
	own.owned, own.count, own.log = lane.Owned, e, own.log.With("replay", e.job.ID)
	rules, err := e.decides(ctx)
	switch {
	case ctx.Err() != nil:
		lane.Close()
	case err != nil:
		e.log.Error("replay lane cannot run", "job", e.job.ID, "err", err)
		e.change(func(p *replay.Progress) { p.Wait = err.Error() })
		lane.Close()
	case rules == nil:
		(&directLane{lane: lane, delivery: &own, excerpt: e}).run(ctx)
	default:
		(&traceLane{
			lane: lane, delivery: &own, rules: rules, maxBytes: int(e.cfg.Sampling.MaxBytes), attribute: e.cfg.Sampling.PolicyAttribute,
			journalSubject: bus.ReplayDecisionsSubject(e.job.ID, e.lane.Partition), excerpt: e,
		}).run(ctx)
	}
	done := e.ended()
	stop()
	reporter.Wait()
	if done {
		e.finish(context.WithoutCancel(ctx))
	} else {
		e.write(context.WithoutCancel(ctx))
	}
	<-ctx.Done() // the members would begin it anew
}

// decides returns the policies of the job; nil where nothing is sampled.
func (e *excerpt) decides(ctx context.Context) (*rules, error) {
	if e.sig != otlpwire.Traces || e.job.NoSampling {
		return nil, nil
	}
	if !e.rules.await(ctx) {
		return nil, ctx.Err()
	}
	return e.rules.replayed(e.job.Policies)
}

// finish says that the lane is done, and what came of it.
func (e *excerpt) finish(ctx context.Context) {
	e.change(func(p *replay.Progress) { p.Done, p.Floor = true, max(p.Floor, e.lane.Last) })
	if !e.write(ctx) {
		return // the next owner finds nothing left to do, and says so
	}
	e.mu.Lock()
	counts := e.mu.progress
	e.mu.Unlock()
	err := e.hub.Conn.DropLane(ctx, bus.Stream(e.sig), bus.ReplayLane(e.job.ID, e.lane.Partition))
	err = errors.Join(err, replay.Record(ctx, e.hub.Conn, replay.Entry{At: time.Now().UTC(), By: counts.Owner, What: "lane finished", Job: e.job.ID, Lane: e.lane.Key(), Counts: &counts}))
	if err != nil {
		e.log.Warn("end of a replay lane is not recorded", "job", e.job.ID, "lane", e.lane.Key(), "err", err)
	}
	e.log.Info("replay lane finished", "job", e.job.ID, "lane", e.lane.Key(), "delivered", counts.Delivered, "sampled_out", counts.SampledOut)
}

func (e *excerpt) change(do func(*replay.Progress)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	do(&e.mu.progress)
}

// write stores the progress.
func (e *excerpt) write(ctx context.Context) bool {
	e.mu.Lock()
	e.mu.progress.Owner, e.mu.progress.At = e.members.Self(), time.Now().UTC()
	value, _ := json.Marshal(e.mu.progress) // cannot fail
	e.mu.Unlock()
	b, err := e.hub.Conn.Replays(ctx, e.cfg.Streams)
	if err == nil {
		err = b.Put(ctx, replay.LaneKey(e.job.ID, e.lane), value)
	}
	if err != nil && ctx.Err() == nil {
		e.log.Debug("progress of a replay is not written", "job", e.job.ID, "err", err)
	}
	return err == nil
}

// ends reports whether d is behind the end of what is to be read.
func (e *excerpt) ends(d bus.Delivery) bool {
	if e == nil || (d.Seq <= e.lane.Last && d.CaughtUp.IsZero()) {
		return false
	}
	e.end = true
	return true
}

// last reports whether nothing that is to be read stands behind d: what there is up to
// the end was in the stream when the job was filed.
func (e *excerpt) last(d bus.Delivery) bool {
	if e == nil || d.Pending > 0 {
		return false
	}
	e.end = true
	return true
}

// ended reports whether the end has been reached.
func (e *excerpt) ended() bool { return e != nil && e.end }

// again says that the lane begins anew at its floor.
func (e *excerpt) again() {
	if e != nil {
		e.end = false
	}
}

// leavesOut reports whether a message of metrics, logs or unsampled spans is not asked
// for; one that cannot be read is in DEADLETTER since it was live.
func (e *excerpt) leavesOut(d bus.Delivery) bool {
	return e != nil && (d.Err != nil || !e.job.Matches(d.Instance()) || !e.In(d.Header.Arrival, d.Seq))
}

const (
	// maxBehind is by how many messages a live lane of this sink may be behind before
	// replays make room for it.
	maxBehind = 128

	// yield is how long each message of a replay then waits.
	yield = 100 * time.Millisecond

	// pacing is how far ahead of its rate a replay may read.
	pacing = 100 * time.Millisecond
)

// wait keeps to the rate of the job and makes room for live lanes. It returns false
// when ctx ended.
func (e *excerpt) wait(ctx context.Context, d bus.Delivery) bool {
	if e == nil {
		return true
	}
	e.change(func(p *replay.Progress) { p.Bytes += int64(d.Size) })
	if e.behind() > maxBehind {
		e.change(func(p *replay.Progress) { p.Wait = "live traffic is behind" })
		if !proc.Sleep(ctx, yield) {
			return false
		}
		e.change(func(p *replay.Progress) { p.Wait = "" })
	}
	if e.job.Rate == 0 {
		return ctx.Err() == nil
	}
	now := time.Now()
	if e.due.Before(now.Add(-pacing)) {
		e.due = now.Add(-pacing)
	}
	e.due = e.due.Add(time.Duration(float64(d.Size) / e.share() * float64(time.Second)))
	if pause := e.due.Sub(now); pause > 0 {
		return proc.Sleep(ctx, pause)
	}
	return true
}

// share returns what of the job's rate this lane may have, in bytes a second.
func (e *excerpt) share() float64 {
	e.replays.mu.Lock()
	defer e.replays.mu.Unlock()
	left := 0
	if now, ok := e.table.Status(e.job.ID); ok {
		for _, l := range now.Lanes {
			if !l.Done {
				left++
			}
		}
	}
	return float64(e.job.Rate) / float64(max(left, 1))
}

// ackEvery is after how many messages the floor of a replay is moved: so many may come
// twice after a crash.
const ackEvery = 32

// settles reports whether it is time to move the floor; for live lanes it always is.
func (e *excerpt) settles() bool {
	if e == nil {
		return true
	}
	e.unsettled++
	return e.unsettled%ackEvery == 0
}

// reached notes the floor.
func (e *excerpt) reached(floor uint64) {
	if e != nil {
		e.change(func(p *replay.Progress) { p.Floor = max(p.Floor, floor) })
	}
}

func (e *excerpt) unchosen(items int) {
	e.change(func(p *replay.Progress) { p.Unchosen += int64(items) })
}

func (e *excerpt) delivered(items int) {
	e.led.Replayed(e.sig, e.backend).Add(float64(items))
	e.change(func(p *replay.Progress) { p.Delivered += int64(items) })
}

func (e *excerpt) dead(_ string, items int) {
	e.change(func(p *replay.Progress) { p.Dead += int64(items) })
}

func (e *excerpt) decided(out sample.Output) {
	e.change(func(p *replay.Progress) {
		p.SampledOut += int64(out.SampledOut)
		p.Unchosen += int64(out.Unchosen)
	})
}
