package sink

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/failpoint"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/sampling/sampler"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/pkg/sink/export"
	"github.com/penstock/penstock/pkg/sink/horizon"
	"github.com/penstock/penstock/pkg/tally"
)

// traceLane samples the spans of one partition and exports the kept traces. It
// runs the sampler: it reads, gives it the time, exports, and moves the floor.
type traceLane struct {
	lane     *bus.Lane
	feed     feed
	exporter *export.Exporter
	count    counter
	policies *versions.Versions
	maxBytes int
	// attribute is the key of the span attribute that names the policy; empty for
	// none.
	attribute string
	// stream has the spans, frames calls visit with those of a message, spread is how they are
	// spread over partitions of SPANS, and in, if not nil, reports which are wanted.
	stream  string
	filters []string // subjects of stream that are read
	frames  func(guard *envelope.Guard, d bus.Delivery, visit func(envelope.Frame) error) error
	spread  partition.Spread
	in      func(arrival int64, seq uint64) bool
	// Where the decisions are recorded.
	journalStream, journalSubject string
	// gauges is the label of the sampler's gauges; empty for none. tell, if not nil, is called with what is to be
	// shown of its sources.
	gauges string
	tell   func(text string)
	// follow, if not nil, gives a new sampler the decisions that were made live.
	follow func(ctx context.Context, s *sampler.Samplers) error
	tally  *tally.Lane // nil: none is kept

	workers *export.Workers
	poison  poison

	sampler   *sampler.Samplers // nil: waiting for the lane to be claimed
	rescues   rescues
	rescuing  []envelope.Decision // rescues that are not recorded yet
	released  bool                // some are finished, and that is not recorded yet
	guard     envelope.Guard
	body      []byte              // of the current message
	journal   *bus.Journal        // of the partition's decisions
	decisions []envelope.Decision // made, not yet recorded
	sources   []envelope.Sources  // of the instances, not yet recorded
	exports   []sampler.Export    // decided, not yet stored by the backend
	bytes     int                 // of exports
	rewind    bool                // once everything is sent, begin again at the floor
	ended     bool                // everything has been read
	horizon   *horizon.Horizon    // nil: the time of silent instances does not advance
	mark      horizon.Mark        // of the horizon, not reached yet
	idled     time.Time           // Asked of the last mark that was reached
	free      time.Time           // when SPANS last had room
	used      int                 // how many changes of policies and domains the sampler knows
	domains   int                 // and how many versions of these
	written   time.Time           // when the journal was last written
	toldAt    time.Time           // when the sources were last shown
}

const (
	// tick is how often an idle lane checks the time.
	tick = 250 * time.Millisecond

	// tellInterval is how often a lane shows what it knows of sources: it looks at every trace for that.
	tellInterval = 5 * time.Second

	// fullPatience is for how long SPANS must be full before the traces that are held are decided
	// without the spans that routers cannot publish.
	fullPatience = 10 * time.Second

	// journalInterval is the longest time between two writes to a journal: a message of
	// DECISIONS stays for two hours at least, and the last one is what fences.
	journalInterval = 30 * time.Minute

	// maxRequest is how many bytes go to the backend in one request, without what the
	// decision adds to each span; Tempo accepts 4 MiB by default.
	maxRequest = 1 << 20

	// maxSending is beyond how many bytes no further request is begun.
	maxSending = 4 * maxRequest
)

// newTraceLane samples live spans, which routers have put into the partitions of SPANS.
func newTraceLane(lane *bus.Lane, d *export.Exporter, count counter, policies *versions.Versions, journal string, horizon *horizon.Horizon, t *tally.Lane) *traceLane {
	return &traceLane{
		lane: lane, feed: live{horizon}, exporter: d, count: count, policies: policies, stream: bus.Spans, frames: routed, spread: partition.Spread{N: 1},
		journalStream: bus.Decisions, journalSubject: journal, horizon: horizon, tally: t,
	}
}

