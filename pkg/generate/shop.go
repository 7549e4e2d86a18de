// Package generate generates the telemetry of a small shop: nine services, a
// checkout trace of twelve spans, request counters, a duration histogram, and
// JSON logs that carry the trace ID. Some checkouts fail, some are slow.
//
// The same seed gives the same traffic. It is what `penstock generate` sends,
// and what tests count.
package generate

import (
	"fmt"
	"math/rand/v2"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
)

// SpansPerCheckout is how many spans a checkout has.
const SpansPerCheckout = 12

// Services are the shop's nine services.
var Services = [...]string{"frontend", "gateway", "checkout", "cart", "catalog", "pricing", "inventory", "payment", "shipping"}

// step is one span of a checkout. Durations are in milliseconds.
type step struct {
	service string
	name    string
	parent  int // index, -1 for the root
	after   int // start, relative to the parent's
	lasts   int
	client  bool
	failing bool // carries the error when the payment fails
}

var checkout = [SpansPerCheckout]step{
	{"frontend", "POST /checkout", -1, 0, 120, false, true},
	{"gateway", "POST /api/checkout", 0, 4, 112, false, true},
	{"checkout", "PlaceOrder", 1, 3, 106, false, true},
	{"cart", "GetCart", 2, 2, 9, false, false},
	{"catalog", "GetProducts", 2, 12, 15, false, false},
	{"catalog", "SELECT products", 4, 3, 9, true, false},
	{"pricing", "Quote", 2, 28, 7, false, false},
	{"inventory", "Reserve", 2, 36, 21, false, false},
	{"inventory", "UPDATE stock", 7, 4, 14, true, false},
	{"payment", "Charge", 2, 58, 32, false, true},
	{"payment", "POST card-processor", 9, 3, 27, true, true},
	{"shipping", "CreateShipment", 2, 92, 11, false, false},
}

// Shares of the checkouts that fail or are slow.
const (
	failShare = 0.03
	slowShare = 0.05
	slowBy    = 1500 * time.Millisecond
)

// Shop generates checkouts. It is for one goroutine.
type Shop struct {
	rng     *rand.Rand
	started time.Time
	// Counts of requests by service and status group: counters are cumulative.
	requests map[string]map[string]int64
	buckets  map[string][]uint64
	seconds  map[string]float64
}

// NewShop returns a shop whose counters start at now.
func NewShop(seed uint64, now time.Time) *Shop {
	return &Shop{
		rng: rand.New(rand.NewPCG(seed, seed^0x9e3779b97f4a7c15)), started: now,
		requests: map[string]map[string]int64{}, buckets: map[string][]uint64{}, seconds: map[string]float64{},
	}
}

// Kind is the outcome of a checkout.
type Kind uint8

// The kinds of checkouts.
const (
	Normal Kind = iota
	Failed
	Slow
)

// Checkout is one checkout as telemetry.
type Checkout struct {
	Kind    Kind
	TraceID []byte
	Spans   *tracepb.TracesData
	Logs    *logspb.LogsData
}

// Checkout generates the next checkout, which ends at now.
func (s *Shop) Checkout(now time.Time) Checkout {
	c := Checkout{TraceID: s.bytes(16)}
	extra := time.Duration(0)
	switch p := s.rng.Float64(); {
	case p < failShare:
		c.Kind = Failed
	case p < failShare+slowShare:
		c.Kind = Slow
		extra = slowBy + time.Duration(s.rng.Int64N(int64(slowBy)))
	}
	begin := now.Add(-time.Duration(checkout[0].lasts)*time.Millisecond - extra)
	spans := make(map[string][]*tracepb.Span, len(Services))
	var ids [SpansPerCheckout][]byte
	var starts [SpansPerCheckout]time.Time
	for i, st := range checkout {
		ids[i], starts[i] = s.bytes(8), begin
		sp := &tracepb.Span{TraceId: c.TraceID, SpanId: ids[i], Name: st.name, Kind: tracepb.Span_SPAN_KIND_SERVER, Flags: 0x101}
		if st.parent >= 0 {
			sp.ParentSpanId = ids[st.parent]
			starts[i] = starts[st.parent].Add(time.Duration(st.after) * time.Millisecond)
		}
		lasts := time.Duration(st.lasts) * time.Millisecond
		if i <= 2 || i == 7 || i == 8 { // the stock is slow, and all spans that wait for it
			lasts += extra
		}
		sp.StartTimeUnixNano, sp.EndTimeUnixNano = uint64(starts[i].UnixNano()), uint64(starts[i].Add(lasts).UnixNano())
		if st.client {
			sp.Kind = tracepb.Span_SPAN_KIND_CLIENT
		}
		sp.Attributes = []*commonpb.KeyValue{str("http.request.method", "POST"), str("app.customer.tier", s.pick("free", "silver", "gold")), num("app.cart.items", 1+s.rng.Int64N(9))}
		if c.Kind == Failed && st.failing {
			sp.Status = &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR, Message: "card declined"}
			sp.Events = []*tracepb.Span_Event{{TimeUnixNano: sp.EndTimeUnixNano, Name: "exception", Attributes: []*commonpb.KeyValue{str("exception.type", "CardDeclined"), str("exception.message", "card declined by issuer")}}}
		}
		spans[st.service] = append(spans[st.service], sp)
		s.count(st, c.Kind, lasts)
	}
	c.Spans, c.Logs = &tracepb.TracesData{}, &logspb.LogsData{}
	for _, svc := range Services {
		c.Spans.ResourceSpans = append(c.Spans.ResourceSpans, &tracepb.ResourceSpans{
			Resource: resource(svc), ScopeSpans: []*tracepb.ScopeSpans{{Scope: &commonpb.InstrumentationScope{Name: "shop." + svc}, Spans: spans[svc]}},
		})
	}
	s.logs(&c, now, ids)
	return c
}

