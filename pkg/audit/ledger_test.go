package audit

import (
	"fmt"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/tally"
)

// TestLedger: lanes of a backend are added up, of traces with what their routers have; what a lane has finished
// without an outcome is a difference, wherever it is.
func TestLedger(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	one := func(c tally.Counts) tally.Tally {
		return tally.Tally{Since: now.Add(-time.Hour), Instances: map[string]*tally.Counts{"as-1": &c}}
	}
	counted := func(routed, sampled uint64) map[string]map[string]tally.Tally {
		return map[string]map[string]tally.Tally{
			"TRACES": {"router-3": one(tally.Counts{Items: 100, Ended: map[tally.Outcome]uint64{tally.Routed: routed, tally.Dead: 3, tally.Unrecorded: 7}, Missing: 2, Missed: now.Add(-time.Minute)})},
			"SPANS": {
				"tempo-0": one(tally.Counts{Items: 60, Ended: map[tally.Outcome]uint64{tally.Delivered: 20, tally.SampledOut: sampled, tally.Duplicate: 10}}),
				"tempo-1": one(tally.Counts{Items: 47, Rescued: 5, Ended: map[tally.Outcome]uint64{tally.Delivered: 45, tally.Unrecorded: 7}}),
			},
			"LOGS": {"loki-3": one(tally.Counts{Items: 5, Ended: map[tally.Outcome]uint64{tally.Delivered: 5}})},
		}
	}
	for _, tc := range []struct {
		routed, sampled uint64
		since           time.Duration
		want            string
		wrong           bool
	}{
		// 107 spans were in SPANS, ten of them twice; three are dead before, and nine are on their way.
		{90, 30, time.Second, "logs loki 5 0 0 0; traces tempo 109 9 0 0; ", false},
		{90, 30, 0, "logs loki 5 0 0 0; traces tempo 109 9 0 2; ", true},
		{90, 28, time.Second, "logs loki 5 0 0 0; traces tempo 109 9 2 0; ", true},
		{86, 30, time.Second, "logs loki 5 0 0 0; traces tempo 113 9 4 0; ", true},
	} {
		b := ledgerOf(counted(tc.routed, tc.sampled), tc.since, now)
		b.inFlight("as-1", "traces", router, 4)
		b.inFlight("as-1", "traces", "tempo", 5)
		r, got := Report{Ledger: b.lines()}, ""
		for _, l := range r.Ledger {
			got += fmt.Sprintln(l.Signal, l.Backend, l.Acked, l.InFlight, l.Difference, l.Missing)
			got = got[:len(got)-1] + "; "
		}
		if got != tc.want || r.Wrong() != tc.wrong {
			t.Errorf("%+v: got %q, wrong %v", tc, got, r.Wrong())
		}
	}
	b := ledgerOf(nil, 0, now)
	b.inFlight("as-1", "traces", router, 4) // nothing of it is routed yet
	if l := b.lines(); len(l) != 1 || l[0].Backend != router || l[0].Acked != 4 || l[0].Difference != 0 {
		t.Errorf("%+v", l)
	}
}
