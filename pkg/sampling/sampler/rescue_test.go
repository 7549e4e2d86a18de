package sampler

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// lateStream is a trace that a late error brings back, and what comes after it; message n has one span.
func lateStream() (set *policy.Set, frames []envelope.Frame) {
	set, err := policy.Parse("p", []byte("decision_wait: 10s\npolicies: [{name: errors, type: status_code, status_code: {status_codes: [ERROR]}}]"))
	if err != nil {
		panic(err)
	}
	set.Late = policy.Late{Traces: 5, Age: time.Hour}
	for _, of := range []struct {
		at          int64
		trace, span string
		failed      bool
	}{{100, "a1", "x", false}, {101, "b2", "x", false}, {115, "c3", "x", false}, {116, "a1", "late", true}, {117, "a1", "later", false}} {
		frames = append(frames, envelope.Frame{Instance: "i", Arrival: of.at * 1e9, Payload: spanOf(of.trace, of.span, 0, of.failed)})
	}
	return set, frames
}

// TestARescueIsTakenOver: it is owed from the moment it is recorded until it is known to be sent, by whoever owns the
// partition, however little of it that owner has read; what it covers is not sent beside it.
func TestARescueIsTakenOver(t *testing.T) {
	set, frames := lateStream()
	s := New(set, 1<<20, 0)
	var decisions []envelope.Decision
	var rescues []envelope.Decision
	for i, f := range frames {
		out, err := s.Add(uint64(i+1), f)
		if err != nil {
			t.Fatal(err)
		}
		decisions, rescues = append(decisions, out.Decisions...), append(rescues, out.Rescues...)
		for _, e := range out.Exports {
			s.Release(e.Seq)
		}
	}
	if len(rescues) != 1 || rescues[0].From != 1 || rescues[0].Upto != 4 || s.Floor() != 2 {
		t.Fatalf("%+v, floor %d", rescues, s.Floor())
	}
	open := func(floor uint64, journal ...envelope.Decision) (*Sampler, []envelope.Decision) {
		t.Helper()
		s := New(set, 1<<20, floor)
		body := envelope.AppendDecisions(nil, append([]envelope.Decision{{}}, journal...)...)
		for _, message := range [][]byte{nil, body, envelope.AppendDecisions(nil, envelope.Decision{}), nil} { // a checkpoint says nothing of rescues
			if err := s.Remember(message); err != nil {
				t.Fatal(err)
			}
		}
		return s, s.Restore().Rescues
	}
	for _, floor := range []uint64{0, 2, 3} {
		s, owed := open(floor, decisions...)
		if len(owed) != 1 || fmt.Sprintf("%+v", owed[0]) != fmt.Sprintf("%+v", rescues[0]) {
			t.Errorf("from floor %d: %+v are owed", floor, owed)
		}
		if got := s.Floor(); got != 0 {
			t.Errorf("nothing is read, and the floor is %d", got)
		}
		var how []string
		for i := floor; i < uint64(len(frames)); i++ {
			out, err := s.Add(i+1, frames[i])
			if err != nil || len(out.Rescues) > 0 {
				t.Fatalf("%+v %v", out.Rescues, err)
			}
			for _, e := range out.Ended {
				if e.Seq == 1 || e.Seq == 4 { // its previous owner has counted it
					if out.Duplicates != 1 || out.SampledOut != 0 {
						t.Errorf("from floor %d: message %d counts as %+v", floor, e.Seq, out)
					}
					how = append(how, fmt.Sprint(e.Seq, e.How == NotKept))
				}
			}
			for _, e := range out.Exports {
				if s.Release(e.Seq); e.Seq != 5 {
					t.Errorf("from floor %d: message %d is sent beside the rescue", floor, e.Seq)
				}
			}
		}
		want := []string{"1 true", "4 true"}
		if floor > 0 {
			want = want[1:]
		}
		if !slices.Equal(how, want) {
			t.Errorf("from floor %d: ended %v, want %v", floor, how, want)
		}
		if got := s.Floor(); got > 3 {
			t.Errorf("the floor is %d, past what is owed", got)
		}
		s.Rescued(owed[0])
		if s.Finish(); s.Floor() != uint64(len(frames)) {
			t.Errorf("the floor is %d after everything", s.Floor())
		}
	}
	if _, owed := open(4, decisions...); len(owed) > 0 {
		t.Errorf("the floor has passed it, and %+v is owed", owed)
	}
	sent := rescues[0]
	sent.Late = envelope.RescueSent
	after, owed := open(2, append(slices.Clone(decisions), sent)...)
	if len(owed) > 0 {
		t.Errorf("it is sent, and %+v is owed", owed)
	}
	if out, _ := after.Add(4, frames[3]); len(out.Ended) != 1 || out.Ended[0].How != Sent {
		t.Errorf("what is sent ends as %+v", out.Ended)
	}
}

// TestARescuedTraceIsForgotten like others: it is not rescued twice.
func TestARescuedTraceIsForgotten(t *testing.T) {
	set, frames := lateStream()
	set.Kept = 1
	s := New(set, 1<<20, 0)
	for i, f := range append(frames, envelope.Frame{Instance: "i", Arrival: 118e9, Payload: spanOf("b2", "late", 0, true)}, envelope.Frame{Instance: "i", Arrival: 119e9, Payload: spanOf("a1", "last", 0, true)}) {
		out, err := s.Add(uint64(i+1), f)
		if err != nil {
			t.Fatal(err)
		}
		if i == len(frames)+1 && len(out.Rescues)+len(out.Exports) > 0 {
			t.Errorf("a1 was rescued, and forgotten when b2 was: %+v", out)
		}
	}
	if traces, _ := s.Held(); traces != 2 { // a1 is another trace now, as after every decision that is forgotten
		t.Errorf("%d traces are held", traces)
	}
}

// TestARescuerLeavesOut what is beyond its range, of another trace, or of another instance.
func TestARescuerLeavesOut(t *testing.T) {
	_, frames := lateStream()
	id := [16]byte{15: 0xa1}
	r := NewRescuer([]envelope.Decision{{Domain: "i", TraceID: id, From: 2, Upto: 9}, {Domain: "j", TraceID: id, From: 5, Upto: 20}}, nil)
	if from, upto := r.Range(); from != 2 || upto != 20 {
		t.Errorf("from %d to %d", from, upto)
	}
	for _, tc := range []struct {
		seq      uint64
		frame    envelope.Frame
		instance string
		spans    int
	}{
		{1, frames[0], "i", 0},
		{2, frames[0], "i", 1},
		{3, frames[0], "i", 0}, // once more
		{3, frames[1], "i", 0},
		{4, frames[3], "k", 0},
		{4, frames[3], "j", 0},
		{5, frames[3], "j", 1},
		{9, frames[3], "i", 1},
		{10, frames[4], "i", 0},
	} {
		tc.frame.Instance = tc.instance
		out, err := r.Add(tc.seq, tc.frame)
		n := 0
		for _, e := range out {
			if n += e.Spans; e.Instance != tc.instance || !e.Rescued {
				t.Errorf("%+v", e)
			}
		}
		if err != nil || n != tc.spans {
			t.Errorf("message %d of %s: %d spans, want %d, %v", tc.seq, tc.instance, n, tc.spans, err)
		}
	}
	if _, err := r.Add(9, envelope.Frame{Instance: "i", Payload: []byte{0x0a, 0xff}}); err == nil {
		t.Error("a payload that is none is read")
	}
}
