package integration

import (
	"context"
	"encoding/hex"
	"fmt"
	"hash/fnv"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlplog/otlploggrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlplog/otlploghttp"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetrichttp"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	otellog "go.opentelemetry.io/otel/log"
	"go.opentelemetry.io/otel/metric"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend"
	"github.com/penstock/penstock/test/backend/loki"
	"github.com/penstock/penstock/test/backend/tempo"
)

// percentage of traces kept that are neither slow nor failed.
const percentage = 30

const sampling = `
tail_sampling:
  decision_wait: 2s
  policies:
    - {name: errors, type: status_code, status_code: {status_codes: [ERROR]}}
    - {name: slow, type: latency, latency: {threshold_ms: 1000}}
    - {name: rest, type: probabilistic, probabilistic: {sampling_percentage: 30}}
`

// shop is an application with the OpenTelemetry SDK: all three signals through
// the SDK's own exporters.
type shop struct {
	traces  *sdktrace.TracerProvider
	metrics *sdkmetric.MeterProvider
	logs    *sdklog.LoggerProvider
}

func startApp(t *testing.T, addr string, overGRPC bool) *shop {
	t.Helper()
	ctx := t.Context()
	var (
		te  sdktrace.SpanExporter
		me  sdkmetric.Exporter
		le  sdklog.Exporter
		err [3]error
	)
	if overGRPC {
		te, err[0] = otlptracegrpc.New(ctx, otlptracegrpc.WithEndpoint(addr), otlptracegrpc.WithInsecure(), otlptracegrpc.WithCompressor("gzip"))
		me, err[1] = otlpmetricgrpc.New(ctx, otlpmetricgrpc.WithEndpoint(addr), otlpmetricgrpc.WithInsecure())
		le, err[2] = otlploggrpc.New(ctx, otlploggrpc.WithEndpoint(addr), otlploggrpc.WithInsecure())
	} else {
		te, err[0] = otlptracehttp.New(ctx, otlptracehttp.WithEndpoint(addr), otlptracehttp.WithInsecure())
		me, err[1] = otlpmetrichttp.New(ctx, otlpmetrichttp.WithEndpoint(addr), otlpmetrichttp.WithInsecure(), otlpmetrichttp.WithCompression(otlpmetrichttp.GzipCompression))
		le, err[2] = otlploghttp.New(ctx, otlploghttp.WithEndpoint(addr), otlploghttp.WithInsecure())
	}
	for _, e := range err {
		if e != nil {
			t.Fatal(e)
		}
	}
	// The application claims to be another instance: identity is overwritten.
	res := resource.NewSchemaless(attribute.String("service.name", "checkout"), attribute.String("instance.id", "forged"))
	a := &shop{
		traces:  sdktrace.NewTracerProvider(sdktrace.WithBatcher(te, sdktrace.WithMaxQueueSize(1<<16)), sdktrace.WithResource(res)),
		metrics: sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewPeriodicReader(me, sdkmetric.WithInterval(time.Hour))), sdkmetric.WithResource(res)),
		logs:    sdklog.NewLoggerProvider(sdklog.WithProcessor(sdklog.NewBatchProcessor(le, sdklog.WithMaxQueueSize(1<<16))), sdklog.WithResource(res)),
	}
	t.Cleanup(func() {
		ctx := context.Background()
		_, _, _ = a.traces.Shutdown(ctx), a.metrics.Shutdown(ctx), a.logs.Shutdown(ctx)
	})
	return a
}

// sent is what a shop has sent: trace IDs by what must become of them.
type sent struct {
	wanted map[string]bool // errors, slow ones, and those below the threshold
	all    int
	logs   int
}

// work makes n traces of three spans each: one in ten fails, one in ten is slow.
func (a *shop) work(t *testing.T, n int) sent {
	t.Helper()
	ctx := t.Context()
	tracer := a.traces.Tracer("test")
	logger := a.logs.Logger("test")
	requests, err := a.metrics.Meter("test").Int64Counter("appserver.http.requests", metric.WithUnit("1"))
	if err != nil {
		t.Fatal(err)
	}
	duration, err := a.metrics.Meter("test").Float64Histogram("appserver.http.duration", metric.WithUnit("s"))
	if err != nil {
		t.Fatal(err)
	}
	out := sent{wanted: map[string]bool{}}
	for i := range n {
		begin := time.Now()
		lasts := 20 * time.Millisecond
		failed, slow := i%10 == 3, i%10 == 7
		if slow {
			lasts = 1200 * time.Millisecond
		}
		ctx, root := tracer.Start(ctx, "POST /checkout", trace.WithTimestamp(begin), trace.WithSpanKind(trace.SpanKindServer))
		for range 2 {
			_, child := tracer.Start(ctx, "step", trace.WithTimestamp(begin))
			if failed {
				child.SetStatus(codes.Error, "card declined")
			}
			child.End(trace.WithTimestamp(begin.Add(lasts / 2)))
		}
		root.End(trace.WithTimestamp(begin.Add(lasts)))
		id := root.SpanContext().TraceID()
		out.wanted[id.String()] = failed || slow || belowThreshold(id[:])
		out.all++

		group := "2xx"
		if failed {
			group = "5xx"
		}
		requests.Add(ctx, 1, metric.WithAttributes(attribute.String("status_group", group), attribute.String("instance.id", "forged")))
		duration.Record(ctx, lasts.Seconds())

		var rec otellog.Record
		rec.SetTimestamp(begin)
		rec.SetSeverity(otellog.SeverityInfo)
		rec.SetSeverityText("INFO")
		rec.SetBody(attribute.StringValue(fmt.Sprintf(`{"level":"info","msg":"order %d"}`, i)))
		logger.Emit(ctx, rec)
		out.logs++
	}
	if err := a.flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	return out
}

