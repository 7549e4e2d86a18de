package sampler

import (
	"cmp"
	"hash/maphash"
	"slices"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
)

// key identifies a trace: two domains may use the same trace ID.
type key struct {
	domain string
	id     otlpwire.TraceID
}

// spanSet is a set of spans, by a hash of all their bytes, with resource and scope: spans that
// differ in anything a backend sees are different, even with the same ID (contrib's eBPF
// instrumentation sends such spans, #2592; the two ends of a call share one in Zipkin). It is a
// list while it is short, as it is for most traces.
type spanSet struct {
	list []uint64
	set  map[uint64]struct{}
}

const shortList = 32

// add reports whether the span is new.
func (s *spanSet) add(k uint64) bool {
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
		s.set = make(map[uint64]struct{}, 2*len(s.list))
		for _, k := range s.list {
			s.set[k] = struct{}{}
		}
		s.list = nil
	}
	return true
}

// pending counts what is owed by sequence and knows the lowest one. Sequences are usually added in rising order,
// the order of messages.
type pending struct {
	debts []debt
}

type debt struct {
	seq uint64
	n   int
}

func (l *pending) add(seq uint64) {
	n := len(l.debts)
	if n == 0 || l.debts[n-1].seq < seq {
		l.debts = append(l.debts, debt{seq, 1})
		return
	}
	i := n - 1
	if l.debts[i].seq != seq {
		var there bool
		if i, there = l.find(seq); !there {
			l.debts = slices.Insert(l.debts, i, debt{seq: seq})
		}
	}
	l.debts[i].n++
}

func (l *pending) find(seq uint64) (int, bool) {
	return slices.BinarySearchFunc(l.debts, seq, func(d debt, seq uint64) int { return cmp.Compare(d.seq, seq) })
}

func (l *pending) release(seq uint64) {
	i, ok := l.find(seq)
	if !ok {
		return
	}
	l.debts[i].n--
	n := 0
	for n < len(l.debts) && l.debts[n].n == 0 {
		n++
	}
	l.debts = l.debts[n:] // append moves the rest from time to time
}

func (l *pending) lowest() (uint64, bool) {
	if len(l.debts) == 0 {
		return 0, false
	}
	return l.debts[0].seq, true
}

// memory remembers decisions, a bounded number of each kind. For kept traces it is exact; for the others
// it remembers 64 bits, and mistakes a trace for one of n dropped ones with a probability of n in 2^64.
type memory struct {
	kept    shelves[otlpwire.TraceID, *keptTrace]
	dropped shelves[uint64, droppedTrace]
	seed    maphash.Seed

	// Decisions of the previous sampler about traces with spans above the floor: these are read again, and
	// the decisions are forgotten only when the reader has passed all of them.
	floor uint64
	above map[key]aboveFloor
	end   uint64 // the highest upto in above
}

type aboveFloor struct {
	kept *keptTrace // nil: dropped
	droppedTrace
}

// droppedTrace is what is remembered of a trace that is not kept.
type droppedTrace struct {
	upto  uint64 // the sequence up to which the spans counted; only for traces of a previous sampler
	begun uint64 // the sequence of TRACES of its first span
	from  uint64 // the lowest sequence of its spans; 0: late spans do not bring it back
	at    int64  // when it was decided, by the domain's present
	// unasked: it was not asked for.
	unasked bool
}

// keptTrace is what is remembered of a kept trace.
type keptTrace struct {
	policy    string
	threshold uint64
	begun     uint64 // the sequence of TRACES of its first span
	covers    uint64 // it was rescued: what stands up to this sequence is sent by the rescue
	// Only for traces of a previous sampler:
	upto uint64 // the sequence up to which its spans counted
	sent bool   // the backend has them
}

// defaultMemory is how many decisions of a kind are remembered: 140 bytes for each kept trace, 48 bytes
// for each other one, and the overhead of a map.
const defaultMemory = 100_000

func newMemory(kept, dropped int, floor uint64) memory {
	return memory{
		kept:    newShelves[otlpwire.TraceID, *keptTrace](cmp.Or(kept, defaultMemory)),
		dropped: newShelves[uint64, droppedTrace](cmp.Or(dropped, defaultMemory)),
		seed:    maphash.MakeSeed(),
		floor:   floor, above: make(map[key]aboveFloor),
	}
}

// pin remembers a decision of the previous sampler until the reader has passed it.
func (m *memory) pin(k key, kept *keptTrace, d droppedTrace) {
	if d.upto > m.floor && m.above != nil {
		m.above[k] = aboveFloor{kept, d}
		m.end = max(m.end, d.upto)
	}
}

// reached forgets decisions that the reader has passed.
func (m *memory) reached(seq uint64) {
	if seq > m.end {
		m.above = nil
	}
}

func (m *memory) keep(k key, t keptTrace) {
	m.kept.add(k.domain, k.id, &t)
	m.pin(k, &t, droppedTrace{upto: t.upto, begun: t.begun})
}

// rescue is keep for a trace that was not kept.
func (m *memory) rescue(k key, t keptTrace) *keptTrace {
	m.dropped.remove(k.domain, maphash.Comparable(m.seed, k))
	if a, pinned := m.above[k]; pinned {
		a.kept = &t
		m.above[k] = a
	}
	m.kept.add(k.domain, k.id, &t)
	m.pin(k, &t, droppedTrace{upto: t.upto, begun: t.begun})
	return &t
}

