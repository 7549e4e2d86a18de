package main

import (
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/prometheus/client_golang/exp/api/remote"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	promremote "github.com/prometheus/prometheus/storage/remote"
	"github.com/prometheus/prometheus/tsdb"
	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/pmetric"

	writer "github.com/penstock/penstock/pkg/backend/prometheus"
)

func init() { model.NameValidationScheme = model.UTF8Validation } //nolint:staticcheck // SA1019: as Prometheus 3 does

// TestPrometheusStoresAndAnswers sends an hour of every type of metric over
// remote_write 2.0 to Prometheus's own handler over a real TSDB, and asks its PromQL engine.
func TestPrometheusStoresAndAnswers(t *testing.T) {
	opts := tsdb.DefaultOptions()
	opts.EnableExemplarStorage, opts.MaxExemplars = true, 10_000
	db, err := tsdb.Open(t.TempDir(), slog.New(slog.DiscardHandler), nil, opts, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	reg := prometheus.NewRegistry()
	handler := promremote.NewWriteHandler(slog.New(slog.DiscardHandler), reg, db, remote.MessageTypes{remote.WriteV2MessageType}, true, false, false)
	status := map[int]int{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := httptest.NewRecorder()
		handler.ServeHTTP(rec, r)
		status[rec.Code]++
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		_, _ = w.Write(rec.Body.Bytes())
	}))
	defer srv.Close()
	cfg := writer.DefaultConfig()
	cfg.URL, cfg.Protocol = srv.URL, "2.0"
	w, err := writer.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now().Add(-time.Hour).Truncate(time.Second)
	const every = 15 * time.Second
	steps := 0
	for at := begin; at.Before(begin.Add(55 * time.Minute)); at = at.Add(every) {
		steps++
		payload, err := (&pmetric.ProtoMarshaler{}).MarshalMetrics(shop(begin, at, steps))
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Write(t.Context(), "as-1", payload); err != nil {
			t.Fatalf("at %v: %v", at, err)
		}
	}
	if status[204] != steps || len(status) != 1 {
		t.Errorf("answers: %v", status)
	}
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 1e6, Timeout: time.Minute})
	end := begin.Add(time.Duration(steps-1) * every)
	ask := func(query string) float64 {
		t.Helper()
		q, err := engine.NewInstantQuery(t.Context(), db, nil, query, end)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		v, err := q.Exec(t.Context()).Vector()
		if err != nil || len(v) != 1 {
			t.Errorf("%s: %v, %v", query, v, err)
			return math.NaN()
		}
		return v[0].F
	}
	n := float64(steps)
	for query, want := range map[string]float64{
		`shop_orders_total{instance_id="as-1",job="shop"}`: 3 * n,
		`deltas_total`: 5 * n,
		`queue_length`: n,
		`histogram_quantile(0.5, shop_duration_seconds_bucket)`:                           0.5,
		`shop_duration_seconds_count`:                                                     10 * n,
		`histogram_count(shop_latency_seconds)`:                                           9 * n,
		`histogram_sum(shop_latency_seconds)`:                                             n,
		`payload_bytes{quantile="0.9"}`:                                                   99,
		`shop_orders_total * on (job) group_left (host_name) target_info{host_name="h1"}`: 3 * n,
		`count({__name__=~".+"})`:                                                         14,
	} {
		if got := ask(query); math.Abs(got-want) > 1e-9*want {
			t.Errorf("%s is %v, want %v", query, got, want)
		}
	}
	// The series that ended is gone at once.
	q, err := engine.NewInstantQuery(t.Context(), db, nil, "ended", end)
	if err != nil {
		t.Fatal(err)
	}
	if v, err := q.Exec(t.Context()).Vector(); err != nil || len(v) != 0 {
		t.Errorf("a series that has ended: %v, %v", v, err)
	}
	// A counter that began with this process counts from its start.
	if got := ask(fmt.Sprintf("increase(shop_orders_total[%ds])", int(end.Sub(begin).Seconds())+120)); math.Abs(got-3*n) > 3*n/20 {
		t.Errorf("increase since the start is %v, want about %v", got, 3*n)
	}
	ex, err := db.ExemplarQuerier(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	found, err := ex.Select(0, end.UnixMilli(), []*labels.Matcher{labels.MustNewMatcher(labels.MatchEqual, "__name__", "shop_duration_seconds_bucket")})
	if err != nil || len(found) != 1 || found[0].SeriesLabels.Get("le") != "1" || found[0].Exemplars[0].Labels.Get("trace_id") != "01000000000000000000000000000009" {
		t.Errorf("exemplars: %+v, %v", found, err)
	}
}

