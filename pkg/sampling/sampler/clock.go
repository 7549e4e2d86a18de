package sampler

import (
	"cmp"
	"container/heap"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
)

// clock is the stream time of one source of an instance: an edge's spool, or a gateway. Sources of an
// instance may be apart, because a machine's clock is wrong or one of them sends what it has kept.
type clock struct {
	in      *instance
	source  uint32
	known   bool      // it has a time
	at      int64     // in Unix nanoseconds of the source
	arrival int64     // the highest arrival seen since the source's clock was set back
	skew    int64     // how far the open windows have been moved with the clock
	back    int64     // by how much the clock was last set back
	active  bool      // since the last Idle
	silent  time.Time // the reader's clock when it was last known that nothing more had been added
	queue   queue     // traces that wait for it, by the time until which they do, then ID
	swept   int64     // its time at the last sweep
	free    int64     // see free, at the last sweep
	place   int       // among the clocks of its domain
	heard   bool      // something has come of it
	born    int64     // its time when something first came of it
	told    int64     // its time when something last came of it
	gone    bool      // the others have advanced by sourceGone since
	others  []int64   // the times of the domain's clocks at that moment; those that come later are not there
	own     [1]part   // of a trace that has spans of this source only
}

// part is a source of a trace. Its time less shift is that of the trace's first source.
type part struct {
	clock *clock
	shift int64
}

// stamp is the time of spans.
type stamp struct {
	at    int64
	spans int
}

const (
	// defaultLag is for how much of the most advanced source's time a trace waits, after the end of its window, for
	// sources that have not passed it: they may have spans of the trace. It does not wait for a source that was
	// so far behind when something last came of it: that sends what it has kept, or its clock is wrong.
	defaultLag = 10 * time.Second

	// sourceGone is after how much of the others' time a source is taken to be gone: an edge that has begun a
	// new spool, or a gateway that was restarted, is another source.
	sourceGone = int64(5 * time.Minute)

	// sweepStep is how far the time of a source advances between two checks for traces that wait for a source
	// that has fallen behind.
	sweepStep = int64(time.Second)

	// maxClocks bounds the sources of an instance that have a clock of their own, and maxDomainClocks those of a
	// domain. The others share one.
	maxClocks       = 32
	maxDomainClocks = 256

	// unknown is the time of a source of which nothing has come yet.
	unknown = -maxSkew

	// maxBack is how far the arrival stamps of a source may go back without a step of its clock, because
	// requests are published concurrently.
	maxBack = int64(time.Second)
)

// clock returns the clock of a source of an instance.
func (d *domain) clock(in *instance, source uint32) *clock {
	var own int
	var last *clock // of the instance
	for _, c := range d.clocks {
		if c.in != in {
			continue
		}
		if c.source == source {
			return c
		}
		own, last = own+1, c
	}
	c := &clock{in: in, source: source, place: len(d.clocks)}
	c.own[0].clock = c
	if own < maxClocks && len(d.clocks) < maxDomainClocks {
		d.clocks = append(d.clocks, c)
		return c
	}
	c.place = slices.IndexFunc(d.clocks, func(c *clock) bool {
		return len(c.queue) == 0 && c.gone && (own < maxClocks || c.in == in)
	})
	if c.place < 0 {
		return cmp.Or(last, d.clocks[len(d.clocks)-1])
	}
	for _, other := range d.clocks {
		if c.place < len(other.others) {
			other.others[c.place] = unknown
		}
	}
	d.clocks[c.place] = c
	return c
}

// several reports whether a domain has several sources that are not gone.
func (d *domain) several() bool {
	n := 0
	for _, c := range d.clocks {
		if !c.gone {
			n++
		}
	}
	return n > 1
}

// newestOf returns the highest arrival of a source of an instance, or, while nothing has come of it, of all of its
// sources, in all domains that it is in, or was.
func (s *Sampler) newestOf(in *instance, h home, source uint32) (arrival int64) {
	arrival = h.domain.newest(in, source)
	if len(s.grouping) == 0 {
		return arrival
	}
	now, before := s.grouping.Of(in.name, math.MaxUint64)
	for _, name := range append(before, now) {
		if d := s.domains[name]; d != nil {
			arrival = max(arrival, d.newest(in, source))
		}
	}
	return arrival
}

func (d *domain) newest(in *instance, source uint32) (arrival int64) {
	for _, c := range d.clocks {
		switch {
		case c.in != in || !c.known:
		case c.source == source:
			return c.arrival
		default:
			arrival = max(arrival, c.arrival)
		}
	}
	return arrival
}

