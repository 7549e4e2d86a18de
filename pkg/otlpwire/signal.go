// Package otlpwire checks, stamps, splits and reads OTLP export requests as
// protobuf bytes, without decoding them into objects.
//
// The bytes of one Export{Trace,Metrics,Logs}ServiceRequest are called a
// payload. All three signals have the same frame: a payload repeats resources
// (field 1), a resource repeats scopes (field 2), a scope repeats spans,
// metrics or log records (field 2). The functions here walk that frame and copy
// what is inside:
//
//	report, err := otlpwire.Scan(sig, payload, limits) // bounds, counts, IDs
//	if !report.Sound() {
//		payload, err = otlpwire.Mend(sig, payload) // without what backends refuse
//	}
//	out, err = stamp.Append(out, payload)      // identity in every resource
//	err = splitter.Split(payload, keyOf, emit) // one payload per key
//	for item := range otlpwire.Items(payload) { ... }
//
// # Promises
//
//   - The generated protobuf decoder accepts what Scan finds sound, and what Mend returns for
//     other payloads that Scan accepts, with the same number of items.
//   - Every function except Scan, Mend and FromJSON may assume a sound payload; on other bytes they
//     return an error or fewer items, but do not panic or read outside the slice.
//   - No function writes to the payload it is given.
//   - Scan, Stamp, Splitter and everything that reads do not allocate in steady
//     state.
//   - Concatenating two payloads of a signal gives a payload that holds the
//     items of both: field 1 is repeated (protobuf encoding specification).
//
// # Not here
//
// Goroutines, clocks and loggers; this package does not know instances or the bus.
package otlpwire

import "fmt"

// Signal is one of the three kinds of telemetry.
type Signal uint8

// The signals, in the order in which every table and report lists them.
const (
	Traces Signal = iota
	Metrics
	Logs
)

// Signals lists all signals.
var Signals = [...]Signal{Traces, Metrics, Logs}

// String returns the signal's name as in subjects, labels and URL paths.
func (s Signal) String() string {
	switch s {
	case Traces:
		return "traces"
	case Metrics:
		return "metrics"
	case Logs:
		return "logs"
	}
	return fmt.Sprintf("signal(%d)", uint8(s))
}

// ParseSignal is the inverse of [Signal.String].
func ParseSignal(name string) (Signal, error) {
	for _, s := range Signals {
		if s.String() == name {
			return s, nil
		}
	}
	return 0, fmt.Errorf("unknown signal %q: want traces, metrics or logs", name)
}
