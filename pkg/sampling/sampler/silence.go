package sampler

import (
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/partition"
)

// Idle advances the clocks of silent instances. before has, for each partition of TRACES, a time up to
// which the caller knows that all its messages have been added; a zero time advances nothing. now is the
// present. All are times of the caller's clock.
func (s *Sampler) Idle(before []time.Time, now time.Time) (out Output) {
	if s.now = now.UnixNano(); s.start == 0 {
		s.start = s.now
	}
	sweep := s.now-s.swept >= int64(sweepInterval)
	if sweep {
		s.swept = s.now
	}
	for _, name := range s.names() {
		in, upto := s.instances[name], before[partition.OfInstance(name, len(before))]
		if upto.IsZero() {
			continue
		}
		if sweep {
			s.overdue(in, upto.UnixNano(), patience, &out)
		}
		active := s.idle(in, upto, now, &out)
		if !active && len(in.traces) == 0 && !in.passed && !slices.ContainsFunc(in.clocks, func(c *clock) bool { return upto.Sub(c.silent) <= time.Hour }) {
			delete(s.instances, name)
			s.largest = nil
		}
	}
	out.Rewind = s.room()
	return out
}

// idle advances the clocks of sources that have been silent; active reports that one was not.
func (s *Sampler) idle(in *instance, upto, now time.Time, out *Output) (active bool) {
	grace := idleGrace
	if in.several() {
		grace = time.Duration(sourceLag) // one may be cut off, and have spans of traces of the others
	}
	for _, c := range in.clocks {
		if c.active {
			c.active, c.silent, active = false, now, true // what was added may be as recent as that
			continue
		}
		c.at = max(c.at, c.arrival+int64(upto.Sub(c.silent)-grace))
	}
	s.advance(in, out, in.clocks...)
	for _, c := range in.clocks {
		silence := upto.Sub(c.silent) - grace
		if c.silent.Equal(now) || silence <= s.shortestWait() {
			continue
		}
		for _, t := range c.queue { // none of its own, unless stamps jumped back and forth
			if silence > t.rules.Wait && (len(in.clocks) == 1 || t.of(c)) {
				c.at = max(c.at, t.key+c.skew+1)
			}
		}
	}
	s.advance(in, out, in.clocks...)
	return active
}

func (s *Sampler) shortestWait() time.Duration {
	shortest := s.versions[0].Wait
	for _, v := range s.versions {
		shortest = min(shortest, v.Wait)
	}
	return shortest
}

// Unblock decides traces that have been held for their wait by the reader's clock. It is for a caller that
// has added everything and knows that nothing more can arrive before something is decided, because SPANS
// is full. Later spans follow the decision.
func (s *Sampler) Unblock(now time.Time) (out Output) {
	for _, name := range s.names() {
		in := s.instances[name]
		s.overdue(in, now.UnixNano(), idleGrace, &out)
	}
	out.Rewind = s.room()
	return out
}

// overdue advances the clocks of an instance to the traces that have been held for grace longer than their
// wait, and decides these.
func (s *Sampler) overdue(in *instance, upto int64, grace time.Duration, out *Output) {
	for _, t := range in.traces {
		grace := grace
		if in.passed || s.held.passed && t.seq <= s.held.oldest {
			grace = min(grace, passedPatience) // others wait for room
		}
		if max(t.read, s.start)+int64(t.rules.Wait+grace) > upto {
			continue
		}
		for _, c := range in.clocks { // all that it could wait for
			c.at = max(c.at, t.due+t.shift(c)+c.skew+1)
		}
	}
	s.advance(in, out, in.clocks...)
}
