// Command tailsampling measures the collector's tail_sampling processor on what
// bench/sampler gives it: a file of requests, each behind its length as four bytes,
// and the policies. It is a module of its own, for it needs other versions than the
// product does. It prints two figures: CPU nanoseconds a span with decoding, which
// the collector does in its receiver, and without; then the share of spans kept.
//
// With -sets it does not measure, but says which traces are kept, for test/oracle/policies.
package main

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/open-telemetry/opentelemetry-collector-contrib/processor/tailsamplingprocessor"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/component/componenttest"
	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/collector/consumer"
	"go.opentelemetry.io/collector/pdata/ptrace"
	"go.opentelemetry.io/collector/processor"
	"go.uber.org/zap"
	"go.yaml.in/yaml/v3"
)

func main() {
	requests := flag.String("requests", "", "`file` of requests")
	policies := flag.String("policies", "", "`file` with the processor's configuration")
	sets := flag.String("sets", "", "`file` of configurations, as JSON")
	flag.Parse()
	work := func() error { return run(*requests, *policies) }
	if *sets != "" {
		work = func() error { return kept(*requests, *sets) }
	}
	if err := work(); err != nil {
		fmt.Fprintln(os.Stderr, "tailsampling:", err)
		os.Exit(1)
	}
}

func run(requests, policies string) error {
	bodies, err := read(requests)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(policies)
	if err != nil {
		return err
	}
	var raw map[string]any
	if err := yaml.Unmarshal(text, &raw); err != nil {
		return err
	}
	factory := tailsamplingprocessor.NewFactory()
	cfg := factory.CreateDefaultConfig()
	if err := confmap.NewFromStringMap(raw).Unmarshal(cfg); err != nil {
		return err
	}
	var kept atomic.Int64
	next, err := consumer.NewTraces(func(_ context.Context, td ptrace.Traces) error {
		kept.Add(int64(td.SpanCount()))
		return nil
	})
	if err != nil {
		return err
	}
	ctx := context.Background()
	settings := componenttest.NewNopTelemetrySettings()
	settings.Logger = zap.NewNop()
	p, err := factory.CreateTraces(ctx, processor.Settings{ID: component.NewID(factory.Type()), TelemetrySettings: settings}, cfg, next)
	if err != nil {
		return err
	}
	if err := p.Start(ctx, componenttest.NewNopHost()); err != nil {
		return err
	}
	spans := 0
	begin := cpu()
	var decoding time.Duration
	for _, b := range bodies {
		from := cpu()
		td, err := new(ptrace.ProtoUnmarshaler).UnmarshalTraces(b)
		if err != nil {
			return err
		}
		decoding += cpu() - from
		spans += td.SpanCount()
		if err := p.ConsumeTraces(ctx, td); err != nil {
			return err
		}
	}
	for before := int64(-1); before != kept.Load() || before == 0; { // decisions come by the second
		before = kept.Load()
		time.Sleep(2500 * time.Millisecond)
	}
	took := cpu() - begin
	n := float64(spans)
	fmt.Printf("%.0f %.0f %.4f\n", float64(took)/n, float64(took-decoding)/n, float64(kept.Load())/n)
	return p.Shutdown(ctx)
}

// cpu is what this process has used.
func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func read(path string) (bodies [][]byte, err error) {
	b, err := os.ReadFile(path)
	for err == nil && len(b) >= 4 {
		n := binary.BigEndian.Uint32(b)
		bodies, b = append(bodies, b[4:4+n]), b[4+n:]
	}
	return bodies, err
}
