package sampler

import (
	"fmt"
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
			if clocks := len(s.instances["i"].clocks); clocks > maxClocks {
				t.Fatalf("%s: %d clocks", name, clocks)
			}
		}
		if traces, _ := s.Held(); int64(each) > sourceGone && traces > 1 {
			t.Errorf("%s: %d traces wait for sources that are gone", name, traces)
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
