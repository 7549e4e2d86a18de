package sampler

import (
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	domains "github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// orderly is a sampler with a domain of i and j, which are in two partitions of TRACES.
func orderly() *Sampler {
	s := New(policy.KeepAll(10*time.Second), 1<<20, 0)
	s.Use(nil, domains.Versions{{Number: 1, From: 1, Set: domains.New(domains.Config{{Name: "d", Instances: []string{"i", "j"}}})}})
	s.Idle(Mark{Before: make([]time.Time, 2), Routed: make([]uint64, 2)}, simBase)
	return s
}

func (s *Sampler) addAt(t *testing.T, instance string, origin uint64, at time.Duration, trace, span string) Output {
	t.Helper()
	out, err := s.Add(origin, envelope.Frame{Instance: instance, Seq: origin, Arrival: simBase.Add(at).UnixNano(), Payload: spanOf(trace, span, 1, false)})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestAFrameDoesNotWaitForEver: where a router stands for longer than the patience, by the reader's clock, what waits
// for it is added. Nothing that waits is forgotten when its domain has been silent.
func TestAFrameDoesNotWaitForEver(t *testing.T) {
	s := orderly()
	s.addAt(t, "i", 1, 0, "a1", "x")
	s.addAt(t, "j", 2, 0, "a1", "y")
	at := func(d time.Duration) Mark {
		return Mark{Before: []time.Time{simBase.Add(d), simBase.Add(d)}, Routed: []uint64{2, 2}}
	}
	n := 0
	for _, d := range []time.Duration{time.Second, time.Minute, time.Hour} {
		for _, e := range s.Idle(at(d), simBase.Add(d)).Exports {
			s.Release(e.Seq)
			n++
		}
	}
	if held, _ := s.Held(); n != 2 || held != 0 {
		t.Fatalf("%d exports, %d are held", n, held)
	}
	late := 2 * time.Hour
	s.now = simBase.Add(late).UnixNano()
	s.addAt(t, "i", 4, late, "b2", "x") // it waits for j
	s.Idle(at(late), simBase.Add(late))
	if len(s.domains["@d"].order.frames) != 1 || s.Floor() != 3 {
		t.Fatalf("the frame is gone, the floor is %d", s.Floor())
	}
	late += time.Duration(orderPatience) + time.Second
	if out := s.Idle(at(late), simBase.Add(late)); out.Unordered != 1 || s.waiting != 0 {
		t.Errorf("%d unordered, %d bytes wait", out.Unordered, s.waiting)
	}
}

// TestADomainIsLeftWhileFramesWait: what waits in it is added before what the instance sends in the next one.
func TestADomainIsLeftWhileFramesWait(t *testing.T) {
	s := orderly()
	s.addAt(t, "i", 1, 0, "a1", "x")
	s.addAt(t, "j", 2, 0, "b2", "x")
	s.addAt(t, "i", 5, time.Second, "a1", "y")
	s.Use(nil, append(s.grouping, domains.Version{Number: 2, From: 6}))
	s.addAt(t, "i", 6, 2*time.Second, "c3", "x")
	s.addAt(t, "i", 7, 3*time.Second, "a1", "z")
	s.addAt(t, "j", 8, 3*time.Second, "c3", "x")
	if len(s.domains["j"].traces) != 0 || s.waiting == 0 {
		t.Error("the last one does not wait for what i may still have sent")
	}
	s.Idle(Mark{Before: make([]time.Time, 2), Routed: []uint64{8, 8}}, simBase)
	for name, want := range map[string]int{"@d": 2, "i": 1, "j": 1} {
		if d := s.domains[name]; d == nil || len(d.traces) != want {
			t.Errorf("%s: %+v", name, d)
		}
	}
	spans := 0
	for _, one := range s.domains["@d"].traces {
		spans += one.spans()
	}
	if spans != 4 || s.waiting != 0 {
		t.Errorf("the traces have %d spans, %d bytes wait", spans, s.waiting)
	}
}
