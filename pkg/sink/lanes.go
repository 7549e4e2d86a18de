package sink

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/keeper"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/processor"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sampling/sampler"
	"github.com/penstock/penstock/pkg/sampling/versions"
)

// lanes shares one lane per signal and partition with the other sinks.
type lanes struct {
	cfg      Config
	policies *versions.Versions
	process  *processor.Rules
	led      *ledger.Ledger
	log      *slog.Logger
	hub      *bus.Hub
	members  *membership.Members
	horizon  *bus.Horizon
	said     backoff.Repeats
	quota    bus.Quota
}

func (l *lanes) service() services.Service {
	var (
		shared  []membership.Shared
		writers Writers
	)
	start := func(context.Context) error {
		var err error
		if writers, err = l.cfg.Writers(); err != nil {
			return err
		}
		for _, sig := range otlpwire.Signals {
			for i, w := range writers[sig] {
				l.led.Know(sig, w.Name())
				for p := range l.cfg.Streams.Partitions {
					shared = append(shared, l.lane(sig, w, p, i > 0))
				}
			}
		}
		return nil
	}
	run := func(ctx context.Context) error {
		work, stop := context.WithCancel(context.WithoutCancel(ctx))
		defer stop()
		var wg sync.WaitGroup
		wg.Go(func() { l.members.Run(work, shared) })
		wg.Go(func() { l.horizon.Run(work) })
		wg.Go(func() {
			keeper.New(func() *bus.Conn { return l.hub.Conn }, l.members.First, l.cfg.Streams, shared, l.led, l.log).Run(work)
		})
		wg.Go(func() { l.policies.Watch(work, l.hub, l.members.Self()) })
		wg.Go(func() { newReplays(l, writers).run(work) })
		wg.Go(func() { l.serveJobs(work) })
		<-ctx.Done()
		l.members.Drain(work, l.cfg.Drain, func(s membership.Shared) bool { return l.cfg.DrainTraces || s.Signal != otlpwire.Traces.String() })
		stop()
		wg.Wait()
		return nil
	}
	end := func(error) error { return writers.Close() }
	return services.NewBasicService(start, run, end)
}

// serveJobs answers those who may have one instance replayed, as one of the sinks.
func (l *lanes) serveJobs(ctx context.Context) {
	backoff.Retry(ctx, l.log, "answer requests for replays", func() error {
		jobs, err := replay.Open(ctx, l.hub.Conn, l.cfg.Streams)
		if err != nil {
			return err
		}
		desk := replay.NewDesk(jobs)
		stop, err := l.hub.Conn.Serve(replay.DeskSubjects, "sinks", func(subject string, body []byte) []byte {
			return desk.Answer(ctx, subject, body)
		})
		if err != nil {
			return err
		}
		<-ctx.Done()
		stop()
		return nil
	})
}

// lane returns the lane of a backend and a partition. A further one of a signal samples
// for itself, and comes to the same decisions: its own place is then that of a backend that
// was away.
func (l *lanes) lane(sig otlpwire.Signal, w backend.Writer, p int, further bool) membership.Shared {
	s := membership.Shared{Signal: sig.String(), Partition: p, Backend: w.Name(), LaneConfig: bus.LaneConfig{
		Stream: bus.Stream(sig), Filter: bus.PartitionFilter(sig, p), Name: w.Name() + "-" + strconv.Itoa(p), Raw: true,
	}}
	d := l.delivery(sig, w, p)
	journal, gauges := bus.DecisionsSubject(p), strconv.Itoa(p)
	if further {
		d.count = furtherTally{liveTally{l.led, sig, w.Name()}}
		journal, gauges = journal+"-"+w.Name(), ""
	}
	if sig == otlpwire.Traces {
		s.Stream, s.Filter, s.Journal, s.Hold = bus.Spans, bus.SpansSubject(p), journal, l.policies.Wait
		s.Run = func(ctx context.Context, lane *bus.Lane) {
			own := *d
			own.waits, own.aside = lane.Waits, newAside(own, lane, p, l.cfg.Aside.MaxInstances)
			t := &traceLane{
				lane: lane, delivery: &own, policies: l.policies, maxBytes: int(l.cfg.Sampling.MaxBytes), attribute: l.cfg.Sampling.PolicyAttribute,
				journalStream: bus.Decisions, journalSubject: journal, gauges: gauges, horizon: l.horizon,
			}
			t.run(ctx)
		}
		return s
	}
	s.Run = func(ctx context.Context, lane *bus.Lane) {
		own := *d
		own.owned, own.waits, own.aside = lane.Owned, lane.Waits, newAside(own, lane, p, l.cfg.Aside.MaxInstances)
		(&directLane{lane: lane, delivery: &own}).run(ctx)
	}
	return s
}

