package sink

import (
	"context"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/membership"
)

// directLane writes payloads in the order in which they are read, one message after the other:
// metrics, logs, and spans that are not to be sampled.
type directLane struct {
	lane     *bus.Lane
	source   source
	exporter *exporter
	// ackEvery is after how many messages the floor is moved; so many may come twice after a crash.
	ackEvery int
	guard    envelope.Guard
	body     []byte // of the current message
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
func newDirectLane(lane *bus.Lane, d *exporter) *directLane {
	return &directLane{lane: lane, source: live{d}, exporter: d, ackEvery: 1}
}

// run reads until ctx ends, the lane is lost or everything has been read: errEnd.
func (l *directLane) run(ctx context.Context) (why error) {
	defer l.lane.Close()
	finish, stop := membership.Finish(ctx)
	defer stop()
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
	first, err := l.source.claim(ctx)
	if err != nil {
		return err
	}
	if !l.exporter.aside.claim(ctx) {
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
	if err := l.source.next(ctx, d); err != nil {
		return err
	}
	if d.Seq == 0 {
		if d.Idle {
			l.repeats = 0
		}
		return nil
	}
	if d.Restamped {
		l.exporter.tally().restamped()
	}
	if l.source.admits(d) {
		if err := l.write(finish, d); err != nil {
			return err
		}
	}
	if l.done, l.count = d.Seq, l.count+1; l.count%l.ackEvery == 0 {
		if err := l.lane.Ack(l.done); err != nil {
			l.exporter.log.Debug("ack lost, a later one makes up for it", "err", err)
		}
	}
	if d.Pending == 0 {
		l.repeats = 0 // nothing came after it: the previous owner has not seen what comes now
	}
	l.source.finished(d.Seq)
	if l.source.last(d) {
		return errEnd
	}
	return nil
}

// write writes a message to the backend, and to DEADLETTER what the backend refuses for good.
func (l *directLane) write(ctx context.Context, d bus.Delivery) error {
	if d.Decompress(&l.body); d.Err != nil {
		return l.source.unreadable(ctx, d, d.Err)
	}
	payload, items, err := l.guard.Open(l.exporter.sig, d.Instance(), d.Body)
	if err != nil {
		return l.source.unreadable(ctx, d, err)
	}
	again := l.repeats > 0 || d.Seq <= l.finished
	l.repeats--
	if !l.exporter.write(ctx, d.Instance(), payload, items, origin{stream: bus.Stream(l.exporter.sig), seq: d.Seq, arrival: d.Header.Arrival, stored: d.Stored, again: again}) {
		return stopped(ctx)
	}
	return nil
}
