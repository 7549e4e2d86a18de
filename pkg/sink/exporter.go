package sink

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/processor"
	"github.com/penstock/penstock/pkg/tally"
)

// exporter writes payloads to one backend, and dead-letters what the backend refuses for
// good.
type exporter struct {
	sig     otlpwire.Signal
	w       backend.Writer
	process *processor.Rules // nil: none
	conn    func() *bus.Conn // valid once the hub's stage has started
	led     *ledger.Ledger
	log     *slog.Logger
	said    *backoff.Repeats // shared by all lanes; nil: everything is logged
	// count, if set, counts instead of the ledger.
	count counter
	// owned is [backend.Deliverer.Owned].
	owned func() bool
	quota *bus.Quota // of dead letters for unreadable messages
	aside *aside     // nil: none is set aside, the lane waits
	// waits, if set, is called with what the lane waits for, see [bus.Lane.Waits].
	waits func(why error)
}

// retry is [backoff.Retry], and reports the error as what the lane waits for.
func (d *exporter) retry(ctx context.Context, what string, do func() error) bool {
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

func (d *exporter) counter() counter {
	if d.count != nil {
		return d.count
	}
	return liveCounter{d.led, d.sig, d.w.Name()}
}

func (d *exporter) delivered(items int) { d.counter().ended(tally.Delivered, "", items) }

// origin is where a payload came from.
type origin struct {
	stream  string
	seq     uint64
	arrival int64     // at its edge
	stored  time.Time // when the hub stored it; zero when unknown
	again   bool      // it may have been written before
	first   string    // where it came from before it was set aside; empty: it was not
}

// dated is the time by which a backend recognises what is ahead of its time, and which it gives
// to what has none. For metrics it is the hub's: the clock of an edge may be frozen or wrong,
// and all of them would become dead letters.
func (o origin) dated(sig otlpwire.Signal) int64 {
	if sig == otlpwire.Metrics && !o.stored.IsZero() {
		return o.stored.UnixNano()
	}
	return o.arrival
}

// source is the origin as dead letters record it.
func (o origin) source() string {
	if o.first != "" {
		return o.first
	}
	return fmt.Sprintf("%s %d", o.stream, o.seq)
}

// write returns true when every one of a payload's items is stored or dead-lettered,
// and false when ctx ended first.
func (d *exporter) write(ctx context.Context, instance string, payload []byte, items int, from origin) bool {
	payload, filtered := d.process.Apply(d.sig, payload)
	if items -= filtered; items == 0 {
		d.counter().ended(tally.Filtered, "", filtered)
		return true
	}
	if !d.send(ctx, instance, payload, items, from) {
		return false
	}
	d.counter().ended(tally.Filtered, "", filtered)
	return true
}

// send is write for a payload that has been processed.
func (d *exporter) send(ctx context.Context, instance string, payload []byte, items int, from origin) bool {
	b := backend.Deliverer{
		Signal: d.sig, Writer: d.w, Log: d.log, Owned: d.owned, Waits: d.waits, Arrival: from.dated(d.sig),
		Delivered: d.delivered, Paused: d.led.Paused(d.sig, d.w.Name()), Deduplicated: func(items int) { d.led.Of(d.sig).Deduplicated(d.w.Name()).Add(float64(items)) },
		GiveUp: func(ctx context.Context, instance string, payload []byte, reason string, why error) bool {
			return d.deadLetter(ctx, instance, payload, from, reason, why)
		},
	}
	if a := d.aside; a != nil {
		b.Aside = func(ctx context.Context, instance string, payload []byte, again bool, why error) (put, goOn bool) {
			if put, goOn = a.set(ctx, instance, payload, again, from, why); put && why != nil {
				// The instance's series continue outside the lane and may come back to it: they
				// must then not continue from the present sums.
				d.w = backend.Session(d.w)
				b.Writer = d.w
			}
			if put && goOn {
				d.counter().ended(tally.Aside, "", otlpwire.Count(d.sig, payload))
			}
			return put, goOn
		}
		b.Delivered = func(items int) {
			a.taken.Store(true)
			d.delivered(items)
		}
	}
	return b.Write(ctx, instance, payload, items, from.again)
}

func (d *exporter) deadLetter(ctx context.Context, instance string, payload []byte, from origin, reason string, why error) bool {
	items := otlpwire.Count(d.sig, payload)
	// These differ only in an item's time or name: one of each kind is logged a minute, with the number of the others.
	if held, due := d.said.Due(d.w.Name()+" "+instance+" "+reason, time.Now()); due {
		d.log.Warn("backend refuses items for good, dead-lettered", "instance", instance, "reason", reason, "err", why, "letters_since_last_said", held)
	}
	return d.store(ctx, instance, items, reason, bus.Message{
		Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: items, Arrival: from.arrival},
		Body:   payload, Refusal: &bus.Refusal{Reason: reason, Detail: why.Error(), Backend: d.w.Name(), Source: from.source()},
	})
}

// undecodable dead-letters a message that is not a valid envelope.
func (d *exporter) undecodable(ctx context.Context, m bus.Delivery, why error) bool {
	const items = 1 // what it holds cannot be counted; the sender's header is not trusted
	if held, due := d.said.Due(m.Subject, time.Now()); due {
		d.log.Warn("message is not telemetry, dead-lettered", "subject", m.Subject, "seq", m.Seq, "err", why, "letters_since_last_said", held)
	}
	if !d.quota.Take(m.Instance(), time.Now()) {
		d.counter().ended(tally.Dropped, ledger.DroppedUndecodable, items)
		return true
	}
	return d.store(ctx, m.Instance(), items, ledger.DeadUndecodable, bus.Message{
		Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: items, Arrival: m.Header.Arrival, ID: fmt.Sprintf("dead-%s-%s-%d", d.w.Name(), d.sig, m.Seq)},
		Body:   m.Body, Refusal: &bus.Refusal{Reason: ledger.DeadUndecodable, Detail: why.Error(), Backend: d.w.Name(), Source: origin{stream: bus.StreamOf(m.Subject), seq: m.Seq}.source()},
	})
}

func (d *exporter) store(ctx context.Context, instance string, items int, reason string, m bus.Message) bool {
	ok := d.retry(ctx, "store a dead letter", func() error { return d.conn().DeadLetter(ctx, d.sig, instance, m) })
	if ok {
		d.counter().ended(tally.Dead, reason, items)
	}
	return ok
}
