// Package load makes OTLP requests for benchmarks: the same bytes for the same
// parameters, in the shape of what a collector or an SDK sends.
package load

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strconv"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/otlpwire"
)

const (
	perResource = 128 // items of one process
	perScope    = 64  // items of one instrumentation library
	perTrace    = 8   // spans
)

// Request returns a marshalled export request of n items with attrs attributes
// each. One metric has one data point.
func Request(sig otlpwire.Signal, n, attrs int) []byte { return Seeded(1, sig, n, attrs) }

// Seeded is Request with other IDs and values for another seed.
func Seeded(seed uint64, sig otlpwire.Signal, n, attrs int) []byte {
	g := &maker{rng: rand.New(rand.NewPCG(seed, uint64(n*100+attrs))), attrs: attrs}
	var m proto.Message
	switch sig {
	case otlpwire.Traces:
		m = &tracepb.TracesData{ResourceSpans: groups(n, perResource, func(res, n int) *tracepb.ResourceSpans {
			return &tracepb.ResourceSpans{Resource: resource(res), SchemaUrl: schemaURL, ScopeSpans: groups(n, perScope, func(sc, n int) *tracepb.ScopeSpans {
				return &tracepb.ScopeSpans{Scope: scope(sc), Spans: groups(n, 1, func(int, int) *tracepb.Span { return g.span() })}
			})}
		})}
	case otlpwire.Metrics:
		m = &metricspb.MetricsData{ResourceMetrics: groups(n, perResource, func(res, n int) *metricspb.ResourceMetrics {
			return &metricspb.ResourceMetrics{Resource: resource(res), SchemaUrl: schemaURL, ScopeMetrics: groups(n, perScope, func(sc, n int) *metricspb.ScopeMetrics {
				return &metricspb.ScopeMetrics{Scope: scope(sc), Metrics: groups(n, 1, func(int, int) *metricspb.Metric { return g.metric() })}
			})}
		})}
	default:
		m = &logspb.LogsData{ResourceLogs: groups(n, perResource, func(res, n int) *logspb.ResourceLogs {
			return &logspb.ResourceLogs{Resource: resource(res), SchemaUrl: schemaURL, ScopeLogs: groups(n, perScope, func(sc, n int) *logspb.ScopeLogs {
				return &logspb.ScopeLogs{Scope: scope(sc), LogRecords: groups(n, 1, func(int, int) *logspb.LogRecord { return g.record() })}
			})}
		})}
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err) // BUG: the messages above are complete
	}
	return b
}

const schemaURL = "https://opentelemetry.io/schemas/1.37.0"

// groups cuts n items into groups of at most size.
func groups[T any](n, size int, group func(i, n int) T) (all []T) {
	for i := 0; n > 0; i++ {
		all = append(all, group(i, min(n, size)))
		n -= size
	}
	return all
}

func resource(i int) *resourcepb.Resource {
	return &resourcepb.Resource{Attributes: []*commonpb.KeyValue{
		str("service.name", "shop-"+strconv.Itoa(i)), str("service.version", "4.11.2"), str("service.instance.id", "0192f3c1-7e44-7b3d-9a66-"+strconv.Itoa(100_000_000_000+i)),
		str("host.name", "node-17.example.internal"), str("process.runtime.name", "OpenJDK Runtime Environment"), str("telemetry.sdk.language", "java"),
	}}
}

func scope(i int) *commonpb.InstrumentationScope {
	return &commonpb.InstrumentationScope{Name: "io.opentelemetry.servlet-" + strconv.Itoa(i), Version: "2.20.1-alpha"}
}

func str(key, val string) *commonpb.KeyValue {
	return &commonpb.KeyValue{Key: key, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: val}}}
}

type maker struct {
	rng   *rand.Rand
	attrs int
	n     int
	trace [16]byte
	root  [8]byte
}

const epoch = 1_790_000_000_000_000_000 // Unix nanoseconds

func (g *maker) id() (id [8]byte) {
	binary.LittleEndian.PutUint64(id[:], g.rng.Uint64()|1)
	return id
}

// attributes are those of an HTTP server, then of the application; every third
// is a number.
func (g *maker) attributes() []*commonpb.KeyValue {
	kvs := make([]*commonpb.KeyValue, 0, g.attrs)
	for i := range g.attrs {
		switch {
		case i == 0:
			kvs = append(kvs, str("http.route", "/api/v1/orders/{orderId}/items"))
		case i%3 == 1:
			kvs = append(kvs, &commonpb.KeyValue{Key: "app.counter." + strconv.Itoa(i), Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: g.rng.Int64N(100_000)}}})
		default:
			kvs = append(kvs, str("app.field."+strconv.Itoa(i), "value-"+strconv.Itoa(g.rng.IntN(1000))+"-of-the-field"))
		}
	}
	return kvs
}