// run reads until ctx ends, the lane is lost or everything has been read: errEnd.
func (l *traceLane) run(ctx context.Context) error {
	defer l.lane.Close()
	defer l.tally.Keep()()
	deliveries := make(chan bus.Delivery, 16) // hides the latency between the goroutines
	reading, leave := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer leave() // a replay ends before ctx
	wg.Go(func() {
		l.lane.Run(reading, func(d bus.Delivery) bool {
			select {
			case deliveries <- d:
				return true
			case <-reading.Done():
				return false
			}
		})
	})
	finish, stop := membership.Finish(ctx) // what is decided when ctx ends is still sent
	defer stop()
	defer l.exporter.Aside.Close()
	l.workers = export.NewWorkers(finish, l.exporter)
	defer l.workers.End()
	l.rescues.lane = l
	defer l.rescues.forget()
	clock := time.NewTicker(tick)
	defer clock.Stop()
	defer l.show(0, 0)
	defer l.showSources(sampler.Sources{})
	for {
		var err error
		more := deliveries
		if l.rescuesFirst() {
			more = nil
		}
		select {
		case <-ctx.Done():
			l.checkpoint(finish)
			return ctx.Err()
		case d := <-more:
			err = l.take(finish, d)
			// Gather what is waiting before anything is sent.
			if err == nil && len(deliveries) > 0 && l.bytes < maxRequest && len(l.decisions) < maxDecisions && ctx.Err() == nil {
				continue
			}
		case f := <-l.rescues.found:
			l.rescued(f)
		case <-clock.C:
			l.look(finish)
		}
		if err == nil {
			err = l.flush(finish)
		}
		if err := l.next(err); err != nil {
			return err
		}
	}
}

// rescuesFirst reports whether what is rescued is to be sent before anything new is read.
func (l *traceLane) rescuesFirst() bool {
	return l.ended || l.sampler != nil && l.sampler.Unsettled() >= maxRescues
}

// next returns why the lane ends after a step.
func (l *traceLane) next(err error) error {
	switch {
	case errors.Is(err, bus.ErrSuperseded):
		l.forget(ledger.InterruptedSuperseded) // the lane has to be claimed again
		return nil
	case err == nil && l.ended && !l.rescues.busy():
		return errEnd
	}
	return err
}

// look does what is due without a delivery.
func (l *traceLane) look(ctx context.Context) {
	if l.sampler == nil {
		return
	}
	l.use()
	if time.Since(l.written) > journalInterval {
		l.checkpoint(ctx)
	}
	if failpoint.WallTime {
		l.note(l.sampler.Idle(sampler.Mark{Before: []time.Time{time.Now()}}, time.Now()))
	}
	again := l.feed.readable()
	l.sampler.Readable(again.From, again.Most)
	l.rescues.begin(ctx, l.policies.Domains())
	l.show(l.sampler.Held())
	if now := time.Now(); l.tell != nil && now.Sub(l.toldAt) > tellInterval {
		l.toldAt = now
		l.showSources(l.sampler.Sources())
	}
}

// forget discards what is held; the lane is claimed again, and begins at its floor.
func (l *traceLane) forget(why string) {
	if l.sampler != nil && l.sampler.Broken() {
		why = ledger.InterruptedPanic
	}
	l.sampler, l.rewind, l.ended = nil, false, false
	l.rescues.forget()
	l.lane.Forget(why)
}

// show sets the gauges of what is held.
func (l *traceLane) show(traces, bytes int) {
	if l.gauges == "" {
		return
	}
	t, b := l.exporter.Ledger.Sampler(l.gauges)
	t.Set(float64(traces))
	b.Set(float64(bytes))
}

// showSources shows what is known of sources.
func (l *traceLane) showSources(s sampler.Sources) {
	if l.gauges != "" {
		known, waiting := l.exporter.Ledger.Sources(l.gauges)
		known.Set(float64(s.Known))
		waiting.Set(float64(s.Waiting))
	}
	text := ""
	switch {
	case l.tell == nil:
		return
	case s.Waiting > 0:
		text = fmt.Sprintf("%d sources; %d traces wait for one that is behind, most for one of %s", s.Known, s.Waiting, s.For)
	case s.Known > 0:
		text = fmt.Sprintf("%d sources", s.Known)
	}
	l.tell(text)
}

// routed calls visit with the frames of a message of SPANS.
func routed(_ *envelope.Guard, d bus.Delivery, visit func(envelope.Frame) error) error {
	if d.Err != nil {
		return d.Err
	}
	for body := d.Body; len(body) > 0; {
		f, rest, err := envelope.NextFrame(body)
		if err != nil {
			return err
		}
		if err := visit(f); err != nil {
			return err
		}
		body = rest
	}
	return nil
}

