package sample

import (
	"cmp"
	"slices"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// key names a trace: two instances may use the same trace ID.
type key struct {
	instance string
	id       otlpwire.TraceID
}

// spanKey tells spans of a trace apart. The kind is a part of it: the two ends
// of a call may share an ID (Zipkin), and Tempo keeps both.
type spanKey struct {
	id   otlpwire.SpanID
	kind int32
}

// spanSet is a set of spans: a list while it is short, which most traces are.
type spanSet struct {
	list []spanKey
	set  map[spanKey]struct{}
}

const shortList = 32

// add reports whether the span is new.
func (s *spanSet) add(sp *otlpwire.Span) bool {
	k := spanKey{sp.SpanID, sp.Kind}
	if s.set != nil {
		if _, held := s.set[k]; held {
			return false
		}
		s.set[k] = struct{}{}
		return true
	}
	if slices.Contains(s.list, k) {
		return false
	}
	if s.list = append(s.list, k); len(s.list) > shortList {
		s.set = make(map[spanKey]struct{}, 2*len(s.list))
		for _, k := range s.list {
			s.set[k] = struct{}{}
		}
		s.list = nil
	}
	return true
}

// ledger counts debts by sequence and knows the lowest. Sequences are added in
// rising order, as messages come.
type ledger struct {
	debts []debt
}

type debt struct {
	seq uint64
	n   int
}

func (l *ledger) add(seq uint64) {
	if n := len(l.debts); n > 0 && l.debts[n-1].seq == seq {
		l.debts[n-1].n++
		return
	}
	l.debts = append(l.debts, debt{seq, 1})
}

func (l *ledger) release(seq uint64) {
	i, ok := slices.BinarySearchFunc(l.debts, seq, func(d debt, seq uint64) int { return cmp.Compare(d.seq, seq) })
	if !ok {
		return
	}
	l.debts[i].n--
	n := 0
	for n < len(l.debts) && l.debts[n].n == 0 {
		n++
	}
	if n > 0 {
		l.debts = append(l.debts[:0], l.debts[n:]...)
	}
}

func (l *ledger) lowest() (uint64, bool) {
	if len(l.debts) == 0 {
		return 0, false
	}
	return l.debts[0].seq, true
}

// memory remembers decisions, a bounded number of each kind: when the younger
// half is full the older half is forgotten.
type memory struct {
	kept, dropped generations
}

// defaultMemory is how many decisions of a kind are remembered; 40 bytes each
// and the name of the instance.
const defaultMemory = 100_000

func newMemory(kept, dropped int) memory {
	return memory{newGenerations(cmp.Or(kept, defaultMemory)), newGenerations(cmp.Or(dropped, defaultMemory))}
}

func (m *memory) remember(k key, kept bool) {
	if kept {
		m.kept.add(k)
	} else {
		m.dropped.add(k)
	}
}

func (m *memory) recall(k key) (kept, known bool) {
	if m.kept.has(k) {
		return true, true
	}
	return false, m.dropped.has(k)
}

type generations struct {
	half       int
	young, old map[key]struct{}
}

func newGenerations(size int) generations {
	return generations{half: max(size/2, 1), young: make(map[key]struct{})}
}

func (g *generations) add(k key) {
	if len(g.young) >= g.half {
		g.young, g.old = make(map[key]struct{}), g.young
	}
	g.young[k] = struct{}{}
}

func (g *generations) has(k key) bool {
	if _, ok := g.young[k]; ok {
		return true
	}
	_, ok := g.old[k]
	return ok
}
