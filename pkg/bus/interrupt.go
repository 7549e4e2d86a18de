package bus

import (
	"context"
	"errors"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/ledger"
)

// Why and how a lane that is read goes back to its floor.

// forgotten says why a reader is to claim its lane again.
type forgotten string

func (f forgotten) Error() string { return "the lane is to be claimed again: " + string(f) }

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

// moved reports whether somebody else has moved the floor of a lane that is ours. An owner
// before may say what he has finished, in the delivery sequence of his time; and the stream
// may have let go of what is below its first message.
func (l *Lane) moved(ctx context.Context, info *jetstream.ConsumerInfo) bool {
	if info.AckFloor.Consumer > info.Delivered.Consumer {
		l.conn.log.Info("the floor was moved by an owner before, going back to it", "lane", l.cfg.Name, "stream", l.cfg.Stream)
		return true
	}
	l.mu.Lock()
	highest := l.mu.highest // no older than info
	l.mu.Unlock()
	if info.AckFloor.Stream <= highest {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, pinTTL/4) // whoever asks has a pin to keep
	defer cancel()
	state, err := l.conn.State(ctx, l.cfg.Stream)
	if err != nil || info.AckFloor.Stream < state.FirstSeq {
		return false
	}
	if info.AckFloor.Stream <= state.LastSeq {
		// When messages are removed from the stream, the server moves the floor of a lane that owes
		// nothing over those of others.
		if all, err := l.Has(ctx, highest, info.AckFloor.Stream); err != nil || all {
			return false
		}
	}
	l.conn.log.Error("somebody else has moved the floor of a lane that is ours: what is between is not read", "lane", l.cfg.Name, "stream", l.cfg.Stream, "read", highest, "floor", info.AckFloor.Stream)
	return true
}

// reset takes the consumer back to its floor, and returns the sequence that comes next. A
// floor beyond the stream's end is no reader's: everything up to there would be passed over.
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
	l.conn.log.Error("the lane's floor is beyond the end of its stream: reading begins at the first message", "lane", l.cfg.Name, "stream", l.cfg.Stream, "floor", res.ResetSeq-1, "end", state.LastSeq)
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
	default: // it has been told
	}
}
