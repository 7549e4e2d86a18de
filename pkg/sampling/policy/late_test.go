package policy

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
)

// grow are policies, and whether they decide about late spans.
var grow = []struct {
	policy string
	grows  bool
}{
	{`type: status_code, status_code: {status_codes: [ERROR]}`, true},
	{`type: latency, latency: {threshold_ms: 700}`, true},
	{`type: latency, latency: {threshold_ms: 100, upper_threshold_ms: 1500}`, false},
	{`type: string_attribute, string_attribute: {key: url.path, values: [/cart/17]}`, true},
	{`type: string_attribute, string_attribute: {key: url.path, values: [/cart/18], invert_match: true}`, false},
	{`type: span_count, span_count: {min_spans: 2}`, true},
	{`type: span_count, span_count: {min_spans: 1, max_spans: 2}`, false},
	{`type: trace_state, trace_state: {key: vendor, values: [gold]}`, true},
	{`type: probabilistic, probabilistic: {sampling_percentage: 99}`, true},
	{`type: rate_limiting, rate_limiting: {spans_per_second: 100}`, false},
	{`type: bytes_limiting, bytes_limiting: {bytes_per_second: 100000}`, false},
	{`type: ottl_condition, ottl_condition: {error_mode: ignore, span: ["status.code == 2"]}`, true},
	{`type: ottl_condition, ottl_condition: {error_mode: propagate, span: ["status.code == 2"]}`, false},
	{`type: and, and: {and_sub_policy: [{name: a, type: latency, latency: {threshold_ms: 1}}, {name: b, type: status_code, status_code: {status_codes: [ERROR]}}]}`, true},
	{`type: and, and: {and_sub_policy: [{name: a, type: rate_limiting, rate_limiting: {spans_per_second: 100}}, {name: b, type: status_code, status_code: {status_codes: [ERROR]}}]}`, false},
	{`type: not, not: {not_sub_policy: {name: a, type: status_code, status_code: {status_codes: [ERROR]}}}`, false},
	{`type: composite, composite: {max_total_spans_per_second: 100, policy_order: [a], composite_sub_policy: [{name: a, type: always_sample}]}`, false},
}

// TestWantsLate: whatever decides about late spans decides the same about the whole trace, whatever else that has; a
// budget, and what other spans could change, has no say.
func TestWantsLate(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	some := func(id byte) *Trace {
		status := []tracepb.Status_StatusCode{tracepb.Status_STATUS_CODE_OK, tracepb.Status_STATUS_CODE_ERROR}[rng.IntN(2)]
		return trace(t, id, time.Duration(rng.IntN(2_000))*time.Millisecond, status)
	}
	for _, tc := range grow {
		set, err := Parse("late", fmt.Appendf(nil, "policies:\n  - {name: p, %s}\n", tc.policy))
		if err != nil {
			t.Fatal(err)
		}
		wants := 0
		for range 200 {
			id := byte(rng.IntN(256))
			first, late := some(id), some(id)
			v := set.WantsLate(late)
			if !v.Keep {
				continue
			}
			wants++
			whole := &Trace{ID: late.ID, Spans: first.Spans + late.Spans, Payload: append(append([]byte{}, first.Payload...), late.Payload...)}
			if all := set.Decide(whole, &Budgets{}); !all.Keep || all.By != v.By || all.Threshold != v.Threshold {
				t.Errorf("%s: late spans are wanted (%+v), the whole trace is not: %+v", tc.policy, v, all)
			}
		}
		if wants > 0 != tc.grows {
			t.Errorf("%s: wanted %d of 200 times", tc.policy, wants)
		}
	}
}

// TestLateSpansThatAreDropped: drop comes first.
func TestLateSpansThatAreDropped(t *testing.T) {
	for _, sub := range []string{
		`{name: d, type: trace_state, trace_state: {key: vendor, values: [gold]}}`,
		`{name: d, type: rate_limiting, rate_limiting: {spans_per_second: 100}}`,
	} {
		set, err := Parse("late", []byte(strings.ReplaceAll(`
policies:
  - {name: errors, type: status_code, status_code: {status_codes: [ERROR]}}
  - {name: none, type: drop, drop: {drop_sub_policy: [SUB]}}
`, "SUB", sub)))
		if err != nil {
			t.Fatal(err)
		}
		if v := set.WantsLate(trace(t, 1, time.Second, tracepb.Status_STATUS_CODE_ERROR)); v.Keep || v.By != "none" {
			t.Errorf("%s: %+v", sub, v)
		}
	}
}