func (l *lanes) delivery(sig otlpwire.Signal, w backend.Writer, p int) *delivery {
	return &delivery{said: &l.said, quota: &l.quota,
		sig: sig, w: w, process: l.process, conn: func() *bus.Conn { return l.hub.Conn }, led: l.led,
		log: l.log.With("signal", sig.String(), "partition", p, "backend", w.Name()),
	}
}

// directLane writes payloads as they come, one message after the other: metrics, logs,
// and spans that are not to be sampled.
type directLane struct {
	lane     *bus.Lane
	delivery *delivery
	guard    envelope.Guard
	body     []byte   // of the message at hand
	excerpt  *excerpt // nil: live
	// repeats is how many of the next messages the owner before may have written: its last
	// acks may be lost. None that came to the hub after the claim.
	repeats int
	// finished is up to where this reader has written everything before: a hub may lose a floor.
	finished uint64
}

// maxRepeated is how many that can be at the most.
const maxRepeated = 64

// claim begins anew: what was remembered of series is another owner's by now. It returns false
// when ctx ended first.
func (l *directLane) claim(ctx context.Context) bool {
	if !l.excerpt.claimed(ctx) || !l.delivery.aside.claim(ctx) {
		return false
	}
	if l.repeats = maxRepeated; l.excerpt != nil && l.excerpt.progress().Owner == "" {
		l.repeats = 0 // there was none before
	}
	l.delivery.w = backend.Session(l.delivery.w)
	return true
}

func (l *directLane) run(ctx context.Context) {
	defer l.lane.Close()
	finish, stop := membership.Finish(ctx)
	defer stop()
	defer l.delivery.aside.close()
	done := uint64(0)
	defer func() { _ = l.lane.Ack(done) }() // what an excerpt has put off
	l.lane.Run(ctx, func(d bus.Delivery) bool {
		switch {
		case l.excerpt.ends(ctx, d):
			l.excerpt.done()
			return false
		case d.Claimed:
			l.finished = d.After
			return l.claim(finish)
		case d.Seq == 0:
			if d.Idle {
				l.repeats = 0
			}
			return true
		case !l.excerpt.wait(ctx, d):
			return false
		}
		if d.Restamped {
			l.delivery.tally().restamped()
		}
		var err error
		if l.excerpt.leavesOut(d) {
			l.excerpt.unchosen(max(d.Header.Items, 1))
		} else if d.Decompress(&l.body); d.Err != nil {
			err = d.Err
		} else {
			var (
				payload []byte
				items   int
			)
			if payload, items, err = l.guard.Open(l.delivery.sig, d.Instance(), d.Body); err == nil {
				again := l.repeats > 0 || d.Seq <= l.finished
				l.repeats--
				if !l.delivery.write(finish, d.Instance(), payload, items, origin{stream: bus.Stream(l.delivery.sig), seq: d.Seq, arrival: d.Header.Arrival, stored: d.Stored, again: again}) {
					return false
				}
			}
		}
		switch {
		case err == nil:
		case l.excerpt != nil:
			l.excerpt.unchosen(max(d.Header.Items, 1)) // it is in DEADLETTER since it was live
		case !l.delivery.undecodable(finish, d, err):
			return false
		}
		if done = d.Seq; l.excerpt.settles() {
			if err := l.lane.Ack(done); err != nil {
				l.delivery.log.Debug("ack lost, a later one makes up for it", "err", err)
			}
		}
		if d.Pending == 0 {
			l.repeats = 0 // nothing was behind it: what comes now the owner before has not seen
		}
		l.excerpt.reached(d.Seq)
		if l.excerpt.last(d) {
			l.excerpt.done()
			return false
		}
		return true
	})
}