// logs adds two lines: one of the checkout, one of the payment.
func (s *Shop) logs(c *Checkout, now time.Time, ids [SpansPerCheckout][]byte) {
	line := func(svc string, span int, sev logspb.SeverityNumber, level, msg string) {
		body := fmt.Sprintf(`{"level":%q,"msg":%q,"trace_id":"%x","span_id":"%x","order":%d}`, level, msg, c.TraceID, ids[span], s.rng.Int64N(1e6))
		c.Logs.ResourceLogs = append(c.Logs.ResourceLogs, &logspb.ResourceLogs{Resource: resource(svc), ScopeLogs: []*logspb.ScopeLogs{{
			Scope: &commonpb.InstrumentationScope{Name: "shop." + svc},
			LogRecords: []*logspb.LogRecord{{
				TimeUnixNano: uint64(now.UnixNano()), ObservedTimeUnixNano: uint64(now.UnixNano()), SeverityNumber: sev, SeverityText: level,
				Body: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: body}}, TraceId: c.TraceID, SpanId: ids[span],
				Attributes: []*commonpb.KeyValue{str("thread.name", "worker-1")},
			}},
		}}})
	}
	switch c.Kind {
	case Failed:
		line("payment", 9, logspb.SeverityNumber_SEVERITY_NUMBER_ERROR, "ERROR", "card declined")
	case Slow:
		line("inventory", 7, logspb.SeverityNumber_SEVERITY_NUMBER_WARN, "WARN", "stock row was locked for long")
	default:
		line("payment", 9, logspb.SeverityNumber_SEVERITY_NUMBER_INFO, "INFO", "card charged")
	}
	line("checkout", 2, logspb.SeverityNumber_SEVERITY_NUMBER_INFO, "INFO", "order placed")
}

// bounds are the histogram's buckets, in seconds.
var bounds = []float64{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5}

func (s *Shop) count(st step, k Kind, lasts time.Duration) {
	if st.client {
		return
	}
	group := "2xx"
	if k == Failed && st.failing {
		group = "5xx"
	}
	if s.requests[st.service] == nil {
		s.requests[st.service] = map[string]int64{"2xx": 0, "5xx": 0}
		s.buckets[st.service] = make([]uint64, len(bounds)+1)
	}
	s.requests[st.service][group]++
	i := 0
	for i < len(bounds) && lasts.Seconds() > bounds[i] {
		i++
	}
	s.buckets[st.service][i]++
	s.seconds[st.service] += lasts.Seconds()
}

// Metrics returns one collection of every service's metrics as of now.
func (s *Shop) Metrics(now time.Time) *metricspb.MetricsData {
	start, at := uint64(s.started.UnixNano()), uint64(now.UnixNano())
	cumulative := metricspb.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE
	out := &metricspb.MetricsData{}
	for _, svc := range Services {
		if s.requests[svc] == nil {
			continue
		}
		var points []*metricspb.NumberDataPoint
		for _, group := range []string{"2xx", "5xx"} {
			points = append(points, &metricspb.NumberDataPoint{
				StartTimeUnixNano: start, TimeUnixNano: at, Value: &metricspb.NumberDataPoint_AsInt{AsInt: s.requests[svc][group]},
				Attributes: []*commonpb.KeyValue{str("method", "POST"), str("status_group", group)},
			})
		}
		var n uint64
		for _, b := range s.buckets[svc] {
			n += b
		}
		sum := s.seconds[svc]
		out.ResourceMetrics = append(out.ResourceMetrics, &metricspb.ResourceMetrics{Resource: resource(svc), ScopeMetrics: []*metricspb.ScopeMetrics{{
			Scope: &commonpb.InstrumentationScope{Name: "shop." + svc},
			Metrics: []*metricspb.Metric{
				{Name: "appserver.http.requests", Unit: "{request}", Data: &metricspb.Metric_Sum{Sum: &metricspb.Sum{DataPoints: points, IsMonotonic: true, AggregationTemporality: cumulative}}},
				{Name: "appserver.http.duration", Unit: "s", Data: &metricspb.Metric_Histogram{Histogram: &metricspb.Histogram{AggregationTemporality: cumulative, DataPoints: []*metricspb.HistogramDataPoint{{
					StartTimeUnixNano: start, TimeUnixNano: at, Count: n, Sum: &sum, BucketCounts: append([]uint64(nil), s.buckets[svc]...), ExplicitBounds: bounds,
				}}}}},
				{Name: "appserver.sessions.active", Data: &metricspb.Metric_Gauge{Gauge: &metricspb.Gauge{DataPoints: []*metricspb.NumberDataPoint{{TimeUnixNano: at, Value: &metricspb.NumberDataPoint_AsInt{AsInt: 10 + s.rng.Int64N(90)}}}}}},
			},
		}}})
	}
	return out
}

func resource(service string) *resourcepb.Resource {
	return &resourcepb.Resource{Attributes: []*commonpb.KeyValue{str("service.name", service), str("service.version", "1.4.2"), str("service.instance.id", service+"-0")}}
}

func str(key, val string) *commonpb.KeyValue {
	return &commonpb.KeyValue{Key: key, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: val}}}
}

func num(key string, val int64) *commonpb.KeyValue {
	return &commonpb.KeyValue{Key: key, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: val}}}
}

func (s *Shop) pick(of ...string) string { return of[s.rng.IntN(len(of))] }

// bytes returns a new ID, which is never all zero.
func (s *Shop) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(s.rng.Uint32())
	}
	b[0] |= 1
	return b
}
