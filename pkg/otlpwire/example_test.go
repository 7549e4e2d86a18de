package otlpwire_test

import (
	"fmt"

	"github.com/penstock/penstock/pkg/otlpwire"
)

const request = `{"resourceLogs":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"shop"}}]},
	"scopeLogs":[{"logRecords":[{"body":{"stringValue":"one"}},{"body":{"stringValue":"two"}}]}]}]}`

// A request is checked and stamped as bytes; nothing of it is decoded into objects.
func Example() {
	payload, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(request), otlpwire.DefaultLimits)
	if err != nil {
		fmt.Println(err)
		return
	}
	report, err := otlpwire.Scan(otlpwire.Logs, payload, otlpwire.DefaultLimits)
	fmt.Println(report.Items, "items,", err)
	for r := range otlpwire.Resources(payload) {
		service, _ := otlpwire.ResourceAttribute(r.Resource(), "service.name")
		fmt.Println("service", string(service.Str))
	}
	// Output:
	// 2 items, <nil>
	// service shop
}

// A payload that a backend refuses is halved until the culprit is alone.
func ExampleHalve() {
	payload, _, _ := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(request), otlpwire.DefaultLimits)
	first, second, several := otlpwire.Halve(otlpwire.Logs, payload)
	fmt.Println(otlpwire.Count(otlpwire.Logs, first), otlpwire.Count(otlpwire.Logs, second), several)
	_, _, several = otlpwire.Halve(otlpwire.Logs, first)
	fmt.Println(several)
	// Output:
	// 1 1 true
	// false
}
