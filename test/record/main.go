// Command record writes what the OpenTelemetry Go SDK exports for every instrument it has, as
// OTLP/JSON, a request a line: the recorded metrics of test/oracle.
//
//	go run ./record > oracle/testdata/sdk.jsonl
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetrichttp"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

func main() {
	if err := run(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "record:", err)
		os.Exit(1)
	}
}

func run(out io.Writer) error {
	var (
		mu    sync.Mutex
		lines bytes.Buffer
	)
	stamp := envelope.Instance{ID: "as-1", Name: "Berlin", Customer: "c-1", Environment: "prod"}.Stamp()
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		stamped, err := stamp.Append(nil, body)
		if err != nil {
			panic(err) // BUG: the SDK makes sound requests
		}
		mu.Lock()
		defer mu.Unlock()
		lines.Write(otlpwire.AppendJSON(nil, otlpwire.Metrics, stamped))
		lines.WriteByte('\n')
	}))
	defer srv.Close()
	ctx := context.Background()
	exporter, err := otlpmetrichttp.New(ctx, otlpmetrichttp.WithEndpointURL(srv.URL+"/v1/metrics"))
	if err != nil {
		return err
	}
	res, err := resource.New(ctx, resource.WithTelemetrySDK(), resource.WithAttributes(
		attribute.String("service.name", "checkout"), attribute.String("service.namespace", "shop"), attribute.String("service.instance.id", "0192f3c1-7e44-7b3d"),
		attribute.String("host.name", "node-17"), attribute.StringSlice("process.command_args", []string{"java", "-Xmx1g"}), attribute.Int("process.pid", 17),
	))
	if err != nil {
		return err
	}
	provider := sdkmetric.NewMeterProvider(
		sdkmetric.WithResource(res),
		sdkmetric.WithReader(sdkmetric.NewPeriodicReader(exporter, sdkmetric.WithInterval(time.Hour))),
		sdkmetric.WithView(sdkmetric.NewView(sdkmetric.Instrument{Name: "*.exponential"}, sdkmetric.Stream{Aggregation: sdkmetric.AggregationBase2ExponentialHistogram{MaxSize: 160, MaxScale: 20}})),
	)
	meter := provider.Meter("github.com/penstock/penstock/test/record", metric.WithInstrumentationVersion("1.0"), metric.WithSchemaURL("https://opentelemetry.io/schemas/1.37.0"))
	requests, _ := meter.Int64Counter("http.server.requests", metric.WithUnit("{request}"), metric.WithDescription("Requests served."))
	sent, _ := meter.Float64Counter("network.io", metric.WithUnit("By"))
	active, _ := meter.Int64UpDownCounter("http.server.active_requests")
	load, _ := meter.Float64Gauge("system.cpu.load", metric.WithUnit("1"))
	duration, _ := meter.Float64Histogram("http.server.request.duration", metric.WithUnit("s"), metric.WithExplicitBucketBoundaries(0.005, 0.01, 0.05, 0.1, 0.5, 1, 5))
	size, _ := meter.Int64Histogram("http.server.request.size.exponential", metric.WithUnit("By"))
	if _, err := meter.Int64ObservableCounter("process.cpu.time", metric.WithUnit("s"), metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
		o.Observe(42, metric.WithAttributes(attribute.String("state", "user")))
		o.Observe(7, metric.WithAttributes(attribute.String("state", "system")))
		return nil
	})); err != nil {
		return err
	}
	tracer := sdktrace.NewTracerProvider().Tracer("x")
	for round := range 3 {
		for i := range 50 {
			ctx, span := tracer.Start(ctx, "GET /orders") // a sampled one: its measurements get exemplars
			as := metric.WithAttributes(attribute.String("http.request.method", []string{"GET", "POST"}[i%2]), attribute.Int("http.response.status_code", 200+i%3), attribute.Bool("error", i%7 == 0))
			requests.Add(ctx, 1, as)
			sent.Add(ctx, float64(i)*1.5, as)
			active.Add(ctx, int64(1-2*(i%2)))
			load.Record(ctx, float64(i%10)/10)
			duration.Record(ctx, float64(i*(round+1))/40, as)
			size.Record(ctx, int64(i*i*i), as)
			span.End()
		}
		if err := provider.ForceFlush(ctx); err != nil {
			return err
		}
	}
	if err := provider.Shutdown(ctx); err != nil {
		return err
	}
	mu.Lock()
	defer mu.Unlock()
	_, err = lines.WriteTo(out)
	return err
}
