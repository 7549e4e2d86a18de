package sampler

import (
	"cmp"
	"container/heap"
	"maps"
	"math"
	"slices"

	"github.com/penstock/penstock/pkg/sampling/policy"
)

// full reports whether there is no room for a new trace of d. Beyond the bound the domain that holds
// most has to wait.
func (s *Sampler) full(d *domain) bool {
	if d.passed || s.held.bytes <= s.maxBytes {
		return d.passed
	}
	if s.largest == nil {
		s.largest = d
		for _, other := range s.domains {
			if other.bytes > s.largest.bytes {
				s.largest = other
			}
		}
	}
	return d.bytes >= s.largest.bytes
}

// pass begins to pass over new traces of d.
func (s *Sampler) pass(d *domain, out *Output) {
	if !s.held.passed {
		s.held.passed, s.held.decided, s.held.oldest = true, true, 0
		for _, one := range s.domains {
			if t := one.oldest(); t != nil && (s.held.decided || t.turn < s.held.oldest) {
				s.held.decided, s.held.oldest = false, t.turn
			}
		}
	}
	d.passed, d.first, d.full, d.decided, out.Full = true, math.MaxUint64, d.bytes, false, true
	s.passing = append(s.passing, d)
}

// passOver begins to pass over new traces of d within a frame. Traces that began with the frame's
// arrival are put back, too, because traces are decided in the order of due and ID, and those that are
// passed over must come later than those that are held; but not if the oldest trace is among them,
// because reading begins again only after that is decided. No edge sends that much with one stamp.
func (s *Sampler) passOver(d *domain, c *clock, arrival int64, out *Output) {
	if d.passed {
		return
	}
	s.pass(d, out)
	var young []*trace
	oldest := d.oldest()
	for _, t := range d.traces {
		if t.from[0].clock != c || t.first != arrival-c.skew {
			continue
		}
		if young = append(young, t); t == oldest || t.turn == s.held.oldest {
			return
		}
	}
	for _, t := range young {
		s.release(d, t)
	}
}

// oldest returns the trace that began first; nil if there is none.
func (d *domain) oldest() (oldest *trace) {
	for _, t := range d.traces {
		if oldest == nil || t.turn < oldest.turn {
			oldest = t
		}
	}
	return oldest
}

// release removes a trace that is to be read again: what is owed for it stays owed.
func (s *Sampler) release(d *domain, t *trace) {
	heap.Remove(&t.queue.queue, t.place)
	delete(d.traces, t.id)
	s.letGo(d, t)
	t.place = -1
}

// putBack removes the youngest traces of the domains that hold most, until what is held is within the
// bound: held traces may grow, and many do. Every domain may hold as much as the others, and keeps its
// oldest trace. The current frame is of the domain now, with this arrival.
func (s *Sampler) putBack(now *domain, c *clock, arrival int64, out *Output) {
	level := s.level()
	for _, name := range s.names() {
		d := s.domains[name]
		if d.bytes <= level || len(d.traces) < 2 {
			continue
		}
		switch {
		case d == now:
			s.passOver(d, c, arrival, out)
		case !d.passed:
			s.pass(d, out)
		}
		young := slices.Collect(maps.Values(d.traces))
		slices.SortFunc(young, func(a, b *trace) int {
			return cmp.Or(cmp.Compare(b.turn, a.turn), cmp.Compare(b.due, a.due), slices.Compare(b.id[:], a.id[:]))
		})
		for _, t := range young[:max(len(young)-1, 0)] {
			if d.bytes <= level {
				break
			}
			s.release(d, t)
		}
	}
}

// level is how much each domain may hold so that all together are within the bound.
func (s *Sampler) level() int {
	var all []int
	rest := s.maxBytes - s.held.bytes // other samplers of the same reader may use a part of it
	for _, d := range s.domains {
		all, rest = append(all, d.bytes), rest+d.bytes
	}
	slices.Sort(all)
	for i, n := range all {
		share := rest / (len(all) - i)
		if n > share {
			return max(share, 0)
		}
		rest -= n
	}
	return s.maxBytes
}

// room reports whether there is room now for traces that were passed over, and whether the oldest trace,
// which kept the floor where it is, has been decided since: otherwise the same traces could be read and
// passed over for ever.
func (s *Sampler) room() bool {
	if !s.held.passed || !s.held.decided || s.held.bytes > s.maxBytes {
		return false
	}
	for _, d := range s.passing {
		if d.decided && d.bytes <= d.full/2 {
			return true
		}
	}
	return false
}

// bound sees to it that what is held is within its bounds, after spans of a trace have been added.
func (s *Sampler) bound(d *domain, t *trace, c *clock, arrival int64, out *Output) {
	if s.held.bytes > s.maxBytes+s.maxBytes/2 {
		s.putBack(d, c, arrival, out)
	}
	if t.place >= 0 && s.tooLarge(t) {
		out.TooLarge++
		heap.Remove(&t.queue.queue, t.place)
		t.final = true
		s.conclude(d, t, policy.Verdict{}, NotKept, out)
	}
}
