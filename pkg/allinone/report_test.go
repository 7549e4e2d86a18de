package allinone

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestTotal: what is rescued was sampled out, and is not any more.
func TestTotal(t *testing.T) {
	reg := prometheus.NewRegistry()
	l := ledger.New(reg)
	l.Of(otlpwire.Traces).Accepted.Add(10)
	l.Of(otlpwire.Logs).Accepted.Add(2)
	l.Of(otlpwire.Traces).SampledOut.Add(7)
	l.Of(otlpwire.Traces).Rescued.Add(3)
	l.Of(otlpwire.Traces).Delivered("tempo").Add(6)
	l.Of(otlpwire.Logs).Delivered("loki").Add(2)
	if got := total(reg); got != (totals{in: 12, kept: 6, sampledOut: 4, delivered: 8}) {
		t.Errorf("%+v", got)
	}
}
