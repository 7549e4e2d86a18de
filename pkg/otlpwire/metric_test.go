package otlpwire

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

// message1 is a message with one field.
func message1(num protowire.Number, content []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, num, protowire.BytesType), content)
}

// TestMetricInParts: the same kind of points in several fields is one, another kind before
// does not count, as protobuf has it.
func TestMetricInParts(t *testing.T) {
	point := message1(1, nil)
	sum := append(append([]byte(nil), point...), protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.VarintType), 2)...)
	monotonic := protowire.AppendVarint(protowire.AppendTag(nil, 3, protowire.VarintType), 1)
	for name, tc := range map[string]struct {
		parts  [][]byte
		points int
		kind   MetricKind
	}{
		"one":                {[][]byte{message1(7, sum)}, 1, Sum},
		"three":              {[][]byte{message1(7, point), message1(7, sum), message1(7, append(point[:len(point):len(point)], monotonic...))}, 3, Sum},
		"another before":     {[][]byte{message1(5, point), message1(7, sum)}, 1, Sum},
		"another in between": {[][]byte{message1(7, sum), message1(5, point), message1(7, sum)}, 1, Sum},
		"the last counts":    {[][]byte{message1(7, sum), message1(9, sum)}, 1, Histogram},
		"none":               {nil, 0, NoMetric},
	} {
		item := message1(1, []byte("m"))
		for _, p := range tc.parts {
			item = append(item, p...)
		}
		var m Metric
		m.Parse(item)
		n := 0
		for range m.Points() {
			n++
		}
		if n != tc.points || m.Kind != tc.kind || string(m.Name) != "m" {
			t.Errorf("%s: %d points of kind %d", name, n, m.Kind)
		}
		if name == "three" && (!m.Monotonic || m.Temporality != Cumulative) {
			t.Errorf("%s: monotonic %v, temporality %d", name, m.Monotonic, m.Temporality)
		}
		if got := Count(Metrics, message1(1, message1(2, message1(2, item)))); got != tc.points {
			t.Errorf("%s: counted are %d", name, got)
		}
	}
}

func TestPick(t *testing.T) {
	p, _, err := FromJSON(nil, Logs, []byte(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"stringValue":"0"}},{"body":{"stringValue":"1"}}]},{"logRecords":[{"body":{"stringValue":"2"}},{"body":{"stringValue":"3"}}]}]}]}`), DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		items []int
		want  string
	}{{[]int{0, 3}, "03"}, {[]int{1, 2, 3}, "123"}, {nil, ""}, {[]int{3}, "3"}} {
		picked, got := Pick(Logs, p, tc.items), ""
		for item := range Items(picked) {
			got += string(ParseValue(Single(item, 5)).Str)
		}
		if got != tc.want || Count(Logs, picked) != len(tc.items) {
			t.Errorf("%v: %q, want %q", tc.items, got, tc.want)
		}
	}
}

// TestObserved: only what has no time gets one, at whatever depth lengths change.
func TestObserved(t *testing.T) {
	p, _, err := FromJSON(nil, Logs, []byte(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"stringValue":"`+strings.Repeat("x", 120)+`"}},{"timeUnixNano":"1"},{"observedTimeUnixNano":"2"}]}]},{"scopeLogs":[{"logRecords":[{},{}]}]}]}`), DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	out := Observed(p, 7)
	if rep, err := Scan(Logs, out, DefaultLimits); err != nil || rep.Items != 5 {
		t.Fatalf("%+v, %v", rep, err)
	}
	var got []uint64
	for item := range Items(out) {
		var times uint64
		for i := 0; i < len(item); {
			var f Field
			if f, i = NextField(item, i); f.Tag == Tag(recordTime, Fixed64) || f.Tag == Tag(recordObserved, Fixed64) {
				times = 10*times + f.Bits
			}
		}
		got = append(got, times)
	}
	if want := []uint64{7, 1, 2, 7, 7}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if again := Observed(out, 8); &again[0] != &out[0] {
		t.Error("copied for nothing")
	}
}
