package sampler

import (
	"cmp"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	domains "github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

var (
	simSeeds = flag.Int("seeds", 2000, "how many worlds TestSimulation runs; make sim runs 10,000")
	simSeed  = flag.Uint64("seed", 0, "run this world of TestSimulation only; 0 for all")
)

// world is one partition with everything that may happen to it: spans of a few
// instances, sent again by routers that died, read by sinks that die at any step
// and are taken over.
type world struct {
	rng      *rand.Rand
	policies *policy.Set
	wait     time.Duration
	root     time.Duration // decision_wait_after_root_received
	room     int           // bytes that a sampler may hold
	streams  map[string][]simSpan
	log      [][]envelope.Frame // the messages of the partition; sequence = index + 1
	full     int                // how often a sampler had no room
	late     bool               // late spans bring their traces back
	rescued  int                // how many did
	apart    bool               // i1 uses other trace IDs
	errors   bool               // only errors are kept; a source of each instance may be cut off for up to a minute
	sources  bool               // instances have three sources, whose ways to the hub take up to nine seconds
	grouping domains.Versions   // i0 and i1, which use the same trace IDs, may be in one domain
	live     bool               // messages are stored as they come; else in any order of instances, as backlogs are
	stored   []time.Duration    // of every message, when; live only
	stalls   [2]stall           // of the partitions of TRACES; live only

	// What survives a sink.
	recorded  [][]byte // messages of decisions
	floor     uint64
	now       time.Duration  // how far the hub's time has come; live only
	delivered map[string]int // by instance, trace and span
}

// stall is a while in which nobody routes a partition of TRACES.
type stall struct {
	from, to time.Duration
	last     uint64 // the message in which the last of what had waited came
}

func (s *stall) holds(at time.Duration) bool { return s.from <= at && at < s.to }

// stall returns that of an instance's partition.
func (w *world) stall(instance string) *stall {
	return &w.stalls[partition.OfInstance(instance, len(w.stalls))]
}

type simSpan struct {
	at      time.Duration
	late    time.Duration // how much later than that it comes to the hub
	source  uint32
	origin  uint64
	trace   int
	name    string
	failing bool
}

var simBase = time.Unix(2_000_000, 0)

func newWorld(seed uint64) *world {
	w := &world{rng: rand.New(rand.NewPCG(seed, 99)), wait: 10 * time.Second, streams: map[string][]simSpan{}, delivered: map[string]int{}}
	w.root = time.Duration(w.rng.IntN(2)) * 3 * time.Second
	if w.room = 1 << 30; w.root == 0 && w.rng.IntN(3) == 0 {
		w.room = 5000 // of up to 25,000: one trace takes about 1,000
	}
	also := rand.New(rand.NewPCG(seed, 7)) // does not change what other worlds are like
	w.late = also.IntN(2) == 0 && !slices.Contains(simRare, seed)
	w.errors = w.late && also.IntN(2) == 0
	var cut [2]time.Duration
	if w.errors {
		cut[0] = time.Duration(also.IntN(20_000)) * time.Millisecond
		cut[1] = cut[0] + time.Duration(also.IntN(60_000))*time.Millisecond
	}
	spread := []int{2_000, 10_000, 40_000}[w.rng.IntN(3)] // milliseconds: budgets are fought for, or windows overlap little
	if w.sources = w.rng.IntN(2) == 0; w.sources {
		w.room = 1 << 30 // passed over in the order of reading, which is not that of the stamps here
	}
	if w.late {
		w.room *= 2 // traces are larger
	}
	if w.rng.IntN(2) == 0 {
		w.room *= 2 // so are traces
		one, other := domains.New(domains.Config{{Name: "d", Instances: []string{"i0", "i1"}}}), domains.New(domains.Config{{Name: "e", Instances: []string{"i0", "i1"}}})
		apart := domains.New(domains.Config{{Name: "d", Instances: []string{"i1"}}, {Name: "e", Instances: []string{"i0"}}})
		first, then := one, []*domains.Set{one, other, nil, apart}[w.rng.IntN(4)]
		w.errors = w.errors || w.late && then != first
		if then != first { // where there is no room, what has begun before a change is not told from the rest
			w.room = 1 << 30
		}
		if w.rng.IntN(2) == 0 {
			first, then = then, first
		}
		w.apart = w.late && first != one && first != other // what begins apart is not told from what has the same ID in the domain
		w.grouping = domains.Versions{{Number: 1, From: 0, Set: first}, {Number: 2, From: 10 + w.rng.Uint64N(60), Set: then}}
	}
	w.parse()
	for i := range 1 + w.rng.IntN(3) {
		inst := fmt.Sprint("i", i)
		ways := [3]time.Duration{0, time.Duration(w.rng.IntN(4)) * time.Second, time.Duration(w.rng.IntN(9_000)) * time.Millisecond}
		for n := range 2 * len(ways) {
			if w.sources || w.grouping != nil && n < 2 { // each source is known from the start, and knows the others
				w.streams[inst] = append(w.streams[inst], simSpan{at: time.Duration(n) * time.Microsecond, trace: 100 + n, name: "a", source: uint32(n%len(ways)) * w.several()})
			}
		}
		for trace := range 1 + w.rng.IntN(12) {
			if w.apart {
				trace += 20 * i
			}
			first := time.Duration(w.rng.IntN(spread)) * time.Millisecond
			for _, name := range []string{"root", "a", "b", "c", "d"}[w.rng.IntN(2) : 2+w.rng.IntN(4)] {
				at := first + time.Duration(w.rng.IntN(14_000))*time.Millisecond
				sp := simSpan{at: at, trace: trace + 1, name: name, failing: w.rng.IntN(16) == 0}
				if n := w.rng.IntN(len(ways)); w.sources {
					sp.source, sp.late = uint32(n), ways[n]
				}
				w.streams[inst] = append(w.streams[inst], sp)
			}
			if w.late && also.IntN(4) == 0 {
				n := also.IntN(len(ways))
				w.streams[inst] = append(w.streams[inst], simSpan{at: first + time.Duration(also.IntN(40_000))*time.Millisecond, trace: trace + 1, name: "e", failing: true, source: uint32(n) * w.several(), late: ways[n] * time.Duration(w.several())})
			}
		}
		skew := time.Duration(0)
		if w.errors && also.IntN(2) == 0 { // the clock of a source is wrong
			skew = time.Duration(also.Int64N(int64(2*time.Hour))) - time.Hour
			skew /= []time.Duration{1, 60, 3600, 100_000}[also.IntN(4)]
		}
		for i := range w.streams[inst] {
			if sp := &w.streams[inst][i]; sp.source == 1 {
				sp.at, sp.late = sp.at+skew, sp.late-skew
			} else if sp.source == 2 && cut[0] <= sp.at+sp.late && sp.at+sp.late < cut[1] {
				sp.late = cut[1] - sp.at // and then everything comes at once
			}
		}
		slices.SortStableFunc(w.streams[inst], func(a, b simSpan) int { return cmp.Or(cmp.Compare(a.at+a.late, b.at+b.late), cmp.Compare(a.at, b.at)) })
	}
	w.route()
	return w
}

// parse makes the policies.
func (w *world) parse() {
	text := `
decision_wait: %v
decision_wait_after_root_received: %v
policies:
  - {name: errors, type: status_code, status_code: {status_codes: [ERROR]}}
`
	if !w.errors {
		text += `
  - {name: large, type: span_count, span_count: {min_spans: 7}}
  - {name: few, type: rate_limiting, rate_limiting: {spans_per_second: 3}}
`
	}
	set, err := policy.Parse("sim", fmt.Appendf(nil, text, w.wait, w.root))
	if err != nil {
		panic(err)
	}
	if w.late {
		set.Late = policy.Late{Traces: 1000, Age: 100 * time.Hour}
	}
	w.policies = set
}

// route fills the log: each instance in its order, a router that dies now and
// then sends its last spans again, instances share messages at random. When live,
// the way to the hub takes less than a second, and routers may stand still on the way on.
func (w *world) route() {
	w.live = w.rng.IntN(2) == 0
	for p := range w.stalls {
		from := time.Duration(1+w.rng.IntN(40_000)) * time.Millisecond
		w.stalls[p] = stall{from: from, to: from + time.Duration(w.rng.IntN(2)*w.rng.IntN(60_000))*time.Millisecond}
	}
	comes := func(instance string, sp simSpan) time.Duration {
		at := sp.at + sp.late
		if s := w.stall(instance); s.holds(at) {
			return s.to
		}
		return at
	}
	var all []*simSpan
	for _, inst := range slices.Sorted(maps.Keys(w.streams)) {
		for i := range w.streams[inst] {
			all = append(all, &w.streams[inst][i])
		}
	}
	slices.SortStableFunc(all, func(a, b *simSpan) int {
		return cmp.Or(cmp.Compare(a.at+a.late, b.at+b.late), cmp.Compare(a.at, b.at))
	})
	for i, sp := range all {
		sp.origin = uint64(i + 1)
	}
	queues := map[string][]simSpan{}
	var names []string
	for _, inst := range slices.Sorted(maps.Keys(w.streams)) {
		spans := w.streams[inst]
		var q []simSpan
		for i := range spans {
			q = append(q, spans[i])
			if w.rng.IntN(12) == 0 {
				q = append(q, spans[max(0, i-w.rng.IntN(6)):i+1]...)
			}
		}
		queues[inst] = q
		names = append(names, inst)
	}
	slices.Sort(names)
	for len(names) > 0 {
		var msg []envelope.Frame
		var last time.Duration
		way := time.Duration(w.rng.IntN(200)) * time.Millisecond
		frames := 1 + w.rng.IntN(4)
		if w.grouping != nil {
			frames += 2
		}
		for range frames {
			if len(names) == 0 {
				break
			}
			i := w.rng.IntN(len(names))
			if w.live {
				for j, name := range names {
					if comes(name, queues[name][0]) < comes(names[i], queues[names[i]][0]) {
						i = j
					}
				}
			}
			if w.grouping != nil && len(w.log) < 3 { // the instances of a domain know each other
				for j, name := range names {
					if queues[name][0].origin < queues[names[i]][0].origin {
						i = j
					}
				}
			}
			for j, name := range names { // a partition of TRACES is routed in order
				if w.stall(name) == w.stall(names[i]) && queues[name][0].origin < queues[names[i]][0].origin {
					i = j
				}
			}
			sp := queues[names[i]][0]
			at := comes(names[i], sp)
			if w.live && len(msg) > 0 && at > last+500*time.Millisecond {
				break // a message does not wait for so long
			}
			last = max(last, at)
			if s := w.stall(names[i]); s.holds(sp.at + sp.late) {
				s.last, way = uint64(len(w.log)+1), 0 // what has waited comes at once
			}
			msg = append(msg, envelope.Frame{Instance: names[i], Source: sp.source, Arrival: simBase.Add(sp.at).UnixNano(), Seq: sp.origin, Payload: spanOf(fmt.Sprint(sp.trace), sp.name, time.Duration(names[i][1]), sp.failing)}) // spans of two instances differ
			if queues[names[i]] = queues[names[i]][1:]; len(queues[names[i]]) == 0 {
				names = slices.Delete(names, i, i+1)
			}
		}
		if n := len(w.stored); n > 0 {
			last = max(last, w.stored[n-1])
		}
		w.log, w.stored = append(w.log, msg), append(w.stored, last+way)
	}
}

// several is 1 where instances have several sources.
func (w *world) several() uint32 {
	if w.sources {
		return 1
	}
	return 0
}

// routed returns the sequences of TRACES up to which everything of each of its partitions is in the log up to seq.
func (w *world) routed(seq uint64) []uint64 {
	there := map[uint64]bool{}
	for _, msg := range w.log[:seq] {
		for _, f := range msg {
			there[f.Seq] = true
		}
	}
	upto := make([]uint64, len(w.stalls))
	for p := range upto {
		upto[p] = 1 << 32
	}
	for inst, spans := range w.streams {
		p := partition.OfInstance(inst, len(upto))
		for _, sp := range spans {
			if !there[sp.origin] {
				upto[p] = min(upto[p], sp.origin-1)
			}
		}
	}
	return upto
}

// run lets one sink after another work until one has finished the log.
func (w *world) run(t *testing.T) (crashes int) {
	for w.sink(t) {
		if crashes++; crashes > 10_000 {
			t.Fatal("no sink ever finishes")
		}
	}
	return crashes
}

// sink reads from the floor on. It returns true when it has died.
func (w *world) sink(t *testing.T) (died bool) {
	dies := func() bool { return w.rng.IntN(40) == 0 }
	s := New(w.policies, w.room, w.floor)
	w.recorded = append(w.recorded, nil) // our mark
	for _, m := range w.recorded {
		if err := s.Remember(m); err != nil {
			t.Fatal(err)
		}
	}
	s.maxWaiting = 1 << 30
	s.Use(nil, w.grouping)
	s.Idle(Mark{Before: make([]time.Time, len(w.stalls)), Routed: make([]uint64, len(w.stalls))}, simBase.Add(w.now))
	var out Output
	open := map[uint64]int{} // spans of a message of which nothing is known yet
	note := func(o Output) {
		for _, e := range o.Ended {
			open[e.Seq] -= e.Spans
		}
		out.Decisions, out.Exports, out.Sources = append(out.Decisions, o.Decisions...), append(out.Exports, o.Exports...), append(out.Sources, o.Sources...)
		out.Rescues = append(out.Rescues, o.Rescues...)
		w.rescued += o.Rescued
		if out.Rewind = out.Rewind || o.Rewind; o.Full {
			w.full++
		}
	}
	var rescues []envelope.Decision // recorded, not sent yet
	// rescue reads spans again, for some of them.
	rescue := func() bool {
		if len(rescues) == 0 {
			return true
		}
		n := w.rng.IntN(len(rescues) + 1)
		some := rescues[:n]
		rescues = rescues[n:]
		r := NewRescuer(some, w.grouping)
		for from, upto := r.Range(); from <= upto; from++ {
			for _, f := range w.log[from-1] {
				exports, err := r.Add(from, f)
				if err != nil {
					t.Fatal(err)
				}
				for _, e := range exports {
					if dies() {
						return false
					}
					w.deliver(e)
				}
			}
		}
		for _, d := range some {
			note(s.Rescued(d))
		}
		return true
	}
	note(s.Restore())
	// flush is what package sink does, with a death between any two steps.
	flush := func() bool {
		if dies() {
			return false
		}
		if len(out.Sources) > 0 {
			w.recorded = append(w.recorded, envelope.AppendSources(nil, out.Sources))
		}
		if len(out.Decisions) > 0 {
			w.recorded = append(w.recorded, envelope.AppendDecisions(nil, append([]envelope.Decision{{}}, out.Decisions...)...))
		}
		rescues = append(rescues, out.Rescues...)
		for _, e := range out.Exports {
			if dies() {
				return false
			}
			w.deliver(e)
			if dies() {
				return false
			}
			s.Release(e.Seq)
			for _, p := range e.Parts {
				open[p.Seq] -= p.Spans
			}
		}
		again := out.Rewind
		out = Output{}
		if !rescue() || dies() {
			return false
		}
		floor := s.Floor() // 0 while nothing was read
		if floor != 0 && floor < w.floor {
			t.Fatalf("the floor goes back from %d to %d", w.floor, floor)
		}
		for seq, spans := range open { // each span has one outcome, whoever reads its message
			if seq <= floor && spans != 0 {
				t.Fatalf("the floor %d has passed message %d, which has %d spans without an outcome", floor, seq, spans)
			}
		}
		w.floor = max(w.floor, floor)
		if again {
			w.recorded = append(w.recorded, envelope.AppendDecision(nil, envelope.Decision{}))
			return false
		}
		return true
	}
	for seq := w.floor + 1; seq <= uint64(len(w.log)); seq++ {
		for _, f := range w.log[seq-1] {
			open[seq] += otlpwire.Count(otlpwire.Traces, f.Payload)
			o, err := s.Add(seq, f)
			if err != nil {
				t.Fatal(err)
			}
			note(o)
		}
		if at := w.stored[seq-1]; w.live && at >= w.now && w.rng.IntN(3) > 0 {
			// Caught up: the time may be anything before the next message is stored.
			w.now = at
			if int(seq) < len(w.log) {
				w.now += time.Duration(w.rng.Int64N(int64(w.stored[seq]-at) + 1))
			}
			asked := w.now - time.Duration(w.rng.IntN(6000))*time.Millisecond // the hub is, now and then
			before := make([]time.Time, len(w.stalls))
			for p, stall := range w.stalls {
				switch {
				case w.rng.IntN(10) == 0: // it does not know
				case seq < stall.last:
					before[p] = simBase.Add(min(asked, stall.from))
				default:
					before[p] = simBase.Add(asked)
				}
			}
			note(s.Idle(Mark{before, w.routed(seq)}, simBase.Add(w.now)))
		} else if w.rng.IntN(3) == 0 {
			note(s.Idle(Mark{make([]time.Time, len(w.stalls)), w.routed(seq)}, simBase.Add(w.now)))
		}
		if w.rng.IntN(3) == 0 && !flush() {
			return true
		}
	}
	note(s.Idle(Mark{make([]time.Time, len(w.stalls)), w.routed(uint64(len(w.log)))}, simBase.Add(w.now)))
	for range 2 {
		note(silence(s, simBase, simBase.Add(time.Hour)))
	}
	for len(out.Decisions)+len(out.Rescues)+len(rescues) > 0 {
		if !flush() {
			return true
		}
	}
	return !flush()
}

func (w *world) deliver(e Export) {
	var sp otlpwire.Span
	for item := range otlpwire.Items(e.Append(nil)) {
		sp.Parse(item)
		w.delivered[fmt.Sprintf("%s %x %s", e.Instance, sp.TraceID[14:], sp.Name)]++
	}
}

// simRare are worlds with something that few others have, which has gone wrong once.
var simRare = []uint64{10247, 36346, 41032}

// TestSimulation runs many worlds: whatever dies when, what is delivered is what
// the reference keeps, whole traces and nothing else, and the floor reaches the
// end. A trace that is decided otherwise than by the reference, wrong, has all of its spans lost or leaked; one that is split
// some of them.
func TestSimulation(t *testing.T) {
	from, to := uint64(1), uint64(*simSeeds)
	if *simSeed != 0 {
		from, to = *simSeed, *simSeed
	}
	spans, kept, crashes, twice, full, rescued := 0, 0, 0, 0, 0, 0
	var seeds []uint64
	for seed := from; seed <= to; seed++ {
		seeds = append(seeds, seed)
	}
	if *simSeed == 0 {
		seeds = append(seeds, simRare...)
	}
	for _, seed := range seeds {
		w := newWorld(seed)
		crashes += w.run(t)
		want := w.want()
		for key := range want {
			if w.delivered[key] == 0 {
				t.Errorf("seed %d: lost: %s", seed, key)
			}
		}
		for key, n := range w.delivered {
			if !want[key] {
				t.Errorf("seed %d: leaked: %s", seed, key)
			}
			twice += n - 1
		}
		if w.floor != uint64(len(w.log)) {
			t.Errorf("seed %d: the floor is %d of %d", seed, w.floor, len(w.log))
		}
		for _, s := range w.streams {
			spans += len(s)
		}
		kept += len(want)
		full += w.full
		rescued += w.rescued
		if t.Failed() {
			t.Fatalf("run it alone: go test ./pkg/sampling/sampler -run TestSimulation -seed %d", seed)
		}
	}
	if *simSeed == 0 && (crashes == 0 || kept == 0 || kept == spans || full == 0 || rescued == 0) {
		t.Fatalf("%d crashes, %d of %d spans kept: nothing was simulated", crashes, kept, spans)
	}
	t.Logf("worlds=%d spans=%d kept=%d crashes=%d full=%d rescued=%d delivered_twice=%d lost=0 leaked=0 split=0 wrong=0", len(seeds), spans, kept, crashes, full, rescued, twice)
}
