package sampler

import (
	"cmp"
	"slices"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// trace is an undecided trace.
type trace struct {
	id     otlpwire.TraceID
	rules  *policy.Version
	from   []part  // the sources that it has spans of; its times are those of the first one
	shares []share // by instance, in the order in which they came
	one    [1]share
	first  int64  // time of its first span
	root   int64  // time of its root span
	rooted bool   // it has a root span
	final  bool   // late spans do not bring it back
	due    int64  // when its window closes
	read   int64  // when it was first seen, by the reader's clock
	seq    uint64 // of the message of its first span, and turn of its frame
	turn   uint64
	begun  uint64 // the sequence of TRACES of that
	owed   uint64 // the lowest sequence of its spans
	queue  *clock // in whose queue it waits
	key    int64  // until when, in the time of that clock
	place  int    // in the queue
	size   int    // as a payload
	held   int    // its memory
	ids    spanSet
}

// share is what a trace has of one instance.
type share struct {
	in     *instance
	first  int64 // time of its first span
	root   int64 // and of its root span
	rooted bool  // there is one
	spans  int
	pieces []otlpwire.Fragment
	stamps []stamp // of the pieces
	parts  []Part
	load   envelope.Load // the highest of its frames
	silent bool          // one of them has no load
}

// share returns what a trace has of an instance.
func (t *trace) share(in *instance, at int64) *share {
	for i := range t.shares {
		if t.shares[i].in == in {
			return &t.shares[i]
		}
	}
	if t.shares == nil {
		t.shares = t.one[:0]
	}
	t.shares = append(t.shares, share{in: in, first: at})
	return &t.shares[len(t.shares)-1]
}

// payer returns the share whose instance's budgets the trace takes from: that of its root span, else of its first
// span. Spans that came after the end do not count.
func (t *trace) payer() *share {
	best := &t.shares[0]
	for i := range t.shares[1:] {
		if other := &t.shares[i+1]; other.before(best, t.due) {
			best = other
		}
	}
	return best
}

func (s *share) before(other *share, due int64) bool {
	mine, its := s.rooted && s.root <= due, other.rooted && other.root <= due
	switch {
	case mine != its:
		return mine
	case mine:
		return cmp.Or(cmp.Compare(s.root, other.root), cmp.Compare(s.in.name, other.in.name)) < 0
	}
	return cmp.Or(cmp.Compare(s.first, other.first), cmp.Compare(s.in.name, other.in.name)) < 0
}

// setDue sets when the window of t closes.
func (t *trace) setDue() {
	t.due = t.first + int64(t.rules.Wait)
	if after := t.rules.WaitAfterRoot; after > 0 && t.rooted {
		t.due = min(t.due, t.root+int64(after))
	}
	t.key = t.due + t.shift(t.queue)
}

// add notes spans of a message.
func (s *share) add(seq uint64, spans int) {
	s.spans += spans
	if n := len(s.parts); n > 0 && s.parts[n-1].Seq == seq {
		s.parts[n-1].Spans += spans
		return
	}
	s.parts = append(s.parts, Part{seq, spans})
}

// spans returns how many spans a trace has.
func (t *trace) spans() (n int) {
	for i := range t.shares {
		n += t.shares[i].spans
	}
	return n
}

// about is the message with the lowest sequence of its spans, of the instance that sent them.
func (t *trace) about() About {
	for i := range t.shares {
		if s := &t.shares[i]; slices.ContainsFunc(s.parts, func(p Part) bool { return p.Seq == t.owed }) {
			return About{t.owed, s.in.name}
		}
	}
	return About{t.owed, t.shares[0].in.name}
}

// payer is whose budgets a trace takes from: an instance's, by the version of the policies. It has others in each of
// its domains, which decide in an order of their own.
type payer struct {
	domain, instance string
	version          uint64
}

func (s *Sampler) budgetsOf(p payer) *policy.Budgets {
	if s.budgets[p] == nil {
		s.budgets[p] = new(policy.Budgets)
	}
	return s.budgets[p]
}

// queue is a heap of traces, the one that is due first on top.
type queue []*trace

func (q queue) Len() int { return len(q) }
func (q queue) Less(i, j int) bool {
	return cmp.Or(cmp.Compare(q[i].key, q[j].key), slices.Compare(q[i].id[:], q[j].id[:])) < 0
}
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].place, q[j].place = i, j
}
func (q *queue) Push(x any) {
	t := x.(*trace)
	t.place = len(*q)
	*q = append(*q, t)
}
func (q *queue) Pop() any {
	old := *q
	t := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	return t
}
