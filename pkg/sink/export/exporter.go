// Package export writes the payloads of a lane to its backend, those of several instances side by side.
//
// # Promises
//
//   - What the backend refuses for good, and what makes the processor or a writer panic, is dead-lettered, item by
//     item: nothing else is lost.
//   - An instance that the backend refuses, for which it fails or is slow, is set aside while others are accepted: its
//     data waits in the stream ASIDE, in order.
//   - Payloads of one instance are written in the order in which they are put.
//
// # Not here
//
// What is read, and the floor: package sink. Attempts and halving: package backend.
package export

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/tally"
)

// Exporter writes payloads to one backend, and dead-letters what the backend refuses for
// good. It is for one goroutine; a copy is for another one.
type Exporter struct {
	Signal  otlpwire.Signal
	Writer  backend.Writer
	Process Process          // nil: none
	Conn    func() *bus.Conn // valid once the hub's stage has started
	Ledger  *ledger.Ledger
	Log     *slog.Logger
	Said    *backoff.Repeats // shared by all lanes; nil: everything is logged
	Count   Counter
	// Owned is [backend.Deliverer.Owned].
	Owned func() bool
	Quota *bus.Quota // of dead letters for unreadable messages
	Aside *Aside     // nil: none is set aside, the lane waits
	// Accepted is of the backend, for all lanes; nil: not known.
	Accepted  *backend.Accepted
	Poison    backend.Poison
	SlowAfter time.Duration // [AsideConfig.SlowAfter]
	Requests  int           // how many the lane may have at a time; 0: one
	// Waits, if set, is called with what the lane waits for, see [bus.Lane.Waits].
	Waits func(why error)

	took time.Duration // how long the last successful attempt took
}

// Counter counts what becomes of items.
type Counter interface {
	// Ended counts items that a lane has finished: delivered, filtered, dead or dropped for a reason, or set
	// aside.
	Ended(how tally.Outcome, reason string, items int)
}

// Noted is a Counter that also notes what it counts.
type Noted struct {
	Counter
	Outcomes *tally.Outcomes
}

// Ended counts items.
func (c Noted) Ended(how tally.Outcome, reason string, items int) {
	c.Outcomes[how] += items
	c.Counter.Ended(how, reason, items)
}

// Process changes payloads, and drops items: [processor.Rules].
type Process interface {
	Apply(sig otlpwire.Signal, payload []byte) (out []byte, filtered int)
}

