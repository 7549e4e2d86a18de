package sampler

import (
	"slices"
	"time"
)

// Mark is what is known to have been added of each partition of TRACES: all its messages that the hub had at Before,
// by the caller's clock, and up to the sequence Routed. Zero stands for nothing.
type Mark struct {
	Before []time.Time
	Routed []uint64
}

// Idle advances the clocks of silent instances, now by the caller's clock. Where what is routed is known, frames of
// instances in several partitions of TRACES are put in order.
func (s *Sampler) Idle(known Mark, now time.Time) (out Output) {
	if slices.ContainsFunc(known.Before, func(at time.Time) bool { return !at.IsZero() }) {
		if s.now = now.UnixNano(); s.start == 0 {
			s.start = s.now
		}
	}
	s.divide(len(known.Before))
	for part, seq := range known.Routed {
		if s.routed == nil {
			s.routed = make([]uint64, len(known.Routed))
		}
		s.routed[part] = max(s.routed[part], seq)
	}
	sweep := s.now-s.swept >= int64(sweepInterval)
	if sweep {
		s.swept = s.now
	}
	if s.waiting > 0 {
		for _, name := range s.names() {
			s.order(s.domains[name], &out)
		}
	}
	if len(s.grouping) > 0 {
		s.settle()
	}
	for _, name := range s.names() {
		d := s.domains[name]
		upto := d.upto(known.Before)
		if upto.IsZero() {
			continue
		}
		if sweep {
			s.overdue(d, upto.UnixNano(), patience, &out)
		}
		active := s.idle(d, upto, now, &out)
		if !active && d.idles() && !slices.ContainsFunc(d.clocks, func(c *clock) bool { return upto.Sub(c.silent) <= time.Hour }) {
			s.forget(d)
		}
	}
	out.Rewind = s.room()
	return out
}

// idles reports whether a domain has nothing, and has had something.
func (d *domain) idles() bool {
	return len(d.traces)+len(d.order.frames)+len(d.queued.debts) == 0 && !d.passed && len(d.clocks) > 0
}

// upto returns the time up to which everything of a domain's instances has been added; zero if that is not known, or
// something waits elsewhere.
func (d *domain) upto(before []time.Time) (upto time.Time) {
	if d.away > 0 {
		return time.Time{}
	}
	for i, part := range d.order.parts {
		if at := before[part]; i == 0 || at.Before(upto) {
			upto = at
		}
	}
	return upto
}

// idle advances the clocks of sources that have been silent; active reports that one was not.
func (s *Sampler) idle(d *domain, upto, now time.Time, out *Output) (active bool) {
	grace := idleGrace
	if d.several() {
		grace = time.Duration(d.lag) // one may be cut off, and have spans of traces of the others
	}
	for _, c := range d.clocks {
		if c.active {
			c.active, c.silent, active = false, now, true // what was added may be as recent as that
			continue
		}
		c.at = max(c.at, c.arrival+int64(upto.Sub(c.silent)-grace))
	}
	s.advance(d, out, d.clocks...)
	for _, c := range d.clocks {
		silence := upto.Sub(c.silent) - grace
		if c.silent.Equal(now) || silence <= s.shortestWait() {
			continue
		}
		for _, t := range c.queue { // none of its own, unless stamps jumped back and forth
			if silence > t.rules.Wait && (len(d.clocks) == 1 || t.of(c)) {
				c.at = max(c.at, t.key+c.skew+1)
			}
		}
	}
	s.advance(d, out, d.clocks...)
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
	s.hurry(&out)
	for _, name := range s.names() {
		s.overdue(s.domains[name], now.UnixNano(), idleGrace, &out)
	}
	out.Rewind = s.room()
	return out
}

// overdue advances the clocks of a domain to the traces that have been held for grace longer than their
// wait, and decides these.
func (s *Sampler) overdue(d *domain, upto int64, grace time.Duration, out *Output) {
	for _, t := range d.traces {
		grace := grace
		if d.passed || s.held.passed && t.turn <= s.held.oldest {
			grace = min(grace, passedPatience) // others wait for room
		}
		if max(t.read, s.start)+int64(t.rules.Wait+grace) > upto {
			continue
		}
		for _, c := range d.clocks { // all that it could wait for
			c.at = max(c.at, t.due+t.shift(c)+c.skew+1)
		}
	}
	s.advance(d, out, d.clocks...)
}
