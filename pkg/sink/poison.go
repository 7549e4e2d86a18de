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
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/sampler"
	"github.com/penstock/penstock/pkg/sink/export"
	"github.com/penstock/penstock/pkg/tally"
)

// A lane whose sampler has panicked sends what was decided before, and is claimed again. What is to blame, the spans of an
// instance in a message, is dead-lettered when it comes again, and never given to a sampler. A sink that takes the lane over
// finds it out by itself.

// poison is what a lane knows of panics of its sampler.
type poison struct {
	of map[sampler.About]*blame // what is to blame, above the floor
	// others is how many panics nothing was to blame for, or for which there was no room: the more, the longer is the pause
	// before the lane is claimed again.
	others int
}

type blame struct {
	why  error
	dead bool // it is in DEADLETTER
}

// maxPoison is how many of these are remembered. Beyond that the lane comes only as far as the next one, and has room again
// once its floor moves.
const maxPoison = 1024

// caught counts and logs a panic, if err is one.
func (l *traceLane) caught(about sampler.About, err error) {
	if _, is := errors.AsType[*fault.Panic](err); is {
		l.exporter.Panicked(ledger.PanicSampler, about.Instance, export.Origin{Stream: l.stream, Seq: about.Seq}, err)
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
		l.caught(p.About, p.Panic)
		if p.Seq == 0 || len(l.poison.of) >= maxPoison {
			l.poison.others++
			return
		}
		if l.poison.of == nil {
			l.poison.of = map[sampler.About]*blame{}
		}
		l.poison.of[p.About] = &blame{why: &fault.Panic{Value: fmt.Sprint(p.Value)}} // without the stack
	}
}

// again prepares the next claim: after a pause, if there have been panics that would come again. It returns false if ctx ends.
func (l *traceLane) again(ctx context.Context) bool {
	floor := l.lane.Floor()
	maps.DeleteFunc(l.poison.of, func(a sampler.About, _ *blame) bool { return a.Seq <= floor })
	if l.poison.others == 0 {
		return true
	}
	l.lane.Waits(errors.New("the sampler has panicked, see the log"))
	defer l.lane.Waits(nil)
	return backoff.Sleep(ctx, fault.Pause(nil, l.poison.others, rand.Float64()))
}

// withheld is what of an instance in a message is not given to the sampler.
type withheld struct {
	payload []byte
	spans   int
	arrival int64
}

// withhold adds a frame of message seq to what is withheld, by instance, if the sampler panics over it.
func (l *traceLane) withhold(all map[string]withheld, seq uint64, f envelope.Frame) bool {
	if l.poison.of[sampler.About{Seq: seq, Instance: f.Instance}] == nil {
		return false
	}
	one := all[f.Instance]
	all[f.Instance] = withheld{append(one.payload, f.Payload...), one.spans + otlpwire.Count(otlpwire.Traces, f.Payload), f.Arrival}
	return true
}

// poisoned dead-letters what is withheld of a message.
func (l *traceLane) poisoned(ctx context.Context, seq uint64, all map[string]withheld) error {
	for _, instance := range slices.Sorted(maps.Keys(all)) {
		one, b := all[instance], l.poison.of[sampler.About{Seq: seq, Instance: instance}]
		part := tally.Part{Seq: seq, Instance: instance, Items: one.spans}
		if b.dead && l.tally != nil { // since an earlier claim; a replay counts again with each claim
			l.tally.Do(func(book *tally.Book) {
				book.Saw(part.Seq, part.Instance, part.Items, "")
				book.Ended(part.Seq, part.Instance, tally.Dead, part.Items)
			})
			continue
		}
		if err := l.refused(part, func(e *export.Exporter) error {
			return l.feed.poisoned(ctx, e, instance, one.payload, export.Origin{Stream: l.stream, Seq: seq, Arrival: one.arrival}, b.why)
		}); err != nil {
			return err
		}
		b.dead = true
	}
	return nil
}