// shop is what a small shop has counted up to a step.
func shop(begin, at time.Time, step int) pmetric.Metrics {
	md := pmetric.NewMetrics()
	rm := md.ResourceMetrics().AppendEmpty()
	rm.Resource().Attributes().PutStr("service.name", "shop")
	rm.Resource().Attributes().PutStr("host.name", "h1")
	ms := rm.ScopeMetrics().AppendEmpty().Metrics()
	start, now := pcommon.NewTimestampFromTime(begin.Add(-time.Second)), pcommon.NewTimestampFromTime(at)
	add := func(name, unit string) pmetric.Metric {
		m := ms.AppendEmpty()
		m.SetName(name)
		m.SetUnit(unit)
		return m
	}
	for name, v := range map[string]int{"shop.orders": 3 * step, "deltas": 5} {
		s := add(name, "{order}").SetEmptySum()
		s.SetIsMonotonic(true)
		s.SetAggregationTemporality(pmetric.AggregationTemporalityCumulative)
		if name == "deltas" {
			s.SetAggregationTemporality(pmetric.AggregationTemporalityDelta)
		}
		p := s.DataPoints().AppendEmpty()
		p.SetStartTimestamp(start)
		p.SetTimestamp(now)
		p.SetIntValue(int64(v))
	}
	g := add("queue.length", "").SetEmptyGauge().DataPoints().AppendEmpty()
	g.SetTimestamp(now)
	g.SetDoubleValue(float64(step))
	e := add("ended", "").SetEmptyGauge().DataPoints().AppendEmpty()
	e.SetTimestamp(now)
	if e.SetDoubleValue(1); step > 100 {
		e.SetFlags(pmetric.DefaultDataPointFlags.WithNoRecordedValue(true))
	}
	h := add("shop.duration", "s").SetEmptyHistogram()
	h.SetAggregationTemporality(pmetric.AggregationTemporalityCumulative)
	p := h.DataPoints().AppendEmpty()
	p.SetStartTimestamp(start)
	p.SetTimestamp(now)
	p.ExplicitBounds().FromRaw([]float64{0, 1, 2})
	p.BucketCounts().FromRaw([]uint64{0, uint64(10 * step), 0, 0})
	p.SetCount(uint64(10 * step))
	p.SetSum(float64(5 * step))
	x := p.Exemplars().AppendEmpty()
	x.SetTimestamp(now)
	x.SetDoubleValue(0.7)
	x.SetTraceID([16]byte{1, 15: 9})
	n := add("shop.latency", "s").SetEmptyExponentialHistogram()
	n.SetAggregationTemporality(pmetric.AggregationTemporalityCumulative)
	xp := n.DataPoints().AppendEmpty()
	xp.SetStartTimestamp(start)
	xp.SetTimestamp(now)
	xp.SetScale(12)
	xp.Positive().SetOffset(100)
	xp.Positive().BucketCounts().FromRaw([]uint64{uint64(step), 0, 0, uint64(2 * step), uint64(5 * step)})
	xp.SetZeroCount(uint64(step))
	xp.SetCount(uint64(9 * step))
	xp.SetSum(float64(step))
	s := add("payload", "By").SetEmptySummary().DataPoints().AppendEmpty()
	s.SetTimestamp(now)
	s.SetCount(uint64(step))
	s.SetSum(float64(step))
	v := s.QuantileValues().AppendEmpty()
	v.SetQuantile(0.9)
	v.SetValue(99)
	return md
}
