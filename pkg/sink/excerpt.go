package sink

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/sampler"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/pkg/sink/export"
	"github.com/penstock/penstock/pkg/sink/horizon"
	"github.com/penstock/penstock/pkg/tally"
)

// excerpt is the part of a job in one partition, as its owner runs it.
type excerpt struct {
	*replays
	job     replay.Status
	lane    replay.Lane
	sig     otlpwire.Signal
	backend string
	owned   func() bool
	has     func(ctx context.Context, after, seq uint64) (bool, error) // of the lane
	sampled bool                                                       // spans outside the range, and of other instances of a domain, count for decisions: they are left out afterwards
	domains domain.Versions                                            // by sequences of TRACES
	reach   horizon.Reach                                              // of the goroutine that reports
	again   atomic.Pointer[horizon.Readable]                           // nil: not known yet
	due     time.Time                                                  // when the rate allows the next message to be read

	mu struct {
		sync.Mutex
		// progress continues from what the bucket has, which is read when the lane is
		// claimed. It is written only on the revision that it then had: a sink that has
		// lost the lane writes nothing.
		progress replay.Progress
		revision uint64
		known    bool
		tried    []byte // what was last tried to write
		read     uint64 // the sequence of the last message
	}
}

// In reports whether something is in the range.
func (e *excerpt) In(arrival int64, seq uint64) bool { return e.job.In(arrival, seq) }

// run does the work until it is done or ctx ends, and records its progress. When it
// returns, the members start it again if the lane is still placed here.
func (e *excerpt) run(ctx context.Context, lane *bus.Lane, w backend.Writer) {
	e.owned, e.has = lane.Owned, lane.Has
	e.reach.MaxBytes = uint64(e.cfg.Sampling.Late.MaxBytes)
	report, stop := context.WithCancel(ctx)
	var reporter sync.WaitGroup
	reporter.Go(func() {
		for backoff.Sleep(report, time.Second) {
			e.report(report)
		}
	})
	own := *e.exporter(e.sig, w, e.lane.Partition, e)
	own.Owned, own.Log = lane.Owned, own.Log.With("replay", e.job.ID)
	err := e.read(ctx, lane, &own)
	stop()
	reporter.Wait()
	last, cancel := membership.Finish(ctx)
	defer cancel()
	if !errors.Is(err, errEnd) {
		_ = e.write(last)
	} else if e.finish(last) {
		<-ctx.Done() // until the table shows it: otherwise the members would start it again
	}
}

// read runs the lane; it returns errEnd when everything has been read and handled.
func (e *excerpt) read(ctx context.Context, lane *bus.Lane, own *export.Exporter) error {
	policies, err := e.decides(ctx)
	if err != nil {
		if ctx.Err() == nil {
			e.log.Error("replay lane cannot run", "job", e.job.ID, "err", err)
			<-ctx.Done()
		}
		lane.Close()
		return err
	}
	if policies == nil {
		return (&directLane{lane: lane, feed: e, exporter: own, count: e, ackEvery: ackEvery}).run(ctx)
	}
	spread := partition.Spread{N: max(policies.Base().Partitions, 1)}
	if !backoff.Retry(ctx, e.log, "read how SPANS is spread", func() error {
		spans, err := e.hub.Conn.State(ctx, bus.Spans)
		spread.ByInstance = !spans.ByTrace
		return err
	}) {
		lane.Close()
		return ctx.Err()
	}
	e.sampled, e.domains = true, policies.Domains()
	follow := e.follow
	if e.job.Policies != "" {
		follow = nil // it decides anew
	}
	return (&traceLane{
		follow: follow,
		lane:   lane, feed: e, exporter: own, count: e, policies: policies, maxBytes: int(e.cfg.Sampling.MaxBytes), attribute: e.cfg.Sampling.PolicyAttribute,
		stream: bus.Stream(e.sig), filters: e.lane.Filters(), frames: received, spread: spread, in: e.In,
		journalStream: bus.Replayed, journalSubject: bus.ReplayedSubject(e.job.Run(), e.lane.Partition),
	}).run(ctx)
}

// followBefore is how long before a range the decisions about its traces may have been recorded: an edge's clock may be ahead.
const followBefore = 10 * time.Minute

// follow reads which decisions have been made live about what the lane reads, where the hub still has them.
func (e *excerpt) follow(ctx context.Context, s *sampler.Samplers) error {
	conn := e.hub.Conn
	from, err := conn.SequenceAt(ctx, bus.Decisions, e.job.Plan.Oldest.Add(-followBefore))
	if err != nil {
		return err
	}
	var subjects []string // without those of further backends
	for p := range e.cfg.Streams.Partitions {
		subjects = append(subjects, bus.DecisionsSubject(p))
	}
	r, err := conn.OpenReaderOf(ctx, bus.ReaderConfig{Stream: bus.Decisions, From: from, Filters: subjects})
	if err != nil {
		return err
	}
	defer r.Close()
	var body []byte
	full := false
	err = r.Each(ctx, func(d bus.Delivery) bool {
		if d.Decompress(&body); d.Err != nil {
			return true
		}
		if _, is, _ := envelope.ReadSources(d.Body); is {
			return true
		}
		all, _ := envelope.ReadDecisions(d.Body) // those before an error count
		for _, one := range all {
			if one.Instance != "" && (e.asks(one.Instance) || e.lane.Shares(e.domains, one.Instance)) {
				full = !s.Follow(one) || full // what has room may still change
			}
		}
		return true
	})
	if full {
		e.log.Warn("there is no room for all decisions that were made live; traces without one are decided again", "job", e.job.ID)
	}
	return err
}

