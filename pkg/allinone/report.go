package allinone

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/penstock/penstock/pkg/backoff"
)

// report prints one line that a person can read, every interval and at the end.
func report(ctx context.Context, w *os.File, reg prometheus.Gatherer, every time.Duration) error {
	var before totals
	last := time.Now()
	for {
		goOn := backoff.Sleep(ctx, every)
		now, t := time.Now(), total(reg)
		rate := (t.in - before.in) / now.Sub(last).Seconds()
		fmt.Fprintf(w, "%s  in %.0f (%.0f/s)  kept %.0f spans  sampled out %.0f  delivered %.0f  dead %.0f  lag %.0f messages\n",
			now.Format(time.TimeOnly), t.in, rate, t.kept, t.sampledOut, t.delivered, t.dead, t.lag)
		if before, last = t, now; !goOn {
			return nil
		}
	}
}

type totals struct{ in, kept, sampledOut, delivered, dead, lag float64 }

// total adds up the ledger over signals.
func total(reg prometheus.Gatherer) (t totals) {
	families, err := reg.Gather()
	if err != nil {
		return t
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			v := m.GetCounter().GetValue() + m.GetGauge().GetValue()
			switch f.GetName() {
			case "penstock_accepted_items_total":
				t.in += v
			case "penstock_sampled_out_items_total":
				t.sampledOut += v
			case "penstock_rescued_items_total": // they are delivered after all
				t.sampledOut -= v
			case "penstock_dead_lettered_items_total":
				t.dead += v
			case "penstock_lane_lag_messages":
				t.lag += v
			case "penstock_delivered_items_total":
				t.delivered += v
				for _, l := range m.GetLabel() {
					if l.GetName() == "signal" && l.GetValue() == "traces" {
						t.kept += v
					}
				}
			}
		}
	}
	return t
}