// tally counts what becomes of items.
type tally interface {
	delivered(items int)
	dead(reason string, items int)
	filtered(items int)
	restamped()
	decided(out sampler.Output)
}

// liveTally counts in the ledger.
type liveTally struct {
	led     *ledger.Ledger
	sig     otlpwire.Signal
	backend string
}

func (t liveTally) delivered(items int) { t.led.Of(t.sig).Delivered(t.backend).Add(float64(items)) }

func (t liveTally) dead(reason string, items int) { t.led.Of(t.sig).Dead(reason).Add(float64(items)) }

func (t liveTally) restamped() { t.led.Of(t.sig).Restamped.Inc() }

func (t liveTally) filtered(items int) { t.led.Of(t.sig).Filtered.Add(float64(items)) }

func (t liveTally) decided(out sampler.Output) {
	led := t.led.Of(t.sig)
	led.SampledOut.Add(float64(out.SampledOut))
	led.Duplicate.Add(float64(out.Duplicates))
	if out.Full {
		t.led.SamplerFull.Inc()
	}
	for i, d := range out.Decisions {
		t.led.Decided(d.Kept, out.By[i])
	}
}

// furtherTally leaves out what the first lane of a signal counts.
type furtherTally struct{ liveTally }

func (furtherTally) decided(sampler.Output) {}

func (furtherTally) filtered(int) {}

func (furtherTally) restamped() {}

// delivery brings payloads to one backend, and dead-letters what that refuses for
// good.
type delivery struct {
	sig     otlpwire.Signal
	w       backend.Writer
	process *processor.Rules // nil: none
	conn    func() *bus.Conn // there once the hub's stage has started
	led     *ledger.Ledger
	log     *slog.Logger
	said    *backoff.Repeats // shared by all lanes; nil: everything is said
	// count counts, where it is set, instead of the ledger.
	count tally
	// owned is [backend.Deliverer.Owned].
	owned func() bool
	quota *bus.Quota // of letters for what nobody can read
	aside *aside     // nil: none is set aside, the lane waits
	// waits, where it is set, is told what the lane waits for, see [bus.Lane.Waits].
	waits func(why error)
}

// retry is [backoff.Retry] for what the lane waits for.
func (d *delivery) retry(ctx context.Context, what string, do func() error) bool {
	return retry(ctx, d.log, d.waits, what, do)
}

func retry(ctx context.Context, log *slog.Logger, waits func(why error), what string, do func() error) bool {
	if waits == nil {
		return backoff.Retry(ctx, log, what, do)
	}
	defer waits(nil)
	return backoff.Retry(ctx, log, what, func() error {
		err := do()
		if err != nil {
			waits(fmt.Errorf("cannot %s: %w", what, err))
		}
		return err
	})
}

func (d *delivery) tally() tally {
	if d.count != nil {
		return d.count
	}
	return liveTally{d.led, d.sig, d.w.Name()}
}

// origin is where a payload came from.
type origin struct {
	stream  string
	seq     uint64
	arrival int64     // at its edge
	stored  time.Time // when the hub had it; zero when nobody knows
	again   bool      // it may have been written before
	first   string    // where it came from before it was set aside; empty: it was not
}

// dated is the time by which a backend tells what is ahead of its time, or gives a time to
// what has none. Of metrics that is the hub's: the clock of an edge may stand, or be wrong,
// and all of them would be dead letters.
func (o origin) dated(sig otlpwire.Signal) int64 {
	if sig == otlpwire.Metrics && !o.stored.IsZero() {
		return o.stored.UnixNano()
	}
	return o.arrival
}

// source is the origin as dead letters tell it.
func (o origin) source() string {
	if o.first != "" {
		return o.first
	}
	return fmt.Sprintf("%s %d", o.stream, o.seq)
}

