package sample

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink/policy"
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
				again = r.take(s, s.Idle(r.now.Add(-200*time.Millisecond), r.now), nil)
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
		m.drop(key{"victim", id(n + 1000)}, 0)
	}
	for n := range 50_000 {
		m.keep(key{"hostile", id(n)}, keptTrace{})
		m.drop(key{"hostile", id(n)}, 0)
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
