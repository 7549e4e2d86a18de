package otlpwire

import (
	"bytes"
	"strings"
	"testing"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

const half = Unknown / 2

func TestTraceStateTellsTheThreshold(t *testing.T) {
	for _, tc := range []struct {
		state     string
		threshold uint64
		want      string
	}{
		{"", half, "ot=th:8"},
		{"", Unknown - Unknown/10, "ot=th:e666"},
		{"", Unknown - Unknown/1000, "ot=th:ffbe77"},
		{"", Unknown - 1, "ot=th:ffffffffffffff"},
		{"ot=th:8", half, "ot=th:c"},
		{"ot=th:0", half, "ot=th:8"},
		{"a=b,ot=rv:db8233f7e3a151;th:8;x:y,c=d", half, "ot=th:c;rv:db8233f7e3a151;x:y,a=b,c=d"},
		{"a=b", half, "ot=th:8,a=b"},
		{"ot=th:nonsense", half, "ot=th:8"},
		{"ot=th:123456789abcdef", half, "ot=th:8"},
		{"ot=th:8;rv:1,a=b", Unknown, "ot=rv:1,a=b"},
		{"ot=th:8", Unknown, ""},
		{" , a=b ,", half, "ot=th:8,a=b"},
		{"ot=rv:7fffffffffffff", half, "ot=rv:7fffffffffffff"}, // not kept by that randomness
		{"ot=rv:80000000000000", half, "ot=th:8;rv:80000000000000"},
		{"ot=th:4;rv:8fffffffffffff", half, "ot=rv:8fffffffffffff"},
		{"ot=rv:7f", half, "ot=th:8;rv:7f"}, // no randomness
		{members(31), half, "ot=th:8," + members(31)},
		{members(32), half, "ot=th:8," + members(31)},
		{members(20) + ",ot=p:1," + members(20), half, "ot=th:8;p:1," + members(20) + "," + members(11)},
		{"ot=k:" + strings.Repeat("v", 254), half, "ot=th:8"},
		{"ot=k:" + strings.Repeat("v", 240) + ";rv:9b8233f7e3a151", half, "ot=th:8;rv:9b8233f7e3a151"},
	} {
		if got := (Annotation{Threshold: tc.threshold}).traceState([]byte(tc.state)); got != tc.want {
			t.Errorf("%q with %x: got %q, want %q", tc.state, tc.threshold, got, tc.want)
		}
	}
}

func members(n int) string { return strings.TrimSuffix(strings.Repeat("a=1,", n), ",") }

// TestAnnotate compares with decoding, changing and encoding.
func TestAnnotate(t *testing.T) {
	for _, seed := range append(generatorSeeds[Traces], marshal(t, sample(Traces))) {
		var want tracepb.TracesData
		if err := proto.Unmarshal(seed, &want); err != nil {
			t.Fatal(err)
		}
		a := Annotation{Threshold: half, Key: "tailsampling.policy", Value: "slow"}
		for _, rs := range want.GetResourceSpans() {
			for _, ss := range rs.GetScopeSpans() {
				for _, sp := range ss.GetSpans() {
					sp.TraceState = a.traceState([]byte(sp.GetTraceState()))
					sp.Attributes = append(sp.Attributes, str(a.Key, a.Value))
				}
			}
		}
		out := a.Append([]byte("x"), seed)
		var got tracepb.TracesData
		if err := proto.Unmarshal(out[1:], &got); err != nil || !proto.Equal(&got, &want) {
			t.Fatalf("%v\ngot  %v\nwant %v", err, &got, &want)
		}
		if again := a.Append(nil, out[1:]); Count(Traces, again) != Count(Traces, seed) || bytes.Count(again, []byte(a.Key)) != bytes.Count(out, []byte(a.Key)) {
			t.Error("an attribute that is there is added again")
		}
		if none := (Annotation{}).Append(nil, seed); !bytes.Equal(none, seed) || (Annotation{}).Needed() {
			t.Error("nothing to say changes something")
		}
	}
}