// write returns true when every one of a payload's items is stored or dead-lettered,
// and false when ctx ended first.
func (d *delivery) write(ctx context.Context, instance string, payload []byte, items int, from origin) bool {
	payload, filtered := d.process.Apply(d.sig, payload)
	if items -= filtered; items == 0 {
		d.tally().filtered(filtered)
		return true
	}
	if !d.send(ctx, instance, payload, items, from) {
		return false
	}
	d.tally().filtered(filtered)
	return true
}

// send is write of what has been processed.
func (d *delivery) send(ctx context.Context, instance string, payload []byte, items int, from origin) bool {
	b := backend.Deliverer{
		Signal: d.sig, Writer: d.w, Log: d.log, Owned: d.owned, Waits: d.waits, Arrival: from.dated(d.sig),
		Delivered: d.tally().delivered, Paused: d.led.Paused(d.sig, d.w.Name()), Deduplicated: func(items int) { d.led.Of(d.sig).Deduplicated(d.w.Name()).Add(float64(items)) },
		GiveUp: func(ctx context.Context, instance string, payload []byte, reason string, why error) bool {
			return d.deadLetter(ctx, instance, payload, from, reason, why)
		},
	}
	if a := d.aside; a != nil {
		b.Aside = func(ctx context.Context, instance string, payload []byte, again bool, why error) (put, goOn bool) {
			if put, goOn = a.set(ctx, instance, payload, again, from, why); put && why != nil {
				// Its series go on elsewhere, and come back one day: never from the sums of now.
				d.w = backend.Session(d.w)
				b.Writer = d.w
			}
			return put, goOn
		}
		b.Delivered = func(items int) {
			a.taken.Store(true)
			d.tally().delivered(items)
		}
	}
	return b.Write(ctx, instance, payload, items, from.again)
}

func (d *delivery) deadLetter(ctx context.Context, instance string, payload []byte, from origin, reason string, why error) bool {
	items := otlpwire.Count(d.sig, payload)
	// Equal but for an item's time or name: one a minute of each kind, and how many more.
	if held, due := d.said.Due(d.w.Name()+" "+instance+" "+reason, time.Now()); due {
		d.log.Warn("backend refuses items for good, dead-lettered", "instance", instance, "reason", reason, "err", why, "letters_since_last_said", held)
	}
	return d.store(ctx, instance, items, reason, bus.Message{
		Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: items, Arrival: from.arrival},
		Body:   payload, Refusal: &bus.Refusal{Reason: reason, Detail: why.Error(), Backend: d.w.Name(), Source: from.source()},
	})
}

// undecodable dead-letters a message that is no envelope of ours.
func (d *delivery) undecodable(ctx context.Context, m bus.Delivery, why error) bool {
	const items = 1 // what it holds nobody can count; what its sender says is not believed
	if held, due := d.said.Due(m.Subject, time.Now()); due {
		d.log.Warn("message is no telemetry, dead-lettered", "subject", m.Subject, "seq", m.Seq, "err", why, "letters_since_last_said", held)
	}
	if !d.quota.Take(m.Instance(), time.Now()) {
		d.led.Of(d.sig).Dropped(ledger.DroppedUndecodable).Add(items)
		return true
	}
	return d.store(ctx, m.Instance(), items, ledger.DeadUndecodable, bus.Message{
		Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: items, Arrival: m.Header.Arrival, ID: fmt.Sprintf("dead-%s-%s-%d", d.w.Name(), d.sig, m.Seq)},
		Body:   m.Body, Refusal: &bus.Refusal{Reason: ledger.DeadUndecodable, Detail: why.Error(), Backend: d.w.Name(), Source: origin{stream: bus.StreamOf(m.Subject), seq: m.Seq}.source()},
	})
}

func (d *delivery) store(ctx context.Context, instance string, items int, reason string, m bus.Message) bool {
	ok := d.retry(ctx, "store a dead letter", func() error { return d.conn().DeadLetter(ctx, d.sig, instance, m) })
	if ok {
		d.tally().dead(reason, items)
	}
	return ok
}
