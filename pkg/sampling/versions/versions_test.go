package versions

import (
	"log/slog"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/logtest"
)

// TestAVersionDoesNotChange: a version that was overwritten with another text is refused and logged,
// one that is reported again is not.
func TestAVersionDoesNotChange(t *testing.T) {
	led := ledger.New(prometheus.NewRegistry())
	var said logtest.Log
	r, err := New(DefaultConfig(), nil, 1, led, said.Logger(slog.LevelInfo))
	if err != nil {
		t.Fatal(err)
	}
	const one, other = "decision_wait: 7s\npolicies: [{name: all, type: always_sample}]", "decision_wait: 9s\npolicies: [{name: all, type: always_sample}]"
	for _, version := range []string{one, one} {
		r.changed(&Record{Number: 1, From: 1, Text: version})
	}
	if n := testutil.ToFloat64(led.PoliciesRefused); n != 0 || r.Wait() != 7*time.Second {
		t.Errorf("%v are refused, the floor stands for %v", n, r.Wait())
	}
	r.changed(&Record{Number: 1, From: 1, Text: other})
	if n := testutil.ToFloat64(led.PoliciesRefused); n != 1 || r.Wait() != 7*time.Second || !said.Says("ERROR", "version 1", "overwritten") {
		t.Errorf("%v are refused, the floor stands for %v, said %s", n, r.Wait(), said.String())
	}
	r.changed(&Record{Number: 2, From: 1, Text: "policies: 2"})
	if n := testutil.ToFloat64(led.PoliciesRefused); n != 2 {
		t.Errorf("%v are refused", n)
	}
}
