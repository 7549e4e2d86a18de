package sampler

import (
	"bytes"
	"cmp"
	"math"
	"slices"

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
	queued pending // their sequences of SPANS
}

// frame is a frame that waits.
type frame struct {
	in  *instance
	seq uint64 // of SPANS
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
	for _, d := range s.domains {
		d.order.parts = nil
	}
	for _, in := range s.instances {
		in.part = partition.OfInstance(in.name, parts)
		in.domain.order.joins(in.part)
	}
}

// added returns the sequence of SPANS up to which all frames have been added, last at most.
func (o *order) added(last uint64) uint64 {
	if low, ok := o.queued.lowest(); ok {
		return low - 1
	}
	return last
}

// added returns the sequence up to which the frames of all domains have been added.
func (s *Sampler) added() uint64 {
	low := s.last
	if s.waiting > 0 && s.decided.above != nil {
		for _, d := range s.domains {
			low = min(low, d.order.added(low))
		}
	}
	return low
}

// ordered reports whether the frames of a domain have to be put in order.
func (s *Sampler) ordered(d *domain) bool { return s.routed != nil && len(d.order.parts) > 1 }

// queue adds a frame to those of its domain that wait, and then those that need not wait any more. Where so many wait
// that there is no room, the first ones of the domain that has most do not wait longer.
func (s *Sampler) queue(in *instance, seq uint64, f envelope.Frame, out *Output) error {
	if err := s.wire.Groups(f.Payload, func([]byte) int { return -1 }, nil); err != nil {
		return err
	}
	s.held.owed.add(seq)
	f.Payload = bytes.Clone(f.Payload)
	o, one := &in.domain.order, frame{in, seq, f}
	i, _ := slices.BinarySearchFunc(o.frames, f.Seq+1, func(one frame, seq uint64) int { return cmp.Compare(one.Seq, seq) })
	o.frames = slices.Insert(o.frames, i, one)
	o.queued.add(seq)
	o.bytes += one.size()
	s.waiting += one.size()
	s.flow(in.domain, s.reached(in.domain), out)
	for s.waiting > s.maxWaiting {
		most := in.domain
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

// reached returns the sequence of TRACES up to which all messages of a domain's instances have come.
func (s *Sampler) reached(d *domain) uint64 {
	low := uint64(math.MaxUint64)
	for _, part := range d.order.parts {
		low = min(low, s.routed[part])
	}
	return low
}

// flow adds the frames of a domain up to a sequence of TRACES.
func (s *Sampler) flow(d *domain, upto uint64, out *Output) {
	o := &d.order
	for len(o.frames) > 0 && o.frames[0].Seq <= upto {
		f := o.frames[0]
		o.frames[0] = frame{}
		o.frames = o.frames[1:]
		_ = s.add(f.in, f.seq, f.Frame, out) // it was checked
		o.queued.release(f.seq)
		s.held.owed.release(f.seq)
		o.bytes -= f.size()
		s.waiting -= f.size()
	}
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
