package sampler

import (
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

func TestMemoryIsBounded(t *testing.T) {
	const bound = 10_000
	s := New(policy.KeepAll(10*time.Second), bound, 0)
	base := time.Unix(1000, 0)
	full, rewind := 0, 0
	for i := range 2000 {
		at := base.Add(time.Duration(i) * 20 * time.Millisecond)
		o, err := s.Add(uint64(i+1), envelope.Frame{Instance: "i", Arrival: at.UnixNano(), Payload: spanOf(fmt.Sprintf("%x", i+1), "a", 0, false)})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range o.Exports {
			s.Release(e.Seq)
		}
		if _, bytes := s.Held(); bytes > bound+800 {
			t.Fatalf("%d bytes held", bytes)
		}
		if o.Full {
			full = i + 1
		}
		if o.Rewind {
			rewind = i + 1
			break
		}
	}
	if full == 0 || rewind < 500 || s.Floor() >= uint64(full) {
		t.Errorf("full at %d, room again at %d, floor %d", full, rewind, s.Floor())
	}
	m := newMemory(10, 10, 1<<40)
	for i := range 1000 {
		k := key{"i", otlpwire.TraceID{byte(i), byte(i >> 8)}}
		if m.keep(k, keptTrace{}); i%2 == 0 {
			m.drop(k, droppedTrace{})
		}
	}
	n := 0
	for _, s := range m.kept.of {
		n += len(s.values)
	}
	for _, s := range m.dropped.of {
		n += len(s.values)
	}
	if n > 20 {
		t.Errorf("%d decisions remembered, want at most 20", n)
	}
}

// TestHeldTracesMayGrow: traces that are held grow beyond all bounds together; the
// youngest are put back, and what is decided is what a sampler with room decides.
func TestHeldTracesMayGrow(t *testing.T) {
	const bound = 20_000
	base := time.Unix(1000, 0)
	run := func(room int) map[string]bool {
		decided := map[string]bool{}
		var journal [][]byte
		floor := uint64(0)
		for range 100 {
			s := New(policy.KeepAll(10*time.Second), room, floor)
			for _, m := range append(journal, nil) {
				if err := s.Remember(m); err != nil {
					t.Fatal(err)
				}
			}
			rewind := false
			note := func(o Output) {
				m := envelope.AppendDecision(nil, envelope.Decision{})
				for _, d := range o.Decisions {
					m = envelope.AppendDecision(m, d)
				}
				journal = append(journal, m)
				for _, e := range o.Exports {
					decided[fmt.Sprint(e.Policy, e.Spans, e.Late)] = true
					s.Release(e.Seq)
				}
				rewind = rewind || o.Rewind
			}
			for seq := floor + 1; seq <= 400 && !rewind; seq++ { // 40 traces, each grows ten times
				o, err := s.Add(seq, envelope.Frame{Instance: "i", Arrival: base.Add(time.Duration(seq) * 20 * time.Millisecond).UnixNano(), Seq: seq, Payload: spanOf(fmt.Sprintf("%x", 1+seq%40), fmt.Sprint(seq)+strings.Repeat("x", 150), 0, false)})
				if err != nil {
					t.Fatal(err)
				}
				note(o)
				if _, bytes := s.Held(); bytes > room+room/2+1000 {
					t.Fatalf("%d bytes held", bytes)
				}
			}
			for range 2 {
				if !rewind {
					note(silence(s, base, base.Add(time.Hour)))
				}
			}
			floor = s.Floor()
			if !rewind {
				return decided
			}
			journal = append(journal, envelope.AppendDecision(nil, envelope.Decision{}))
		}
		t.Fatal("never finished")
		return nil
	}
	if got, want := run(bound), run(1<<30); !maps.Equal(got, want) || len(want) != 1 {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestTakeOverRemembersAllAboveTheFloor: a cache that is too small for what stands
// above the floor reverses no decision.
func TestTakeOverRemembersAllAboveTheFloor(t *testing.T) {
	set, err := policy.Parse("p", []byte("decision_cache: {sampled_cache_size: 10, non_sampled_cache_size: 10}\npolicies: [{name: e, type: status_code, status_code: {status_codes: [ERROR]}}]"))
	if err != nil {
		t.Fatal(err)
	}
	var journal []byte
	for i := range 1000 {
		journal = envelope.AppendDecision(journal, envelope.Decision{Instance: "i", TraceID: otlpwire.TraceID{14: byte(i >> 8), 15: byte(i)}, Kept: i%2 == 0, Upto: uint64(100 + i)})
	}
	next := New(set, 1<<20, 100)
	if err := next.Remember(journal); err != nil {
		t.Fatal(err)
	}
	base := time.Unix(1000, 0)
	add := func(seq uint64, trace string) Output {
		o, err := next.Add(seq, envelope.Frame{Instance: "i", Arrival: base.UnixNano(), Seq: seq, Payload: spanOf(trace, "late", 0, true)})
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	if o := add(101, "3"); o.Duplicates != 1 {
		t.Errorf("a dropped trace's span that was read before: %+v", o)
	}
	if o := add(110, "5"); o.SampledOut != 1 {
		t.Errorf("a late span of a dropped trace: %+v", o)
	}
	if o := add(111, "4"); len(o.Exports) != 1 || !o.Exports[0].Late {
		t.Errorf("a span of a kept trace: %+v", o)
	}
	if add(2000, "3e8"); next.decided.above != nil {
		t.Error("what is passed is remembered for ever")
	}
}

func TestRecordedDecisionsAreNotReversed(t *testing.T) {
	set, err := policy.Parse("p", []byte("policies: [{name: e, type: status_code, status_code: {status_codes: [ERROR]}}]"))
	if err != nil {
		t.Fatal(err)
	}
	base := time.Unix(1000, 0)
	first := New(set, 1<<20, 0)
	feed := func(s *Sampler, seq uint64, trace string, failed bool) Output {
		o, err := s.Add(seq, envelope.Frame{Instance: "i", Arrival: base.UnixNano(), Payload: spanOf(trace, "x", 0, failed)})
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	feed(first, 1, "a1", false)
	feed(first, 2, "b2", true)
	out := silence(first, base, base.Add(time.Hour))
	if len(out.Decisions) != 2 {
		t.Fatalf("got %+v", out)
	}
	var record []byte
	for _, d := range out.Decisions {
		record = envelope.AppendDecision(record, d)
	}
	checkpoint := envelope.AppendDecision(nil, envelope.Decision{})
	for name, tc := range map[string]struct {
		journal [][]byte
		again   bool // the kept trace's own span is exported again
	}{
		"not known to be sent":     {[][]byte{nil, record}, true},
		"sent":                     {[][]byte{nil, record, checkpoint}, false},
		"sent by the owner before": {[][]byte{nil, record, nil, checkpoint}, true},
	} {
		next := New(set, 1<<20, 0)
		for _, m := range tc.journal {
			if err := next.Remember(m); err != nil {
				t.Fatal(err)
			}
		}
		// Of the dropped trace comes an error, of the kept one none.
		if o := feed(next, 3, "a1", true); o.SampledOut != 1 || len(o.Exports) != 0 {
			t.Errorf("%s: dropped trace: %+v", name, o)
		}
		if o := feed(next, 2, "b2", true); (len(o.Exports) == 1) != tc.again || (o.Duplicates == 1) == tc.again {
			t.Errorf("%s: the kept trace again: %+v", name, o)
		}
		if o := feed(next, 4, "b2", false); o.SampledOut != 0 || len(o.Exports) != 1 {
			t.Errorf("%s: kept trace, late: %+v", name, o)
		}
	}
	if err := New(set, 1<<20, 0).Remember(record[:len(record)-1]); err == nil {
		t.Error("a record that was cut is no error")
	}
}

// TestRoutedAgain: frames of a router that has died come again from the next one,
// also when their traces have been decided.
func TestRoutedAgain(t *testing.T) {
	base := time.Unix(1000, 0)
	s := New(policy.KeepAll(time.Second), 1<<20, 0)
	var total Output
	feed := func(at time.Duration, origin uint64, trace string) {
		o, err := s.Add(uint64(at), envelope.Frame{Instance: "i", Arrival: base.Add(at).UnixNano(), Seq: origin, Payload: spanOf(trace, "x", 0, false)})
		if err != nil {
			t.Fatal(err)
		}
		total.Exports, total.Duplicates = append(total.Exports, o.Exports...), total.Duplicates+o.Duplicates
	}
	feed(0, 1, "a1")
	feed(2*time.Second, 2, "b2")
	feed(4*time.Second, 3, "c3")
	feed(2*time.Second, 2, "b2")
	feed(4*time.Second, 3, "c3")
	if len(total.Exports) != 2 || total.Duplicates != 2 {
		t.Errorf("%d exports, %d duplicates; want 2 and 2", len(total.Exports), total.Duplicates)
	}
	feed(6*time.Second, 1, "d4") // TRACES was made anew: not a repetition
	feed(8*time.Second, 2, "e5")
	if len(total.Exports) != 4 || total.Duplicates != 2 {
		t.Errorf("%d exports, %d duplicates; want 4 and 2", len(total.Exports), total.Duplicates)
	}
}

// TestAFrameIsHeldAsAWholeOrNot: when the room ends within a frame, none of the
// traces that begin with it is held. One that was would be decided before its
// neighbours that have the same due and a lower ID.
func TestAFrameIsHeldAsAWholeOrNot(t *testing.T) {
	base := time.Unix(1000, 0)
	s := New(policy.KeepAll(10*time.Second), 2300, 0)
	frame := func(seq uint64, traces ...string) Output {
		f := envelope.Frame{Instance: "i", Arrival: base.Add(time.Duration(seq)).UnixNano(), Seq: seq}
		for _, id := range traces {
			f.Payload = append(f.Payload, spanOf(id, strings.Repeat("x", 250), 0, false)...)
		}
		o, err := s.Add(seq, f)
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	frame(1, "0a", "0b") // one more fits
	if frame(2, "a1"); s.held.bytes < 2300-900 || s.held.bytes > 2300+1000 {
		t.Fatalf("a trace is %d bytes: the test tests nothing", s.held.bytes)
	}
	o := frame(3, "f6", "e5", "d4", "c3", "b2")
	if traces, _ := s.Held(); traces != 3 || !o.Full {
		t.Errorf("%d traces are held, full %v; want the first three only", traces, o.Full)
	}
	if s.Floor() != 0 {
		t.Errorf("floor %d, although all is owed", s.Floor())
	}
}
