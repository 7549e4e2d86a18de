// Package sampler gathers spans into traces and decides about each trace once
// its window has closed. It is a pure state machine: no goroutine, no lock, no
// clock, no logger.
//
//	s := sampler.New(policies, maxBytes, floor)
//	out := s.Add(seq, frame) // spans in; decisions that the stream's time brought
//	out = s.Idle(mark, now)  // from time to time: instances may be silent
//	s.Release(seq)           // for every export, once the backend has it
//	floor := s.Floor()
//
// # Stream time
//
// Every source of an instance, an edge's spool or a gateway, has a clock of its own: the highest
// arrival stamp seen. A trace's window opens with the arrival of its first span and closes when the
// clock has passed first + wait, or a while after its root span, if that is
// configured; the spans stamped within count. So an edge
// that catches up after an hour is judged as if it had been live, and the same
// stretch of an instance's stream gives the same decisions on every reading.
//
// A trace waits for all sources that may have spans of it (clock.go): its decision does not depend on
// which of them comes first, if they come within ten seconds of each other.
//
// # Domains
//
// The instances of a domain share traces, clocks and memory; by default each instance is a domain (domain.go). Frames of a
// domain are added in the order of TRACES, wherever its instances are routed (order.go).
//
// The clock of a source that is silent moves on with the reader's, but only up
// to moments at which its partition of TRACES had left nothing behind on the way; it goes
// back when the edge was only cut off, and sends what it has kept. When the edge's own clock is
// set back, by more than a second, the open windows go back with it; when it is set
// forward they close. A clock that does not move although its instance sends is moved on
// when a trace has been held for its wait and [patience] by the reader's clock: what stands
// still on one machine must not hold up what others share with it.
//
// # Policies
//
// A trace is judged by the version of the policies that is in force at the sequence
// of its first span.
//
// # Promises
//
//   - A span is never forgotten: it is held, or in an Export, or counted in
//     Output. Floor stays below the message of every span held or not released.
//   - No trace is decided for want of memory. At the bound, spans of new traces are
//     passed over, and read again from the floor when there is room: reading is
//     what slows down. A trace that takes half of the bound by itself is given up.
//   - It is the domains that hold most whose traces are passed over: every one may hold as
//     much as the others. Reading begins again only when a trace that keeps the floor where
//     it is has been decided, so the floor moves.
//   - No arrival stamp, however odd, overflows or stands for something else.
//   - Late spans follow the decision of their trace while it is remembered, or turn "not kept" into kept (rescue.go); a
//     decision that was recorded is never reversed by the next owner.
//
// # Not here
//
// Reading, exporting, and the wall clock: package sink.
package sampler