// received calls visit with the spans of a message of TRACES.
func received(guard *envelope.Guard, d bus.Delivery, visit func(envelope.Frame) error) error {
	if d.Err != nil {
		return d.Err
	}
	payload, _, err := guard.Open(otlpwire.Traces, d.Instance(), d.Body)
	if err != nil {
		return err
	}
	return visit(envelope.Frame{Instance: d.Instance(), Arrival: d.Header.Arrival, Seq: d.Seq, Source: envelope.SourceOf(d.Header.ID), Load: d.Header.Load, Payload: payload})
}

// decides returns the policies of the job; nil where nothing is sampled.
func (e *excerpt) decides(ctx context.Context) (*versions.Versions, error) {
	if e.sig != otlpwire.Traces || e.job.NoSampling {
		return nil, nil
	}
	if !e.policies.Await(ctx) {
		return nil, ctx.Err()
	}
	return e.policies.Replayed(e.job.Policies, e.job.Alone())
}

// claim reads how far the lane had come when this sink became its owner.
func (e *excerpt) claim(ctx context.Context) (first bool, err error) {
	if !backoff.Retry(ctx, e.log, "read the progress of a replay", func() error {
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
	}) {
		return false, stopped(ctx)
	}
	before := e.progress()
	if before.Done {
		return false, errEnd
	}
	return before.Owner == "", nil
}

// report writes how far the lane has come, and notes how many messages were removed from the
// stream before they were read; other instances' messages may be among them.
func (e *excerpt) report(ctx context.Context) {
	e.mu.Lock()
	known := e.mu.known
	e.mu.Unlock()
	if !known {
		return // not the owner
	}
	if state, err := e.hub.Conn.State(ctx, bus.Stream(e.sig)); err == nil {
		again := e.reach.Look(state, time.Now())
		e.again.Store(&again)
		e.change(func(p *replay.Progress) {
			read := max(e.mu.read, p.Floor, e.lane.First-1)
			if state.FirstSeq > read+1 && read < e.lane.Last {
				p.Gone += min(state.FirstSeq-1, e.lane.Last) - read
				e.mu.read = state.FirstSeq - 1
			}
		})
	}
	if err := e.write(ctx); err != nil && ctx.Err() == nil {
		e.log.Debug("cannot write progress of a replay", "job", e.job.ID, "err", err)
	}
}

