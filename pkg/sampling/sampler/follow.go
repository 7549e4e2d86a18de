package sampler

import (
	"unique"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// A reader of TRACES decides again what has been decided live. Where the decision is still on record, it is followed: live,
// a trace may have been decided without a source that came too late, or a limit was reached, and nothing that is read later
// shows that. A decision becomes the sampler's own with the first span of its trace.

// followed is a decision of a sampler of live spans.
type followed struct {
	kept      bool
	policy    unique.Handle[string]
	threshold uint64
}

// followedBytes is about how much memory one takes.
const followedBytes = 128

// Follow notes the decision of another sampler, a live one, about a trace that is to come: of several about one
// "kept" counts. It returns false when there is no room, of half of the sampler's memory.
func (a *Samplers) Follow(d envelope.Decision) bool {
	s := a.parts[a.spread.Of(d.Instance, d.TraceID)]
	if s.followed == nil {
		s.followed = make(map[key]followed)
	}
	k := key{unique.Make(d.Domain).Value(), d.TraceID}
	switch old, there := s.followed[k]; {
	case there && old.kept && !d.Kept: // it was forgotten, and late spans were decided by themselves
		return true
	case !there && a.follows >= s.maxBytes/2/followedBytes:
		return false
	case !there:
		a.follows++
	}
	s.followed[k] = followed{d.Kept, unique.Make(d.Policy), d.Threshold}
	return true
}

// follow makes the decision about a trace that is followed its own: message seq has its first span.
func (s *Sampler) follow(id otlpwire.TraceID, domain string, in *instance, seq, origin uint64, arrival int64, out *Output) (kept *keptTrace, known bool, was droppedTrace) {
	k := key{domain, id}
	f, known := s.followed[k]
	if !known {
		return nil, false, was
	}
	one := envelope.Decision{Domain: domain, Instance: in.name, TraceID: id, Upto: seq - 1, Begun: origin}
	asked := s.chosen == nil || s.chosen(arrival, seq)
	if one.Kept = f.kept && asked; one.Kept {
		one.Policy, one.Threshold = f.policy.Value(), f.threshold
		kept = &keptTrace{policy: one.Policy, threshold: one.Threshold, begun: origin}
		s.decided.keep(k, *kept)
	} else {
		was = droppedTrace{begun: origin, unasked: !asked}
		s.decided.drop(k, was)
	}
	out.Decisions, out.By = append(out.Decisions, one), append(out.By, one.Policy)
	return kept, true, was
}
