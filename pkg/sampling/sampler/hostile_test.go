package sampler

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// partitionReader reads a log of messages as package sink does, one sampler after the other,
// and looks at the time when it has read all.
type partitionReader struct {
	t        *testing.T
	policies *policy.Set
	room     int
	log      []envelope.Frame // one a message; sequence = index + 1
	recorded [][]byte
	floor    uint64
	now      time.Time

	decided map[string]int // by instance
	rounds  int
	most    int // bytes held
}

func newPartitionReader(t *testing.T, room int) *partitionReader {
	return &partitionReader{t: t, policies: policy.KeepAll(10 * time.Second), room: room, now: time.Unix(2_000_000, 0), decided: map[string]int{}}
}

// sampler begins at the floor.
func (r *partitionReader) sampler() *Sampler {
	r.rounds++
	s := New(r.policies, r.room, r.floor)
	r.recorded = append(r.recorded, nil)
	for _, m := range r.recorded {
		if err := s.Remember(m); err != nil {
			r.t.Fatal(err)
		}
	}
	return s
}

// take books what a step has brought, and reports whether reading begins again.
func (r *partitionReader) take(s *Sampler, out Output, err error) (again bool) {
	if err != nil {
		r.t.Fatal(err)
	}
	_, held := s.Held()
	r.most = max(r.most, held)
	body := envelope.AppendDecision(nil, envelope.Decision{})
	for _, d := range out.Decisions {
		body = envelope.AppendDecision(body, d)
		r.decided[d.Instance]++
	}
	for i := range out.Exports {
		s.Release(out.Exports[i].Seq)
	}
	if len(out.Decisions) > 0 || out.Rewind {
		r.recorded = append(r.recorded, body)
	}
	if floor := s.Floor(); floor > r.floor {
		r.floor = floor
	}
	return out.Rewind
}

// read reads all there is, and lets time pass until step says that it is enough: then what
// comes in is step's doing, too.
func (r *partitionReader) read(enough func(idle int) bool) {
	r.t.Helper()
	for {
		s := r.sampler()
		again := false
		read := func() {
			for s.last < uint64(len(r.log)) && !again {
				seq := max(s.last, r.floor) + 1
				out, err := s.Add(seq, r.log[seq-1])
				again = r.take(s, out, err)
			}
		}
		s.last = r.floor
		for idle := 0; !again; idle++ {
			if enough(idle) {
				return
			}
			if read(); !again {
				r.now = r.now.Add(time.Second)
				again = r.take(s, s.Idle(Mark{Before: []time.Time{r.now.Add(-200 * time.Millisecond)}}, r.now), nil)
			}
		}
		if r.rounds > 300 {
			r.t.Fatalf("%d rounds, floor %d of %d, decided %v", r.rounds, r.floor, len(r.log), r.decided)
		}
	}
}

func (r *partitionReader) add(instance string, arrival int64, traces ...string) {
	f := envelope.Frame{Instance: instance, Arrival: arrival, Seq: uint64(len(r.log) + 1)}
	for _, id := range traces {
		f.Payload = append(f.Payload, spanOf(id, "a", 0, false)...)
	}
	r.log = append(r.log, f)
}

// flood adds messages of one stamp, and between them those of a victim, whose clock goes on.
func (r *partitionReader) flood(messages int, stamp func(n int) int64) {
	for n := range messages {
		var traces []string
		for i := range 20 {
			traces = append(traces, fmt.Sprintf("%x", 1+n*20+i))
		}
		r.add("hostile", stamp(n), traces...)
		r.add("victim", r.now.Add(time.Duration(n)*100*time.Millisecond).UnixNano(), fmt.Sprintf("%x", n+1))
	}
}

// TestAFrozenClockHoldsUpNobody: far more than a sampler can hold comes under one stamp. Each
// time reading begins again something has been decided, the other instance's traces are
// decided as its own clock says, and in the end all is.
func TestAFrozenClockHoldsUpNobody(t *testing.T) {
	t.Run("one stamp", func(t *testing.T) { frozenClock(t, 0) })
	t.Run("one stamp, and one before", func(t *testing.T) { frozenClock(t, 1) }) // which is all that is left when the others are put back
}

