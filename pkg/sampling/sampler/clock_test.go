package sampler

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// TestSourcesAreBounded: an instance may have any number of sources one after the other, such as gateways that are
// restarted, and more at once than have a clock of their own; no trace waits for one that is gone.
func TestSourcesAreBounded(t *testing.T) {
	for name, each := range map[string]time.Duration{"one after the other": 10 * time.Minute, "at once": time.Millisecond} {
		s := New(policy.KeepAll(10*time.Second), 1<<20, 0)
		base := time.Unix(2_000_000, 0)
		var out Output
		spans := 0
		for n := range 10 * maxClocks {
			for k := range 3 {
				at := base.Add(time.Duration(n)*each + time.Duration(k)*each/3)
				o, err := s.Add(uint64(3*n+k+1), envelope.Frame{Instance: "i", Source: uint32(n + 1), Arrival: at.UnixNano(), Payload: spanOf(fmt.Sprintf("%x", n+1), fmt.Sprint(k), 0, false)})
				if err != nil {
					t.Fatal(err)
				}
				out.merge(o)
				spans++
			}
			if clocks := len(s.domains["i"].clocks); clocks > maxClocks {
				t.Fatalf("%s: %d clocks", name, clocks)
			}
		}
		if traces, _ := s.Held(); int64(each) > sourceGone && traces > 1 {
			t.Errorf("%s: %d traces wait for sources that are gone", name, traces)
		}
		last := func(c *clock) bool { return c.source == 10*maxClocks }
		if int64(each) > sourceGone && !slices.ContainsFunc(s.domains["i"].clocks, last) {
			t.Errorf("%s: the last source has no clock of its own", name)
		}
		out.merge(s.Finish())
		kept := 0
		for _, e := range out.Exports {
			kept += e.Spans
		}
		if kept != spans {
			t.Errorf("%s: %d of %d spans", name, kept, spans)
		}
	}
}

// clocked is a sampler with a policy that wants errors, and what it has decided.
type clocked struct {
	*testing.T
	*Sampler
	out  Output
	base time.Time
	seq  uint64
}

func newClocked(t *testing.T) *clocked {
	set, err := policy.Parse("p", []byte("decision_wait: 20s\npolicies: [{name: errors, type: status_code, status_code: {status_codes: [ERROR]}}]"))
	if err != nil {
		t.Fatal(err)
	}
	return &clocked{T: t, Sampler: New(set, 1<<20, 0), base: time.Unix(2_000_000, 0)}
}

// add adds a frame of a source; one without spans only says what time it is there.
func (c *clocked) add(source uint32, at time.Duration, traces uint64, payload []byte) {
	c.Helper()
	c.seq++
	out, err := c.Add(c.seq, envelope.Frame{Instance: "i", Source: source, Seq: traces, Arrival: c.base.Add(at).UnixNano(), Payload: payload})
	if err != nil {
		c.Fatal(err)
	}
	c.out.merge(out)
}

// TestRecordedSourcesAreWaitedFor by the next owner, although nothing has come of them yet.
func TestRecordedSourcesAreWaitedFor(t *testing.T) {
	for name, recorded := range map[string]bool{"recorded": true, "not recorded": false} {
		c := newClocked(t)
		if recorded {
			if err := c.Remember(envelope.AppendSources(nil, []envelope.Sources{{Instance: "i", Seen: map[uint32]int64{1: c.base.UnixNano(), 2: c.base.UnixNano()}}})); err != nil {
				t.Fatal(err)
			}
		}
		c.add(1, 0, 0, spanOf("1", "a", 0, false))
		c.add(1, 21*time.Second, 0, nil)
		c.add(2, 19*time.Second, 0, spanOf("1", "b", 0, true))
		c.add(2, 22*time.Second, 0, nil)
		if kept := len(c.out.Exports) == 1 && c.out.Exports[0].Spans == 2; kept != recorded {
			t.Errorf("%s: %+v", name, c.out)
		}
	}
}

// TestWhatARouterSendsAgain is a repetition also when it is the first that comes of its source.
func TestWhatARouterSendsAgain(t *testing.T) {
	c := newClocked(t)
	c.add(1, 30*time.Second, 10, spanOf("1", "a", 0, false))
	c.add(2, 5*time.Second, 7, spanOf("2", "b", 0, false))
	if c.out.Duplicates != 1 || len(c.out.Ended) != 1 || c.out.Ended[0].How != Repeated {
		t.Errorf("%+v", c.out)
	}
}

// TestClocksThatStandStill: a trace does not go from one source that stands still to the next for ever.
func TestClocksThatStandStill(t *testing.T) {
	c := newClocked(t)
	c.add(1, 0, 0, spanOf("1", "a", 0, false))
	for now := c.base; now.Before(c.base.Add(12 * time.Minute)); now = now.Add(5 * time.Second) {
		for source := range uint32(3) {
			c.add(source+1, 0, 0, nil)
		}
		c.out.merge(c.Idle(Mark{Before: []time.Time{now}}, now))
	}
	if len(c.out.Decisions) != 1 {
		t.Errorf("%d decisions in twelve minutes", len(c.out.Decisions))
	}
}