// claim begins at the floor: everything above it is read again, and follows the
// decisions that were recorded. From now on no previous owner can record any.
func (l *traceLane) claim(ctx context.Context) error {
	l.lane.Waits(errors.New("the versions of the policies are not known yet"))
	known := l.policies.Await(ctx)
	if l.lane.Waits(nil); !known {
		return stopped(ctx)
	}
	if !l.again(ctx) {
		return stopped(ctx)
	}
	if _, err := l.feed.claim(ctx); err != nil {
		return err
	}
	if !l.exporter.Aside.Claim(ctx) {
		return stopped(ctx)
	}
	if !l.exporter.Retry(ctx, "continue the tally", func() error {
		_, err := l.tally.Claim(ctx, l.lane.Floor())
		return err
	}) {
		return stopped(ctx)
	}
	l.rescues.forget()
	l.sources, l.rescuing, l.released = nil, nil, false
	l.decisions, l.exports, l.bytes, l.rewind, l.ended = l.decisions[:0], l.exports[:0], 0, false, false
	l.mark, l.idled, l.free = horizon.Mark{}, time.Time{}, time.Now()
	if !l.exporter.Retry(ctx, "read the recorded decisions", func() error {
		err := fault.Guard(func() error { return l.begin(ctx) })
		l.caught(sampler.About{}, err)
		return err
	}) {
		return stopped(ctx)
	}
	return nil
}

// begin begins with a new sampler.
func (l *traceLane) begin(ctx context.Context) (err error) {
	sampler := sampler.NewSamplers(l.policies.Base(), l.spread, l.maxBytes, l.lane.Floor(), l.in)
	l.journal, err = l.exporter.Conn().TakeJournal(ctx, l.journalStream, l.decisionsMessage(0), sampler.Remember)
	if err == nil && l.follow != nil {
		err = l.follow(ctx, sampler)
	}
	if err == nil {
		l.sampler, l.used, l.written = sampler, -1, time.Now()
		l.use()
		l.note(sampler.Restore())
		l.hold(ctx)
		if l.horizon != nil {
			l.note(sampler.Idle(l.horizon.Nothing(), time.Now()))
		}
	}
	return err
}

// use gives the sampler new versions of the policies and of the domains. Where spans have been added to which new
// domains apply, everything is read again.
func (l *traceLane) use() {
	all, changes := l.policies.All()
	if changes == l.used {
		return
	}
	grouping := l.policies.Domains()
	if failpoint.DomainsIgnored {
		grouping = nil
	}
	l.sampler.Use(all, grouping)
	for _, one := range grouping[min(l.domains, len(grouping)):] {
		l.rewind = l.rewind || l.used >= 0 && one.From <= l.sampler.Newest()
	}
	l.used, l.domains = changes, len(grouping)
}

// take handles what the lane has read: a message goes to the sampler.
func (l *traceLane) take(ctx context.Context, d bus.Delivery) error {
	if d.Claimed {
		return l.claim(ctx)
	}
	if l.sampler == nil {
		return nil // delivered before the claim
	}
	switch err := l.feed.next(ctx, d); {
	case errors.Is(err, errEnd):
		l.end()
		return nil
	case err != nil:
		return err
	case d.Seq == 0:
		l.quiet(ctx, d)
		return nil
	}
	l.use() // a version may have come since the last tick
	if l.rewind {
		return nil // it comes again
	}
	if l.feed.admits(d) {
		if err := l.add(ctx, d); err != nil {
			return err
		}
	}
	if l.feed.last(d) {
		l.end()
	}
	l.idle(d.Seq >= l.mark.Spans)
	return nil
}

// end decides what is held, because nothing more comes.
func (l *traceLane) end() {
	l.note(l.sampler.Finish())
	l.ended = true
}

// add hands the spans of a message to the sampler.
func (l *traceLane) add(ctx context.Context, d bus.Delivery) error {
	poison := map[string]withheld{}
	err := fault.Guard(func() error {
		d.Decompress(&l.body)
		return l.frames(&l.guard, d, func(f envelope.Frame) error {
			if failpoint.OneClock {
				f.Source = 0
			}
			if l.withhold(poison, d.Seq, f) {
				return nil
			}
			out, err := l.sampler.Add(d.Seq, f)
			if err == nil {
				l.tally.Do(func(b *tally.Book) { b.Saw(d.Seq, f.Instance, otlpwire.Count(otlpwire.Traces, f.Payload), "") })
				l.note(out)
			}
			return err
		})
	})
	if err != nil {
		l.guard = envelope.Guard{} // it may be left as it was in a panic
		l.caught(sampler.About{Seq: d.Seq}, err)
		err = l.unreadable(ctx, d, err)
	}
	if err == nil {
		err = l.poisoned(ctx, d.Seq, poison)
	}
	return err
}