func (g *maker) span() *tracepb.Span {
	id := g.id()
	sp := &tracepb.Span{SpanId: id[:], Name: "GET /api/v1/orders/{orderId}/items", Kind: tracepb.Span_SPAN_KIND_SERVER, Flags: 0x101}
	if g.n%perTrace == 0 {
		binary.LittleEndian.PutUint64(g.trace[:], g.rng.Uint64()|1)
		binary.LittleEndian.PutUint64(g.trace[8:], g.rng.Uint64())
		g.root = id
	} else {
		sp.ParentSpanId = append([]byte(nil), g.root[:]...)
	}
	sp.TraceId = append([]byte(nil), g.trace[:]...)
	sp.StartTimeUnixNano = epoch + uint64(g.n)*1_000_000
	sp.EndTimeUnixNano = sp.StartTimeUnixNano + g.rng.Uint64N(250_000_000)
	sp.Attributes = g.attributes()
	if g.n%4 == 0 {
		sp.Events = []*tracepb.Span_Event{{TimeUnixNano: sp.EndTimeUnixNano, Name: "exception", Attributes: []*commonpb.KeyValue{str("exception.type", "java.io.IOException"), str("exception.message", "Connection reset by peer")}}}
		sp.Status = &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR, Message: "Connection reset by peer"}
	}
	g.n++
	return sp
}

func (g *maker) metric() *metricspb.Metric {
	g.n++
	at := uint64(epoch + g.n)
	if g.n%4 == 0 {
		return &metricspb.Metric{Name: "http.server.request.duration", Unit: "s", Data: &metricspb.Metric_Histogram{Histogram: &metricspb.Histogram{
			AggregationTemporality: metricspb.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE,
			DataPoints: []*metricspb.HistogramDataPoint{{
				Attributes: g.attributes(), StartTimeUnixNano: epoch, TimeUnixNano: at, Count: 10, Sum: proto.Float64(1.5),
				BucketCounts: []uint64{1, 2, 3, 4, 0, 0, 0}, ExplicitBounds: []float64{0.005, 0.01, 0.05, 0.1, 0.5, 1},
			}},
		}}}
	}
	return &metricspb.Metric{Name: "http.server.active_requests", Unit: "{request}", Data: &metricspb.Metric_Sum{Sum: &metricspb.Sum{
		AggregationTemporality: metricspb.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE,
		DataPoints:             []*metricspb.NumberDataPoint{{Attributes: g.attributes(), StartTimeUnixNano: epoch, TimeUnixNano: at, Value: &metricspb.NumberDataPoint_AsInt{AsInt: g.rng.Int64N(1000)}}},
	}}}
}

func (g *maker) record() *logspb.LogRecord {
	sp := g.span()
	return &logspb.LogRecord{
		TimeUnixNano: sp.StartTimeUnixNano, ObservedTimeUnixNano: sp.EndTimeUnixNano, SeverityNumber: logspb.SeverityNumber_SEVERITY_NUMBER_INFO, SeverityText: "INFO",
		Body: str("", "order "+strconv.Itoa(g.n)+" shipped to warehouse 7 after 3 attempts").Value, Attributes: sp.Attributes, TraceId: sp.TraceId, SpanId: sp.SpanId,
	}
}

// Policies returns a tail_sampling configuration of n policies: one for slow traces, and
// others that look for attributes nobody has.
func Policies(n int, wait string) string {
	text := "decision_wait: " + wait + "\npolicies:\n  - {name: slow, type: latency, latency: {threshold_ms: 240}}\n"
	for i := 1; i < n; i++ {
		switch i % 3 {
		case 0:
			text += fmt.Sprintf("  - {name: p%d, type: string_attribute, string_attribute: {key: absent.%d, values: [x]}}\n", i, i)
		case 1:
			text += fmt.Sprintf("  - {name: p%d, type: numeric_attribute, numeric_attribute: {key: app.counter.%d, min_value: 1000000}}\n", i, i)
		default:
			text += fmt.Sprintf("  - {name: p%d, type: span_count, span_count: {min_spans: %d}}\n", i, 100+i)
		}
	}
	return text
}
