package policy_test

import (
	"fmt"

	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// Policies are written as for the collector's tail_sampling processor.
func ExampleParse() {
	set, err := policy.Parse("sampling.yaml", []byte(`
decision_wait: 10s
policies:
  - {name: errors, type: status_code, status_code: {status_codes: [ERROR]}}
`))
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, code := range []string{"1", "2"} {
		payload, _, _ := otlpwire.FromJSON(nil, otlpwire.Traces, []byte(`{"resourceSpans":[{"scopeSpans":[{"spans":[
			{"traceId":"0102030405060708090a0b0c0d0e0f10","spanId":"0102030405060708","status":{"code":`+code+`}}]}]}]}`), otlpwire.DefaultLimits)
		var t policy.Trace
		t.Reset(otlpwire.TraceID{1}, 1, payload, 0)
		fmt.Println(set.Decide(&t, new(policy.Budgets)).Keep)
	}
	// Output:
	// false
	// true
}
