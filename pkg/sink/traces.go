package sink

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/proc"
	"github.com/penstock/penstock/pkg/sink/policy"
	"github.com/penstock/penstock/pkg/sink/sample"
)

// traceLane samples the spans of one partition and exports the kept traces. It
// is the shell around the sampler: it reads, tells the time, exports, and moves
// the floor.
type traceLane struct {
	lane     *bus.Lane
	delivery *delivery
	policies *policy.Set
	maxBytes int
	alive    func() bool // the hub answers

	partition int
	sampler   *sample.Sampler
	decisions []envelope.Decision // made, not yet recorded
	exports   []sample.Export     // decided, not yet stored by the backend
	bytes     int                 // of exports
	last      time.Time           // of the last message
	behind    bool                // messages were waiting behind the last one
}

const (
	// tick is how often an idle lane looks at the time.
	tick = 250 * time.Millisecond

	// maxDecisions is how many decisions are gathered for one message: of 40
	// bytes, a name of up to 128 and a few for each budget they stay below a stock
	// server's 1 MiB.
	maxDecisions = 2048

	// maxRequest is how many bytes go to the backend in one request; Tempo takes
	// 4 MiB by default.
	maxRequest = 1 << 20
)

func (l *traceLane) run(ctx context.Context) {
	deliveries := make(chan bus.Delivery, 16) // hides the hand-over between the goroutines
	var wg sync.WaitGroup
	wg.Go(func() {
		l.lane.Run(ctx, func(d bus.Delivery) bool {
			select {
			case deliveries <- d:
				return true
			case <-ctx.Done():
				return false
			}
		})
	})
	defer wg.Wait()
	if !l.forget(ctx) {
		return
	}
	clock := time.NewTicker(tick)
	defer clock.Stop()
	heldTraces, heldBytes := l.delivery.led.Sampler(strconv.Itoa(l.partition))
	for {
		select {
		case <-ctx.Done():
			return
		case d := <-deliveries:
			if !l.take(ctx, d) {
				return
			}
			// Gather what is waiting before anything is sent.
			if len(deliveries) > 0 && l.bytes < maxRequest && len(l.decisions) < maxDecisions {
				continue
			}
		case now := <-clock.C:
			// Caught up: what is silent may be moved on, however busy others are.
			if !l.behind && len(deliveries) == 0 && l.alive() {
				l.note(l.sampler.Idle(now))
			}
			traces, bytes := l.sampler.Held()
			heldTraces.Set(float64(traces))
			heldBytes.Set(float64(bytes))
		}
		if !l.flush(ctx) {
			return
		}
	}
}

// forget starts anew at the floor: everything above it comes again, and follows
// the decisions that were recorded. It returns false when ctx ended first.
func (l *traceLane) forget(ctx context.Context) bool {
	l.decisions, l.exports, l.bytes = l.decisions[:0], l.exports[:0], 0
	ok := proc.Retry(ctx, l.delivery.log, "read the recorded decisions", func() error {
		l.sampler = sample.New(l.policies, l.maxBytes)
		return l.delivery.conn.Recall(ctx, bus.Decisions, bus.DecisionsSubject(l.partition), func(body []byte) error {
			for len(body) > 0 {
				d, rest, err := envelope.NextDecision(body)
				if err != nil {
					return err
				}
				l.sampler.Remember(d)
				body = rest
			}
			return nil
		})
	})
	l.last, l.behind = time.Now(), true
	return ok
}

// record makes the decisions durable: before the first span of a kept trace is
// sent, and before the floor passes a span of one that was not.
func (l *traceLane) record(ctx context.Context) bool {
	for chunk := range slices.Chunk(l.decisions, maxDecisions) {
		msg := bus.Message{Subject: bus.DecisionsSubject(l.partition), Header: envelope.Header{
			ContentType: envelope.ContentTypeDecisions, Items: len(chunk), Arrival: l.last.UnixNano(),
		}}
		var body []byte
		for _, d := range chunk {
			body = envelope.AppendDecision(body, d)
		}
		msg.Body, msg.Header.Encoding = envelope.Compress(nil, body, envelope.S2)
		if !proc.Retry(ctx, l.delivery.log, "record decisions", func() error {
			_, err := l.delivery.conn.Publish(ctx, msg)
			return err
		}) {
			return false
		}
	}
	l.decisions = l.decisions[:0]
	return true
}

// take hands one message to the sampler.
func (l *traceLane) take(ctx context.Context, d bus.Delivery) bool {
	if d.Reset {
		return l.forget(ctx)
	}
	l.last, l.behind = time.Now(), d.Pending > 0
	err := d.Err
	for body := d.Body; err == nil && len(body) > 0; {
		var f envelope.Frame
		if f, body, err = envelope.NextFrame(body); err != nil {
			break
		}
		var out sample.Output
		if out, err = l.sampler.Add(d.Seq, l.last, f); err == nil {
			l.note(out)
		}
	}
	if err != nil {
		return l.delivery.undecodable(ctx, d, err)
	}
	return true
}

// note books what the sampler has brought.
func (l *traceLane) note(out sample.Output) {
	led := l.delivery.led.Of(otlpwire.Traces)
	led.SampledOut.Add(float64(out.SampledOut))
	led.Duplicate.Add(float64(out.Duplicates))
	if out.Early > 0 {
		l.delivery.log.Warn("sampler is full, traces were decided before their time; raise sampling.max_bytes_per_partition", "traces", out.Early)
	}
	if out.TooLarge > 0 {
		l.delivery.log.Warn("traces were given up, larger than maximum_trace_size_bytes", "traces", out.TooLarge)
	}
	for i, d := range out.Decisions {
		l.delivery.led.Decided(d.Kept, out.By[i])
	}
	l.decisions = append(l.decisions, out.Decisions...)
	for _, e := range out.Exports {
		l.exports = append(l.exports, e)
		l.bytes += e.Size()
	}
}

// flush records what was decided, exports it, one instance a request, in the
// order of decision, and moves the floor.
func (l *traceLane) flush(ctx context.Context) bool {
	if !l.record(ctx) {
		return false
	}
	for len(l.exports) > 0 {
		first := l.exports[0]
		n, payload := 1, first.Append(nil)
		for n < len(l.exports) && l.exports[n].Instance == first.Instance && len(payload)+l.exports[n].Size() <= maxRequest {
			payload = l.exports[n].Append(payload)
			n++
		}
		if !l.delivery.write(ctx, first.Instance, payload, origin{seq: first.Seq}) {
			return false
		}
		for _, e := range l.exports[:n] {
			l.sampler.Release(e.Seq)
		}
		l.exports = append(l.exports[:0], l.exports[n:]...)
	}
	l.bytes = 0
	if err := l.lane.Ack(l.sampler.Floor()); err != nil {
		l.delivery.log.Debug("ack lost, a later one makes up for it", "err", err)
	}
	return true
}