// unreadable handles the part of a message that cannot be read; it counts as one span.
func (l *traceLane) unreadable(ctx context.Context, d bus.Delivery, why error) error {
	return l.refused(tally.Part{Seq: d.Seq, Instance: d.Instance(), Items: 1}, func(e *export.Exporter) error {
		return l.feed.unreadable(ctx, e, d, why)
	})
}

// refused has do handle what does not go to the sampler, and notes what becomes of it.
func (l *traceLane) refused(part tally.Part, do func(*export.Exporter) error) error {
	own, wrote := *l.exporter, tally.Outcomes{}
	own.Count = export.Noted{Counter: l.count, Outcomes: &wrote}
	err := do(&own)
	if err == nil {
		l.tally.Do(func(b *tally.Book) {
			b.Saw(part.Seq, part.Instance, part.Items, "")
			b.EndedTogether([]tally.Part{part}, &wrote)
		})
	}
	return err
}

// quiet is take for a lane that has nothing left to read.
func (l *traceLane) quiet(ctx context.Context, d bus.Delivery) {
	reached, err := l.lane.Has(ctx, d.After, l.mark.Spans)
	if err != nil && ctx.Err() == nil {
		if more, due := l.exporter.Said.Due("has "+l.journalSubject, time.Now()); due {
			l.exporter.Log.Warn("cannot determine whether all spans have arrived; traces of silent instances wait", "err", err, "more_since_last_said", more)
		}
	}
	l.idle(reached)
}

// idle moves the clocks of silent instances on when the mark has been reached:
// then everything that their partitions of TRACES had before has been added.
func (l *traceLane) idle(reached bool) {
	if !reached || l.horizon == nil {
		return
	}
	if l.mark.Asked.After(l.idled) { // once for each mark: it visits every instance
		l.idled = l.mark.Asked
		l.note(l.sampler.Idle(l.mark.Mark, time.Now()))
	}
	latest := l.horizon.Latest()
	if !latest.Full || latest.Spans != l.mark.Spans { // routers publish, or can
		l.free = latest.Asked
	} else if latest.Asked.Sub(l.free) > fullPatience { // everything in SPANS has been added
		l.note(l.sampler.Unblock(time.Now()))
	}
	l.mark = latest
}

// note records the sampler's output: counts, decisions and exports.
func (l *traceLane) note(out sampler.Output) {
	l.count.decided(out)
	if len(out.Ended) > 0 {
		l.tally.Do(func(b *tally.Book) {
			for _, e := range out.Ended {
				b.Ended(e.Seq, e.Instance, outcomes[e.How], e.Spans)
			}
		})
	}
	if out.Full {
		if more, due := l.exporter.Said.Due("full "+l.journalSubject, time.Now()); due {
			l.exporter.Log.Warn("sampler is full: new traces wait in the hub until there is room; raise sampling.max_bytes_per_partition", "more_since_last_said", more)
		}
	}
	if out.Unordered > 0 {
		if more, due := l.exporter.Said.Due("unordered "+l.journalSubject, time.Now()); due {
			l.exporter.Log.Warn("spans of a domain do not wait longer for the routers of its other instances: traces may be decided without some of their spans; where there is no room, raise sampling.max_bytes_per_partition", "more_since_last_said", more)
		}
	}
	l.panicked(out)
	l.rewind = l.rewind || out.Rewind
	if out.TooLarge > 0 {
		if more, due := l.exporter.Said.Due("too large "+l.journalSubject, time.Now()); due {
			l.exporter.Log.Warn("traces were given up, larger than maximum_trace_size_bytes or half of sampling.max_bytes_per_partition", "traces", out.TooLarge, "more_since_last_said", more)
		}
	}
	l.decisions, l.sources = append(l.decisions, out.Decisions...), append(l.sources, out.Sources...)
	l.rescuing = append(l.rescuing, out.Rescues...)
	for _, e := range out.Exports {
		if !l.feed.asks(e.Instance) {
			l.sampler.Release(e.Seq)
			continue
		}
		if failpoint.AckBeforeExport {
			l.sampler.Release(e.Seq)
		}
		l.exports = append(l.exports, e)
		l.bytes += e.Size()
	}
}

// outcomes are those of spans that the sampler finishes.
var outcomes = [...]tally.Outcome{sampler.NotKept: tally.SampledOut, sampler.Repeated: tally.Duplicate, sampler.Sent: tally.Unrecorded, sampler.NotAsked: tally.SampledOut}

