package sampler

import (
	"bytes"
	"cmp"
	"math"
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/partition"
)

// order puts the frames of a domain into the order in which the hub has stored the messages of TRACES that they come
// from. Instances in different partitions of TRACES are routed independently, and one may be minutes
// ahead of another: to the rules of clocks, the other would look like a source that sends a backlog. A frame waits
// until all messages before it of the domain's instances have come, as far as the routers have got.
//
// Where the instances of a domain are in one partition, or everything is read from TRACES, frames come in order.
type order struct {
	parts  []int   // the partitions of TRACES that the domain's instances are in
	frames []frame // by sequence of TRACES
	bytes  int     // of these
}

// frame is a frame that waits.
type frame struct {
	in   *instance
	home home      // as of its sequence of TRACES
	of   []*domain // that it may have spans of traces of
	seq  uint64
	read int64 // the reader's clock when it was first looked at while it waited
	envelope.Frame
}

// size returns the approximate memory of a frame.
func (f *frame) size() int { return 160 + len(f.Payload) }

// joins notes that an instance of a partition of TRACES is in the domain.
func (o *order) joins(part int) {
	if !slices.Contains(o.parts, part) {
		o.parts = append(o.parts, part)
	}
}

// divide sets the number of partitions of TRACES.
func (s *Sampler) divide(parts int) {
	if parts == s.parts {
		return
	}
	s.parts = parts
	for _, in := range s.instances {
		in.part = partition.OfInstance(in.name, parts)
	}
	for _, d := range s.domains {
		d.order.parts = nil
		for _, c := range d.clocks {
			d.order.joins(c.in.part)
		}
	}
}

// added returns the sequence of SPANS up to which all frames that may have spans of the domain's traces have been
// added, last at most.
func (d *domain) added(last uint64) uint64 {
	if low, ok := d.queued.lowest(); ok {
		return low - 1
	}
	return last
}

// counted returns the sequence of SPANS up to which the spans of a domain's traces count for what is decided now.
func (s *Sampler) counted(d *domain) uint64 {
	if s.routed == nil || len(s.grouping) == 0 {
		return s.last
	}
	return d.added(s.last - 1) // other frames of the last message may have to wait
}

// added returns the sequence up to which the frames of all domains have been added.
func (s *Sampler) added() uint64 {
	low := s.last
	if s.waiting > 0 && s.decided.above != nil {
		for _, d := range s.domains {
			low = min(low, d.added(low))
		}
	}
	return low
}

// ordered reports whether the frames of a domain have to be put in order.
func (s *Sampler) ordered(d *domain) bool { return s.routed != nil && len(d.order.parts) > 1 }

// line returns the domain among whose frames the next one of an instance has to wait; nil if it need not wait. After a
// change of its domain that is the previous one, as long as anything is there, or may come.
func (s *Sampler) line(in *instance) *domain {
	if in.waits > 0 {
		return in.line
	}
	for _, was := range in.before {
		if d := s.domains[was.name]; d != nil && !was.done && s.ordered(d) {
			return d
		}
	}
	if s.ordered(in.domain) {
		return in.domain
	}
	return nil
}

// queue adds a frame to those of a line that wait, and then those that need not wait any more. Where so many wait
// that there is no room, the first ones of the domain that has most do not wait longer.
func (s *Sampler) queue(line *domain, in *instance, seq uint64, f envelope.Frame, out *Output) error {
	if err := s.wire.Groups(f.Payload, func([]byte) int { return -1 }, nil); err != nil {
		return err
	}
	f.Payload = bytes.Clone(f.Payload)
	one := frame{in: in, home: in.home, seq: seq, Frame: f}
	s.each(in.home, func(d *domain) { one.of = append(one.of, d) })
	o := &line.order
	i, _ := slices.BinarySearchFunc(o.frames, f.Seq+1, func(one frame, seq uint64) int { return cmp.Compare(one.Seq, seq) })
	o.frames = slices.Insert(o.frames, i, one)
	o.bytes += one.size()
	s.waiting += one.size()
	in.line, in.waits = line, in.waits+1
	s.held.owed.add(seq)
	for _, d := range one.of {
		if d.queued.add(seq); d != line {
			d.away++
		}
	}
	for _, d := range one.of[1:] {
		if d != line {
			s.flow(d, s.reached(d), out) // what waits there comes before what follows
		}
	}
	s.flow(line, s.reached(line), out)
	for s.waiting > s.maxWaiting {
		most := line
		for _, d := range s.domains {
			if d.order.bytes > most.order.bytes {
				most = d
			}
		}
		s.flow(most, most.order.frames[0].Seq, out)
		out.Unordered++
	}
	return nil
}

// each calls do with the domains of a home.
func (s *Sampler) each(h home, do func(*domain)) {
	do(h.domain)
	for _, was := range h.before {
		if d := s.domains[was.name]; d != nil && !was.done {
			do(d)
		}
	}
}

// reached returns the sequence of TRACES up to which all messages of a domain's instances have come.
func (s *Sampler) reached(d *domain) uint64 {
	low := uint64(math.MaxUint64)
	for _, part := range d.order.parts {
		low = min(low, s.routed[part])
	}
	return low
}

// flow adds the frames of a line up to a sequence of TRACES.
func (s *Sampler) flow(line *domain, upto uint64, out *Output) {
	o := &line.order
	for len(o.frames) > 0 && o.frames[0].Seq <= upto {
		f := o.frames[0]
		o.frames[0] = frame{}
		o.frames = o.frames[1:]
		_ = s.add(f.in, f.home, f.seq, f.Frame, out) // it was checked
		s.held.owed.release(f.seq)
		for _, d := range f.of {
			if d.queued.release(f.seq); d != line {
				d.away--
			}
		}
		f.in.waits--
		o.bytes -= f.size()
		s.waiting -= f.size()
	}
}

// orderPatience is for how long a frame waits at most, by the reader's clock: nothing that happens to routers takes as long.
const orderPatience = int64(2 * time.Minute)

// order adds the frames of a line that need not wait any more.
func (s *Sampler) order(line *domain, out *Output) {
	s.flow(line, s.reached(line), out)
	overdue := uint64(0)
	for i := range line.order.frames {
		f := &line.order.frames[i]
		if f.read == 0 {
			f.read = s.now
		}
		if s.now-f.read > orderPatience {
			overdue = f.Seq
			out.Unordered++
		}
	}
	s.flow(line, overdue, out)
}

// hurry adds all frames that wait.
func (s *Sampler) hurry(out *Output) {
	if s.waiting == 0 {
		return
	}
	for _, name := range s.names() {
		s.flow(s.domains[name], math.MaxUint64, out)
	}
}
