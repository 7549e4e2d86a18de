package keeper

import (
	"context"
	"time"

	"github.com/penstock/penstock/pkg/bus"
)

// pushed is the letters that were deleted to make room in DEADLETTER since the last record of it.
type pushed struct {
	messages uint64
	items    map[string]uint64 // by signal and instance
	since    time.Time
	retry    time.Time // when deletion is tried again after an error
}

const (
	// maxPushed is how many dead letters are deleted at one look, and for how many instances that is
	// recorded.
	maxPushed = 500

	// pushedInterval is how often deleted letters are recorded.
	pushedInterval = time.Minute
)

// letters makes room in DEADLETTER before the hub does, because the hub does not report whose
// letters it discards.
func (k *Keeper) letters(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	k.recordPushed(ctx, time.Now())
	state, err := k.conn().State(ctx, bus.DeadLetter)
	if err != nil {
		return
	}
	at := held(state)
	k.show(bus.DeadLetter, at)
	if at.done, at.largest = at.last, 0; state.Refuses {
		return // an operator's choice
	}
	upTo := at.removable()
	if upTo == 0 || time.Now().Before(k.pushed.retry) {
		return
	}
	if err = bus.ErrKept; !state.Kept {
		err = k.push(ctx, upTo)
	}
	if err == nil || ctx.Err() != nil {
		return
	}
	k.pushed.retry = time.Now().Add(pushedInterval)
	if more, due := k.said.Due(bus.DeadLetter+bus.Kind(err), time.Now()); due {
		k.log.Warn("DEADLETTER is nearly full and its oldest letters cannot be deleted; the hub discards them uncounted (permissions: docs/upgrading.md)", "err", err, "more_since_last_said", more)
	}
}

// push deletes the dead letters up to a sequence, and counts them.
func (k *Keeper) push(ctx context.Context, upTo uint64) error {
	var gone []bus.Letter
	if err := k.conn().Letters(ctx, "", "", false, func(l bus.Letter) bool {
		if l.Seq > upTo || len(gone) == maxPushed {
			return false
		}
		gone = append(gone, l)
		return true
	}); err != nil {
		return err
	}
	for _, l := range gone {
		if err := k.conn().DropLetter(ctx, l.Seq); err != nil {
			return err
		}
		k.led.Pushed(l.Signal, l.Instance).Add(float64(l.Items))
		if k.pushed.items == nil {
			k.pushed.items, k.pushed.since = map[string]uint64{}, time.Now()
		}
		k.pushed.messages++
		whose := l.Signal + "." + l.Instance
		if _, known := k.pushed.items[whose]; !known && len(k.pushed.items) == maxPushed {
			whose = l.Signal + "._other"
		}
		k.pushed.items[whose] += uint64(max(l.Items, 0))
	}
	return nil
}

// recordPushed logs and records the letters deleted in the last minute; with the zero time it does so
// immediately.
func (k *Keeper) recordPushed(ctx context.Context, now time.Time) {
	p := k.pushed
	if p.messages == 0 || !now.IsZero() && now.Sub(p.since) < pushedInterval {
		return
	}
	k.pushed = pushed{retry: p.retry}
	k.log.Error("DEADLETTER is full; oldest letters deleted", "letters", p.messages, "instances", len(p.items))
	k.record(ctx, Loss{Stream: bus.DeadLetter, Messages: p.messages, Items: p.items, Because: "the stream was full"})
}
