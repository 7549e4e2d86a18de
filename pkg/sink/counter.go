package sink

import (
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/sampler"
	"github.com/penstock/penstock/pkg/tally"
)

// counter counts what becomes of items.
type counter interface {
	delivered(items int)
	aside(items int)
	dead(reason string, items int)
	dropped(items int)
	filtered(items int)
	restamped()
	decided(out sampler.Output)
}

// liveCounter counts in the ledger.
type liveCounter struct {
	led     *ledger.Ledger
	sig     otlpwire.Signal
	backend string
}

func (t liveCounter) delivered(items int) { t.led.Of(t.sig).Delivered(t.backend).Add(float64(items)) }

func (t liveCounter) dead(reason string, items int) { t.led.Of(t.sig).Dead(reason).Add(float64(items)) }

func (liveCounter) aside(int) {} // counted with the message that is new in ASIDE

func (t liveCounter) dropped(items int) {
	t.led.Of(t.sig).Dropped(ledger.DroppedUndecodable).Add(float64(items))
}

func (t liveCounter) restamped() { t.led.Of(t.sig).Restamped.Inc() }

func (t liveCounter) filtered(items int) { t.led.Of(t.sig).Filtered.Add(float64(items)) }

func (t liveCounter) decided(out sampler.Output) {
	led := t.led.Of(t.sig)
	led.SampledOut.Add(float64(out.SampledOut))
	led.Duplicate.Add(float64(out.Duplicates))
	if out.Full {
		t.led.SamplerFull.Inc()
	}
	for i, d := range out.Decisions {
		t.led.Decided(d.Kept, out.By[i])
	}
}

// furtherCounter leaves out what the first lane of a signal counts.
type furtherCounter struct{ liveCounter }

// ownCounter notes what becomes of the message, or messages, that a lane writes.
type ownCounter struct {
	counter
	ended *tally.Outcomes
}

func (c ownCounter) delivered(items int) {
	c.ended[tally.Delivered] += items
	c.counter.delivered(items)
}

func (c ownCounter) aside(items int) {
	c.ended[tally.Aside] += items
	c.counter.aside(items)
}

func (c ownCounter) dead(reason string, items int) {
	c.ended[tally.Dead] += items
	c.counter.dead(reason, items)
}

func (c ownCounter) dropped(items int) {
	c.ended[tally.Dropped] += items
	c.counter.dropped(items)
}

func (c ownCounter) filtered(items int) {
	c.ended[tally.Filtered] += items
	c.counter.filtered(items)
}

func (furtherCounter) decided(sampler.Output) {}

func (furtherCounter) filtered(int) {}

func (furtherCounter) restamped() {}
