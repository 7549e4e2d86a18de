package sink

import (
	"bytes"
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

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sampling/sampler"
	"github.com/penstock/penstock/pkg/sampling/versions"
)

// replays runs the lanes of replay jobs: it follows the bucket, asks the backends
// whether they take data that old, and tells the members which lanes there are.
type replays struct {
	*lanes
	writers Writers
	log     *slog.Logger
	behind  func() uint64 // by how many messages a live lane is

	mu      sync.Mutex
	table   *replay.Table
	known   bool            // what was there at the start has been read
	asking  map[string]bool // keys of the checks under way
	running sync.WaitGroup
}

func newReplays(l *lanes, writers Writers) *replays {
	return &replays{lanes: l, writers: writers, log: l.log.With("component", "replay"), behind: l.members.Behind, table: replay.NewTable(), asking: map[string]bool{}}
}

// run follows the bucket until ctx ends.
func (r *replays) run(ctx context.Context) {
	for ctx.Err() == nil {
		b, err := r.hub.OpenBucket(ctx, replay.Bucket)
		if err == nil {
			r.forget()
			err = b.Watch(ctx, ">", func(key string, value []byte) { r.note(ctx, key, value) })
		}
		if err != nil && ctx.Err() == nil {
			r.log.Warn("replay jobs cannot be watched, will try again", "err", err)
		}
		backoff.Sleep(ctx, retryInterval)
	}
	r.running.Wait()
}

// retryInterval is how long a watch that breaks waits before it begins again.
const retryInterval = time.Second

// forget begins with an empty table: a new watch says everything again.
func (r *replays) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.table, r.known = replay.NewTable(), false
}

// note takes in what the watch says of a key; "" when all that was there has been said.
func (r *replays) note(ctx context.Context, key string, value []byte) {
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
}

