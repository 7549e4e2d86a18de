package sampler

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/partition"
	domains "github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// guarded is samplers of one partition that keep everything after ten seconds, and chosen decides what was asked for.
func guarded(chosen func(first int64, seq uint64) bool) *Samplers {
	return NewSamplers(policy.KeepAll(10*time.Second), partition.Spread{N: 1}, 1<<20, 0, chosen)
}

func (a *Samplers) addAt(t *testing.T, instance string, seq uint64, at time.Duration, trace, span string) Output {
	t.Helper()
	out, err := a.Add(seq, envelope.Frame{Instance: instance, Seq: seq, Arrival: simBase.Add(at).UnixNano(), Payload: spanOf(trace, span, 1, false)})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// without are versions of the policies in which a sequence has none: what begins there makes the sampler panic.
func without(seq uint64) []policy.Version {
	return []policy.Version{{From: seq}, {From: seq + 1, Set: policy.KeepAll(10 * time.Second)}}
}

// ends wants that samplers have panicked over a message, and that nothing is left of them.
func (a *Samplers) ends(t *testing.T, out Output, blamed About) {
	t.Helper()
	p := out.Panicked
	if p == nil || p.About != blamed || !strings.Contains(p.Stack, "sampler") {
		t.Fatalf("%+v, want %v to be blamed", p, blamed)
	}
	if out.Panicked = nil; !reflect.DeepEqual(out, Output{Rewind: true}) {
		t.Errorf("the step that panics has an output, too: %+v", out)
	}
	if !a.Broken() || a.Floor() != 0 {
		t.Errorf("broken: %v, floor %d", a.Broken(), a.Floor())
	}
	a.Use(without(99), nil)
	a.Release(1)
	a.Readable(1, 1)
	for i, out := range []Output{
		a.addAt(t, "i", 50, time.Hour, "e5", "x"), a.Idle(Mark{Before: []time.Time{simBase}}, simBase), a.Unblock(simBase), a.Restore(),
		a.Rescued(envelope.Decision{Instance: "i"}), a.Finish(),
	} {
		if !reflect.DeepEqual(out, Output{Rewind: true}) {
			t.Errorf("step %d after a panic: %+v", i, out)
		}
	}
	if traces, bytes := a.Held(); traces+bytes+a.Unsettled()+a.Sources().Known != 0 || a.Newest() != 0 || a.Floor() != 0 {
		t.Errorf("%d traces and %d bytes are left, the floor is %d", traces, bytes, a.Floor())
	}
}

// TestAPanicEndsTheSamplers, whatever they do, and the message that is to blame is named: the one whose span is added, or the
// first one of the trace that is decided, not the one that has moved the time.
func TestAPanicEndsTheSamplers(t *testing.T) {
	t.Run("adding", func(t *testing.T) {
		a := guarded(nil)
		a.Use(without(3), nil)
		for seq := range uint64(2) {
			if out := a.addAt(t, "i", seq+1, 0, "a1", string('a'+rune(seq))); out.Panicked != nil {
				t.Fatalf("%+v", out.Panicked)
			}
		}
		a.ends(t, a.addAt(t, "i", 3, time.Minute, "b2", "x"), About{3, "i"}) // when the other one has been decided
	})
	t.Run("one of several partitions", func(t *testing.T) {
		spread, last := partition.Spread{N: 4}, uint64(0)
		a := NewSamplers(policy.KeepAll(10*time.Second), spread, 1<<20, 0, func(_ int64, seq uint64) bool {
			if seq == last {
				panic("the last partition")
			}
			return true
		})
		for seq := range uint64(20) {
			if spread.Of("i", [16]byte{15: byte(seq + 1)}) == 3 {
				last = seq + 1
			}
			a.addAt(t, "i", seq+1, 0, fmt.Sprintf("%02x", seq+1), "x")
		}
		a.ends(t, a.Finish(), About{last, "i"})
	})
	t.Run("a frame that has waited", func(t *testing.T) {
		a := guarded(nil)
		a.Use(without(2), domains.Versions{{Number: 1, From: 1, Set: domains.New(domains.Config{{Name: "d", Instances: []string{"i", "j"}}})}})
		a.Idle(Mark{Before: make([]time.Time, 2), Routed: make([]uint64, 2)}, simBase)
		a.addAt(t, "i", 1, 0, "a1", "x")
		a.addAt(t, "j", 2, 0, "b2", "x") // it waits
		a.ends(t, a.addAt(t, "i", 3, 0, "c3", "x"), About{2, "j"})
	})
	second := func(_ int64, seq uint64) bool {
		if seq == 2 {
			panic("the second")
		}
		return true
	}
	for name, step := range map[string]func(*Samplers) Output{
		"decided by a message": func(a *Samplers) Output { return a.addAt(t, "i", 4, time.Minute, "d4", "x") },
		"decided by time": func(a *Samplers) Output {
			for at := simBase; ; at = at.Add(time.Second) {
				if out := a.Idle(Mark{Before: []time.Time{at}}, at); out.Panicked != nil || at.Sub(simBase) > time.Hour {
					return out
				}
			}
		},
		"decided at the end":      (*Samplers).Finish,
		"decided because of room": func(a *Samplers) Output { return a.Unblock(simBase.Add(time.Hour)) },
	} {
		t.Run(name, func(t *testing.T) {
			a := guarded(second)
			a.addAt(t, "i", 1, 0, "a1", "x")
			a.addAt(t, "i", 2, time.Second, "b2", "x")
			a.addAt(t, "i", 3, 2*time.Second, "b2", "y")
			a.ends(t, step(a), About{2, "i"})
		})
	}
	t.Run("no message", func(t *testing.T) {
		a := guarded(nil)
		a.addAt(t, "i", 1, 0, "a1", "x")
		a.Idle(Mark{Before: make([]time.Time, 1), Routed: make([]uint64, 1)}, simBase)
		a.ends(t, a.Idle(Mark{Before: make([]time.Time, 1), Routed: make([]uint64, 2)}, simBase), About{}) // there is no such partition
	})
	t.Run("told later", func(t *testing.T) {
		a := guarded(nil)
		a.addAt(t, "i", 1, 0, "a1", "x")
		a.Use(without(1), nil)
		if !a.Broken() {
			t.Fatal("a version without policies is none")
		}
		a.ends(t, a.Finish(), About{})
	})
}

// TestADecisionThatCannotBeRemembered is an error, as one that cannot be decoded.
func TestADecisionThatCannotBeRemembered(t *testing.T) {
	a := NewSamplers(policy.KeepAll(time.Second), partition.Spread{N: 8}, 1<<20, 0, nil)
	a.parts = a.parts[:1]
	var all []envelope.Decision
	for n := range byte(20) {
		all = append(all, envelope.Decision{Domain: "i", Instance: "i", TraceID: [16]byte{n}, Upto: 1})
	}
	if _, is := a.Remember(envelope.AppendDecisions(nil, all...)).(*fault.Panic); !is { //nolint:errorlint // it is not wrapped
		t.Error("no panic is returned")
	}
}

// TestPoliciesThatPanicAreTold: the trace is decided by the others, and the output says how many policies panicked, with the
// first trace, its instance and the policy; also when late spans are decided, and over several partitions.
func TestPoliciesThatPanicAreTold(t *testing.T) {
	set, frames := lateStream()
	set = set.With("mine", func(tr *policy.Trace) policy.Outcome {
		if tr.ID[15] == 0xa1 {
			panic("a policy")
		}
		return policy.NotSampled
	})
	dull := frames[3]
	dull.Payload = spanOf("a1", "dull", 0, false) // comes late, and is not wanted
	frames = append(frames[:3:3], append([]envelope.Frame{dull}, frames[3:]...)...)
	for n, want := range map[int]string{1: "..11..", 4: "...2.."} { // of four partitions the one of the trace gets only what is late
		a, got := NewSamplers(set, partition.Spread{N: n}, 1<<20, 0, nil), ""
		for i, f := range frames {
			out, err := a.Add(uint64(i+1), f)
			if err != nil {
				t.Fatal(err)
			}
			one := out.NoAnswer
			if one == nil {
				got += "."
				continue
			}
			got += strconv.Itoa(one.Policies)
			if one.Policy != "mine" || one.Instance != "i" || one.TraceID[15] != 0xa1 || one.Value != "a policy" || !strings.Contains(one.Stack, "panic_test.go") {
				t.Errorf("%d partitions, frame %d: %+v", n, i+1, one)
			}
		}
		if got != want {
			t.Errorf("%d partitions: %s, want %s", n, got, want)
		}
		if out := a.Finish(); out.NoAnswer != nil || out.Panicked != nil {
			t.Errorf("%+v", out)
		}
	}
	a := NewSamplers(policy.KeepAll(time.Second).With("all", func(*policy.Trace) policy.Outcome { panic("all") }), partition.Spread{N: 4}, 1<<20, 0, nil)
	for n := range 20 {
		a.addAt(t, "i", uint64(n+1), 0, fmt.Sprintf("%02x", n), "x")
	}
	if out := a.Finish(); out.NoAnswer == nil || out.NoAnswer.Policies != 20 || len(out.Exports) != 20 {
		t.Errorf("%d exports, %+v", len(out.Exports), out.NoAnswer)
	}
}

// TestARescuerContinues with the next frame when one makes it panic, and nothing of that one is left.
func TestARescuerContinues(t *testing.T) {
	in := envelope.Decision{Domain: "i", Instance: "i", Kept: true, From: 1, Upto: 9, Late: envelope.Rescued}
	in.TraceID[15] = 0xa1
	r := NewRescuer([]envelope.Decision{in}, nil)
	poison := in.TraceID
	poison[15] = 0xb2
	r.wanted[poison] = []*rescued{nil}
	payload, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{
		{TraceId: in.TraceID[:], SpanId: []byte("01234567")}, {TraceId: poison[:], SpanId: []byte("01234567")},
	}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := r.Add(1, envelope.Frame{Instance: "i", Seq: 1, Payload: payload}); out != nil || !strings.Contains(fmt.Sprint(err), "panic: ") {
		t.Errorf("%+v, %v", out, err)
	}
	if out, err := r.Add(2, envelope.Frame{Instance: "i", Seq: 2, Payload: spanOf("a1", "x", 0, false)}); err != nil || len(out) != 1 || out[0].Spans != 1 {
		t.Errorf("%+v, %v", out, err)
	}
}

// TestAboutATrace names the instance that sent the first message of it.
func TestAboutATrace(t *testing.T) {
	a, b := &instance{name: "a"}, &instance{name: "b"}
	for _, owed := range []uint64{3, 5} {
		tr := &trace{owed: owed, shares: []share{{in: a, parts: []Part{{5, 1}, {7, 1}}}, {in: b, parts: []Part{{3, 1}, {5, 1}}}}}
		if got, want := tr.about(), map[uint64]About{3: {3, "b"}, 5: {5, "a"}}[owed]; got != want {
			t.Errorf("%v, want %v", got, want)
		}
	}
}