// restore creates the clocks of sources of an instance that the previous owner knew. Until something comes of them
// they are waited for.
func (d *domain) restore(in *instance, seen map[uint32]int64) {
	for _, source := range slices.Sorted(maps.Keys(seen)) {
		if slices.ContainsFunc(d.clocks, func(c *clock) bool { return c.in == in && c.source == source }) {
			continue
		}
		c := d.clock(in, source)
		c.at, c.told, c.arrival, c.active = unknown, seen[source], seen[source], true
	}
}

// recordSources reports whether the sources of a domain are to be recorded with a decision of that time: if there
// are several, or also one.
func (d *domain) recordSources(due int64, also bool) bool {
	if len(d.clocks) == 1 && !also || d.recorded.clocks == len(d.clocks) && due-d.recorded.due < sourceGone && d.recorded.due-due < sourceGone {
		return false
	}
	d.recorded.clocks, d.recorded.due = len(d.clocks), due
	return true
}

// seen returns the sources of a domain, by instance.
func (d *domain) seen() (all []envelope.Sources) {
	of := map[*instance]map[uint32]int64{}
	for _, c := range d.clocks {
		if c.gone {
			continue
		}
		if of[c.in] == nil {
			of[c.in] = map[uint32]int64{}
			all = append(all, envelope.Sources{Domain: d.name, Instance: c.in.name, Seen: of[c.in]})
		}
		of[c.in][c.source] = c.told
	}
	return all
}

// alone returns the sources of a trace that has spans of this one only.
func (c *clock) alone() []part { return c.own[:] }

// time is the source's time, in which windows stay where they are when its clock is set.
func (c *clock) time() int64 { return c.at - c.skew }

// tell sets the clock by an arrival stamp. Stamps from two clocks in turn, such as those of
// two gateways behind one id, move the clock back and forward by the same amount, and the windows with it.
func (c *clock) tell(arrival int64) {
	step := arrival - c.arrival
	switch {
	case !c.known:
		c.known, c.arrival = true, arrival
	case step < -maxBack:
		c.back = -step
		c.move(step)
		c.arrival = arrival
	case c.back > 0 && step > maxBack && max(step-c.back, c.back-step) <= maxBack:
		c.move(c.back)
		c.back = 0
	}
	c.arrival = max(c.arrival, arrival)
	c.at = c.arrival // also if silence had moved it on
}

// heard notes the times of all clocks when something has come of this one.
func (d *domain) heard(c *clock) {
	if !c.heard {
		c.heard, c.born = true, c.time()
	}
	c.told, c.others, c.gone = c.time(), c.others[:0], false
	if len(d.clocks) == 1 {
		return
	}
	for _, other := range d.clocks {
		since := c.born
		if other.knew(c) {
			since = max(since, other.others[c.place])
		}
		other.gone = other.gone || other != c && c.told-since >= sourceGone
		at := other.time()
		if !other.known { // restored: in step then, unless reading has begun long before that
			if at = min(other.told, c.told); other.told-c.told >= d.lag {
				at = unknown
			}
		}
		c.others = append(c.others, at)
	}
}

// knew reports whether something had come of another source before it last did of this one: otherwise it is not
// known how far they are from each other.
func (c *clock) knew(other *clock) bool {
	return other.place < len(c.others) && c.others[other.place] > unknown
}

// behind returns how far the source was behind another one when something last came of it, at least.
func (c *clock) behind(other *clock) int64 {
	if !c.knew(other) {
		return 0
	}
	return c.others[other.place] - c.told
}

// move moves all open windows.
func (c *clock) move(by int64) { c.skew = min(max(c.skew+by, -maxSkew), maxSkew) }

// shift returns how far a source's time is from that of the trace's first source; 0 for one that the trace
// has no spans of: only sources that are in step with the others are waited for.
func (t *trace) shift(c *clock) int64 {
	for _, p := range t.from {
		if p.clock == c {
			return p.shift
		}
	}
	return 0
}

// of reports whether a trace has spans of a source.
func (t *trace) of(c *clock) bool {
	return slices.ContainsFunc(t.from, func(p part) bool { return p.clock == c })
}

// lead returns the most advanced source of a trace, and its time.
func (t *trace) lead() (first part, at int64) {
	first = t.from[0]
	at = first.clock.time()
	for _, p := range t.from[1:] {
		if one := p.clock.time() - p.shift; one > at {
			first, at = p, one
		}
	}
	return first, at
}

