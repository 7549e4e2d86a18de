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

// Deliverer brings payloads of one signal to one backend.
type Deliverer struct {
	Signal otlpwire.Signal
	Writer Writer
	Log    *slog.Logger
	// Arrival is when what is written arrived at its edge, in Unix nanoseconds; 0: nobody knows.
	Arrival int64
	// Delivered counts items that the backend has.
	Delivered func(items int)
	// Deduplicated counts those among them that the backend has refused because it has
	// them already, as far as can be known.
	Deduplicated func(items int)
	// Paused says whether it waits for a person to mend an address or a credential.
	Paused func(bool)
	// Waits, where it is set, is told when a payload is written, with why that was not done
	// before each pause, and nil when it is over.
	Waits func(why error)
	// GiveUp takes a payload that the backend will never take, in which no half is
	// better than the other. It returns false when ctx ended first.
	GiveUp func(ctx context.Context, instance string, payload []byte, reason string, why error) bool
	// Aside, where it is set, takes a payload out of the way: before it is tried, with why
	// nil, when older ones of its instance are waiting there, and after some tries with a
	// refusal marked by [fault.Sender]. again says that the payload may have been written before.
	// It returns put when it has taken it, and goOn false when ctx ended first. It may change Writer.
	Aside func(ctx context.Context, instance string, payload []byte, again bool, why error) (put, goOn bool)
	// refused is how many of the payload at hand were given up one after the other, asked how
	// often the backend was asked for it.
	refused, asked int
	// Owned, where it is set, is asked before something is tried again or given up:
	// an owner that has slept must not bring old items behind newer ones.
	Owned func() bool
}

// maxRefused is after how many culprits in a row the rest of a payload that is refused, too, is
// given up as it is: all of an instance whose clock is wrong must not cost everybody of its
// partition two requests an item.
const maxRefused = 256

// maxAsked is after how many requests for one payload what is refused, too, is given up as it is:
// good and bad ones in turn make two requests an item. What may be a repetition is told apart to the end.
const maxAsked = 512

// asideAfter is how often a backend must refuse who sends a payload before that goes aside, and
// maxPatience the longest pause for which that waits.
const (
	asideAfter  = 3
	maxPatience = time.Second
)

// definite reports whether a backend has said that it stored nothing.
func definite(err error) bool {
	var answer *httpclient.Error
	return errors.As(err, &answer) && slices.Contains([]int{401, 403, 404, 405, 429}, answer.Status) && !errors.Is(err, httpclient.ErrBegun)
}

// Write returns true when every one of a payload's items is stored or given up, and
// false when ctx ended first. again says that the payload may have been written before.
func (d *Deliverer) Write(ctx context.Context, instance string, payload []byte, items int, again bool) bool {
	d.refused, d.asked = 0, 0
	if d.Waits != nil {
		d.Waits(errNoAnswer)
		defer d.Waits(nil)
	}
	return d.write(ctx, instance, payload, items, again)
}

// errNoAnswer is what a write waits for first.
var errNoAnswer = errors.New("the backend gives no answer")

// pause waits before the next attempt. It returns false when ctx ended, or another owner may have
// come meanwhile.
func (d *Deliverer) pause(ctx context.Context, wait time.Duration, why error) bool {
	if d.Waits != nil {
		d.Waits(why)
	}
	return backoff.Sleep(ctx, wait) && (d.Owned == nil || d.Owned())
}

func (d *Deliverer) write(ctx context.Context, instance string, payload []byte, items int, again bool) bool {
	paused, said := false, false
	pause := func(now bool) {
		if now != paused {
			paused = now
			d.Paused(now)
		}
	}
	defer pause(false)
	var arrival time.Time
	if d.Arrival > 0 {
		arrival = time.Unix(0, d.Arrival)
	}
	if d.Aside != nil {
		if put, goOn := d.Aside(ctx, instance, payload, again, nil); put || !goOn {
			return goOn
		}
	}
	for attempt := 1; ; attempt++ {
		d.asked++
		err := writeArrived(ctx, d.Writer, instance, payload, arrival)
		var parts fault.Parts
		if err == nil || errors.As(err, &parts) {
			if attempt > 1 {
				d.Log.Info("backend takes data again", "attempts", attempt)
			}
			for _, p := range parts {
				if p.Known {
					d.Deduplicated(p.Items)
					continue
				}
				if items -= p.Items; !d.GiveUp(ctx, instance, p.Payload, p.Reason, p.Err) {
					return false
				}
			}
			d.refused = 0
			d.Delivered(items)
			return true
		}
		if ctx.Err() != nil || (d.Owned != nil && !d.Owned()) {
			return false
		}
		if reason, permanent := fault.Reason(err); permanent {
			first, second, several := otlpwire.Halve(d.Signal, payload)
			if several && !fault.IsWhole(err) && d.refused < maxRefused && (again || d.asked < maxAsked) {
				return d.write(ctx, instance, first, otlpwire.Count(d.Signal, first), again) && d.write(ctx, instance, second, otlpwire.Count(d.Signal, second), again)
			}
			// A sample is a part of a series, in order; a line that is too far behind need not be there.
			if again && !several && reason == ledger.DeadOutOfOrder && d.Signal == otlpwire.Metrics {
				d.Deduplicated(items)
				d.Delivered(items)
				return true
			}
			d.refused++
			return d.GiveUp(ctx, instance, payload, reason, err)
		}
		again = again || !definite(err) // the answer may be lost, and not the request
		wait := fault.Pause(err, attempt, rand.Float64())
		if d.Aside != nil && fault.IsSender(err) {
			if attempt < asideAfter && (wait <= maxPatience || fault.IsConfiguration(err)) {
				if !d.pause(ctx, min(wait, maxPatience/4), err) {
					return false
				}
				continue
			}
			if put, goOn := d.Aside(ctx, instance, payload, again, err); put || !goOn {
				return goOn
			}
		}
		was := paused
		pause(fault.IsConfiguration(err))
		switch {
		case paused && !was:
			d.Log.Error("lane paused: the backend's address or credential is wrong; the data is kept", "err", err)
		case !said:
			said = true
			d.Log.Warn("backend does not take data, will try again", "err", err)
		}
		if !d.pause(ctx, wait, err) {
			return false
		}
	}
}
