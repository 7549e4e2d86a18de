package main

import (
	"bufio"
	"os"
	"testing"

	"go.opentelemetry.io/collector/pdata/pmetric"
)

// TestRecordedMetrics compares what the OpenTelemetry Go SDK has exported (test/record), in
// every way of translating and sending.
func TestRecordedMetrics(t *testing.T) {
	f, err := os.Open("testdata/sdk.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	kinds, series := map[pmetric.MetricType]bool{}, 0
	for lines.Scan() {
		md, err := (&pmetric.JSONUnmarshaler{}).UnmarshalMetrics(lines.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		for _, rm := range md.ResourceMetrics().All() {
			for _, sm := range rm.ScopeMetrics().All() {
				for _, m := range sm.Metrics().All() {
					if kinds[m.Type()] = true; m.Type() == pmetric.MetricTypeExponentialHistogram {
						for _, p := range m.ExponentialHistogram().DataPoints().All() {
							tellShape(p)
						}
					}
				}
			}
		}
		for _, v := range variants() {
			want := theirs(md, v)
			got, err := ours(md, v)
			if err != nil {
				t.Fatal(err)
			}
			if v.protocol == "1.0" {
				want.forget()
			}
			want.meant()
			got.meant()
			for key := range union(want, got) {
				if series++; want[key].String() != got[key].String() {
					t.Errorf("%+v: %s\n  Prometheus\n    %s\n  penstock\n    %s", v, key, want[key], got[key])
				}
			}
		}
	}
	if err := lines.Err(); err != nil || len(kinds) != 4 || series < 1000 {
		t.Errorf("%d kinds of metrics, %d series, %v", len(kinds), series, err)
	}
}