func frozenClock(t *testing.T, earlier int64) {
	const messages = 400
	r := newPartitionReader(t, 800_000) // of 5 MB
	frozen := r.now.UnixNano()
	r.flood(messages, func(n int) int64 {
		if n == 0 {
			return frozen - earlier
		}
		return frozen
	})
	first := 0
	r.read(func(idle int) bool {
		if first == 0 && r.rounds > 1 {
			first = r.decided["victim"]
		}
		return r.floor == uint64(len(r.log)) || idle > 100
	})
	if r.decided["hostile"] != messages*20 || r.decided["victim"] != messages || r.floor != uint64(len(r.log)) {
		t.Errorf("decided %v, floor %d of %d after %d rounds", r.decided, r.floor, len(r.log), r.rounds)
	}
	// All whose window had closed, but for those that share what the hostile one filled.
	if first < messages-110 {
		t.Errorf("%d of the victim's %d traces were decided before reading began again", first, messages)
	}
	if r.rounds < 2 || r.rounds > 60 {
		t.Errorf("%d rounds", r.rounds)
	}
	if r.most > r.room*3/2+100_000 {
		t.Errorf("%d bytes held, the bound is %d", r.most, r.room)
	}
}

// TestAFrozenClockThatGoesOn: an instance sends and sends, and its stamps stay what they are;
// or they go back and forth, which moves its windows with them.
func TestAFrozenClockThatGoesOn(t *testing.T) {
	for name, stamp := range map[string]func(now time.Time, n int) int64{
		"the same stamp": func(time.Time, int) int64 { return 1_999_999e9 },
		"to and fro":     func(_ time.Time, n int) int64 { return 1_999_999e9 + int64(n%2)*5e9 },
		"further back":   func(_ time.Time, n int) int64 { return 1_999_999e9 - int64(n)*2e9 },
	} {
		t.Run(name, func(t *testing.T) {
			r := newPartitionReader(t, 1<<20)
			sent := 0
			r.read(func(int) bool {
				r.add("hostile", stamp(r.now, sent), fmt.Sprintf("%x", sent+1))
				r.add("victim", r.now.UnixNano(), fmt.Sprintf("%x", sent+1))
				sent++
				return sent > 1500 // seconds
			})
			if want := 1500 - 10 - int(patience/time.Second) - 20; r.decided["hostile"] < want || r.floor < uint64(2*want) {
				t.Errorf("%d of %d traces were decided, floor %d", r.decided["hostile"], sent, r.floor)
			}
			if r.decided["victim"] < 1480 {
				t.Errorf("victim: %d of %d", r.decided["victim"], sent)
			}
		})
	}
}

// TestASilentHeapHoldsUpNobody: an instance holds nearly all there is, and is silent or sends
// on under a stamp that stands still, while another is busy: that one's traces are decided,
// and the floor moves.
func TestASilentHeapHoldsUpNobody(t *testing.T) {
	for name, seconds := range map[string]int{"silent": 150, "frozen": 800} { // that longer than patience
		t.Run(name, func(t *testing.T) {
			goesOn := name == "frozen"
			const perSecond = 40 // of 560 bytes: 10 s of them are more than a quarter of the room
			r := newPartitionReader(t, 800_000)
			stamp := r.now.UnixNano()
			for m := range 14 {
				var traces []string
				for i := range 95 {
					traces = append(traces, fmt.Sprintf("%x", 1+m*95+i))
				}
				r.add("hostile", stamp, traces...)
			}
			heap, sent, n := len(r.log), 0, 2000
			var floors []uint64
			r.read(func(int) bool {
				for i := range perSecond {
					r.add("busy", r.now.UnixNano()+int64(i), fmt.Sprintf("%x", sent+1))
					sent++
				}
				if goesOn {
					n++
					r.add("hostile", stamp, fmt.Sprintf("%x", n))
				}
				floors = append(floors, r.floor)
				return len(floors) > seconds
			})
			if r.decided["hostile"] < 14*95 || r.floor < uint64(heap) {
				t.Errorf("decided %v, floor %d, the heap ends at %d", r.decided, r.floor, heap)
			}
			if late := sent - r.decided["busy"]; late > perSecond*60 {
				t.Errorf("%d of %d traces of the busy one are not decided", late, sent)
			}
			if r.rounds > 20 {
				t.Errorf("%d rounds", r.rounds)
			}
			t.Logf("%d rounds, floor %d of %d, decided %v", r.rounds, r.floor, len(r.log), r.decided)
		})
	}
}

// TestAGiantOfPieces: one trace comes in pieces of a span, each in a resource of its own: what
// it takes counts, not its payload alone, and it is the one that is given up.
func TestAGiantOfPieces(t *testing.T) {
	s := New(policy.KeepAll(10*time.Second), 400_000, 0)
	base := time.Unix(2_000_000, 0).UnixNano()
	seq, given := uint64(0), 0
	add := func(instance string, payload []byte) {
		seq++
		out, err := s.Add(seq, envelope.Frame{Instance: instance, Arrival: base, Seq: seq, Payload: payload})
		if err != nil {
			t.Fatal(err)
		}
		given += out.TooLarge
		if out.Full || out.Rewind {
			t.Fatalf("message %d: others wait for it", seq)
		}
	}
	for i := range 100 {
		add("victim", spanOf(fmt.Sprintf("%x", i+1), "a", 0, false))
	}
	for i := range 3000 {
		add("hostile", spanOf("1", fmt.Sprintf("%08d", i), 0, false))
	}
	if given != 1 || len(s.domains["victim"].traces) != 100 {
		t.Errorf("%d given up, %d of the victim's 100 are held", given, len(s.domains["victim"].traces))
	}
}

