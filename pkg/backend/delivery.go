package backend

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/httpclient"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Deliverer delivers payloads of one signal to one backend.
type Deliverer struct {
	Signal otlpwire.Signal
	Writer Writer
	Log    *slog.Logger
	// Arrival is when the payload arrived at its edge, in Unix nanoseconds; 0 if unknown.
	Arrival int64
	// Delivered counts items that the backend has.
	Delivered func(items int)
	// Deduplicated counts those of them that the backend has refused because it already has them, as
	// far as this can be known.
	Deduplicated func(items int)
	// Paused is called with true while the deliverer waits for an operator to correct an address or a
	// credential.
	Paused func(bool)
	// Waits, if set, is called when the writing of a payload begins, before each pause with the reason
	// for it, and with nil at the end.
	Waits func(why error)
	// GiveUp takes a payload that the backend refuses for good and that is not to be halved further. It
	// returns false if ctx ended first.
	GiveUp func(ctx context.Context, instance string, payload []byte, reason string, why error) bool
	// Aside, if set, may set a payload aside: before the first attempt, with why nil, if older ones of
	// its instance wait there, and after some attempts, with a refusal marked by [fault.Sender]. again
	// says that the payload may have been written before. It returns put true if it has taken the
	// payload, and goOn false if ctx ended first. It may change Writer.
	Aside func(ctx context.Context, instance string, payload []byte, again bool, why error) (put, goOn bool)
	// refused is how many pieces of the current payload were given up in a row, asked how many requests
	// it has taken.
	refused, asked int
	// Owned, if set, is called before a retry, and before something is given up: an owner whose process
	// was suspended must not write old items after newer ones.
	Owned func() bool
}

// maxRefused is after how many refused items in a row the rest of a payload, if it is refused, too, is
// given up as a whole: an instance whose clock is wrong must not cost the others of its partition two
// requests for each of its items.
const maxRefused = 256

// maxAsked is after how many requests for one payload a refused part is given up as a whole: valid and
// invalid items in turn would make two requests an item. A payload that may have been written before
// is always halved to the end, to find out what the backend has.
const maxAsked = 512

// asideAfter is how often a backend must refuse the sender of a payload before the payload is set
// aside, and maxPatience the longest requested pause up to which the deliverer waits for that.
const (
	asideAfter  = 3
	maxPatience = time.Second
)

// definite reports whether a backend's answer means that it stored nothing.
func definite(err error) bool {
	var answer *httpclient.Error
	return errors.As(err, &answer) && slices.Contains([]int{401, 403, 404, 405, 429}, answer.Status) && !errors.Is(err, httpclient.ErrBegun)
}

// Write returns true when every item of a payload is stored or given up, and false if ctx ended
// first. again says that the payload may have been written before.
func (d *Deliverer) Write(ctx context.Context, instance string, payload []byte, items int, again bool) bool {
	d.refused, d.asked = 0, 0
	if d.Waits != nil {
		d.Waits(errNoAnswer)
		defer d.Waits(nil)
	}
	return d.write(ctx, instance, payload, items, again)
}

// errNoAnswer is the reason to wait until the first attempt is answered.
var errNoAnswer = errors.New("the backend gives no answer")

// pause waits before the next attempt. It returns false if ctx ended, or if the lane may have another
// owner by then.
func (d *Deliverer) pause(ctx context.Context, wait time.Duration, why error) bool {
	if d.Waits != nil {
		d.Waits(why)
	}
	return backoff.Sleep(ctx, wait) && d.isOwner()
}

func (d *Deliverer) isOwner() bool { return d.Owned == nil || d.Owned() }

// arrival is Arrival as a time, the zero time for none.
func (d *Deliverer) arrival() time.Time {
	if d.Arrival <= 0 {
		return time.Time{}
	}
	return time.Unix(0, d.Arrival)
}

