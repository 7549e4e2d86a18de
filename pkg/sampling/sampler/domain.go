package sampler

import (
	"maps"
	"slices"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	domains "github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// domain is the state of the instances that may share traces; most domains have one.
type domain struct {
	name     string
	version  int      // of the grouping, by which its instances are known
	clocks   []*clock // of its sources, in the order in which they were first seen
	recorded struct { // when its sources were last recorded
		clocks int
		due    int64
	}
	lag    int64 // of its sources, see defaultLag
	traces map[otlpwire.TraceID]*trace
	order  order   // of the frames of its instances
	queued pending // sequences of SPANS of the frames that wait and may have spans of its traces
	away   int     // how many of these wait among the frames of another domain

	bytes   int    // memory of its traces
	passed  bool   // its new traces are passed over
	first   uint64 // the lowest sequence of what was passed over
	full    int    // bytes when passing began
	decided bool   // one of its traces has been decided since then
}

// instance is the state of one instance.
type instance struct {
	name string
	home
	version int     // of the grouping, by which that is its home
	part    int     // the partition of TRACES that it is in
	waits   int     // how many of its frames wait for their turn
	line    *domain // among whose frames they do
	origin  uint64  // highest sequence of TRACES seen
	sources map[uint32]source
	meter   envelope.Meter // of what came to this partition
}

// home is where the traces of an instance are, as of a sequence of TRACES.
type home struct {
	domain *domain  // that new traces are in
	before []former // the other domains that it was in, where traces that began there stay
}

// former is a domain that an instance was in.
type former struct {
	name  string
	until uint64 // the sequence of TRACES from which it is in another
	done  bool   // nothing that began before that is undecided, or may come
}

// version returns which version of the domains is in force at a sequence of TRACES, 0 for none.
func (s *Sampler) version(seq uint64) int {
	version := len(s.grouping)
	for version > 0 && s.grouping[version-1].From > seq {
		version--
	}
	return version
}

// instance returns the state of an instance, in the domain that it has at a sequence of TRACES.
func (s *Sampler) instance(name string, seq uint64) *instance {
	in := s.instances[name]
	if in == nil {
		in = &instance{name: name, version: -1, part: partition.OfInstance(name, s.parts)}
		s.instances[name] = in
	}
	version := s.version(seq)
	if in.version == version {
		return in
	}
	now, before := s.grouping.Of(name, seq)
	in.version, in.before, in.domain = version, nil, s.domains[now]
	for _, was := range before {
		in.before = append(in.before, former{name: was, until: s.grouping[:version].Left(name, was)})
	}
	if in.domain == nil {
		in.domain = s.newDomain(now, seq)
	} else if in.domain.version < version && domains.Shared(now) {
		s.populate(in.domain, seq) // others may have come into it
	}
	in.domain.version = max(in.domain.version, version)
	in.domain.order.joins(in.part)
	for _, was := range before {
		if s.domains[was] == nil && domains.Shared(was) { // others may not be as far as the change
			s.newDomain(was, seq)
		}
	}
	return in
}

func (s *Sampler) newDomain(name string, seq uint64) *domain {
	d := &domain{name: name, lag: s.lag, traces: make(map[otlpwire.TraceID]*trace)}
	s.domains[name] = d
	s.populate(d, seq)
	return d
}

// populate gives a new domain the sources of its instances that the previous owner knew, or that are known from the
// domains that these were in before.
func (s *Sampler) populate(d *domain, seq uint64) {
	restore := func(all []envelope.Sources) {
		for _, known := range all {
			in := s.instance(known.Instance, seq)
			d.order.joins(in.part)
			d.restore(in, known.Seen)
		}
	}
	restore(s.sources[d.name])
	delete(s.sources, d.name)
	if !domains.Shared(d.name) {
		return
	}
	own := s.membersOf(d.name, seq)
	for _, name := range slices.Sorted(maps.Keys(s.sources)) {
		restore(slices.DeleteFunc(slices.Clone(s.sources[name]), func(known envelope.Sources) bool { return !slices.Contains(own, known.Instance) }))
	}
	for _, name := range own {
		in := s.instances[name]
		if in == nil || in.domain == nil || in.domain == d {
			continue
		}
		seen := map[uint32]int64{}
		for _, c := range in.domain.clocks {
			if c.in == in && !c.gone {
				seen[c.source] = c.told
			}
		}
		d.order.joins(in.part)
		d.restore(in, seen)
	}
}

// membersOf returns the instances that are known, or recorded, and in a shared domain at a sequence of TRACES. They are
// looked up together, for all domains of a version.
func (s *Sampler) membersOf(domain string, seq uint64) []string {
	version := s.version(seq)
	if s.members == nil || s.membersAt != version {
		s.members, s.membersAt = map[string][]string{}, version
		names := map[string]bool{}
		for name := range s.instances {
			names[name] = true
		}
		for _, all := range s.sources {
			for _, known := range all {
				names[known.Instance] = true
			}
		}
		for _, name := range slices.Sorted(maps.Keys(names)) {
			now, _ := s.grouping.Of(name, seq)
			s.members[now] = append(s.members[now], name)
		}
	}
	return s.members[domain]
}

// domain returns the domain that spans of a trace belong to: where the instance was in another one when the trace
// began, that one. It is nil where the trace is decided and nothing else is known of the domain.
func (s *Sampler) domain(h home, id otlpwire.TraceID) (d *domain, name string) {
	for _, was := range h.before {
		d := s.domains[was.name]
		if _, known, when := s.decided.recall(key{was.name, id}); known && when.begun < was.until {
			return d, was.name
		}
		if d != nil && d.traces[id] != nil && d.traces[id].begun < was.until {
			return d, was.name
		}
	}
	return h.domain, h.domain.name
}

// passedBefore reports whether a domain passes over traces that an instance may have spans of from before.
func (s *Sampler) passedBefore(h home) bool {
	return slices.ContainsFunc(h.before, func(was former) bool {
		d := s.domains[was.name]
		return !was.done && d != nil && d.passed
	})
}

// settle notes which domains the instances have left for good.
func (s *Sampler) settle() {
	for _, in := range s.instances {
		for i := range in.before {
			was := &in.before[i]
			if d := s.domains[was.name]; !was.done {
				was.done = d == nil || s.left(d, was.until)
			}
		}
	}
}

// left reports whether nothing of a domain that began before a sequence of TRACES is undecided, or may come.
func (s *Sampler) left(d *domain, until uint64) bool {
	if d.passed || len(d.order.frames)+len(d.queued.debts) > 0 || s.ordered(d) && s.reached(d) < until {
		return false
	}
	for _, t := range d.traces {
		if t.begun < until {
			return false
		}
	}
	return true
}

// forget removes what is known of a domain that has no traces.
func (s *Sampler) forget(d *domain) {
	delete(s.domains, d.name)
	delete(s.rescues, d.name)
	s.largest = nil
	if !domains.Shared(d.name) { // it is one instance
		if in := s.instances[d.name]; in != nil && in.domain == d {
			delete(s.instances, d.name)
		}
		for _, v := range s.versions {
			delete(s.budgets, payer{d.name, d.name, v.Number})
		}
		return
	}
	maps.DeleteFunc(s.instances, func(_ string, in *instance) bool { return in.domain == d })
	maps.DeleteFunc(s.budgets, func(p payer, _ *policy.Budgets) bool { return p.domain == d.name })
}

// names lists the domains in an order that does not depend on the map.
func (s *Sampler) names() []string {
	names := make([]string, 0, len(s.domains))
	for n := range s.domains {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}