// finish records that the lane is done, and its results. It returns false when ctx
// ended or the lane has another owner.
func (e *excerpt) finish(ctx context.Context) bool {
	if !e.progress().Done {
		e.change(func(p *replay.Progress) { p.Done, p.Floor, p.Wait = true, max(p.Floor, e.lane.Last), "" })
		lost := false
		if !backoff.Retry(ctx, e.log, "record that a replay lane is finished", func() error {
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
			e.log.Warn("replay lane finished, audit entry not written", "job", e.job.ID, "lane", e.lane.Key(), "err", err)
		}
		e.log.Info("replay lane finished", "job", e.job.ID, "lane", e.lane.Key(), "delivered", counts.Delivered, "sampled_out", counts.SampledOut)
	}
	if err := e.hub.Conn.DropLane(ctx, bus.Stream(e.sig), bus.ReplayLane(e.job.Run(), e.lane.Partition)); err != nil {
		e.log.Warn("cannot delete the consumer of a finished replay lane", "job", e.job.ID, "lane", e.lane.Key(), "err", err)
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

// write stores the progress, unless another owner has stored its own since the lane was claimed.
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
		case bytes.Equal(there, tried): // ours: its answer was lost or came too late
			next, err = b.Store(ctx, e.job.LaneKey(e.lane), value, at)
		case json.Unmarshal(there, &now) == nil && !now.Done && e.owned():
			next = at // the previous owner has written once more
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

// next ends the lane at the end of the job's range, and slows it to the rate of the job and while
// live lanes have a backlog.
func (e *excerpt) next(ctx context.Context, d bus.Delivery) error {
	switch {
	case d.Idle:
		return e.idle(ctx, d.After)
	case d.Seq > e.lane.Last:
		return errEnd
	case d.Seq > 0 && !e.wait(ctx, d):
		return stopped(ctx)
	}
	return nil
}

// idle returns errEnd when the lane has nothing left to read; after is the last message that it
// has read.
func (e *excerpt) idle(ctx context.Context, after uint64) error {
	over, err := e.has(ctx, after, e.lane.Last)
	if err != nil && ctx.Err() == nil {
		if more, due := e.said.Due("has "+e.job.ID, time.Now()); due {
			e.log.Warn("cannot determine whether a replay has read everything, will try again", "job", e.job.ID, "err", err, "more_since_last_said", more)
		}
	}
	if over {
		return errEnd
	}
	return nil
}

// last reports whether d is the last message. Everything up to the end was in the stream when the
// job was planned, so nothing pending means the end. With several replicas a copy of the stream may
// lag: then only the leader's answer counts that nothing is left (see idle).
func (e *excerpt) last(d bus.Delivery) bool {
	return d.Pending == 0 && (e.cfg.Streams.Replicas <= 1 || d.Seq >= e.lane.Last)
}

// admits leaves out other instances' messages, which a lane reads when the job is for many
// instances, and what is outside the range.
func (e *excerpt) admits(d bus.Delivery) bool {
	wanted := e.asks(d.Instance()) && e.In(d.Header.Arrival, d.Seq)
	if e.sampled {
		wanted = e.asks(d.Instance()) || e.lane.Shares(e.domains, d.Instance())
	}
	if !wanted {
		e.unchosen(max(d.Header.Items, 1))
	}
	return wanted
}

func (e *excerpt) readable() horizon.Readable {
	if again := e.again.Load(); again != nil {
		return *again
	}
	return horizon.Readable{}
}

func (e *excerpt) asks(instance string) bool { return e.job.Matches(instance) }

// unreadable counts a message that has been in DEADLETTER since it was read live.
func (e *excerpt) unreadable(_ context.Context, _ *export.Exporter, d bus.Delivery, _ error) error {
	e.unchosen(max(d.Header.Items, 1))
	return nil
}

// poisoned counts what has been in DEADLETTER, too, since it was read live.
func (e *excerpt) poisoned(_ context.Context, _ *export.Exporter, _ string, payload []byte, _ export.Origin, _ error) error {
	e.unchosen(otlpwire.Count(e.sig, payload))
	return nil
}

const (
	// maxBehind is the backlog, in messages, that a live lane of this sink may have before
	// replays slow down.
	maxBehind = 128

	// yield is how long each message of a replay then waits.
	yield = 100 * time.Millisecond

	// pacing is how far ahead of its rate a replay may read.
	pacing = 100 * time.Millisecond
)

// wait delays the lane to the rate of the job and while live lanes have a backlog. It returns
// false when ctx ended.
func (e *excerpt) wait(ctx context.Context, d bus.Delivery) bool {
	e.change(func(p *replay.Progress) {
		p.Bytes += int64(d.Size)
		e.mu.read = d.Seq
	})
	if e.behind() > maxBehind {
		e.change(func(p *replay.Progress) { p.Wait = "live lanes have a backlog" })
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

// share returns this lane's share of the job's rate, in bytes a second.
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

// ackEvery is after how many messages the floor of a replay is moved: up to so many may be
// read twice after a crash.
const ackEvery = 32

func (e *excerpt) finished(floor uint64) {
	e.change(func(p *replay.Progress) { p.Floor = max(p.Floor, floor) })
}

func (e *excerpt) unchosen(items int) {
	e.change(func(p *replay.Progress) { p.Unchosen += int64(items) })
}

// Ended counts for the job. What is filtered counts as not asked for; replays set nothing aside.
func (e *excerpt) Ended(how tally.Outcome, reason string, items int) {
	switch how {
	case tally.Delivered:
		e.led.Replayed(e.sig, e.backend).Add(float64(items))
		e.change(func(p *replay.Progress) { p.Delivered += int64(items) })
	case tally.Dead:
		e.change(func(p *replay.Progress) { p.Dead += int64(items) })
	case tally.Dropped:
		e.led.Of(e.sig).Dropped(reason).Add(float64(items))
	case tally.Filtered:
		e.unchosen(items)
	}
}

// rescued counts spans that were sampled out, and are delivered after all.
func (e *excerpt) rescued(items int) {
	e.change(func(p *replay.Progress) { p.SampledOut = max(0, p.SampledOut-int64(items)) })
}

func (e *excerpt) incomplete(int) {} // the log says it

func (e *excerpt) restamped() {} // counted when it was live

func (e *excerpt) saw(*message) {}

func (e *excerpt) decided(out sampler.Output) {
	e.change(func(p *replay.Progress) {
		for _, one := range out.Ended {
			switch {
			case one.How == sampler.NotAsked, one.How == sampler.NotKept && !e.asks(one.Instance):
				p.Unchosen += int64(one.Spans)
			case one.How == sampler.NotKept:
				p.SampledOut += int64(one.Spans)
			}
		}
		for i := range out.Exports {
			if !e.asks(out.Exports[i].Instance) {
				p.Unchosen += int64(out.Exports[i].Spans)
			}
		}
	})
}