func (d *Deliverer) write(ctx context.Context, instance string, payload []byte, items int, again bool) bool {
	p := &delivery{Deliverer: d, instance: instance, payload: payload, items: items, again: again}
	defer p.setPaused(false)
	arrival := d.arrival()
	if done, goOn := p.setAside(ctx, nil); done {
		return goOn
	}
	for attempt := 1; ; attempt++ {
		d.asked++
		err := writeArrived(ctx, d.Writer, instance, payload, arrival)
		var parts fault.Parts
		if err == nil || errors.As(err, &parts) {
			if attempt > 1 {
				d.Log.Info("backend accepts data again", "attempts", attempt)
			}
			return p.stored(ctx, parts)
		}
		if ctx.Err() != nil || !d.isOwner() {
			return false
		}
		if reason, permanent := fault.Reason(err); permanent {
			return p.refusedForGood(ctx, reason, err)
		}
		p.again = p.again || !definite(err) // perhaps only the answer was lost, not the request
		wait := fault.Pause(err, attempt, rand.Float64())
		if d.Aside != nil && fault.IsSender(err) && mayHealSoon(err, attempt, wait) {
			wait = min(wait, maxPatience/4)
		} else {
			if done, goOn := p.setAside(ctx, err); done {
				return goOn
			}
			p.report(err)
		}
		if !d.pause(ctx, wait, err) {
			return false
		}
	}
}

// delivery is one payload, or a part of one, until it is stored, given up or out of the way.
type delivery struct {
	*Deliverer
	instance string
	payload  []byte
	items    int
	again    bool // it may have been written before

	paused bool // for a person
	warned bool // that the backend does not take it
}

// setAside has the payload taken out of the way, where there is such a way: before it is
// tried, with why nil, or for a refusal of its sender. done says that nothing is left to do, and
// goOn what [Deliverer.Write] returns then.
func (p *delivery) setAside(ctx context.Context, why error) (done, goOn bool) {
	if p.Aside == nil || why != nil && !fault.IsSender(why) {
		return false, true
	}
	put, goOn := p.Aside(ctx, p.instance, p.payload, p.again, why)
	return put || !goOn, goOn
}

// mayHealSoon reports whether a payload whose sender is refused is tried again before it
// goes aside.
func mayHealSoon(err error, attempt int, wait time.Duration) bool {
	return attempt < asideAfter && (wait <= maxPatience || fault.IsConfiguration(err))
}

// stored counts the payload as delivered, but for the parts that the backend will never take:
// they are given up. It returns false when ctx ended first.
func (p *delivery) stored(ctx context.Context, but fault.Parts) bool {
	for _, part := range but {
		if part.Known {
			p.Deduplicated(part.Items)
			continue
		}
		if p.items -= part.Items; !p.GiveUp(ctx, p.instance, part.Payload, part.Reason, part.Err) {
			return false
		}
	}
	p.refused = 0
	p.Delivered(p.items)
	return true
}

// refusedForGood brings the halves of a payload that the backend will never take as it is, so
// that only the culprits are given up.
func (p *delivery) refusedForGood(ctx context.Context, reason string, err error) bool {
	first, second, several := otlpwire.Halve(p.Signal, p.payload)
	switch {
	case several && !fault.IsWhole(err) && p.mayHalve():
		return p.half(ctx, first) && p.half(ctx, second)
	case !several && p.repeated(reason):
		p.Deduplicated(p.items)
		p.Delivered(p.items)
		return true
	}
	p.refused++
	return p.GiveUp(ctx, p.instance, p.payload, reason, err)
}

// mayHalve reports whether the payload that this one is a part of has not yet cost too much.
func (p *delivery) mayHalve() bool {
	return p.refused < maxRefused && (p.again || p.asked < maxAsked)
}

func (p *delivery) half(ctx context.Context, payload []byte) bool {
	return p.write(ctx, p.instance, payload, otlpwire.Count(p.Signal, payload), p.again)
}

// repeated reports whether the backend refuses an item because it has it from an earlier attempt.
// A sample is a part of a series, in order; a line that is too far behind need not be there.
func (p *delivery) repeated(reason string) bool {
	return p.again && reason == ledger.DeadOutOfOrder && p.Signal == otlpwire.Metrics
}

// setPaused tells when the delivery begins to wait for a person, and when that is over.
func (p *delivery) setPaused(now bool) {
	if now != p.paused {
		p.paused = now
		p.Paused(now)
	}
}

// report says once why the backend does not take the payload, and each time that it takes a
// person to mend that.
func (p *delivery) report(err error) {
	was := p.paused
	p.setPaused(fault.IsConfiguration(err))
	switch {
	case p.paused && !was:
		p.Log.Error("lane paused: the backend's address or credential is wrong; the data is kept", "err", err)
	case !p.warned:
		p.warned = true
		p.Log.Warn("backend does not accept data; retrying", "err", err)
	}
}
