package policy

import (
	"cmp"
	"context"
	"errors"
	"strings"

	"github.com/open-telemetry/opentelemetry-collector-contrib/pkg/ottl"
	"github.com/open-telemetry/opentelemetry-collector-contrib/pkg/ottl/contexts/ottlspan"
	"github.com/open-telemetry/opentelemetry-collector-contrib/pkg/ottl/contexts/ottlspanevent"
	"github.com/open-telemetry/opentelemetry-collector-contrib/pkg/ottl/ottlfuncs"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/pdata/ptrace"
	"go.uber.org/zap"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// ottlCondition is ottl_condition: a span, or an event of one, meets one of the conditions. It is the
// only policy that needs the decoded trace; a trace is decoded when the first of them is evaluated.
type ottlCondition struct {
	spans  []*ottl.Condition[*ottlspan.TransformContext]
	events []*ottl.Condition[*ottlspanevent.TransformContext]
	// strict is error_mode propagate: the first condition that fails ends the evaluation, and the policy
	// has no answer.
	strict bool
}

// volatile are functions whose value may differ the next time, or on another machine: the time and
// random numbers, the local time zone, and the order of a map that a function has created.
var volatile = []string{"Now", "UUID", "UUIDv7", "Time", "Keys", "Values", "ToKeyValueString"}

// maxDecoded is the largest trace that is decoded, in bytes: two bytes can be an event that takes seventy
// bytes decoded.
const maxDecoded = 8 << 20

// A condition may look at the resource and the scope of a span again with each span, and at a span again with each of its events:
// many small ones that share a large one cost as much time as a trace of another size. Beyond maxRepeats times its size, and
// leastRead bytes, a trace is not evaluated. Traces of instrumented programs stay below: resources of 50 KiB, with the arguments of
// a Java process, and spans of 500 bytes come to 100 times.
const (
	maxRepeats = 128
	leastRead  = 4 << 20
)

func newOTTL(spans, events []string) (ottlCondition, error) {
	var (
		c    ottlCondition
		errs []error
	)
	quiet := component.TelemetrySettings{Logger: zap.NewNop()}
	spanParser, err := ottlspan.NewParser(functions[*ottlspan.TransformContext](ottlfuncs.NewIsRootSpanFactory()), quiet)
	errs = append(errs, err)
	eventParser, err := ottlspanevent.NewParser(functions[*ottlspanevent.TransformContext](), quiet)
	errs = append(errs, err)
	if err := errors.Join(errs...); err != nil {
		return c, err
	}
	c.spans, err = spanParser.ParseConditions(spans)
	errs = append(errs, err)
	c.events, err = eventParser.ParseConditions(events)
	return c, errors.Join(append(errs, err)...)
}

// functions are the deterministic converters of OTTL.
func functions[K any](more ...ottl.Factory[K]) map[string]ottl.Factory[K] {
	all := ottlfuncs.StandardConverters[K]()
	for _, f := range more {
		all[f.Name()] = f
	}
	for _, name := range volatile {
		delete(all, name)
	}
	return all
}

func (c ottlCondition) evaluate(t *Trace, _ *Budgets) Outcome {
	if len(t.Payload) > maxDecoded || !c.affords(t) {
		if c.strict {
			return Failed
		}
		return NotSampled
	}
	resources := t.decode().ResourceSpans()
	for i := range resources.Len() {
		scopes := resources.At(i).ScopeSpans()
		for j := range scopes.Len() {
			spans := scopes.At(j).Spans()
			for k := range spans.Len() {
				if yes, err := c.matches(resources.At(i), scopes.At(j), spans.At(k)); yes {
					return Sampled
				} else if err != nil && c.strict {
					return Failed
				}
			}
		}
	}
	return NotSampled
}

// affords reports whether what the conditions may look at is within its bound.
func (c ottlCondition) affords(t *Trace) bool {
	left := max(maxRepeats*len(t.Payload), leastRead)
	var sp otlpwire.Span
	for r := range otlpwire.Resources(t.Payload) {
		for sc := range r.Scopes() {
			shared := len(r.Resource()) + len(sc.Scope())
			for item := range sc.Items() {
				if len(c.spans) > 0 {
					left -= shared + len(item)
				}
				if len(c.events) > 0 {
					sp.Parse(item)
					own := len(item)
					for event := range sp.Events() {
						own -= len(event)
					}
					for event := range sp.Events() {
						left -= shared + own + len(event)
					}
				}
				if left < 0 {
					return false
				}
			}
		}
	}
	return true
}

// matches evaluates the conditions on a span and its events. A condition that fails counts as not met.
func (c ottlCondition) matches(rs ptrace.ResourceSpans, ss ptrace.ScopeSpans, sp ptrace.Span) (yes bool, err error) {
	if len(c.spans) > 0 {
		tc := ottlspan.NewTransformContext(rs, ss, sp)
		defer tc.Close()
		if yes, err = anyOf(c.spans, tc, c.strict); yes || (err != nil && c.strict) {
			return yes, err
		}
	}
	for i := 0; len(c.events) > 0 && i < sp.Events().Len(); i++ {
		tc := ottlspanevent.NewTransformContext(rs, ss, sp, sp.Events().At(i))
		yes, failed := anyOf(c.events, tc, c.strict)
		tc.Close()
		if err = cmp.Or(err, failed); yes || (err != nil && c.strict) {
			return yes, err
		}
	}
	return false, err
}

// anyOf reports whether one of the conditions is met, or else the error of one; strict stops at the first
// that fails.
func anyOf[K any](conditions []*ottl.Condition[K], k K, strict bool) (yes bool, err error) {
	for _, c := range conditions {
		yes, failed := c.Eval(context.Background(), k)
		if failed != nil && strict {
			return false, failed
		}
		if failed == nil && yes {
			return true, nil
		}
		err = cmp.Or(err, failed)
	}
	return false, err
}

// decode returns the trace as pdata. A trace that cannot be decoded has no spans; Scan does not accept
// such a payload. If decoding panics, it does so for every policy that asks.
func (t *Trace) decode() ptrace.Traces {
	if !t.decodes {
		var u ptrace.ProtoUnmarshaler
		d, err := u.UnmarshalTraces(t.Payload)
		if err != nil {
			d = ptrace.NewTraces()
		}
		t.decoded, t.decodes = d, true
	}
	return t.decoded
}

// ottlCondition builds the policy.
func (b *builder) ottlCondition(s spec) evaluator {
	cfg := s.OTTL
	if len(cfg.Span)+len(cfg.SpanEvent) == 0 {
		b.fail(s, "span and spanevent are empty")
	}
	c, err := newOTTL(cfg.Span, cfg.SpanEvent)
	if err != nil {
		b.fail(s, "%v", err)
	}
	switch strings.ToLower(cfg.ErrorMode) {
	case "", "ignore", "silent":
	case "propagate":
		c.strict = true
	default:
		b.fail(s, "error_mode is %q, want ignore, silent or propagate", cfg.ErrorMode)
	}
	return c
}
