package sink

import (
	"context"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/tally"
)

// directLane writes payloads in the order in which they are read, one message after the other:
// metrics, logs, and spans that are not to be sampled.
type directLane struct {
	lane     *bus.Lane
	feed     feed
	exporter *exporter
	// ackEvery is after how many messages the floor is moved; so many may come twice after a crash.
	ackEvery int
	guard    envelope.Guard
	body     []byte         // of the current message
	tally    *tally.Lane    // nil: none is kept
	ended    tally.Outcomes // of the current message
	// repeats is how many of the next messages the previous owner may have written: its last
	// acks may be lost. Messages that came to the hub after the claim are not among them.
	repeats int
	// finished is up to where this reader had written everything before: a hub may lose a floor.
	finished uint64
	done     uint64 // the last message that has been dealt with
	count    int    // of messages that have been
}

// maxRepeated is the most that repeats can be.
const maxRepeated = 64

// newDirectLane writes live traffic.
func newDirectLane(lane *bus.Lane, d *exporter, t *tally.Lane) *directLane {
	l := &directLane{lane: lane, feed: live{exporter: d}, exporter: d, ackEvery: 1, tally: t}
	d.count = ownCounter{d.counter(), &l.ended}
	return l
}

// run reads until ctx ends, the lane is lost or everything has been read: errEnd.
func (l *directLane) run(ctx context.Context) (why error) {
	defer l.lane.Close()
	finish, stop := membership.Finish(ctx)
	defer stop()
	defer l.tally.Keep()()
	defer l.exporter.aside.close()
	defer func() { _ = l.lane.Ack(l.done) }() // acks that were put off
	l.lane.Run(ctx, func(d bus.Delivery) bool {
		why = l.take(ctx, finish, d)
		return why == nil
	})
	return why
}

// claim begins again with a new session of the writer: another owner may have continued the
// series since.
func (l *directLane) claim(ctx context.Context) error {
	first, err := l.feed.claim(ctx)
	if err != nil {
		return err
	}
	if !l.exporter.aside.claim(ctx) {
		return stopped(ctx)
	}
	if !l.exporter.retry(ctx, "continue the tally", func() error {
		finished, err := l.tally.Claim(ctx, l.lane.Floor())
		l.finished = max(l.finished, finished)
		return err
	}) {
		return stopped(ctx)
	}
	if l.repeats = maxRepeated; first {
		l.repeats = 0
	}
	l.exporter.w = backend.Session(l.exporter.w)
	return nil
}

// take handles what the lane has read; what has begun when ctx ends is completed under finish.
func (l *directLane) take(ctx, finish context.Context, d bus.Delivery) error {
	if d.Claimed {
		l.finished = d.After
		return l.claim(finish)
	}
	if err := l.feed.next(ctx, d); err != nil {
		return err
	}
	if d.Seq == 0 {
		if d.Idle {
			l.repeats = 0
		}
		return nil
	}
	if d.Restamped {
		l.exporter.counter().restamped()
	}
	if l.feed.admits(d) {
		if err := l.write(finish, d); err != nil {
			return err
		}
	}
	if l.done, l.count = d.Seq, l.count+1; l.count%l.ackEvery == 0 {
		if err := l.lane.Ack(l.done); err != nil {
			l.exporter.log.Debug("ack lost, a later one makes up for it", "err", err)
		}
		l.tally.Floor(l.done)
	}
	if d.Pending == 0 {
		l.repeats = 0 // nothing came after it: the previous owner has not seen what comes now
	}
	l.feed.finished(d.Seq)
	if l.feed.last(d) {
		return errEnd
	}
	return nil
}

// write writes a message to the backend, and to DEADLETTER what the backend refuses for good.
func (l *directLane) write(ctx context.Context, d bus.Delivery) error {
	l.ended = tally.Outcomes{}
	items, err := l.writeItems(ctx, d)
	if err == nil {
		l.tally.Do(func(b *tally.Book) {
			b.Saw(d.Seq, d.Instance(), items, d.Header.ID)
			b.EndedTogether([]tally.Part{{Seq: d.Seq, Instance: d.Instance(), Items: items}}, &l.ended)
		})
	}
	return err
}

// writeItems is write; it returns how many items there were.
func (l *directLane) writeItems(ctx context.Context, d bus.Delivery) (items int, err error) {
	payload, items, err := d.Open(&l.guard, l.exporter.sig, &l.body)
	if err != nil {
		return items, l.feed.unreadable(ctx, d, err)
	}
	again := l.repeats > 0 || d.Seq <= l.finished
	l.repeats--
	if !l.exporter.write(ctx, d.Instance(), payload, items, origin{stream: bus.Stream(l.exporter.sig), seq: d.Seq, arrival: d.Header.Arrival, stored: d.Stored, again: again}) {
		return items, stopped(ctx)
	}
	return items, nil
}