// join returns the time of spans of a source that have arrived then. The sources of a trace have the same
// time, unless one is further away than lag: then it has, with its first span, the time of the most
// advanced source.
func (t *trace) join(c *clock, arrival, lag int64) int64 {
	at := arrival - c.skew
	for _, p := range t.from {
		if p.clock == c {
			return at - p.shift
		}
	}
	lead, now := t.lead()
	p := part{clock: c}
	switch ahead := lead.clock.behind(c) + lead.shift; {
	case at-now <= -lag:
		p.shift = at - now
	case ahead >= lag:
		p.shift = ahead
	}
	p.shift = min(max(p.shift, -maxSkew), maxSkew)
	t.from = append(t.from[:len(t.from):len(t.from)], p)
	return at - p.shift
}

// wait puts a trace into the queue of a source.
func (t *trace) wait(c *clock) {
	t.queue, t.key = c, t.due+t.shift(c)
	heap.Push(&c.queue, t)
}

// blocks returns a source that may have spans of a trace before the end of its window; nil if there is none,
// or if the trace has waited for long enough.
func (d *domain) blocks(t *trace) *clock {
	if len(d.clocks) == 1 {
		return nil
	}
	if lead, now := t.lead(); d.now(lead, now) > t.due+d.lag {
		return nil
	}
	return d.owes(t)
}

// now is the time of the most advanced source that was in step with lead when something last came of lead.
func (d *domain) now(lead part, now int64) int64 {
	if lead.clock.gone {
		return maxStamp // its traces wait for nobody
	}
	for _, c := range d.clocks {
		if c != lead.clock && lead.clock.knew(c) && lead.clock.behind(c)+lead.shift < d.lag {
			now = max(now, c.time())
		}
	}
	return now
}

// owes is blocks, however long the trace has waited.
func (d *domain) owes(t *trace) *clock {
	lead, _ := t.lead()
	for _, c := range d.clocks {
		if shift := t.shift(c); c.time()-shift <= t.due && d.owed(c, shift, lead) {
			return c
		}
	}
	return nil
}

// owed reports whether a source may have spans that the others have had: it is neither behind nor gone.
func (d *domain) owed(c *clock, shift int64, lead part) bool {
	return c.behind(lead.clock)-lead.shift+shift < d.lag && !c.gone
}

// sweep adds to the ready traces those that wait for a source which has fallen behind meanwhile: from time to
// time, and before a trace is decided that does not wait for such a source any more.
func (s *Sampler) sweep(d *domain) {
	if !slices.ContainsFunc(d.clocks, func(c *clock) bool { return c.time()-c.swept >= sweepStep }) && !slices.ContainsFunc(s.ready, func(t *trace) bool { return d.owes(t) != nil }) {
		return
	}
	for _, c := range d.clocks {
		c.swept = c.time()
		c.free = d.free(c)
	}
	n := len(s.ready)
	for _, c := range d.clocks {
		for _, t := range c.queue {
			if d.ready(t) {
				s.ready = append(s.ready, t)
			}
		}
	}
	for _, t := range s.ready[n:] {
		heap.Remove(&t.queue.queue, t.place)
	}
}

// ready reports whether a trace need not wait any more. It is called for all traces of a domain, most of
// which have sources that are in step: for these it does not look at all sources.
func (d *domain) ready(t *trace) bool {
	lead, now := t.lead()
	if !slices.ContainsFunc(t.from, func(p part) bool { return p.shift != 0 }) {
		return t.due < lead.clock.free
	}
	return d.now(lead, now) > t.due && d.blocks(t) == nil
}

// free returns before which time traces need not wait any more of which a source is the most advanced, if all of
// their sources are in step.
func (d *domain) free(c *clock) int64 {
	own := c.alone()[0]
	now := d.now(own, c.time())
	blocked := now
	for _, other := range d.clocks {
		if d.owed(other, 0, own) {
			blocked = min(blocked, other.time())
		}
	}
	return max(blocked, now-d.lag)
}

// Sources is what a sampler knows of its sources, and what waits for them.
type Sources struct {
	Known   int    // that are not gone
	Waiting int    // traces whose window has ended, and that wait for a source that is behind
	For     string // the instance of the source that most of them wait for
}

// Sources returns that. It looks at all traces of domains with several sources.
func (s *Sampler) Sources() (all Sources) {
	most := 0
	for _, name := range s.names() {
		for _, c := range s.domains[name].clocks {
			if c.gone {
				continue
			}
			all.Known++
			n := 0
			for _, t := range c.queue {
				if _, at := t.lead(); at > t.due {
					n++
				}
			}
			if all.Waiting += n; n > most {
				most, all.For = n, c.in.name
			}
		}
	}
	return all
}

// byDue is the order in which traces are decided.
func byDue(a, b *trace) int {
	return cmp.Or(cmp.Compare(a.due, b.due), slices.Compare(a.id[:], b.id[:]))
}
