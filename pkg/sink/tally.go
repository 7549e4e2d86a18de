package sink

import (
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/sampler"
)

// tally counts what becomes of items.
type tally interface {
	delivered(items int)
	dead(reason string, items int)
	filtered(items int)
	restamped()
	decided(out sampler.Output)
}

// liveTally counts in the ledger.
type liveTally struct {
	led     *ledger.Ledger
	sig     otlpwire.Signal
	backend string
}

func (t liveTally) delivered(items int) { t.led.Of(t.sig).Delivered(t.backend).Add(float64(items)) }

func (t liveTally) dead(reason string, items int) { t.led.Of(t.sig).Dead(reason).Add(float64(items)) }

func (t liveTally) restamped() { t.led.Of(t.sig).Restamped.Inc() }

func (t liveTally) filtered(items int) { t.led.Of(t.sig).Filtered.Add(float64(items)) }

func (t liveTally) decided(out sampler.Output) {
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

// furtherTally leaves out what the first lane of a signal counts.
type furtherTally struct{ liveTally }

func (furtherTally) decided(sampler.Output) {}

func (furtherTally) filtered(int) {}

func (furtherTally) restamped() {}
