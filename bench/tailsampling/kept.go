package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/open-telemetry/opentelemetry-collector-contrib/processor/tailsamplingprocessor"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/component/componenttest"
	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/collector/consumer"
	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/ptrace"
	"go.opentelemetry.io/collector/processor"
	"go.uber.org/zap"
	"go.yaml.in/yaml/v3"
)

// set is a configuration of the processor, and which of the requests it is asked about:
// all when there is nothing.
type set struct {
	Policies string
	Only     []int
}

// kept writes which traces each of the sets keeps, as JSON: the place of its request for
// each. A request is one whole trace. Nothing waits: a processor that is shut down decides
// what it has.
func kept(requests, sets string) error {
	bodies, err := read(requests)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(sets)
	if err != nil {
		return err
	}
	var all []set
	if err := json.Unmarshal(text, &all); err != nil {
		return err
	}
	traces := make([]ptrace.Traces, len(bodies))
	for i, b := range bodies {
		if traces[i], err = new(ptrace.ProtoUnmarshaler).UnmarshalTraces(b); err != nil {
			return err
		}
	}
	answers := make([][]int, len(all))
	for i, s := range all {
		if answers[i], err = s.keeps(traces); err != nil {
			return fmt.Errorf("%s: %w", s.Policies, err)
		}
	}
	return json.NewEncoder(os.Stdout).Encode(answers)
}

func (s set) keeps(traces []ptrace.Traces) ([]int, error) {
	var raw map[string]any
	if err := yaml.Unmarshal([]byte(s.Policies), &raw); err != nil {
		return nil, err
	}
	ids := map[pcommon.TraceID]bool{}
	next, err := consumer.NewTraces(func(_ context.Context, td ptrace.Traces) error {
		for _, rs := range td.ResourceSpans().All() {
			for _, ss := range rs.ScopeSpans().All() {
				for _, sp := range ss.Spans().All() {
					ids[sp.TraceID()] = true
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	p, err := start(raw, next)
	if err != nil {
		return nil, err
	}
	ctx := context.Background()
	answer := []int{}
	for i, td := range traces {
		if s.Only == nil || slices.Contains(s.Only, i) {
			err = errors.Join(err, p.ConsumeTraces(ctx, td))
		}
	}
	if err := errors.Join(err, p.Shutdown(ctx)); err != nil {
		return nil, err
	}
	for i, td := range traces {
		if ids[td.ResourceSpans().At(0).ScopeSpans().At(0).Spans().At(0).TraceID()] {
			answer = append(answer, i)
		}
	}
	return answer, nil
}

// start starts a processor that decides when it is shut down.
func start(raw map[string]any, next consumer.Traces) (processor.Traces, error) {
	factory := tailsamplingprocessor.NewFactory()
	cfg := factory.CreateDefaultConfig()
	if err := confmap.NewFromStringMap(raw).Unmarshal(cfg); err != nil {
		return nil, err
	}
	own := cfg.(*tailsamplingprocessor.Config)
	own.DecisionWait, own.NumTraces = time.Hour, 1<<20
	settings := componenttest.NewNopTelemetrySettings()
	settings.Logger = zap.NewNop()
	ctx := context.Background()
	p, err := factory.CreateTraces(ctx, processor.Settings{ID: component.NewID(factory.Type()), TelemetrySettings: settings}, cfg, next)
	if err != nil {
		return nil, err
	}
	return p, p.Start(ctx, componenttest.NewNopHost())
}
