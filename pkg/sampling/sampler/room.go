package sampler

import (
	"cmp"
	"container/heap"
	"maps"
	"slices"
)

// full reports whether there is no room for a new trace of in. Beyond the bound the instance that holds
// most has to wait.
func (s *Sampler) full(in *instance) bool {
	if in.passed || s.held.bytes <= s.maxBytes {
		return in.passed
	}
	if s.largest == nil {
		s.largest = in
		for _, other := range s.instances {
			if other.bytes > s.largest.bytes {
				s.largest = other
			}
		}
	}
	return in.bytes >= s.largest.bytes
}

// pass begins to pass over new traces of in.
func (s *Sampler) pass(in *instance, out *Output) {
	if !s.held.passed {
		s.held.passed, s.held.decided, s.held.oldest = true, true, 0
		for _, one := range s.instances {
			if t := one.oldest(); t != nil && (s.held.decided || t.seq < s.held.oldest) {
				s.held.decided, s.held.oldest = false, t.seq
			}
		}
	}
	in.passed, in.full, in.decided, out.Full = true, in.bytes, false, true
	s.passing = append(s.passing, in)
}

// passOver begins to pass over new traces of in within a frame. Traces that began with the frame's
// arrival are put back, too, because traces are decided in the order of due and ID, and those that are
// passed over must come later than those that are held; but not if the oldest trace is among them,
// because reading begins again only after that is decided. No edge sends that much with one stamp.
func (s *Sampler) passOver(in *instance, c *clock, arrival int64, out *Output) {
	if in.passed {
		return
	}
	s.pass(in, out)
	var young []*trace
	oldest := in.oldest()
	for _, t := range in.traces {
		if t.from[0].clock != c || t.first != arrival-c.skew {
			continue
		}
		if young = append(young, t); t == oldest || t.seq == s.held.oldest {
			return
		}
	}
	for _, t := range young {
		s.release(in, t)
	}
}

// oldest returns the trace that began first; nil if there is none.
func (in *instance) oldest() (oldest *trace) {
	for _, t := range in.traces {
		if oldest == nil || t.seq < oldest.seq {
			oldest = t
		}
	}
	return oldest
}

// release removes a trace that is to be read again: what is owed for it stays owed.
func (s *Sampler) release(in *instance, t *trace) {
	heap.Remove(&t.queue.queue, t.place)
	delete(in.traces, t.id)
	s.letGo(in, t)
	t.place = -1
}

// putBack removes the youngest traces of the instances that hold most, until what is held is within the
// bound: held traces may grow, and many do. Every instance may hold as much as the others, and keeps its
// oldest trace. The current frame is of the instance now, with this arrival.
func (s *Sampler) putBack(now *instance, c *clock, arrival int64, out *Output) {
	level := s.level()
	for _, name := range s.names() {
		in := s.instances[name]
		if in.bytes <= level || len(in.traces) < 2 {
			continue
		}
		switch {
		case in == now:
			s.passOver(in, c, arrival, out)
		case !in.passed:
			s.pass(in, out)
		}
		young := slices.Collect(maps.Values(in.traces))
		slices.SortFunc(young, func(a, b *trace) int {
			return cmp.Or(cmp.Compare(b.seq, a.seq), cmp.Compare(b.due, a.due), slices.Compare(b.id[:], a.id[:]))
		})
		for _, t := range young[:max(len(young)-1, 0)] {
			if in.bytes <= level {
				break
			}
			s.release(in, t)
		}
	}
}

// level is how much each instance may hold so that all together are within the bound.
func (s *Sampler) level() int {
	var all []int
	rest := s.maxBytes - s.held.bytes // other samplers of the same reader may use a part of it
	for _, in := range s.instances {
		all, rest = append(all, in.bytes), rest+in.bytes
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
	for _, in := range s.passing {
		if in.decided && in.bytes <= in.full/2 {
			return true
		}
	}
	return false
}
