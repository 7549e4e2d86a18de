package ledger

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/otlpwire"
)

func TestMetricsFollowTheConventionsAndExistAtZero(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	l := New(reg)
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	for name, want := range map[string]int{"penstock_accepted_items_total": 3, "penstock_refused_items_total": 27, "penstock_closed_connections_total": 2, "penstock_delivered_items_total": 12, "penstock_dead_lettered_items_total": 27, "penstock_panics_total": 6} {
		if n, err := testutil.GatherAndCount(reg, name); err != nil || n != want {
			t.Errorf("%s: %d series from the start, want %d (%v)", name, n, want, err)
		}
	}
	l.Of(otlpwire.Logs).Refused(RefusedFull).Add(2)
	if v := testutil.ToFloat64(l.Of(otlpwire.Logs).Refused(RefusedFull)); v != 2 {
		t.Errorf("got %v, want 2", v)
	}
}
