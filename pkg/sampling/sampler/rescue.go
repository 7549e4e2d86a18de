package sampler

import (
	"cmp"
	"errors"
	"hash/maphash"
	"math"
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/otlpwire"
	domains "github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// A rescue turns "not kept" into kept, once: spans that come after the decision, and that a policy without a budget
// wants by themselves, bring their trace back. The sampler has let go of the earlier spans; they stand in
// the stream. The decision is recorded, and then a [Rescuer] reads them again. What comes later follows the decision.
//
// A rescue covers what the sampler has seen so far. Spans up to there that it sees later, because frames of a domain
// have waited, or because they are read again by another owner, are the rescue's.

// rescues is how many traces of a domain were rescued in a minute of stream time.
type rescues struct{ minute, n int64 }

// count reports whether one more trace may be rescued.
func (r *rescues) count(now int64, most int) bool {
	if minute := now / int64(time.Minute); minute > r.minute || minute < r.minute-1 {
		*r = rescues{minute: minute}
	}
	r.n++
	return r.n <= int64(most)
}

// present is the time of a domain by the stamps of most of its sources: neither one that sends what it has kept nor
// one whose clock is ahead moves it.
func (d *domain) present() int64 {
	var times []int64
	for _, c := range d.clocks {
		if c.known && !c.gone {
			times = append(times, c.at)
		}
	}
	if len(times) == 0 {
		return 0
	}
	slices.Sort(times)
	return times[len(times)/2]
}

// late decides about spans of a trace of d that is not kept; asked reports that a policy has decided, and if that is not to
// keep the trace, it stays so.
func (s *Sampler) late(d *domain, in *instance, id otlpwire.TraceID, rules *policy.Version, was droppedTrace, spans int, out *Output) (v policy.Verdict, asked bool) {
	s.trace.Reset(id, spans, s.scratch, was.at)
	v = rules.WantsLate(&s.trace)
	if out.asked(id, in, v.Panicked); !v.Keep {
		return policy.Verdict{}, v.By != "" // a drop policy does, in its way
	}
	now, r := d.present(), s.rescues[d.name]
	switch {
	case was.from < s.readable.from || s.readable.most > 0 && s.last-min(was.from, s.last) > s.readable.most || now-was.at > int64(rules.Late.Age):
		out.TooLate++
		return policy.Verdict{}, true
	case !r.count(now, rules.Late.Traces):
		out.OverLimit++
		v = policy.Verdict{}
	default:
		out.Rescued++
	}
	s.rescues[d.name] = r
	return v, true
}

// lateHeld is late for spans of an undecided trace: it has waited for other sources, and they are stamped later than its
// end. They are looked at as if they had come after it.
func (s *Sampler) lateHeld(d *domain, t *trace, out *Output) policy.Verdict {
	if t.rules.Late.Traces == 0 || len(d.clocks) == 1 {
		return policy.Verdict{}
	}
	for i := range t.shares {
		sh := &t.shares[i]
		for j := range sh.pieces {
			if sh.stamps[j].at <= t.due {
				continue
			}
			s.scratch = sh.pieces[j].Append(s.scratch[:0])
			if v, asked := s.late(d, sh.in, t.id, t.rules, droppedTrace{from: math.MaxUint64, at: d.present()}, sh.stamps[j].spans, out); asked {
				t.final = !v.Keep
				return v
			}
		}
	}
	return policy.Verdict{}
}

// rescue decides about late spans of a trace that was not kept. It returns what is remembered of the trace from
// now on; nil: nothing has changed.
func (s *Sampler) rescue(d *domain, in *instance, k key, was droppedTrace, spans int, g otlpwire.Group, out *Output) *keptTrace {
	if was.from == 0 {
		return nil
	}
	if d == nil { // it is a former domain of the instance, of which nothing else is left
		d = in.domain
	}
	late := g.Fragment(nil)
	s.scratch = late.Append(s.scratch[:0])
	rules := s.rules(was.from)
	v, asked := s.late(d, in, k.id, rules, was, spans, out)
	if !v.Keep {
		if asked {
			s.decided.settle(k)
		}
		return nil
	}
	one := envelope.Decision{
		Domain: k.domain, Instance: in.name, TraceID: k.id, Kept: true, Upto: s.last, Begun: was.begun, Policy: v.By, Threshold: v.Threshold,
		From: was.from, At: d.present(), Late: envelope.Rescued,
	}
	s.held.owed.add(one.Upto)
	s.unsettled++
	out.Decisions, out.By, out.Rescues = append(out.Decisions, one), append(out.By, v.By), append(out.Rescues, one)
	return s.decided.rescue(k, keptTrace{policy: v.By, threshold: v.Threshold, begun: was.begun, covers: one.Upto})
}

// rememberRescue restores a rescue that was recorded, or that it was finished.
func (s *Sampler) rememberRescue(k key, d envelope.Decision) {
	sent := d.Late == envelope.RescueSent
	s.decided.rescue(k, keptTrace{policy: d.Policy, threshold: d.Threshold, begun: d.Begun, covers: d.Upto, upto: d.Upto, sent: sent})
	if delete(s.recorded, k); sent {
		return
	}
	r := s.rescues[d.Domain]
	r.count(d.At, 0)
	if s.rescues[d.Domain] = r; d.Upto > s.decided.floor {
		s.recorded[k] = d
	}
}

// Restore returns the rescues that previous owners have recorded and not finished. It is called once, after all that
// is remembered.
func (s *Sampler) Restore() (out Output) {
	for _, d := range s.recorded {
		s.held.owed.add(d.Upto)
		s.unsettled++
		out.Rescues = append(out.Rescues, d)
	}
	slices.SortFunc(out.Rescues, func(a, b envelope.Decision) int {
		return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.Domain, b.Domain), slices.Compare(a.TraceID[:], b.TraceID[:]))
	})
	clear(s.recorded)
	return out
}