// act does what the table asks for. r.mu is held.
func (r *replays) act(ctx context.Context) {
	var wanted []membership.Shared
	for _, job := range r.table.Jobs() {
		switch job.Phase() {
		case replay.Checking:
			if job.Plan == nil {
				r.settle(ctx, job.PlanKey(), func() any { return r.plan(ctx, job) })
			}
			for _, name := range job.Unasked() {
				r.settle(ctx, job.CheckKey(name), func() any { return r.check(ctx, job, name) })
			}
		case replay.Running:
			for _, l := range job.Lanes {
				if l.Done {
					continue
				}
				sig, _ := otlpwire.ParseSignal(l.Signal) // the table holds valid jobs only
				w, ok := r.writer(job, sig)
				if !ok {
					r.log.Error("a replay is for a backend that this sink does not have: its configuration is not that of the others", "job", job.ID, "backends", job.Backends)
					continue
				}
				wanted = append(wanted, r.lane(job, l, sig, w))
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
	tokens := strings.Split(key, ".") // lane.<run>.<signal>.<partition>
	if len(tokens) == 4 {
		sig, err := otlpwire.ParseSignal(tokens[2])
		p, numErr := strconv.Atoi(tokens[3])
		if err == nil && numErr == nil {
			if err := r.hub.Conn.DropLane(ctx, bus.Stream(sig), bus.ReplayLane(tokens[1], p)); err != nil {
				return // another change of the table, or another sink, tries again
			}
		}
	}
	if b, err := r.hub.OpenBucket(ctx, replay.Bucket); err == nil {
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
		backoff.Retry(ctx, r.log, "write down what is known of a replay job", func() error {
			b, err := r.hub.OpenBucket(ctx, replay.Bucket)
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

// askTimes is how often a backend that gives no answer is asked.
const askTimes = 4

// plan finds out which lanes a job has.
func (r *replays) plan(ctx context.Context, job replay.Status) (plan *replay.Plan) {
	if !r.policies.Await(ctx) {
		return nil
	}
	backoff.Retry(ctx, r.log, "plan replay job "+job.ID, func() (err error) {
		policies, err := r.policies.Replayed(job.Policies)
		if err == nil {
			plan, err = replay.MakePlan(ctx, r.hub.Conn, job.Request, policies.Wait(), time.Now())
		} else {
			err = &replay.Refusal{Text: err.Error()}
		}
		if why, final := errors.AsType[*replay.Refusal](err); final {
			plan, err = &replay.Plan{At: time.Now().UTC(), Error: why.Text}, nil
		}
		return err
	})
	return plan
}

// check asks the backend of a signal whether it takes data as old as a job's.
func (r *replays) check(ctx context.Context, job replay.Status, name string) replay.Check {
	sig, _ := otlpwire.ParseSignal(name) // the table holds valid jobs only
	w, ok := r.writer(job, sig)
	c := replay.Check{OK: true, Backend: w.Name(), At: time.Now().UTC()}
	if !ok {
		var names []string
		for _, w := range r.writers[sig] {
			names = append(names, w.Name())
		}
		c.OK, c.Wrong, c.Text = false, true, fmt.Sprintf("the sinks write %s to %s, not to %s", name, strings.Join(names, ", "), strings.Join(job.Backends, ", "))
		return c
	}
	for attempt := 1; ; attempt++ {
		ok, text, err := backend.Takes(ctx, w, job.Plan.Oldest, time.Now())
		if err == nil {
			c.OK, c.Text = ok, text
			return c
		}
		if attempt == askTimes || !backoff.Sleep(ctx, time.Second) {
			c.OK, c.Text = false, fmt.Sprintf("%s does not say what it takes: %v", w.Name(), err)
			return c
		}
	}
}

// writer returns the backend that a job's data of a signal goes to: the first of those it
// names, or without names the one that has none itself. ok is false when there is none of
// them.
func (r *replays) writer(job replay.Status, sig otlpwire.Signal) (w backend.Writer, ok bool) {
	for _, w := range r.writers[sig] {
		if len(job.Backends) == 0 || slices.Contains(job.Backends, w.Name()) {
			return w, true
		}
	}
	return r.writers[sig][0], false
}

// lane returns the lane of a job that the members are to place.
func (r *replays) lane(job replay.Status, l replay.LaneStatus, sig otlpwire.Signal, w backend.Writer) membership.Shared {
	return membership.Shared{
		LaneConfig: bus.LaneConfig{Stream: bus.Stream(sig), Name: bus.ReplayLane(job.Run(), l.Partition), Filters: l.Filters(), Start: max(l.First, 1), Raw: true},
		Signal:     l.Signal, Partition: l.Partition, Partitions: r.cfg.Streams.Partitions, Backend: w.Name(), Quiet: true,
		Run: func(ctx context.Context, lane *bus.Lane) {
			e := &excerpt{replays: r, job: job, lane: l.Lane, sig: sig, backend: w.Name()}
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
	owned   func() bool
	has     func(ctx context.Context, after, seq uint64) (bool, error) // of the lane
	end     bool                                                       // everything has been read
	over    bool                                                       // and is done
	due     time.Time                                                  // when the next message may be read, by the rate
	// unsettled counts messages of a lane that writes them as they come.
	unsettled int

	mu struct {
		sync.Mutex
		// progress counts on from what the bucket has, which is read when the lane is
		// claimed, and written under the revision that it then has: one who has lost the
		// lane writes nothing.
		progress replay.Progress
		revision uint64
		known    bool
		tried    []byte // what was to be written last
		read     uint64 // the sequence of the last message
	}
}

// In reports whether something is in the range.
func (e *excerpt) In(arrival int64, seq uint64) bool { return e.job.In(arrival, seq) }

// run does the work until it is done or ctx ends, and writes down how far it is. When
// it returns the members begin it anew, if it is still theirs.
func (e *excerpt) run(ctx context.Context, lane *bus.Lane, w backend.Writer) {
	e.owned, e.has = lane.Owned, lane.Has
	report, stop := context.WithCancel(ctx)
	var reporter sync.WaitGroup
	reporter.Go(func() {
		for backoff.Sleep(report, time.Second) {
			e.report(report)
		}
	})
	own := *e.delivery(e.sig, w, e.lane.Partition)
	own.owned, own.count, own.log = lane.Owned, e, own.log.With("replay", e.job.ID)
	policies, err := e.decides(ctx)
	switch {
	case err != nil:
		if ctx.Err() == nil {
			e.log.Error("replay lane cannot run", "job", e.job.ID, "err", err)
			<-ctx.Done()
		}
		lane.Close()
	case policies == nil:
		(&directLane{lane: lane, delivery: &own, excerpt: e}).run(ctx)
	default:
		(&traceLane{
			lane: lane, delivery: &own, policies: policies, maxBytes: int(e.cfg.Sampling.MaxBytes), attribute: e.cfg.Sampling.PolicyAttribute,
			journalStream: bus.Replayed, journalSubject: bus.ReplayedSubject(e.job.Run(), e.lane.Partition), excerpt: e,
		}).run(ctx)
	}
	stop()
	reporter.Wait()
	last, cancel := membership.Finish(ctx)
	defer cancel()
	if !e.over {
		_ = e.write(last)
	} else if e.finish(last) {
		<-ctx.Done() // until the table says so: the members would begin it anew
	}
}

// decides returns the policies of the job; nil where nothing is sampled.
func (e *excerpt) decides(ctx context.Context) (*versions.Versions, error) {
	if e.sig != otlpwire.Traces || e.job.NoSampling {
		return nil, nil
	}
	if !e.policies.Await(ctx) {
		return nil, ctx.Err()
	}
	return e.policies.Replayed(e.job.Policies)
}

// claimed reads how far the lane was when this sink became its owner. It returns false
// when it is done, or ctx ended.
func (e *excerpt) claimed(ctx context.Context) bool {
	if e == nil {
		return true
	}
	e.end = false
	ok := backoff.Retry(ctx, e.log, "read how far a replay is", func() error {
		b, err := e.hub.OpenBucket(ctx, replay.Bucket)
		if err != nil {
			return err
		}
		value, revision, err := b.Get(ctx, e.job.LaneKey(e.lane))
		if err != nil && !errors.Is(err, bus.ErrMissing) {
			return err
		}
		var p replay.Progress
		if value != nil {
			if err := json.Unmarshal(value, &p); err != nil {
				e.log.Error("cannot read progress of a replay; it starts again", "job", e.job.ID, "err", err)
			}
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		p.Wait = ""
		e.mu.progress, e.mu.revision, e.mu.known, e.mu.read = p, revision, true, 0
		return nil
	})
	e.over = ok && e.progress().Done
	return ok && !e.over
}

// report writes how far the lane is, and notes what the stream has let go of before it
// was read; other instances' messages may be among that.
func (e *excerpt) report(ctx context.Context) {
	e.mu.Lock()
	known := e.mu.known
	e.mu.Unlock()
	if !known {
		return // not the owner
	}
	if state, err := e.hub.Conn.State(ctx, bus.Stream(e.sig)); err == nil {
		e.change(func(p *replay.Progress) {
			read := max(e.mu.read, p.Floor, e.lane.First-1)
			if state.FirstSeq > read+1 && read < e.lane.Last {
				p.Gone += min(state.FirstSeq-1, e.lane.Last) - read
				e.mu.read = state.FirstSeq - 1
			}
		})
	}
	if err := e.write(ctx); err != nil && ctx.Err() == nil {
		e.log.Debug("progress of a replay is not written", "job", e.job.ID, "err", err)
	}
}

// finish says that the lane is done, and what came of it. It returns false when ctx
// ended, or the lane has another owner.
func (e *excerpt) finish(ctx context.Context) bool {
	if !e.progress().Done {
		e.change(func(p *replay.Progress) { p.Done, p.Floor, p.Wait = true, max(p.Floor, e.lane.Last), "" })
		lost := false
		if !backoff.Retry(ctx, e.log, "write down that a replay lane is done", func() error {
			err := e.write(ctx)
			if lost = errors.Is(err, errLost); lost {
				return nil
			}
			return err
		}) || lost {
			return false
		}
		counts := e.progress()
		if err := replay.Record(ctx, e.hub.Conn, replay.Entry{At: time.Now().UTC(), By: counts.Owner, What: "lane finished", Job: e.job.ID, Lane: e.lane.Key(), Counts: &counts}); err != nil {
			e.log.Warn("end of a replay lane is not in the audit", "job", e.job.ID, "lane", e.lane.Key(), "err", err)
		}
		e.log.Info("replay lane finished", "job", e.job.ID, "lane", e.lane.Key(), "delivered", counts.Delivered, "sampled_out", counts.SampledOut)
	}
	if err := e.hub.Conn.DropLane(ctx, bus.Stream(e.sig), bus.ReplayLane(e.job.Run(), e.lane.Partition)); err != nil {
		e.log.Warn("consumer of a replay is left behind", "job", e.job.ID, "lane", e.lane.Key(), "err", err)
	}
	return true
}

func (e *excerpt) change(do func(*replay.Progress)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	do(&e.mu.progress)
}

func (e *excerpt) progress() replay.Progress {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.mu.progress
}

// write stores the progress, unless somebody else has since the lane was claimed.
func (e *excerpt) write(ctx context.Context) error {
	e.mu.Lock()
	e.mu.progress.Owner, e.mu.progress.At = e.members.Self(), time.Now().UTC()
	value, _ := json.Marshal(e.mu.progress) // cannot fail
	revision, known, tried := e.mu.revision, e.mu.known, e.mu.tried
	if known {
		e.mu.tried = value
	}
	e.mu.Unlock()
	if !known {
		return errLost
	}
	b, err := e.hub.OpenBucket(ctx, replay.Bucket)
	if err != nil {
		return err
	}
	next, err := b.Store(ctx, e.job.LaneKey(e.lane), value, revision)
	if errors.Is(err, bus.ErrChanged) || errors.Is(err, bus.ErrExists) {
		var now replay.Progress
		there, at, readErr := b.Get(ctx, e.job.LaneKey(e.lane))
		switch {
		case readErr != nil:
		case bytes.Equal(there, tried): // ours: its answer was not waited for, or lost
			next, err = b.Store(ctx, e.job.LaneKey(e.lane), value, at)
		case json.Unmarshal(there, &now) == nil && !now.Done && e.owned():
			next = at // the owner before has written once more
		default:
			err = errLost
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if next != 0 {
		e.mu.revision = next
	}
	e.mu.known = !errors.Is(err, errLost)
	return err
}

// errLost says that a lane is not ours, or not known to be.
var errLost = errors.New("the lane has another owner")

// ends reports whether d is behind the end of what is to be read, or nothing is left of that.
func (e *excerpt) ends(ctx context.Context, d bus.Delivery) bool {
	if e == nil || d.Claimed {
		return false
	}
	over := d.Seq > e.lane.Last
	if d.Idle {
		var err error
		if over, err = e.has(ctx, d.After, e.lane.Last); err != nil && ctx.Err() == nil {
			if more, due := e.said.Due("has "+e.job.ID, time.Now()); due {
				e.log.Warn("the hub does not say whether a replay has read everything, it is asked again", "job", e.job.ID, "err", err, "more_since_last_said", more)
			}
		}
	}
	e.end = e.end || over
	return over
}

// last reports whether nothing that is to be read stands behind d: what there is up to
// the end was in the stream when the job was planned. A copy of the stream on another
// server may be behind; there the end is where the stream's leader says that nothing is left.
func (e *excerpt) last(d bus.Delivery) bool {
	if e == nil || d.Pending > 0 || e.cfg.Streams.Replicas > 1 && d.Seq < e.lane.Last {
		return false
	}
	e.end = true
	return true
}

// ended reports whether the end has been reached.
func (e *excerpt) ended() bool { return e != nil && e.end }

// done says that what was read up to the end has been dealt with.
func (e *excerpt) done() { e.over = true }

// again says that the lane begins anew at its floor.
func (e *excerpt) again() {
	if e != nil {
		e.end = false
	}
}

// leavesOut reports whether a message of metrics, logs or unsampled spans is not asked
// for; one that cannot be read is in DEADLETTER since it was live.
func (e *excerpt) leavesOut(d bus.Delivery) bool {
	return e != nil && (d.Err != nil || !e.matches(d) || !e.In(d.Header.Arrival, d.Seq))
}

// matches reports whether a message is of an instance that is asked for: where many are,
// the lane reads the whole partition.
func (e *excerpt) matches(d bus.Delivery) bool { return e == nil || e.job.Matches(d.Instance()) }

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
	e.change(func(p *replay.Progress) {
		p.Bytes += int64(d.Size)
		e.mu.read = d.Seq
	})
	if e.behind() > maxBehind {
		e.change(func(p *replay.Progress) { p.Wait = "live traffic is behind" })
		if !backoff.Sleep(ctx, yield) {
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
		return backoff.Sleep(ctx, pause)
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

func (e *excerpt) restamped() {} // counted when it was live

// filtered counts with what was not asked for.
func (e *excerpt) filtered(items int) { e.unchosen(items) }

func (e *excerpt) decided(out sampler.Output) {
	e.change(func(p *replay.Progress) {
		p.SampledOut += int64(out.SampledOut)
		p.Unchosen += int64(out.Unchosen)
	})
}
