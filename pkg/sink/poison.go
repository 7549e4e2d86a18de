package sink

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/sampler"
	"github.com/penstock/penstock/pkg/sink/export"
	"github.com/penstock/penstock/pkg/tally"
)

// A lane whose sampler has panicked sends what was decided before, and is claimed again. The message that is to blame is
// dead-lettered when it comes again, and never given to a sampler. A sink that takes the lane over finds it out by itself.

// poison is what a lane knows of panics of its sampler.
type poison struct {
	of map[uint64]*blame // by sequence, the messages that are to blame, above the floor
	// others is how many panics no message was to blame for, or for which there was no room: the more, the longer is the pause
	// before the lane is claimed again.
	others int
}

type blame struct {
	why  error
	dead bool // it is in DEADLETTER
}

// maxPoison is how many messages are remembered. Beyond that the lane comes only as far as the next one, and has room again
// once its floor moves.
const maxPoison = 1024

// caught counts and logs a panic, if err is one; seq is the message that it was about, or 0.
func (l *traceLane) caught(seq uint64, err error) {
	if _, is := errors.AsType[*fault.Panic](err); is {
		l.exporter.Panicked(ledger.PanicSampler, "", export.Origin{Stream: l.stream, Seq: seq}, err)
	}
}

// panicked handles what a step of the sampler tells of panics.
func (l *traceLane) panicked(out sampler.Output) {
	if n := out.NoAnswer; n != nil {
		l.exporter.Ledger.Panics(ledger.PanicPolicy).Add(float64(n.Policies))
		if more, due := l.exporter.Said.Due("panic "+ledger.PanicPolicy, time.Now()); due {
			l.exporter.Log.Error("bug: a policy panicked; it has no answer about the trace, and the others decide", "policy", n.Policy, "trace", hex.EncodeToString(n.TraceID[:]), "instance", n.Instance, "err", n.Panic, "stack", n.Stack, "more_since_last_said", more)
		}
	}
	if p := out.Panicked; p != nil {
		l.caught(p.Seq, p.Panic)
		if p.Seq == 0 || len(l.poison.of) >= maxPoison {
			l.poison.others++
			return
		}
		if l.poison.of == nil {
			l.poison.of = map[uint64]*blame{}
		}
		l.poison.of[p.Seq] = &blame{why: &fault.Panic{Value: fmt.Sprint(p.Value)}} // without the stack
	}
}

// again prepares the next claim: after a pause, if there have been panics that would come again. It returns false if ctx ends.
func (l *traceLane) again(ctx context.Context) bool {
	floor := l.lane.Floor()
	maps.DeleteFunc(l.poison.of, func(seq uint64, _ *blame) bool { return seq <= floor })
	if l.poison.others == 0 {
		return true
	}
	l.lane.Waits(errors.New("the sampler has panicked, see the log"))
	defer l.lane.Waits(nil)
	return backoff.Sleep(ctx, fault.Pause(nil, l.poison.others, rand.Float64()))
}

// poisoned dead-letters a message over which the sampler panics, with a letter for each instance that has spans in it.
func (l *traceLane) poisoned(ctx context.Context, d bus.Delivery, b *blame) error {
	spans, items, from := map[string][]byte{}, map[string]int{}, export.Origin{Stream: l.stream, Seq: d.Seq}
	if err := fault.Guard(func() error {
		d.Decompress(&l.body)
		return l.frames(&l.guard, d, func(f envelope.Frame) error {
			spans[f.Instance], from.Arrival = append(spans[f.Instance], f.Payload...), f.Arrival
			items[f.Instance] += otlpwire.Count(otlpwire.Traces, f.Payload)
			return nil
		})
	}); err != nil {
		return l.unreadable(ctx, d, b.why)
	}
	for _, instance := range slices.Sorted(maps.Keys(spans)) {
		part := tally.Part{Seq: d.Seq, Instance: instance, Items: items[instance]}
		if b.dead && l.tally != nil { // since an earlier claim; a replay counts again with each claim
			l.tally.Do(func(book *tally.Book) {
				book.Saw(part.Seq, part.Instance, part.Items, "")
				book.Ended(part.Seq, part.Instance, tally.Dead, part.Items)
			})
			continue
		}
		if err := l.refused(part, func(e *export.Exporter) error {
			return l.feed.poisoned(ctx, e, instance, spans[instance], from, b.why)
		}); err != nil {
			return err
		}
	}
	b.dead = true
	return nil
}
