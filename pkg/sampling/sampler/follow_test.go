package sampler

import (
	"fmt"
	"slices"
	"testing"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// TestLiveDecisionsAreFollowed, whatever the policies say now, span by span, also by the next owner; the last one about a
// trace that says kept counts. A trace that began outside the range is not kept, and what there is no decision of is decided.
func TestLiveDecisionsAreFollowed(t *testing.T) {
	set, err := policy.Parse("p", []byte("decision_wait: 10s\npolicies: [{name: errors, type: status_code, status_code: {status_codes: [ERROR]}}]"))
	if err != nil {
		t.Fatal(err)
	}
	id := func(n byte) otlpwire.TraceID { return otlpwire.TraceID{15: n} }
	open := func(journal ...[]byte) *Samplers {
		s := NewSamplers(set, partition.Spread{N: 2}, 1<<20, 0, func(first int64, _ uint64) bool { return first >= 50e9 })
		for _, m := range append([][]byte{nil}, journal...) {
			if err := s.Remember(m); err != nil {
				t.Fatal(err)
			}
		}
		for _, d := range []envelope.Decision{
			{Domain: "i", Instance: "i", TraceID: id(0xa1), Kept: true, Policy: "then", Threshold: 7},
			{Domain: "i", Instance: "i", TraceID: id(0xb2)},
			{Domain: "i", Instance: "i", TraceID: id(0xc3)},
			{Domain: "i", Instance: "i", TraceID: id(0xc3), Kept: true, Policy: "late", Late: envelope.Rescued},
			{Domain: "i", Instance: "i", TraceID: id(0xd4), Kept: true, Policy: "then"},
			{Domain: "j", Instance: "j", TraceID: id(0xe5), Kept: true, Policy: "then"},
			{Domain: "i", Instance: "i", TraceID: id(0xa1)}, // its decision was forgotten when a late span came
		} {
			if !s.Follow(d) {
				t.Fatal("no room")
			}
		}
		return s
	}
	frames := []struct {
		at     int64
		trace  string
		failed bool
	}{{40, "d4", false}, {60, "a1", false}, {61, "b2", true}, {62, "c3", false}, {63, "e5", false}, {64, "d4", true}, {65, "a1", false}, {66, "f6", true}, {100, "f7", false}}
	run := func(s *Samplers, from int) (got []string, decisions []envelope.Decision) {
		for i := from; i < len(frames); i++ {
			f := frames[i]
			out, err := s.Add(uint64(i+1), envelope.Frame{Instance: "i", Arrival: f.at * 1e9, Seq: uint64(i + 1), Payload: spanOf(f.trace, fmt.Sprint(i), 0, f.failed)})
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range out.Exports {
				got = append(got, fmt.Sprintf("%d: %s %d", e.Seq, e.Policy, e.Spans))
				s.Release(e.Seq)
			}
			for _, e := range out.Ended {
				if outside := f.trace == "d4"; from == 0 && outside != (e.How == NotAsked) || outside && out.SampledOut > 0 && from == 0 {
					t.Errorf("message %d ended as %v, %d sampled out", i+1, e.How, out.SampledOut)
				}
			}
			decisions = append(decisions, out.Decisions...)
		}
		for _, e := range s.Finish().Exports {
			got = append(got, fmt.Sprintf("%d: %s %d", e.Seq, e.Policy, e.Spans))
			s.Release(e.Seq)
		}
		return got, decisions
	}
	s := open()
	got, decisions := run(s, 0)
	if want := []string{"2: then 1", "4: late 1", "7: then 1", "8: errors 1"}; !slices.Equal(got, want) {
		t.Errorf("sent %q, want %q", got, want)
	}
	if s.Floor() != uint64(len(frames)) {
		t.Errorf("the floor is %d", s.Floor())
	}
	// The next owner begins after the first span of d4, which is not in the range: the other one is not sent either.
	next, _ := run(open(envelope.AppendDecisions(nil, decisions...)), 1)
	if want := got; !slices.Equal(next, want) {
		t.Errorf("the next owner sent %q, want %q", next, want)
	}
}

// TestFollowsAreBounded by a half of the memory.
func TestFollowsAreBounded(t *testing.T) {
	s := NewSamplers(policy.KeepAll(1), partition.Spread{N: 3}, 100*2*followedBytes, 0, nil)
	n := 0
	for s.Follow(envelope.Decision{Domain: "i", Instance: "i", TraceID: otlpwire.TraceID{byte(n), 1}}) {
		n++
	}
	if n != 100 || !s.Follow(envelope.Decision{Domain: "i", Instance: "i", TraceID: otlpwire.TraceID{7, 1}, Kept: true}) {
		t.Errorf("%d decisions are followed", n)
	}
}