import (
	"cmp"
	"container/heap"
	"hash/maphash"
	"maps"
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	domains "github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// Sampler is the state of one partition.
type Sampler struct {
	versions []policy.Version // by From; the first one from 0
	maxBytes int
	// maxWaiting bounds the bytes of the frames that wait for their turn.
	maxWaiting int

	parts     int // partitions of TRACES
	grouping  domains.Versions
	members   map[string][]string // of shared domains, by the version membersAt; nil: not known
	membersAt int
	domains   map[string]*domain
	instances map[string]*instance
	budgets   map[payer]*policy.Budgets
	sources   map[string][]envelope.Sources // recorded, of domains that have not been seen yet
	routed    []uint64                      // by partition of TRACES, the sequence up to which everything has been added; nil: frames come in order
	waiting   int                           // bytes of the frames that wait for their turn
	unsent    []key                         // recorded, and not known to be at the backend
	rescues   map[string]rescues            // by domain
	followed  map[key]followed              // decisions of live samplers
	recorded  map[key]envelope.Decision     // rescues of previous owners that are not known to be finished
	unsettled int                           // rescues that are not finished
	readable  struct{ from, most uint64 }   // see Readable
	lag       int64                         // see defaultLag
	decided   memory
	held      *held
	chosen    func(first int64, seq uint64) bool // nil: every trace
	heads     map[*otlpwire.Heads]int            // number of pieces that share it
	last      uint64                             // highest sequence seen
	newest    uint64                             // and of TRACES
	wire      otlpwire.Splitter
	span      otlpwire.Span
	scratch   []byte // the current trace
	trace     policy.Trace
	passing   []*domain // whose traces are passed over
	largest   *domain   // the domain that holds most; nil: to be determined
	// now is the reader's clock at the last Idle, start at the first one, swept at the last check for
	// overdue traces; in Unix nanoseconds.
	now, start, swept int64
	ready             []*trace // of the current step
	earlier           bool     // a trace has become due earlier
	fresh             []bool   // of the current piece, which spans are not held yet
	hash              maphash.Hash
}

// held is what the samplers of one reader hold together.
type held struct {
	owed  pending
	about About // for [Panicked]
	bytes int   // memory of traces; what they share is counted once
	// passed: traces have been passed over, and will be until everything is read again.
	passed bool
	turn   uint64 // of the last frame: how many have been added
	// oldest is the lowest turn of an undecided trace when passing began; decided: a trace that began
	// with that frame has been decided since then.
	oldest  uint64
	decided bool
}

// idleGrace is how far the clock of a silent instance stays behind: a message may take that much longer
// than another from the edge to the hub.
const idleGrace = time.Second

// How long a trace may be held, beyond its wait, by the reader's clock, once everything that the hub had
// at that time has been read. If a link is slower than the incoming data, its edge's stream time runs
// slower than the reader's clock; ten minutes allow one twentieth at a wait of 30 s.
const (
	patience       = 10 * time.Minute
	passedPatience = 30 * time.Second // if others wait for room
	sweepInterval  = 5 * time.Second
)

// Bounds of stamps: from 1970 to 2116. Sums of a few of them do not overflow.
const (
	maxStamp = 1 << 62
	maxSkew  = 1 << 61
)

// Approximate memory of a trace and of a piece of one besides their bytes: a trace of one small span
// takes several times its size on the wire.
const (
	traceBytes = 480
	pieceBytes = 152
	spanBytes  = 16
)

// New returns an empty sampler that holds up to maxBytes of spans.
//
// floor is the sequence after which reading begins: all decisions about traces that are read again are
// remembered, however many.
func New(policies *policy.Set, maxBytes int, floor uint64) *Sampler {
	return &Sampler{
		versions: []policy.Version{{Set: policies}},
		maxBytes: maxBytes, maxWaiting: maxBytes / 2,
		parts:     1,
		domains:   make(map[string]*domain),
		instances: make(map[string]*instance),
		budgets:   make(map[payer]*policy.Budgets),
		sources:   make(map[string][]envelope.Sources),
		rescues:   make(map[string]rescues),
		recorded:  make(map[key]envelope.Decision),
		lag:       int64(cmp.Or(policies.SourceLag, defaultLag)),
		heads:     make(map[*otlpwire.Heads]int),
		decided:   newMemory(policies.Kept, policies.Dropped, floor),
		held:      new(held),
	}
}

// Use sets the versions of the policies that follow the one of [New], by From, and those of the domains, by sequences of
// TRACES: in the order of that nothing that began before a change is read after it. Held
// traces to which another version of the policies applies from now on are judged by that version. Those that have
// begun in another domain stay there: where spans have been added that versions of the domains apply to
// which are new, a new sampler must begin at the floor.
func (s *Sampler) Use(policies []policy.Version, grouping domains.Versions) {
	s.versions = append(s.versions[:1:1], policies...)
	s.grouping = grouping
	for _, in := range s.instances {
		in.version = -1
	}
	s.members = nil
	for _, d := range s.domains {
		for _, t := range d.traces {
			t.rules = s.rules(t.seq)
			t.setDue()
		}
		for _, c := range d.clocks {
			heap.Init(&c.queue)
		}
	}
}

// rules returns the version that is in force at a sequence.
func (s *Sampler) rules(seq uint64) *policy.Version {
	i := len(s.versions) - 1
	for i > 0 && s.versions[i].From > seq {
		i--
	}
	return &s.versions[i]
}

// Add adds the spans of one frame of message seq. Messages must be added in the order of seq; one may have many
// frames.
func (s *Sampler) Add(seq uint64, f envelope.Frame) (out Output, err error) {
	s.last = max(s.last, seq)
	s.decided.reached(s.added())
	f.Arrival = min(max(f.Arrival, 0), maxStamp)
	in := s.instance(f.Instance, f.Seq)
	s.newest = max(s.newest, f.Seq)
	if s.routed != nil {
		s.routed[in.part] = max(s.routed[in.part], f.Seq)
	}
	if line := s.line(in); line != nil {
		err = s.queue(line, in, seq, f, &out)
	} else {
		err = s.add(in, in.home, seq, f, &out)
	}
	out.Rewind = s.room()
	return out, err
}

// add is Add for a frame whose turn it is.
func (s *Sampler) add(in *instance, h home, seq uint64, f envelope.Frame, out *Output) error {
	s.held.about = About{seq, in.name}
	c := h.domain.clock(in, f.Source)
	c.active = true
	if f.Seq != 0 && f.Seq <= in.origin && f.Arrival <= s.newestOf(in, h, f.Source) {
		// An instance's messages are routed in order, so a router that took over has sent this one again.
		n := otlpwire.Count(otlpwire.Traces, f.Payload)
		out.Duplicates += n
		out.end(in, seq, n, Repeated)
		return nil
	}
	s.earlier, in.origin = false, f.Seq
	s.held.turn++
	s.hear(h.domain, c, f.Arrival, out)
	for _, was := range h.before {
		if d := s.domains[was.name]; d != nil && !was.done && len(d.traces) > 0 {
			c := d.clock(in, f.Source)
			c.active = true
			s.hear(d, c, f.Arrival, out)
		}
	}
	load := in.load(f, otlpwire.Count(otlpwire.Traces, f.Payload))

	// Split by trace: the key is the trace's index among those of this frame.
	order := make(map[otlpwire.TraceID]int)
	var ids []otlpwire.TraceID
	err := s.wire.Groups(f.Payload, func(item []byte) int {
		id, _ := otlpwire.SpanTrace(item)
		n, ok := order[id]
		if !ok {
			n = len(ids)
			order[id], ids = n, append(ids, id)
		}
		return n
	}, func(key int, g otlpwire.Group) {
		s.addPiece(in, h, c, seq, f.Seq, ids[key], f.Arrival, load, g, out)
	})
	if s.earlier { // a trace is due before the time of the source that it waits for
		s.earlier = false
		s.each(h, func(d *domain) {
			if len(d.clocks) > 1 {
				s.advance(d, out, d.clocks...)
			}
		})
	}
	return err
}

// hear notes that something has come of a source: windows that end before close without it.
func (s *Sampler) hear(d *domain, c *clock, arrival int64, out *Output) {
	c.tell(arrival)
	d.heard(c)
	s.advance(d, out, c)
}

// addPiece adds spans of one trace that share a resource.
func (s *Sampler) addPiece(in *instance, h home, c *clock, seq, origin uint64, id otlpwire.TraceID, arrival int64, load envelope.Load, g otlpwire.Group, out *Output) {
	n := 0
	for range g.Items() {
		n++
	}
	d, name := s.domain(h, id)
	kept, known, when := s.decided.recall(key{name, id})
	if !known && (d == nil || d.traces[id] == nil) {
		kept, known, when = s.follow(id, name, in, seq, origin, arrival, out)
	}
	if known {
		s.addLate(d, in, key{name, id}, seq, n, kept, when, g, out)
		return
	}
	if d != h.domain {
		c = d.clock(in, c.source)
	}
	t := d.traces[id]
	if t == nil {
		if t = s.open(h, d, c, seq, id, arrival, out); t == nil {
			return
		}
		t.begun = origin
	}
	t.begun = min(t.begun, origin)
	at := t.join(c, arrival, d.lag)
	sh := t.share(in, at)
	fresh := s.addSpans(t, sh, at, g)
	if n > fresh {
		out.Duplicates += n - fresh
		out.end(in, seq, n-fresh, Repeated)
	}
	if fresh == 0 {
		return
	}
	if sh.first = min(sh.first, at); seq < t.owed {
		s.held.owed.add(seq)
		s.held.owed.release(t.owed)
		t.owed = seq
	}
	if at < t.first {
		t.first = at
		s.dueEarlier(t)
	}
	sh.load.Max(load)
	sh.silent = sh.silent || load == (envelope.Load{})
	sh.stamps = append(sh.stamps, stamp{at, fresh})
	sh.add(seq, fresh)
	s.hold(d, t, sh, g.Fragment(s.fresh), fresh)
	s.bound(d, t, c, arrival, out)
}

// addLate adds n spans of a trace that is decided: they follow the decision, or turn it. Of those up to the sequence
// was.upto nothing is left to be done.
func (s *Sampler) addLate(d *domain, in *instance, k key, seq uint64, n int, kept *keptTrace, was droppedTrace, g otlpwire.Group, out *Output) {
	if kept == nil && seq > was.upto {
		kept = s.rescue(d, in, k, was, n, g, out)
	}
	switch {
	case seq <= was.upto && kept != nil:
		out.Duplicates += n
		out.end(in, seq, n, Sent)
	case seq <= was.upto, kept != nil && seq <= kept.covers && kept.upto > 0: // the previous owner has counted it
		out.Duplicates += n
		out.end(in, seq, n, NotKept)
	case kept == nil && was.unasked:
		out.end(in, seq, n, NotAsked)
	case kept == nil || seq <= kept.covers:
		out.SampledOut += n
		out.end(in, seq, n, NotKept)
	default:
		s.held.owed.add(seq)
		out.Exports = append(out.Exports, Export{
			Instance: in.name, Spans: n, Seq: seq, Policy: kept.policy, Threshold: kept.threshold, Late: true, Parts: []Part{{seq, n}}, pieces: []otlpwire.Fragment{g.Fragment(nil)},
		})
	}
}

func (o *Output) end(in *instance, seq uint64, spans int, how How) {
	o.Ended = append(o.Ended, Ended{Part{seq, spans}, in.name, how})
}

// open begins a trace, unless there is no room: then it is passed over, and nil.
func (s *Sampler) open(h home, d *domain, c *clock, seq uint64, id otlpwire.TraceID, arrival int64, out *Output) *trace {
	if s.full(d) || s.passedBefore(h) {
		if s.passOver(d, c, arrival, out); seq < d.first {
			d.first = seq
			s.held.owed.add(seq) // never released: the floor stays below it
		}
		return nil
	}
	t := &trace{id: id, rules: s.rules(seq), from: c.alone(), first: arrival - c.skew, seq: seq, turn: s.held.turn, owed: seq, read: s.now, queue: c}
	t.setDue()
	d.traces[id] = t
	heap.Push(&c.queue, t)
	s.held.owed.add(seq)
	s.take(d, t, traceBytes)
	return t
}

// dueEarlier computes when a trace is due after that has become earlier.
func (s *Sampler) dueEarlier(t *trace) {
	t.setDue()
	heap.Fix(&t.queue.queue, t.place)
	s.earlier = s.earlier || t.key < t.queue.time()
}

// addSpans notes in s.fresh which spans of g are not held yet, and returns how many. A root span
// may close the window.
func (s *Sampler) addSpans(t *trace, sh *share, at int64, g otlpwire.Group) (fresh int) {
	s.fresh = s.fresh[:0]
	resource, last, scoped := digest(&s.hash, 0, g.Resource()), []byte(nil), uint64(0)
	for item, scope := range g.ItemsIn() {
		s.span.Parse(item)
		if len(scope) != len(last) || len(scope) == 0 || &scope[0] != &last[0] {
			last, scoped = scope, digest(&s.hash, resource, scope)
		}
		is := t.ids.add(digest(&s.hash, scoped, item))
		if s.fresh = append(s.fresh, is); is {
			fresh++
		}
		if s.span.Root && (!sh.rooted || at < sh.root) {
			sh.root, sh.rooted = at, true
			if !t.rooted || at < t.root {
				t.root, t.rooted = at, true
				s.dueEarlier(t)
			}
		}
	}
	return fresh
}

// tooLarge reports whether a trace takes half of the memory by itself, or more than its policies
// allow.
func (s *Sampler) tooLarge(t *trace) bool {
	own := t.rules.MaxTraceBytes
	return t.held > s.maxBytes/2 || own > 0 && t.size > own
}

// digest extends the digest of by a hash of part. A span's digest covers its resource, its scope and
// itself: the first two are hashed once for all their spans.
func digest(h *maphash.Hash, of uint64, part []byte) uint64 {
	h.Reset()
	maphash.WriteComparable(h, of)
	_, _ = h.Write(part)
	return h.Sum64()
}

// take records that a trace of d takes so many bytes more, or less.
func (s *Sampler) take(d *domain, t *trace, bytes int) {
	t.held += bytes
	d.bytes += bytes
	s.held.bytes += bytes
	switch {
	case bytes < 0 && d == s.largest:
		s.largest = nil
	case s.largest != nil && d.bytes > s.largest.bytes:
		s.largest = d
	}
}

// hold adds a piece to a trace. The resource and scopes of a frame, which all its
// pieces share, count once.
func (s *Sampler) hold(d *domain, t *trace, sh *share, piece otlpwire.Fragment, spans int) {
	if s.heads[piece.Heads]++; s.heads[piece.Heads] == 1 {
		s.take(d, t, piece.Heads.Size())
	}
	s.take(d, t, piece.Held()+pieceBytes+spans*spanBytes)
	t.size += piece.Size()
	sh.pieces = append(sh.pieces, piece)
}

// letGo removes a trace from what is held.
func (s *Sampler) letGo(d *domain, t *trace) {
	for i := range t.shares {
		for j := range t.shares[i].pieces {
			piece := &t.shares[i].pieces[j]
			s.take(d, t, -piece.Held()-pieceBytes)
			if s.heads[piece.Heads]--; s.heads[piece.Heads] == 0 {
				delete(s.heads, piece.Heads)
				s.take(d, t, -piece.Heads.Size())
			}
		}
	}
	s.take(d, t, -traceBytes-t.spans()*spanBytes)
}

// advance decides the traces whose windows have ended by the clocks that have moved, in the order of due, unless
// they have to wait for another source.
func (s *Sampler) advance(d *domain, out *Output, moved ...*clock) {
	s.ready = s.ready[:0]
	for _, c := range moved {
		for len(c.queue) > 0 && c.queue[0].key < c.time() {
			t := heap.Pop(&c.queue).(*trace)
			if len(d.clocks) == 1 {
				s.decide(d, t, out)
			} else if other := d.blocks(t); other != nil && other != c {
				t.wait(other)
			} else {
				s.ready = append(s.ready, t)
			}
		}
	}
	if len(d.clocks) == 1 {
		return
	}
	s.sweep(d)
	slices.SortFunc(s.ready, byDue)
	for _, t := range s.ready {
		s.decide(d, t, out)
	}
	clear(s.ready)
}

// decide evaluates the policies for a trace that is in no queue any more.
func (s *Sampler) decide(d *domain, t *trace, out *Output) {
	about := s.held.about
	s.held.about = t.about()
	skew, spans := t.from[0].clock.skew, 0
	s.scratch = s.scratch[:0]
	for i := range t.shares {
		sh := &t.shares[i]
		for j := range sh.pieces {
			if len(d.clocks) == 1 || sh.stamps[j].at <= t.due { // else it came while the trace waited for other sources
				s.scratch = sh.pieces[j].Append(s.scratch)
				spans += sh.stamps[j].spans
			}
		}
	}
	s.trace.Reset(t.id, spans, s.scratch, t.due+skew)
	pays := t.payer()
	if !pays.silent {
		s.trace.Load = pays.load
	}
	v := t.rules.Decide(&s.trace, s.budgetsOf(payer{d.name, pays.in.name, t.rules.Number}))
	out.asked(t.id, pays.in, v.Panicked)
	how := NotKept
	if !v.Keep && v.By == "" {
		late := s.lateHeld(d, t, out)
		v.Keep, v.By, v.Threshold = late.Keep, late.By, late.Threshold
	}
	if s.chosen != nil && !s.chosen(t.first+skew, t.seq) {
		v.Keep, how = false, NotAsked // it was evaluated only for what it takes from the budgets
	}
	s.conclude(d, t, v, how, out)
	if cap(s.scratch) > maxScratch {
		s.scratch = nil
	}
	s.held.about = about
}

// maxScratch is how much memory is kept for the next trace.
const maxScratch = 4 << 20

// conclude removes a decided trace, which is not in the queue any more. how is how its spans end if it is not kept.
func (s *Sampler) conclude(d *domain, t *trace, v policy.Verdict, how How, out *Output) {
	delete(d.traces, t.id)
	s.letGo(d, t)
	d.decided = true
	s.held.decided = s.held.decided || t.turn == s.held.oldest
	one := envelope.Decision{Domain: d.name, Instance: t.payer().in.name, TraceID: t.id, Kept: v.Keep, Upto: s.counted(d), Begun: t.begun, Version: t.rules.Number, Due: t.due + t.from[0].clock.skew, Spent: v.Took}
	k := key{d.name, t.id}
	out.By = append(out.By, v.By)
	if d.recordSources(t.due, len(s.grouping) > 0) {
		out.Sources = append(out.Sources, d.seen()...)
	}
	if !v.Keep {
		was := droppedTrace{begun: t.begun, unasked: how == NotAsked}
		if t.rules.Late.Traces > 0 && how == NotKept && v.By == "" && !t.final {
			was.from, was.at = min(t.owed, d.added(s.last)+1), d.present() // frames that wait may have spans of it
			one.From, one.At = was.from, was.at
		}
		s.decided.drop(k, was)
		out.Decisions = append(out.Decisions, one)
		if how == NotKept {
			out.SampledOut += t.spans()
		}
		for i := range t.shares {
			for _, p := range t.shares[i].parts {
				out.end(t.shares[i].in, p.Seq, p.Spans, how)
			}
		}
		s.held.owed.release(t.owed)
		return
	}
	one.Policy, one.Threshold = v.By, v.Threshold
	s.decided.keep(k, keptTrace{policy: v.By, threshold: v.Threshold, begun: t.begun})
	out.Decisions = append(out.Decisions, one)
	for i := range t.shares {
		sh := &t.shares[i]
		if i > 0 {
			s.held.owed.add(t.owed)
		}
		out.Exports = append(out.Exports, Export{Instance: sh.in.name, Spans: sh.spans, Seq: t.owed, Policy: v.By, Threshold: v.Threshold, Further: i > 0, Parts: sh.parts, pieces: sh.pieces})
	}
}

// Finish decides all held traces: nothing more will be added.
func (s *Sampler) Finish() (out Output) {
	s.hurry(&out)
	for _, name := range s.names() {
		d := s.domains[name]
		all := slices.Collect(maps.Values(d.traces))
		slices.SortFunc(all, byDue)
		for _, t := range all {
			heap.Remove(&t.queue.queue, t.place)
			s.decide(d, t, &out)
		}
	}
	out.Rewind = s.held.passed // nothing is held any more, so there is room
	return out
}

// Release records that the backend has an export with this sequence.
func (s *Sampler) Release(seq uint64) { s.held.owed.release(seq) }

// Floor returns the sequence up to which nothing is owed.
func (s *Sampler) Floor() uint64 {
	if low, ok := s.held.owed.lowest(); ok {
		return min(low-1, s.last) // rescues are owed before they are read again
	}
	return s.last
}

// Held returns the number of undecided traces and their approximate memory in bytes.
func (s *Sampler) Held() (traces, bytes int) {
	for _, d := range s.domains {
		traces += len(d.traces)
	}
	return traces, s.held.bytes
}