// payload appends the spans of an export, with what the decision adds to them.
func (l *traceLane) payload(dst []byte, e *sampler.Export, scratch *[]byte) []byte {
	note := otlpwire.Annotation{Threshold: e.Threshold}
	if l.attribute != "" {
		note.Key, note.Value = l.attribute, e.Policy
	}
	if !note.Needed() {
		return e.Append(dst)
	}
	*scratch = e.Append((*scratch)[:0])
	return note.Append(dst, *scratch)
}

// together returns how many exports, from the first on, go in one request, and the spans
// and bytes of it: one instance, up to maxRequest or one export.
func together(exports []sampler.Export) (n, spans, size int) {
	for i := range exports {
		e := &exports[i]
		if n > 0 && (e.Instance != exports[0].Instance || size+e.Size() > maxRequest) {
			break
		}
		n, spans, size = n+1, spans+e.Spans, size+e.Size()
	}
	return n, spans, size
}

// flush records the decisions, exports the kept traces, one instance a request, those of each in the order of
// decision, and moves the floor. It returns an error of record, or if an export was given up.
func (l *traceLane) flush(ctx context.Context) error {
	if l.sampler == nil {
		return nil
	}
	if err := l.record(ctx); err != nil {
		return err
	}
	l.rescues.begin(ctx, l.policies.Domains()) // before the lane may have to wait for the backend
	if slices.ContainsFunc(l.exports, func(e sampler.Export) bool { return e.Further }) {
		// A request has spans of one instance; the order within each stays.
		slices.SortStableFunc(l.exports, func(a, b sampler.Export) int { return strings.Compare(a.Instance, b.Instance) })
	}
	if failpoint.AckBeforeExport {
		_ = l.lane.Ack(l.sampler.Floor())
	}
	if !l.export() {
		return stopped(ctx)
	}
	floor := l.sampler.Floor()
	if failpoint.FloorTooHigh {
		floor++
	}
	if err := l.lane.Ack(floor); err != nil {
		l.exporter.Log.Debug("ack lost, a later one makes up for it", "err", err)
	}
	l.tally.Floor(floor)
	l.feed.finished(floor)
	if l.rewind {
		l.checkpoint(ctx)
		l.forget(ledger.InterruptedFull)
	}
	return nil
}

// export sends everything that is to be exported, and returns false if it was given up.
func (l *traceLane) export() bool {
	sending := 0 // bytes
	for rest := l.exports; len(rest) > 0; {
		if l.workers.Busy == export.MaxJobs || sending > maxSending {
			if !l.workers.Settle(<-l.workers.Done) {
				return false
			}
			continue
		}
		n, spans, size := together(rest)
		now := rest[:n]
		sending += size
		l.request(now, spans, size, func(ended *tally.Outcomes) {
			sending -= size
			l.sent(now, ended)
		})
		rest = rest[n:]
	}
	if !l.workers.Finish() {
		return false
	}
	clear(l.exports)
	l.exports, l.bytes = l.exports[:0], 0
	return true
}

// request has exports of one instance sent together, and then sent called.
func (l *traceLane) request(exports []sampler.Export, spans, size int, sent func(ended *tally.Outcomes)) {
	instance, from := exports[0].Instance, export.Origin{Stream: l.stream, Seq: exports[0].Seq}
	j := &export.Job{Instance: instance}
	j.Do = func(ctx context.Context, w *export.Worker) bool {
		// Not reused: a transport may still read it after a failed attempt.
		payload := make([]byte, 0, size)
		for i := range exports {
			payload = l.payload(payload, &exports[i], &w.Scratch)
		}
		return w.Write(ctx, instance, payload, spans, from)
	}
	j.Then = func() { sent(&j.Ended) }
	l.workers.Put(j)
}

// sent notes what has become of exports of one instance.
func (l *traceLane) sent(exports []sampler.Export, ended *tally.Outcomes) {
	for i := range exports {
		e := &exports[i]
		if e.Rescued {
			l.count.rescued(e.Spans)
		} else if !failpoint.AckBeforeExport { // there it was released before; and what is rescued is owed with its rescue
			l.sampler.Release(e.Seq)
		}
	}
	l.tally.Do(func(b *tally.Book) {
		var parts []tally.Part
		for i := range exports {
			for _, p := range exports[i].Parts {
				parts = append(parts, tally.Part{Seq: p.Seq, Instance: exports[i].Instance, Items: p.Spans})
				if exports[i].Rescued {
					b.Rescued(p.Seq, exports[i].Instance, p.Spans)
				}
			}
		}
		b.EndedTogether(parts, ended)
	})
}