// settle notes that late spans do not bring a trace back, whatever else comes.
func (m *memory) settle(k key) {
	if d, ok := m.dropped.get(k.domain, maphash.Comparable(m.seed, k)); ok {
		d.from = 0
		m.dropped.add(k.domain, maphash.Comparable(m.seed, k), d)
	}
	if a, pinned := m.above[k]; pinned {
		a.from = 0
		m.above[k] = a
	}
}

func (m *memory) drop(k key, d droppedTrace) {
	m.dropped.add(k.domain, maphash.Comparable(m.seed, k), d)
	m.pin(k, nil, d)
}

// sent records that the backend has a kept trace.
func (m *memory) sent(k key) {
	if a, ok := m.above[k]; ok && a.kept != nil {
		a.kept.sent = true
	}
	if t, ok := m.kept.get(k.domain, k.id); ok {
		t.sent = true
	}
}

// recall returns what is remembered of a trace, kept nil if it was dropped, up to which sequence its spans
// are finished, and where it began.
func (m *memory) recall(k key) (kept *keptTrace, known bool, d droppedTrace) {
	kept, known = m.kept.get(k.domain, k.id)
	if !known {
		d, known = m.dropped.get(k.domain, maphash.Comparable(m.seed, k))
	}
	if a, ok := m.above[k]; ok && !known {
		kept, d, known = a.kept, a.droppedTrace, true
	}
	if kept != nil {
		if d = (droppedTrace{begun: kept.begun}); kept.sent {
			d.upto = kept.upto
		}
	}
	return kept, known, d
}

// shelves hold a bounded number of values, one shelf for each domain. When they are full the oldest
// values of the largest shelf are dropped: a domain with many decisions displaces its own, not those
// of others.
type shelves[K comparable, V any] struct {
	size, n int
	of      map[string]*shelf[K, V]
}

type shelf[K comparable, V any] struct {
	values map[K]V
	order  []K // in the order in which they were added
}

func newShelves[K comparable, V any](size int) shelves[K, V] {
	return shelves[K, V]{size: max(size, 1), of: make(map[string]*shelf[K, V])}
}

func (s *shelves[K, V]) add(domain string, k K, v V) {
	if _, there := s.get(domain, k); !there && s.n >= s.size {
		s.forget()
	}
	own := s.of[domain]
	if own == nil {
		own = &shelf[K, V]{values: make(map[K]V)}
		s.of[domain] = own
	}
	if _, there := own.values[k]; !there {
		own.order = append(own.order, k)
		s.n++
	}
	own.values[k] = v
}

// forget drops some values of the largest shelf, so many at a time that the search for it costs little.
func (s *shelves[K, V]) forget() {
	var largest *shelf[K, V]
	for domain, one := range s.of {
		switch {
		case len(one.order) == 0:
			delete(s.of, domain)
		case largest == nil || len(one.order) > len(largest.order):
			largest = one
		}
	}
	some := min(s.size/64+1, len(largest.order))
	for _, k := range largest.order[:some] {
		delete(largest.values, k)
	}
	largest.order = append(largest.order[:0], largest.order[some:]...)
	s.n -= some
}

// remove drops one value.
func (s *shelves[K, V]) remove(domain string, k K) {
	if own := s.of[domain]; own != nil {
		delete(own.values, k) // its place in the order is given back in turn
	}
}

func (s *shelves[K, V]) get(domain string, k K) (v V, ok bool) {
	if own := s.of[domain]; own != nil {
		v, ok = own.values[k]
	}
	return v, ok
}

// Remember restores what a previous owner has recorded: the decisions of one message, as they were
// appended, in the order of the messages, before any Add. A message without decisions marks the beginning
// of another owner. Later spans follow the decisions, what these took from the budgets is spent, and
// traces that the backend is known to have are not exported again.
func (s *Sampler) Remember(message []byte) error {
	return remember(message, []*Sampler{s}, partition.Spread{N: 1})
}

// remember passes every decision of a message to the sampler of its partition.
func remember(message []byte, parts []*Sampler, spread partition.Spread) error {
	if len(message) == 0 {
		for _, s := range parts {
			s.unsent = s.unsent[:0]
		}
	}
	if all, is, err := envelope.ReadSources(message); is {
		for _, one := range all {
			for _, s := range parts {
				s.sources[one.Domain] = append(slices.DeleteFunc(s.sources[one.Domain], func(old envelope.Sources) bool { return old.Instance == one.Instance }), one)
			}
		}
		return err
	}
	all, err := envelope.ReadDecisions(message)
	for _, d := range all {
		if d.Instance != "" {
			parts[spread.Of(d.Instance, d.TraceID)].rememberOne(d)
			continue
		}
		for _, s := range parts {
			for _, k := range s.unsent {
				s.decided.sent(k)
			}
			s.unsent = s.unsent[:0]
		}
	}
	return err
}

func (s *Sampler) rememberOne(d envelope.Decision) {
	k := key{d.Domain, d.TraceID}
	switch {
	case d.Late != envelope.OnTime:
		s.rememberRescue(k, d)
	case d.Kept:
		s.decided.keep(k, keptTrace{upto: d.Upto, policy: d.Policy, threshold: d.Threshold, begun: d.Begun})
		s.unsent = append(s.unsent, k)
	default:
		s.decided.drop(k, droppedTrace{upto: d.Upto, begun: d.Begun, from: d.From, at: d.At})
	}
	if len(d.Spent) > 0 {
		s.budgetsOf(payer{d.Domain, d.Instance, d.Version}).Restore(d.Due, d.Spent)
	}
}
