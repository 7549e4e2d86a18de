package sampler_test

import (
	"fmt"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/sampler"
)

// span is a frame with one span, which arrived so many seconds after the instance began.
func span(trace, id byte, status, second int) envelope.Frame {
	payload, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, fmt.Appendf(nil, `{"resourceSpans":[{"scopeSpans":[{"spans":[
		{"traceId":"%032x","spanId":"%016x","name":"checkout","status":{"code":%d}}]}]}]}`, trace, id, status), otlpwire.DefaultLimits)
	if err != nil {
		panic(err)
	}
	return envelope.Frame{Instance: "as-1", Arrival: int64(second) * int64(time.Second), Payload: payload}
}

// A trace is decided when the stream itself says that its window has closed: no clock is read.
func Example() {
	policies, err := policy.Parse("sampling.yaml", []byte(`
decision_wait: 10s
policies:
  - {name: errors, type: status_code, status_code: {status_codes: [ERROR]}}
`))
	if err != nil {
		fmt.Println(err)
		return
	}
	s := sampler.New(policies, 64<<20, 0)
	add := func(seq uint64, f envelope.Frame) {
		out, err := s.Add(seq, f)
		if err != nil {
			fmt.Println(err)
			return
		}
		for i, d := range out.Decisions { // to be recorded before anything else is done
			fmt.Printf("message %d: trace %d, kept %v, by %q\n", seq, d.TraceID[15], d.Kept, out.By[i])
		}
		for _, e := range out.Exports { // to be sent to the backend
			fmt.Printf("message %d: %d spans to send, late %v\n", seq, e.Spans, e.Late)
			s.Release(e.Seq) // the backend has it
		}
	}
	const ok, failed = 1, 2
	add(1, span(1, 1, ok, 1))
	add(2, span(1, 2, failed, 2))
	add(3, span(2, 3, ok, 3))
	traces, _ := s.Held()
	fmt.Println(traces, "traces held, floor", s.Floor())

	add(4, span(3, 4, ok, 20)) // this arrival closes both windows
	fmt.Println("floor", s.Floor())
	add(5, span(1, 5, ok, 21)) // follows the decision of its trace
	// Output:
	// 2 traces held, floor 0
	// message 4: trace 1, kept true, by "errors"
	// message 4: trace 2, kept false, by ""
	// message 4: 2 spans to send, late false
	// floor 3
	// message 5: 1 spans to send, late true
}