func (a *shop) flush(ctx context.Context) error {
	for _, f := range []func(context.Context) error{a.traces.ForceFlush, a.metrics.ForceFlush, a.logs.ForceFlush} {
		if err := f(ctx); err != nil {
			return err
		}
	}
	return nil
}

// belowThreshold is what the collector's probabilistic policy does, written
// anew: FNV-1a 64 of its default salt and the trace ID.
func belowThreshold(id []byte) bool {
	h := fnv.New64a()
	_, _ = h.Write([]byte("default-hash-seed"))
	_, _ = h.Write(id)
	return float64(h.Sum64()) <= percentage/100.0*math.MaxUint64
}

// TestSDKToBackends is the whole way: two applications on two instances, one
// over gRPC, one over HTTP, all three signals, to Tempo, Prometheus and Loki.
func TestSDKToBackends(t *testing.T) {
	prom := backend.StartPrometheus(t)
	tmp, lok := tempo.Start(t), loki.Start(t)
	p := startPipeline(t, func(c *sink.Config) {
		c.Tempo.Endpoint, c.Prometheus.URL, c.Loki.URL = tmp.Addr, prom.URL, lok.URL
		c.Sampling.File = writeFile(t, "sampling.yaml", sampling)
	})
	instances := []edge.InstanceConfig{
		{ID: "as-1", Name: "Berlin", Customer: "acme", Namespace: "appserver", Environment: "prod"},
		{ID: "as-2", Name: "Paris", Customer: "globex", Namespace: "appserver", Environment: "prod"},
	}
	const traces = 200
	var edges []*edgeAddrs
	want := map[string]sent{}
	for i, inst := range instances {
		e := p.startEdge(t, inst)
		edges = append(edges, e)
		addr := e.grpc
		if i == 1 {
			addr = e.http
		}
		want[inst.ID] = startApp(t, addr, i == 0).work(t, traces)
	}
	p.balanced(t, 60*time.Second, edges...)

	t.Run("traces", func(t *testing.T) { checkTraces(t, tmp, want, instances) })
	t.Run("logs", func(t *testing.T) { checkLogs(t, lok, want) })
	t.Run("metrics", func(t *testing.T) { checkMetrics(t, prom) })
	if n := count(t, otlpwire.Traces, "penstock_accepted_items_total", edges[0].role, edges[1].role); n != 2*3*traces {
		t.Errorf("%d spans accepted, want %d", n, 2*3*traces)
	}
}

// checkTraces compares what Tempo has with the traces that had to be kept.
func checkTraces(t *testing.T, tmp *tempo.Server, want map[string]sent, instances []edge.InstanceConfig) {
	got := map[string]map[string]int{} // instance, trace: spans
	byID := map[string]edge.InstanceConfig{}
	for _, in := range instances {
		got[in.ID] = map[string]int{}
		byID[in.ID] = in
	}
	for _, s := range tmp.Spans() {
		in, ok := byID[s.Attribute("instance.id")]
		if !ok || s.Attribute("instance.name") != in.Name || s.Attribute("customer.id") != in.Customer ||
			s.Attribute("service.namespace") != "appserver" || s.Attribute("deployment.environment") != "prod" || s.Attribute("service.name") != "checkout" {
			t.Fatalf("stamp of a span is wrong: %v", s.Resource)
		}
		got[in.ID][hex.EncodeToString(s.Span.GetTraceId())]++
	}
	for id, w := range want {
		kept, wanted := 0, 0
		for trace, keep := range w.wanted {
			n := got[id][trace]
			if keep {
				wanted++
			}
			if n > 0 {
				kept++
			}
			if (keep && n != 3) || (!keep && n != 0) {
				t.Errorf("%s: trace %s: %d spans arrived, to be kept: %v", id, trace, n, keep)
			}
		}
		t.Logf("%s: kept %d of %d traces, as wanted: %d", id, kept, w.all, wanted)
		if len(got[id]) != kept {
			t.Errorf("%s: traces that were never sent arrived", id)
		}
	}
	for _, push := range tmp.Pushes() {
		if slices.ContainsFunc(push, func(id string) bool { return id != push[0] }) {
			t.Errorf("one push holds spans of several instances: %v", push)
		}
	}
}

