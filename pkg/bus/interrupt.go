package bus

import (
	"context"
	"errors"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/ledger"
)

// Why and how a lane that is read goes back to its floor.

// forgotten is the reason why a reader has to claim its lane again.
type forgotten string

func (f forgotten) Error() string { return "the lane must be claimed again: " + string(f) }

// Is makes it a kind of errPinLost.
func (forgotten) Is(target error) bool { return target == errPinLost }

// interrupt drops the lane, and counts it if it was read.
func (l *Lane) interrupt(err error) {
	if l.pull != nil && l.cfg.Interrupted != nil {
		l.cfg.Interrupted(interruption(err))
	}
	l.drop()
}

// interruption returns the reason for the ledger.
func interruption(err error) string {
	if f, is := errors.AsType[forgotten](err); is {
		return string(f)
	}
	switch {
	case errors.Is(err, errPinLost):
		return ledger.InterruptedPin
	case errors.Is(err, errGone), errors.Is(err, jetstream.ErrConsumerNotFound):
		return ledger.InterruptedGone
	}
	return ledger.InterruptedHub
}

// moved reports whether somebody else has moved the floor of a lane that is ours. A previous
// owner may have sent a late ack, with a delivery sequence from before the reset. A floor below
// the stream's first message is no sign of that: it moves when messages are removed.
func (l *Lane) moved(ctx context.Context, info *jetstream.ConsumerInfo) bool {
	if info.AckFloor.Consumer > info.Delivered.Consumer {
		l.conn.log.Info("a late ack of a previous owner moved the floor; resuming from it", "lane", l.cfg.Name, "stream", l.cfg.Stream)
		return true
	}
	l.mu.Lock()
	highest := l.mu.highest // at least as recent as info
	l.mu.Unlock()
	if info.AckFloor.Stream <= highest {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, pinTTL/4) // the caller has a pin to renew
	defer cancel()
	state, err := l.conn.State(ctx, l.cfg.Stream)
	if err != nil || info.AckFloor.Stream < state.FirstSeq {
		return false
	}
	if info.AckFloor.Stream <= state.LastSeq {
		// When messages are removed from the stream, the server moves the floor of a lane that has
		// finished everything past those of other lanes.
		if all, err := l.Has(ctx, highest, info.AckFloor.Stream); err != nil || all {
			return false
		}
	}
	l.conn.log.Error("somebody else has moved the floor of a lane that is owned here; the messages between are not read", "lane", l.cfg.Name, "stream", l.cfg.Stream, "read", highest, "floor", info.AckFloor.Stream)
	return true
}

// reset resets the consumer to its floor and returns the sequence that comes next. A floor
// beyond the stream's end was set by no reader: everything up to it would be skipped.
func (l *Lane) reset(ctx context.Context) (uint64, error) {
	res, err := l.conn.js.ResetConsumer(ctx, l.cfg.Stream, l.cfg.Name)
	if err != nil {
		return 0, err
	}
	state, err := l.conn.State(ctx, l.cfg.Stream)
	if err != nil || res.ResetSeq <= state.LastSeq+1 {
		return res.ResetSeq, err
	}
	first := max(state.FirstSeq, l.cfg.Start, 1)
	l.conn.log.Error("the lane's floor is beyond the end of its stream; reading from the first message", "lane", l.cfg.Name, "stream", l.cfg.Stream, "floor", res.ResetSeq-1, "end", state.LastSeq)
	if l.cfg.Interrupted != nil {
		l.cfg.Interrupted(ledger.InterruptedMoved)
	}
	res, err = l.conn.js.ResetConsumerToSequence(ctx, l.cfg.Stream, l.cfg.Name, first)
	if err != nil {
		return 0, err
	}
	return res.ResetSeq, nil
}

// Forget makes the reader claim the lane again, from its floor; reason is one of package
// ledger.
func (l *Lane) Forget(reason string) {
	select {
	case l.forget <- reason:
	default: // a request is pending
	}
}
