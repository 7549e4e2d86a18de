package otlpwire

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

func TestJSONRoundTrip(t *testing.T) {
	for _, sig := range Signals {
		p := marshal(t, sample(sig))
		text := AppendJSON(nil, sig, p)
		if bytes.ContainsAny(text, "\n\r") {
			t.Errorf("%v: the line has a break: %s", sig, text)
		}
		back, err := FromJSON(nil, sig, text, DefaultLimits)
		if err != nil {
			t.Fatalf("%v: %v\n%s", sig, err, text)
		}
		if got, want := decode(t, sig, back), decode(t, sig, p); !proto.Equal(got, want) {
			t.Errorf("%v: got %v\nwant %v", sig, got, want)
		}
	}
}

// TestJSONByTheSpecification has one row a rule of the OTLP/JSON encoding.
func TestJSONByTheSpecification(t *testing.T) {
	span := func(members string) string {
		return `{"resourceSpans":[{"scopeSpans":[{"spans":[{` + members + `}]}]}]}`
	}
	ids := `"traceId":"5B8EFFF798038103D269B633813FC60C","spanId":"eee19b7ec3c1b174"`
	for _, tc := range []struct {
		name, text string
		ok         bool
		report     Report
	}{
		{"hex in either case", span(ids), true, Report{Items: 1}},
		{"empty object", `{}`, true, Report{}},
		{"unknown fields", `{"x":[{"y":[1,{"z":null}]}],"resourceSpans":[]}`, true, Report{}},
		{"snake_case is unknown", `{"resource_spans":[{"scope_spans":[{"spans":[{}]}]}]}`, true, Report{}},
		{"null is default", span(ids + `,"attributes":null,"name":null`), true, Report{Items: 1}},
		{"31 hex digits", span(`"traceId":"5B8EFFF798038103D269B633813FC60","spanId":"eee19b7ec3c1b174"`), true, Report{Items: 1, Invalid: 1}},
		{"no hex", span(`"traceId":"zz","spanId":"eee19b7ec3c1b174"`), true, Report{Items: 1, Invalid: 1}},
		{"time as string and number", span(ids + `,"startTimeUnixNano":"18446744073709551615","endTimeUnixNano":5`), true, Report{Items: 1}},
		{"time of 2^64", span(ids + `,"startTimeUnixNano":"18446744073709551616"`), false, Report{}},
		{"fraction for an integer", span(ids + `,"droppedLinksCount":1.5`), false, Report{}},
		{"enum as integer", span(ids + `,"kind":99`), true, Report{Items: 1}},
		{"enum by name", span(ids + `,"kind":"SPAN_KIND_SERVER"`), false, Report{}},
		{"double out of range", span(ids + `,"attributes":[{"key":"a","value":{"doubleValue":1e400}}]`), false, Report{}},
		{"NaN as string", span(ids + `,"attributes":[{"key":"a","value":{"doubleValue":"NaN"}}]`), true, Report{Items: 1}},
		{"lone surrogate", span(ids + `,"name":"\ud800"`), true, Report{Items: 1}},
		{"invalid UTF-8", span(ids + ",\"name\":\"\xff\""), true, Report{Items: 1}},
		{"duplicate key", span(ids + `,"attributes":[{"key":"a"}],"kind":1,"attributes":[{"key":"b"},{"key":"c"}]`), true, Report{Items: 1}},
		{"trailing comma", `{"resourceSpans":[],}`, false, Report{}},
		{"second document", `{}{}`, false, Report{}},
		{"byte order mark", "\ufeff{}", false, Report{}},
		{"only brackets", strings.Repeat("[", 1<<20), false, Report{}},
		{"deep unknown field", `{"x":` + strings.Repeat("[", 1<<10) + strings.Repeat("]", 1<<10) + `}`, true, Report{}},
		{"too deep unknown field", `{"x":` + strings.Repeat("[", 1<<20) + `}`, false, Report{}},
		{"unterminated string", `{"resourceSpans`, false, Report{}},
		{"array for an object", `[]`, false, Report{}},
		{"empty", ``, false, Report{}},
		{"600,000 empty spans", `{"resourceSpans":[{"scopeSpans":[{"spans":[{}` + strings.Repeat(",{}", 600_000) + `]}]}]}`, false, Report{}},
		{"64 nested arrays", span(ids + `,"attributes":[{"key":"a","value":` + strings.Repeat(`{"arrayValue":{"values":[`, 64) + strings.Repeat("]}}", 64) + `}]`), true, Report{Items: 1}},
		{"65 nested arrays", span(ids + `,"attributes":[{"key":"a","value":` + strings.Repeat(`{"arrayValue":{"values":[`, 65) + strings.Repeat("]}}", 65) + `}]`), false, Report{}},
	} {
		p, err := FromJSON(nil, Traces, []byte(tc.text), DefaultLimits)
		if !tc.ok {
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("%s: got %v, want %v", tc.name, err, ErrMalformed)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		checkAgainstDecoder(t, Traces, p)
		if rep, err := Scan(Traces, p, DefaultLimits); err != nil || rep != tc.report {
			t.Errorf("%s: got %+v, %v; want %+v", tc.name, rep, err, tc.report)
		}
	}
	p, _ := FromJSON(nil, Traces, []byte(span(ids+`,"attributes":[{"key":"a"}],"kind":1,"attributes":[{"key":"b"},{"key":"c"}]`)), DefaultLimits)
	if sp := decode(t, Traces, p).(*tracepb.TracesData).ResourceSpans[0].ScopeSpans[0].Spans[0]; len(sp.Attributes) != 2 || sp.Attributes[0].Key != "b" || sp.Kind != 1 {
		t.Errorf("duplicate key: got %v, want the last one, b and c, and kind 1", sp)
	}
}

// FuzzFromJSON checks that what comes out of the JSON reader is a request.
func FuzzFromJSON(f *testing.F) {
	for _, sig := range Signals {
		f.Add(uint8(sig), AppendJSON(nil, sig, marshal(f, sample(sig))))
	}
	f.Fuzz(func(t *testing.T, s uint8, text []byte) {
		sig := Signal(s % 3)
		p, err := FromJSON(nil, sig, text, DefaultLimits)
		if err != nil {
			return
		}
		if !checkAgainstDecoder(t, sig, p) {
			t.Fatalf("%v: the scanner refuses what came of %q", sig, text)
		}
	})
}