// Rescued records that the backend has everything of a rescue.
func (s *Sampler) Rescued(d envelope.Decision) (out Output) {
	s.held.owed.release(d.Upto)
	s.unsettled--
	d.Late = envelope.RescueSent
	out.Decisions, out.By = append(out.Decisions, d), append(out.By, d.Policy)
	return out
}

// Readable sets from which sequence on the stream can be read again, and how many sequences at most, 0 for any: traces
// that begin before that are not rescued.
func (s *Sampler) Readable(from, most uint64) { s.readable.from, s.readable.most = from, most }

// Rescuer finds the spans of rescues in the stream.
type Rescuer struct {
	wanted     map[otlpwire.TraceID][]*rescued
	grouping   domains.Versions
	from, upto uint64
	wire       otlpwire.Splitter
	hash       maphash.Hash
	fresh      []bool
	known      int // spans that are remembered
}

// maxKnown is how many spans a rescuer remembers: what is in the stream twice beyond that comes twice.
const maxKnown = 1 << 20

type rescued struct {
	envelope.Decision
	ids spanSet
}

// NewRescuer is for some rescues of one sampler, or several; grouping is theirs.
func NewRescuer(all []envelope.Decision, grouping domains.Versions) *Rescuer {
	r := &Rescuer{wanted: make(map[otlpwire.TraceID][]*rescued), grouping: grouping, from: math.MaxUint64}
	for _, d := range all {
		r.wanted[d.TraceID] = append(r.wanted[d.TraceID], &rescued{Decision: d})
		r.from, r.upto = min(r.from, d.From), max(r.upto, d.Upto)
	}
	return r
}

// Range returns the first and the last sequence that is to be added.
func (r *Rescuer) Range() (from, upto uint64) { return r.from, r.upto }

// Add returns the spans of rescues in a frame of message seq. What is in the stream twice comes once. A frame that makes it
// panic has none, and a [fault.Panic] is returned.
func (r *Rescuer) Add(seq uint64, f envelope.Frame) (out []Export, err error) {
	err = fault.Guard(func() (err error) {
		out, err = r.add(seq, f)
		return err
	})
	if _, panicked := errors.AsType[*fault.Panic](err); panicked {
		r.wire = otlpwire.Splitter{}
	}
	return out, err
}

func (r *Rescuer) add(seq uint64, f envelope.Frame) (out []Export, err error) {
	var found []*rescued
	in, before := "", []string(nil) // the domains of the instance, once they are known
	err = r.wire.Groups(f.Payload, func(item []byte) int {
		id, _ := otlpwire.SpanTrace(item)
		for _, one := range r.wanted[id] {
			if seq < one.From || seq > one.Upto {
				continue
			}
			if in == "" {
				in, before = r.grouping.Of(f.Instance, f.Seq)
			}
			if its := one.Domain == in || slices.Contains(before, one.Domain) && one.Begun < r.grouping.Left(f.Instance, one.Domain); !its {
				continue
			}
			n := slices.Index(found, one)
			if n < 0 {
				n, found = len(found), append(found, one)
			}
			return n
		}
		return -1
	}, func(n int, g otlpwire.Group) {
		one, spans := found[n], 0
		r.fresh = r.fresh[:0]
		resource := digest(&r.hash, 0, g.Resource())
		for item, scope := range g.ItemsIn() {
			is := r.known >= maxKnown || one.ids.add(digest(&r.hash, digest(&r.hash, resource, scope), item))
			if r.fresh = append(r.fresh, is); is {
				spans++
				r.known++
			}
		}
		if spans > 0 {
			out = append(out, Export{
				Instance: f.Instance, Spans: spans, Seq: one.Upto, Policy: one.Policy, Threshold: one.Threshold, Late: true, Rescued: true,
				Parts: []Part{{one.Upto, spans}}, pieces: []otlpwire.Fragment{g.Fragment(r.fresh)},
			})
		}
	})
	return out, err
}