// TestSamplersFinishWhatWasPassedOver: of several partitions that share the room the last one
// is not the one that waited.
func TestSamplersFinishWhatWasPassedOver(t *testing.T) {
	const traces = 300
	decided := map[otlpwire.TraceID]bool{}
	for floor, round := uint64(0), 0; ; round++ {
		if round > 50 {
			t.Fatalf("no end, floor %d, %d decided", floor, len(decided))
		}
		all := NewSamplers(policy.KeepAll(10*time.Second), partition.Spread{N: 7}, 60_000, floor, nil)
		for id := range decided {
			body := envelope.AppendDecision(nil, envelope.Decision{Instance: "i", TraceID: id, Upto: traces})
			if err := all.Remember(body); err != nil {
				t.Fatal(err)
			}
		}
		take := func(out Output) bool {
			for _, d := range out.Decisions {
				decided[d.TraceID] = true
			}
			for i := range out.Exports {
				all.Release(out.Exports[i].Seq)
			}
			return out.Rewind
		}
		again := false
		for seq := floor + 1; seq <= traces && !again; seq++ {
			out, err := all.Add(seq, envelope.Frame{Instance: "i", Arrival: int64(seq), Seq: seq, Payload: spanOf(fmt.Sprintf("%x", seq), "a", 0, false)})
			if err != nil {
				t.Fatal(err)
			}
			again = take(out)
		}
		if !again {
			again = take(all.Finish())
		}
		floor = all.Floor()
		if !again {
			break
		}
	}
	if len(decided) != traces {
		t.Errorf("%d of %d traces are decided when the replay is done", len(decided), traces)
	}
}

// TestOddStamps: no stamp, and no order of them, keeps a trace from its decision once its
// instance is silent, or touches another instance.
func TestOddStamps(t *testing.T) {
	odd := []int64{math.MinInt64, math.MinInt64 + 1, -1, 0, 1, math.MaxInt64, math.MaxInt64 - 1, 1 << 62, -(1 << 62)}
	r := newPartitionReader(t, 1<<20)
	n := 0
	for _, a := range odd {
		for _, b := range odd {
			for _, c := range []int64{a, b, a, b} {
				n++
				r.add("hostile", c, fmt.Sprintf("%x", n))
			}
		}
		r.add("victim", r.now.UnixNano(), fmt.Sprintf("%x", n))
	}
	r.read(func(idle int) bool { return idle > 30 })
	if r.decided["hostile"] != n || r.decided["victim"] != len(odd) || r.floor != uint64(len(r.log)) {
		t.Errorf("decided %v of %d, floor %d of %d", r.decided, n, r.floor, len(r.log))
	}
}

// TestDecisionsOfOthersAreRemembered: an instance that decides without end pushes out what is
// remembered of itself.
func TestDecisionsOfOthersAreRemembered(t *testing.T) {
	m := newMemory(1000, 1000, 0)
	id := func(n int) otlpwire.TraceID { return otlpwire.TraceID{byte(n), byte(n >> 8), byte(n >> 16), 1} }
	for n := range 200 {
		m.keep(key{"victim", id(n)}, keptTrace{})
		m.drop(key{"victim", id(n + 1000)}, droppedTrace{})
	}
	for n := range 50_000 {
		m.keep(key{"hostile", id(n)}, keptTrace{})
		m.drop(key{"hostile", id(n)}, droppedTrace{})
	}
	for n := range 200 {
		if kept, known, _ := m.recall(key{"victim", id(n)}); !known || kept == nil {
			t.Fatalf("kept trace %d of the victim is forgotten", n)
		}
		if kept, known, _ := m.recall(key{"victim", id(n + 1000)}); !known || kept != nil {
			t.Fatalf("dropped trace %d of the victim is forgotten", n)
		}
	}
	if _, known, _ := m.recall(key{"hostile", id(49_999)}); !known {
		t.Error("the youngest decision is forgotten")
	}
	if m.kept.n > 1000 || m.dropped.n > 1000 {
		t.Errorf("%d and %d decisions are remembered", m.kept.n, m.dropped.n)
	}
}
