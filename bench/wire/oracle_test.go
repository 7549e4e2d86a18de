package main

import (
	"bytes"
	"testing"

	"go.opentelemetry.io/collector/pdata/plog"
	"go.opentelemetry.io/collector/pdata/pmetric"
	"go.opentelemetry.io/collector/pdata/ptrace"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/bench/internal/load"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/otlpwire/badinput"
)

// TestPdataAcceptsWhatIsSound: pdata refuses a whole request for one ID of a wrong
// length, and Loki and Prometheus decode with it. What penstock lets pass must not
// cost a customer a batch there.
func TestPdataAcceptsWhatIsSound(t *testing.T) {
	for _, row := range badinput.Rows() {
		sig := must(otlpwire.ParseSignal(row.Signal))
		body := row.Body()
		if row.JSON {
			p, _, err := otlpwire.FromJSON(nil, sig, body, otlpwire.DefaultLimits)
			if err != nil {
				continue
			}
			body = p
		}
		rep, err := otlpwire.Scan(sig, body, otlpwire.DefaultLimits)
		if err != nil {
			continue
		}
		if !rep.Sound() {
			body = must(otlpwire.Mend(sig, body))
		}
		if err := tryPdata(sig, body); err != nil {
			t.Errorf("%s %s: %v", row.ID, row.Name, err)
		}
	}
}

func tryPdata(sig otlpwire.Signal, payload []byte) error {
	var err error
	switch sig {
	case otlpwire.Traces:
		_, err = (&ptrace.ProtoUnmarshaler{}).UnmarshalTraces(payload)
	case otlpwire.Metrics:
		_, err = (&pmetric.ProtoUnmarshaler{}).UnmarshalMetrics(payload)
	default:
		_, err = (&plog.ProtoUnmarshaler{}).UnmarshalLogs(payload)
	}
	return err
}

// TestJSONAgreesWithPdata reads the same OTLP/JSON with both.
func TestJSONAgreesWithPdata(t *testing.T) {
	for signal, text := range badinput.Examples() {
		sig := must(otlpwire.ParseSignal(signal))
		ours, sanitised, err := otlpwire.FromJSON(nil, sig, []byte(text), otlpwire.DefaultLimits)
		if err != nil || sanitised != 0 {
			t.Errorf("%v: %v, %d sanitised", sig, err, sanitised)
			continue
		}
		theirs := pdataJSON(t, sig, []byte(text))
		got, want := generated(sig), generated(sig)
		check(proto.Unmarshal(ours, got))
		check(proto.Unmarshal(theirs, want))
		// pdata makes a resource and a scope where there is none; so does a stamp.
		if !proto.Equal(withEmpty(sig, got), withEmpty(sig, want)) {
			t.Errorf("%v: got %v\nwant %v", sig, got, want)
		}
	}
}

// withEmpty takes a message once through pdata, which fills in what it fills in.
func withEmpty(sig otlpwire.Signal, m proto.Message) proto.Message {
	b := must(proto.Marshal(m))
	out := generated(sig)
	switch sig {
	case otlpwire.Traces:
		check(proto.Unmarshal(must((&ptrace.ProtoMarshaler{}).MarshalTraces(must((&ptrace.ProtoUnmarshaler{}).UnmarshalTraces(b)))), out))
	case otlpwire.Metrics:
		check(proto.Unmarshal(must((&pmetric.ProtoMarshaler{}).MarshalMetrics(must((&pmetric.ProtoUnmarshaler{}).UnmarshalMetrics(b)))), out))
	default:
		check(proto.Unmarshal(must((&plog.ProtoMarshaler{}).MarshalLogs(must((&plog.ProtoUnmarshaler{}).UnmarshalLogs(b)))), out))
	}
	return out
}

func pdataJSON(t *testing.T, sig otlpwire.Signal, text []byte) []byte {
	t.Helper()
	switch sig {
	case otlpwire.Traces:
		return must((&ptrace.ProtoMarshaler{}).MarshalTraces(must((&ptrace.JSONUnmarshaler{}).UnmarshalTraces(text))))
	case otlpwire.Metrics:
		return must((&pmetric.ProtoMarshaler{}).MarshalMetrics(must((&pmetric.JSONUnmarshaler{}).UnmarshalMetrics(text))))
	}
	return must((&plog.ProtoMarshaler{}).MarshalLogs(must((&plog.JSONUnmarshaler{}).UnmarshalLogs(text))))
}

// TestSidesDoTheSame: a comparison is of no use when one side does less.
func TestSidesDoTheSame(t *testing.T) {
	payload := load.Request(otlpwire.Traces, 512, 3)
	var st otlpwire.Stamp
	for _, a := range identity {
		st.Overwrite(a.key, a.val)
	}
	st.Insert(inserted.key, inserted.val)
	ours := must(st.Append(nil, payload))
	// pdata writes an empty status and an empty parent where a span has none, two
	// bytes each; the order of attributes differs, too.
	more := 0
	for _, rs := range must((&ptrace.ProtoUnmarshaler{}).UnmarshalTraces(payload)).ResourceSpans().All() {
		for _, ss := range rs.ScopeSpans().All() {
			for _, s := range ss.Spans().All() {
				if s.ParentSpanID().IsEmpty() {
					more += 2
				}
				if s.Status().Code() == ptrace.StatusCodeUnset {
					more += 2
				}
			}
		}
	}
	if n := len(stampPdata(otlpwire.Traces, payload)); n != len(ours)+more {
		t.Errorf("stamp: %d bytes, pdata %d, want %d", len(ours), n, len(ours)+more)
	}
	if n := len(stampGenerated(otlpwire.Traces, payload)); n != len(ours) {
		t.Errorf("stamp: %d bytes, generated %d", len(ours), n)
	}
	total := func(f func()) int {
		before := sink
		f()
		return sink - before
	}
	var sp otlpwire.Splitter
	key := func(item []byte) int { id, _ := otlpwire.SpanTrace(item); return place(id) }
	want := total(func() { check(sp.Split(payload, key, func(_ int, p []byte) { sink += len(p) })) })
	if n := total(func() { splitPdata(payload) }); n != want+more {
		t.Errorf("split: %d bytes, pdata %d, want %d", want, n, want+more)
	}
	if n := total(func() { splitGenerated(payload) }); n != want {
		t.Errorf("split: %d bytes, generated %d", want, n)
	}
	want = total(func() { readWire(payload) })
	if n := total(func() { readPdata(payload) }); n != want {
		t.Errorf("read: %d, pdata %d", want, n)
	}
	if n := total(func() { readGenerated(payload) }); n != want {
		t.Errorf("read: %d, generated %d", want, n)
	}
	if rep := must(otlpwire.Scan(otlpwire.Traces, payload, otlpwire.DefaultLimits)); rep != (otlpwire.Report{Items: 512}) {
		t.Errorf("preflight: %+v", rep)
	}
	if !bytes.Equal(payload, load.Request(otlpwire.Traces, 512, 3)) {
		t.Error("a side has written to the payload")
	}
}

// TestNothingAllocates: penstock's sides run without an allocation in steady
// state, for all signals and sizes.
func TestNothingAllocates(t *testing.T) {
	for _, sig := range otlpwire.Signals {
		for _, n := range []int{1, 64, 512} {
			for _, op := range operations(sig, load.Request(sig, n, 3)) {
				if got := testing.AllocsPerRun(10, op.sides[0].run); got != 0 {
					t.Errorf("%v, %d items, %s: %v allocations", sig, n, op.name, got)
				}
			}
		}
	}
}
