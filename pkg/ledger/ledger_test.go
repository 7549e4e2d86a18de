package ledger

import (
	"fmt"
	"testing"
	"time"

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
	for name, want := range map[string]int{"penstock_accepted_items_total": 3, "penstock_refused_items_total": 27, "penstock_closed_connections_total": 2, "penstock_delivered_items_total": 12, "penstock_dead_lettered_items_total": 27, "penstock_panics_total": 7} {
		if n, err := testutil.GatherAndCount(reg, name); err != nil || n != want {
			t.Errorf("%s: %d series from the start, want %d (%v)", name, n, want, err)
		}
	}
	l.Of(otlpwire.Logs).Refused(RefusedFull).Add(2)
	if v := testutil.ToFloat64(l.Of(otlpwire.Logs).Refused(RefusedFull)); v != 2 {
		t.Errorf("got %v, want 2", v)
	}
}

// TestInstances: a process has metrics of the first 1000 instances that it sees, and of all others together.
func TestInstances(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	l := New(reg)
	at := time.Unix(1_700_000_000, 0)
	for i := range maxNamed + 50 {
		l.Saw(otlpwire.Logs, fmt.Sprintf("as-%d", i), 2, 100, at.Add(time.Duration(i)*time.Second))
	}
	l.Saw(otlpwire.Logs, "as-0", 3, 50, at.Add(-time.Hour)) // an older one
	l.Saw(otlpwire.Metrics, "as-0", 1, 10, at)
	for name, want := range map[string][3]float64{"as-0": {5, 150, 1.7e9}, "as-999": {2, 100, 1.7e9 + 999}, others: {100, 5000, 1.7e9 + 1049}} {
		got := [3]float64{testutil.ToFloat64(l.instances.items.WithLabelValues("logs", name)), testutil.ToFloat64(l.instances.bytes.WithLabelValues("logs", name)), testutil.ToFloat64(l.instances.seen.WithLabelValues("logs", name))}
		if got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	if n, err := testutil.GatherAndCount(reg, "penstock_instance_items_total"); err != nil || n != maxNamed+2 {
		t.Errorf("%d series, %v", n, err)
	}
}