func checkLogs(t *testing.T, lok *loki.Server, want map[string]sent) {
	got := map[string]int{}
	last := map[string]time.Time{}
	for _, e := range lok.Entries() {
		id := e.Labels["instance_id"]
		if len(e.Labels) != 4 || e.Labels["service_name"] != "checkout" || e.Labels["deployment_environment"] != "prod" || e.Labels["level"] != "info" {
			t.Fatalf("labels are %v, want instance_id, service_name, deployment_environment, level", e.Labels)
		}
		if !want[id].wanted[e.Metadata["trace_id"]] && !isKnown(want[id], e.Metadata["trace_id"]) {
			t.Errorf("%s: line with the trace ID %q of nobody", id, e.Metadata["trace_id"])
		}
		if len(e.Metadata["span_id"]) != 16 || e.Metadata["customer_id"] == "" || !strings.HasPrefix(e.Line, `{"level":"info"`) {
			t.Errorf("line %q with metadata %v", e.Line, e.Metadata)
		}
		if e.At.Before(last[id]) {
			t.Errorf("%s: line of %v after one of %v", id, e.At, last[id])
		}
		last[id] = e.At
		got[id]++
	}
	for id, w := range want {
		if got[id] != w.logs {
			t.Errorf("%s: %d lines, want %d", id, got[id], w.logs)
		}
	}
}

func isKnown(s sent, trace string) bool { _, ok := s.wanted[trace]; return ok }

// checkMetrics asks the real Prometheus the questions of a dashboard.
func checkMetrics(t *testing.T, prom *backend.Prometheus) {
	for query, want := range map[string]int{
		`appserver_http_requests_total{instance_id="as-1",status_group="2xx"}`:             180,
		`appserver_http_requests_total{instance_id="as-2",status_group="5xx"}`:             20,
		`sum by (instance_id) (appserver_http_duration_seconds_count{instance_id="as-1"})`: 200,
		`appserver_http_duration_seconds_bucket{instance_id="as-1",le="+Inf"}`:             200,
	} {
		got, err := prom.Query(query)
		if err != nil || len(got) != 1 || got[0].Value[1] != fmt.Sprint(want) {
			t.Errorf("%s = %v, %v; want %d", query, got, err, want)
		}
	}
	series, err := prom.Series(`{__name__=~"appserver.*"}`)
	if err != nil || len(series) == 0 {
		t.Fatalf("series: %v, %v", series, err)
	}
	ids := map[string]string{}
	for _, s := range series {
		if s["instance_id"] == "" || s["instance_name"] == "" || s["instance_id"] == "forged" {
			t.Errorf("series without the right identity: %v", s)
		}
		ids[s["instance_id"]] = s["instance_name"]
	}
	if len(ids) != 2 || ids["as-1"] != "Berlin" || ids["as-2"] != "Paris" {
		t.Errorf("instances are %v", ids)
	}
}

// TestPrometheusAnswers sends counters for a while and runs the queries of a
// dashboard against the real Prometheus.
func TestPrometheusAnswers(t *testing.T) {
	prom := backend.StartPrometheus(t)
	p := startPipeline(t, func(c *sink.Config) { c.Prometheus.URL = prom.URL })
	e := p.startEdge(t, edge.InstanceConfig{ID: "as-1", Name: "Berlin"})
	a := startApp(t, e.grpc, true)
	requests, err := a.metrics.Meter("test").Int64Counter("appserver.http.requests", metric.WithUnit("1"))
	if err != nil {
		t.Fatal(err)
	}
	queries := []string{
		`sum(rate(appserver_http_requests_total[5m])) by (instance_id)`,
		`sum by (instance_id, instance_name) (rate(appserver_http_requests_total{status_group="5xx"}[5m]))`,
	}
	// A rate needs two samples: collect until both queries have a value.
	eventually(t, 60*time.Second, "the queries answer", func() error {
		for _, group := range []string{"2xx", "5xx"} {
			requests.Add(t.Context(), 7, metric.WithAttributes(attribute.String("status_group", group)))
		}
		if err := a.metrics.ForceFlush(t.Context()); err != nil {
			return err
		}
		for _, q := range queries {
			got, err := prom.Query(q)
			if err != nil {
				return err
			}
			if len(got) != 1 || got[0].Metric["instance_id"] != "as-1" || got[0].Value[1] == "0" {
				return fmt.Errorf("%s = %v", q, got)
			}
			if strings.Contains(q, "instance_name") && got[0].Metric["instance_name"] != "Berlin" {
				return fmt.Errorf("%s = %v, want instance_name Berlin", q, got)
			}
		}
		return nil
	})
}