// Retry is [backoff.Retry], and reports the error as what the lane waits for.
func (d *Exporter) Retry(ctx context.Context, what string, do func() error) bool {
	return retry(ctx, d.Log, d.Waits, what, do)
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

func (d *Exporter) delivered(items int) { d.Count.Ended(tally.Delivered, "", items) }

// Origin is where a payload came from.
type Origin struct {
	Stream  string
	Seq     uint64
	Arrival int64     // at its edge
	Stored  time.Time // when the hub stored it; zero when unknown
	Again   bool      // it may have been written before
	first   string    // where it came from before it was set aside; empty: it was not
}

// dated is the time by which a backend recognises what is ahead of its time, and which it gives
// to what has none. For metrics it is the hub's: the clock of an edge may be frozen or wrong,
// and all of them would become dead letters.
func (o Origin) dated(sig otlpwire.Signal) int64 {
	if sig == otlpwire.Metrics && !o.Stored.IsZero() {
		return o.Stored.UnixNano()
	}
	return o.Arrival
}

// source is the origin as dead letters record it.
func (o Origin) source() string {
	if o.first != "" {
		return o.first
	}
	return fmt.Sprintf("%s %d", o.Stream, o.Seq)
}

// Write returns true when every one of a payload's items is stored or dead-lettered,
// and false when ctx ended first.
func (d *Exporter) Write(ctx context.Context, instance string, payload []byte, items int, from Origin) bool {
	processed, filtered := payload, 0
	if err := fault.Guard(func() error {
		if d.Process != nil {
			processed, filtered = d.Process.Apply(d.Signal, payload)
		}
		return nil
	}); err != nil {
		return d.unprocessable(ctx, instance, payload, from, err)
	}
	if items -= filtered; items == 0 {
		d.Count.Ended(tally.Filtered, "", filtered)
		return true
	}
	if !d.send(ctx, instance, processed, items, from) {
		return false
	}
	d.Count.Ended(tally.Filtered, "", filtered)
	return true
}

// unprocessable is Write for a payload on which the processor panics: only the items that cause it are
// dead-lettered. They are not processed, and their letters not for any backend.
func (d *Exporter) unprocessable(ctx context.Context, instance string, payload []byte, from Origin, why error) bool {
	if first, second, several := otlpwire.Halve(d.Signal, payload); several {
		return d.Write(ctx, instance, first, otlpwire.Count(d.Signal, first), from) && d.Write(ctx, instance, second, otlpwire.Count(d.Signal, second), from)
	}
	d.Panicked(ledger.PanicProcessor, instance, from, why)
	return d.letter(ctx, ledger.PanicProcessor, instance, payload, from, ledger.DeadPoison, why)
}

// Panicked counts a panic, and logs it; instance is empty if it is not known.
func (d *Exporter) Panicked(stage, instance string, from Origin, why error) {
	d.Ledger.Panics(stage).Inc()
	if more, due := d.Said.Due("panic "+stage, time.Now()); due {
		stack := ""
		if p, is := errors.AsType[*fault.Panic](why); is {
			stack = p.Stack
		}
		d.Log.Error("bug: a stage panicked; what is to blame for it is dead-lettered as poison", "stage", stage, "instance", instance, "source", from.source(), "err", why, "stack", stack, "more_since_last_said", more)
	}
}

// send is Write for a payload that has been processed.
func (d *Exporter) send(ctx context.Context, instance string, payload []byte, items int, from Origin) bool {
	b := backend.Deliverer{
		Signal: d.Signal, Writer: d.Writer, Log: d.Log, Owned: d.Owned, Waits: d.Waits, Arrival: from.dated(d.Signal),
		Delivered: d.delivered, Paused: d.Ledger.Paused(d.Signal, d.Writer.Name()), Deduplicated: func(items int) { d.Ledger.Of(d.Signal).Deduplicated(d.Writer.Name()).Add(float64(items)) },
		GiveUp: func(ctx context.Context, instance string, payload []byte, reason string, why error) bool {
			return d.deadLetter(ctx, instance, payload, from, reason, why)
		},
		Poison: d.Poison, Panicked: func(instance string, why *fault.Panic) { d.Panicked(ledger.PanicWriter, instance, from, why) },
		Took: d.accepts,
	}
	if d.Accepted != nil {
		b.Others = d.Accepted.Others
	}
	if a := d.Aside; a != nil {
		b.MayAside, b.SlowAfter = a.may, d.SlowAfter
		part := 0 // how many messages of this payload are in ASIDE
		b.Aside = func(ctx context.Context, instance string, payload []byte, again bool, t backend.Trouble) (put, goOn bool) {
			if put, goOn = a.set(ctx, instance, payload, again, from, &part, t); put && t.Err != nil {
				// The instance's series continue outside the lane and may come back to it: they
				// must then not continue from the present sums.
				b.Writer = backend.Session(b.Writer)
			}
			if put && goOn {
				d.Count.Ended(tally.Aside, "", otlpwire.Count(d.Signal, payload))
			}
			return put, goOn
		}
	}
	written := b.Write(ctx, instance, payload, items, from.Again)
	d.Writer = b.Writer
	return written
}

// accepts notes that the backend has accepted something.
func (d *Exporter) accepts(instance string, took time.Duration) {
	if d.took = took; d.SlowAfter > 0 && took >= d.SlowAfter {
		return // it may be slow for everybody
	}
	if d.Accepted != nil {
		d.Accepted.Note(instance, time.Now())
	}
	if d.Aside != nil {
		d.Aside.taken.Store(true)
	}
}

func (d *Exporter) deadLetter(ctx context.Context, instance string, payload []byte, from Origin, reason string, why error) bool {
	// These differ only in an item's time or name: one of each kind is logged a minute, with the number of the others.
	if held, due := d.Said.Due(d.Writer.Name()+" "+instance+" "+reason, time.Now()); due {
		d.Log.Warn("backend refuses items for good, dead-lettered", "instance", instance, "reason", reason, "err", why, "letters_since_last_said", held)
	}
	return d.letter(ctx, d.Writer.Name(), instance, payload, from, reason, why)
}

// letter stores a dead letter; by is who has refused it.
func (d *Exporter) letter(ctx context.Context, by, instance string, payload []byte, from Origin, reason string, why error) bool {
	items := otlpwire.Count(d.Signal, payload)
	return d.store(ctx, instance, items, reason, bus.Message{
		Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: items, Arrival: from.Arrival},
		Body:   payload, Refusal: &bus.Refusal{Reason: reason, Detail: why.Error(), Backend: by, Source: from.source()},
	})
}

