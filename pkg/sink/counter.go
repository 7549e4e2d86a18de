package sink

import (
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/sampler"
	"github.com/penstock/penstock/pkg/sink/export"
	"github.com/penstock/penstock/pkg/tally"
)

// counter counts what becomes of items.
type counter interface {
	export.Counter
	restamped()
	// saw counts a message of metrics or logs that has been finished.
	saw(m *message)
	decided(out sampler.Output)
	// rescued counts spans that were sampled out, and are delivered after all.
	rescued(items int)
	// incomplete counts traces that were rescued without all of their spans.
	incomplete(traces int)
}

// liveCounter counts in the ledger.
type liveCounter struct {
	led     *ledger.Ledger
	sig     otlpwire.Signal
	backend string
}

func (t liveCounter) Ended(how tally.Outcome, reason string, items int) {
	led, n := t.led.Of(t.sig), float64(items)
	switch how {
	case tally.Delivered:
		led.Delivered(t.backend).Add(n)
	case tally.Dead:
		led.Dead(reason).Add(n)
	case tally.Dropped:
		led.Dropped(reason).Add(n)
	case tally.Filtered:
		led.Filtered.Add(n)
	} // what is set aside is counted with the message that is new in ASIDE
}

func (t liveCounter) saw(m *message) { t.led.Saw(t.sig, m.Job.Instance, m.items, m.Size, m.Stored) }

func (t liveCounter) restamped() { t.led.Of(t.sig).Restamped.Inc() }

func (t liveCounter) decided(out sampler.Output) {
	led := t.led.Of(t.sig)
	led.SampledOut.Add(float64(out.SampledOut))
	led.Duplicate.Add(float64(out.Duplicates))
	if out.Full {
		t.led.SamplerFull.Inc()
	}
	t.led.SamplerUnordered.Add(float64(out.Unordered))
	t.led.Late(ledger.LateRescued, out.Rescued)
	t.led.Late(ledger.LateTooLate, out.TooLate)
	t.led.Late(ledger.LateOverLimit, out.OverLimit)
	for i, d := range out.Decisions {
		if d.Late == envelope.OnTime {
			t.led.Decided(d.Kept, out.By[i])
		}
	}
}

func (t liveCounter) rescued(items int) { t.led.Of(t.sig).Rescued.Add(float64(items)) }

// furtherCounter leaves out what the first lane of a signal counts.
type furtherCounter struct{ liveCounter }

func (t furtherCounter) Ended(how tally.Outcome, reason string, items int) {
	if how != tally.Filtered {
		t.liveCounter.Ended(how, reason, items)
	}
}

func (furtherCounter) restamped() {}

func (furtherCounter) saw(*message) {}

func (t liveCounter) incomplete(traces int) { t.led.Late(ledger.LateIncomplete, traces) }

func (furtherCounter) incomplete(int) {}

func (furtherCounter) rescued(int) {}

func (furtherCounter) decided(sampler.Output) {}
