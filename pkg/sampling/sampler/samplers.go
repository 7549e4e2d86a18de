package sampler

import (
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	domains "github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// Samplers are the samplers of all partitions, for a reader of the streams of whole instances: each gets
// the spans that the sampler of its partition got when they were live, so that budgets, of which every
// partition has a share, give the same verdicts. With one partition it is that one sampler.
//
// They share one bound and one floor. They are guarded: a panic is the end of them, not of the process (panic.go).
type Samplers struct {
	parts  []*Sampler // nil: one has panicked
	spread partition.Spread
	held   *held
	last   uint64 // highest sequence seen
	// follows is how many decisions are followed.
	follows int
	split   otlpwire.Splitter
	pieces  [][]byte // of the current payload, by partition
	// panicked is what the next output tells.
	panicked *Panicked
}

// NewSamplers returns a sampler like that of [New] for each partition of a spread. chosen says which traces may be kept, by the arrival
// and sequence of their first span; nil for all. The others are evaluated, too, for what they take from
// the budgets.
func NewSamplers(policies *policy.Set, spread partition.Spread, maxBytes int, floor uint64, chosen func(first int64, seq uint64) bool) *Samplers {
	all := &Samplers{held: new(held), spread: spread, last: floor, pieces: make([][]byte, spread.N)}
	for range spread.N {
		s := New(policies, maxBytes, floor)
		s.held, s.chosen = all.held, chosen
		all.parts = append(all.parts, s)
	}
	return all
}

// merge adds the output of another step.
func (o *Output) merge(more Output) {
	o.Sources = append(o.Sources, more.Sources...)
	o.Ended = append(o.Ended, more.Ended...)
	o.Exports = append(o.Exports, more.Exports...)
	o.Decisions = append(o.Decisions, more.Decisions...)
	o.By = append(o.By, more.By...)
	o.SampledOut += more.SampledOut
	o.Duplicates += more.Duplicates
	o.TooLarge += more.TooLarge
	o.Rescues = append(o.Rescues, more.Rescues...)
	o.Rescued += more.Rescued
	o.TooLate += more.TooLate
	o.OverLimit += more.OverLimit
	o.Unordered += more.Unordered
	if more.NoAnswer != nil {
		o.noAnswer(*more.NoAnswer)
	}
	o.Full = o.Full || more.Full
	o.Rewind = o.Rewind || more.Rewind
}

// Add is [Sampler.Add], for a frame with spans of all partitions.
func (a *Samplers) Add(seq uint64, f envelope.Frame) (out Output, err error) {
	err = a.guard(About{seq, f.Instance}, func() (err error) {
		out, err = a.add(seq, f)
		return err
	})
	return a.told(out), err
}

func (a *Samplers) add(seq uint64, f envelope.Frame) (out Output, err error) {
	a.last = max(a.last, seq)
	if len(a.parts) == 1 {
		return a.parts[0].Add(seq, f)
	}
	for i := range a.pieces {
		a.pieces[i] = a.pieces[i][:0]
	}
	err = a.split.Split(f.Payload, func(item []byte) int {
		id, _ := otlpwire.SpanTrace(item)
		return a.spread.Of(f.Instance, id)
	}, func(p int, piece []byte) { a.pieces[p] = append(a.pieces[p], piece...) })
	for p, piece := range a.pieces {
		if err != nil || len(piece) == 0 {
			continue
		}
		f.Payload = piece
		var one Output
		one, err = a.parts[p].Add(seq, f)
		out.merge(one)
	}
	return out, err
}

// each merges the outputs of a step of every sampler.
func (a *Samplers) each(step func(*Sampler) Output) (out Output) {
	_ = a.guard(About{}, func() error {
		for _, s := range a.parts {
			out.merge(step(s))
		}
		return nil
	})
	return a.told(out)
}

// Idle is [Sampler.Idle].
func (a *Samplers) Idle(known Mark, now time.Time) Output {
	return a.each(func(s *Sampler) Output { return s.Idle(known, now) })
}

// Unblock is [Sampler.Unblock].
func (a *Samplers) Unblock(now time.Time) Output {
	return a.each(func(s *Sampler) Output { return s.Unblock(now) })
}

// Finish is [Sampler.Finish]: once all samplers hold nothing, there is room for what was passed over.
func (a *Samplers) Finish() Output { return a.each((*Sampler).Finish) }

// Use is [Sampler.Use].
func (a *Samplers) Use(policies []policy.Version, grouping domains.Versions) {
	_ = a.guard(About{}, func() error {
		for _, s := range a.parts {
			s.Use(policies, grouping)
		}
		return nil
	})
}

// Remember is [Sampler.Remember], for decisions of all partitions.
func (a *Samplers) Remember(message []byte) error {
	return fault.Guard(func() error { return remember(message, a.parts, a.spread) })
}

// Release is [Sampler.Release].
func (a *Samplers) Release(seq uint64) { a.held.owed.release(seq) }

// Floor is [Sampler.Floor].
func (a *Samplers) Floor() uint64 {
	if low, ok := a.held.owed.lowest(); ok {
		return min(low-1, a.last)
	}
	return a.last
}

// Restore is [Sampler.Restore].
func (a *Samplers) Restore() Output { return a.each((*Sampler).Restore) }

// Rescued is [Sampler.Rescued].
func (a *Samplers) Rescued(d envelope.Decision) (out Output) {
	_ = a.guard(About{}, func() error {
		out = a.parts[a.spread.Of(d.Instance, d.TraceID)].Rescued(d)
		return nil
	})
	return a.told(out)
}

// Unsettled returns how many rescues are not finished: a reader bounds them by reading nothing new.
func (a *Samplers) Unsettled() (n int) {
	for _, s := range a.parts {
		n += s.unsettled
	}
	return n
}

// Sources is [Sampler.Sources], of all partitions.
func (a *Samplers) Sources() (all Sources) {
	_ = a.guard(About{}, func() error {
		most := 0
		for _, s := range a.parts {
			one := s.Sources()
			all.Known += one.Known
			if all.Waiting += one.Waiting; one.Waiting > most {
				most, all.For = one.Waiting, one.For
			}
		}
		return nil
	})
	return all
}

// Kept returns what is remembered about a trace that another sampler has decided about: the policy that it is kept by.
func (a *Samplers) Kept(d envelope.Decision) (by string, kept, known bool) {
	s := a.parts[a.spread.Of(d.Instance, d.TraceID)]
	one, known, _ := s.decided.recall(key{d.Domain, d.TraceID})
	if one == nil {
		return "", false, known
	}
	return one.policy, true, true
}

// Readable is [Sampler.Readable].
func (a *Samplers) Readable(from, most uint64) {
	for _, s := range a.parts {
		s.Readable(from, most)
	}
}

// Newest returns the highest sequence of TRACES that something has been added of.
func (a *Samplers) Newest() (newest uint64) {
	for _, s := range a.parts {
		newest = max(newest, s.newest)
	}
	return newest
}

// Held returns the number of undecided traces and their approximate memory in bytes.
func (a *Samplers) Held() (traces, bytes int) {
	for _, s := range a.parts {
		n, _ := s.Held()
		traces += n
	}
	return traces, a.held.bytes
}

// Passed reports whether traces have been passed over because there was no room.
func (a *Samplers) Passed() bool { return a.held.passed }