// Undecodable dead-letters a message that is not a valid envelope, or that cannot be read without a panic.
func (d *Exporter) Undecodable(ctx context.Context, m bus.Delivery, why error) bool {
	const items = 1 // what it holds cannot be counted; the sender's header is not trusted
	reason, by, what := ledger.DeadUndecodable, d.Writer.Name(), "message is not telemetry, dead-lettered"
	_, panicked := errors.AsType[*fault.Panic](why)
	if panicked {
		reason, by, what = ledger.DeadPoison, ledger.PanicReader, "message makes penstock panic, dead-lettered"
	}
	if held, due := d.Said.Due(m.Subject, time.Now()); due {
		d.Log.Warn(what, "subject", m.Subject, "seq", m.Seq, "err", why, "letters_since_last_said", held)
	}
	if !panicked && !d.Quota.Take(m.Instance(), time.Now()) { // what is our fault is kept
		d.Count.Ended(tally.Dropped, ledger.DroppedUndecodable, items)
		return true
	}
	return d.store(ctx, m.Instance(), items, reason, bus.Message{
		Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: items, Arrival: m.Header.Arrival, ID: fmt.Sprintf("dead-%s-%s-%d", d.Writer.Name(), d.Signal, m.Seq)},
		Body:   m.Body, Refusal: &bus.Refusal{Reason: reason, Detail: why.Error(), Backend: by, Source: Origin{Stream: bus.StreamOf(m.Subject), Seq: m.Seq}.source()},
	})
}

// Unsampled dead-letters the spans that one instance has in a message over which the sampler panics. They are not
// processed, and the letter not for any backend.
func (d *Exporter) Unsampled(ctx context.Context, instance string, payload []byte, from Origin, why error) bool {
	items := otlpwire.Count(d.Signal, payload)
	return d.store(ctx, instance, items, ledger.DeadPoison, bus.Message{ // another owner may do the same, with this id
		Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: items, Arrival: from.Arrival, ID: fmt.Sprintf("dead-%s-%s-%d-%s", d.Writer.Name(), from.Stream, from.Seq, instance)},
		Body:   payload, Refusal: &bus.Refusal{Reason: ledger.DeadPoison, Detail: why.Error(), Backend: ledger.PanicSampler, Source: from.source()},
	})
}

func (d *Exporter) store(ctx context.Context, instance string, items int, reason string, m bus.Message) bool {
	ok := d.Retry(ctx, "store a dead letter", func() error { return d.Conn().DeadLetter(ctx, d.Signal, instance, m) })
	if ok {
		d.Count.Ended(tally.Dead, reason, items)
	}
	return ok
}
