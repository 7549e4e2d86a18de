package remotewrite

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/badinput"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// translate returns the series of an OTLP/JSON request, a line each.
func translate(t *testing.T, metrics string) ([]string, error) {
	t.Helper()
	text := `{"resourceMetrics":[{"resource":{"attributes":[
		{"key":"instance.id","value":{"stringValue":"forged"}},{"key":"instance.name","value":{"stringValue":"Berlin"}},
		{"key":"service.name","value":{"stringValue":"shop"}},{"key":"service.namespace","value":{"stringValue":"as"}},
		{"key":"service.instance.id","value":{"stringValue":"pod-1"}},{"key":"host.name","value":{"stringValue":"h"}}]},
		"scopeMetrics":[{"metrics":[` + metrics + `]}]}]}`
	p, _, err := otlpwire.FromJSON(nil, otlpwire.Metrics, []byte(text), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	var req metricspb.MetricsData
	if err := proto.Unmarshal(p, &req); err != nil {
		t.Fatal(err)
	}
	tr := newTranslation([]string{"instance.id", "instance.name"}, "as-1")
	if err := tr.add(&req); err != nil {
		return nil, err
	}
	_ = tr.request() // sorts samples and removes doubles from what is sent
	var out []string
	for _, s := range tr.order {
		var ls []string
		for _, l := range s.labels {
			ls = append(ls, l.name+"="+l.value)
		}
		if !slices.IsSorted(ls) {
			t.Errorf("labels are not in order: %v", ls)
		}
		line := strings.Join(ls, " ")
		for _, v := range s.samples {
			line += fmt.Sprintf(" | %v@%d", v.value, v.at)
		}
		out = append(out, line)
	}
	return out, nil
}

const common = " instance=pod-1 instance_id=as-1 instance_name=Berlin job=as/shop"

func TestTranslation(t *testing.T) {
	for name, tc := range map[string]struct {
		metric string
		want   []string
	}{
		"counter": {
			`{"name":"appserver.http.requests","unit":"1","sum":{"isMonotonic":true,"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"5000000","asInt":"7","attributes":[{"key":"status_group","value":{"stringValue":"5xx"}}]}]}}`,
			[]string{"__name__=appserver_http_requests_total" + common + " status_group=5xx | 7@5"},
		},
		"gauge in seconds": {
			`{"name":"queue.age","unit":"s","gauge":{"dataPoints":[{"timeUnixNano":"1000000","asDouble":1.5}]}}`,
			[]string{"__name__=queue_age_seconds" + common + " | 1.5@1"},
		},
		"sum that may fall": {
			`{"name":"sessions","sum":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"1000000","asInt":"3"}]}}`,
			[]string{"__name__=sessions" + common + " | 3@1"},
		},
		"histogram": {
			`{"name":"d","unit":"s","histogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"1000000","count":"6","sum":9,"bucketCounts":["1","2","3"],"explicitBounds":[0.1,1]}]}}`,
			[]string{
				"__name__=d_seconds_bucket" + common + " le=0.1 | 1@1", "__name__=d_seconds_bucket" + common + " le=1 | 3@1", "__name__=d_seconds_bucket" + common + " le=+Inf | 6@1",
				"__name__=d_seconds_count" + common + " | 6@1", "__name__=d_seconds_sum" + common + " | 9@1",
			},
		},
		"summary": {
			`{"name":"q","summary":{"dataPoints":[{"timeUnixNano":"1000000","count":"2","sum":3,"quantileValues":[{"quantile":0.5,"value":1}]}]}}`,
			[]string{"__name__=q_count" + common + " | 2@1", "__name__=q_sum" + common + " | 3@1", "__name__=q" + common + " quantile=0.5 | 1@1"},
		},
		"identity wins over attributes": {
			`{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"1000000","asInt":"1","attributes":[{"key":"instance_id","value":{"stringValue":"forged"}},{"key":"job","value":{"stringValue":"forged"}},{"key":"__name__","value":{"stringValue":"forged"}}]}]}}`,
			[]string{"__name__=g" + common + " key__name__=forged | 1@1"},
		},
		"names that become one are joined": {
			`{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"1000000","asInt":"1","attributes":[{"key":"a.b","value":{"stringValue":"1"}},{"key":"a_b","value":{"stringValue":"2"}}]}]}}`,
			[]string{"__name__=g a_b=1;2" + common + " | 1@1"},
		},
		"no data": {`{"name":"g"}`, nil},
	} {
		got, err := translate(t, tc.metric)
		if err != nil || !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v\n got %s\nwant %s", name, err, strings.Join(got, "\n     "), strings.Join(tc.want, "\n     "))
		}
	}
	stale, err := translate(t, `{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"1000000","flags":1}]}}`)
	if err != nil || len(stale) != 1 || !strings.HasSuffix(stale[0], "NaN@1") || math.Float64bits(stalenessOf(t)) != 0x7ff0000000000002 {
		t.Errorf("no recorded value: %v, %v", stale, err)
	}
}

func stalenessOf(t *testing.T) float64 { t.Helper(); return stale }

func TestUnsupportedIsRefusedByName(t *testing.T) {
	for metric, want := range map[string]string{
		`{"name":"a.b","sum":{"aggregationTemporality":1,"dataPoints":[{"asInt":"1"}]}}`:                                                                `metric "a.b": delta temporality is not supported`,
		`{"name":"e","exponentialHistogram":{"aggregationTemporality":2,"dataPoints":[{}]}}`:                                                            "exponential histograms are not supported",
		`{"name":"h","histogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"1","bucketCounts":["1","2"],"explicitBounds":[1,2]}]}}`:     "2 bucket counts for 2 bounds",
		`{"name":"h","histogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"1","bucketCounts":["1","2","3"],"explicitBounds":[2,1]}]}}`: "bounds are not in order",
	} {
		if _, err := translate(t, metric); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	w, err := New(Config{URL: "http://127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, permanent := fault.Reason(w.Write(t.Context(), "i", []byte("garbage"))); !permanent {
		t.Error("garbage may heal")
	}
}

// TestBadInput translates the rows of bad metrics that the door lets pass: every
// series is of the instance that sent it, whatever labels it claims, and none
// has a reserved label.
func TestBadInput(t *testing.T) {
	for _, row := range badinput.Rows() {
		if row.Signal != "metrics" || row.JSON || row.Refused {
			continue
		}
		p, err := otlpwire.Mend(otlpwire.Metrics, row.Body())
		if err != nil {
			t.Fatalf("%s: %v", row.Name, err)
		}
		var req metricspb.MetricsData
		if err := proto.Unmarshal(p, &req); err != nil {
			t.Fatalf("%s: %v", row.Name, err)
		}
		tr := newTranslation([]string{"instance.id", "instance.name"}, "as-1")
		if err := tr.add(&req); err != nil {
			if !strings.Contains(err.Error(), "not supported") {
				t.Errorf("%s: %v", row.Name, err)
			}
			continue
		}
		for _, s := range tr.order {
			seen := map[string]bool{}
			for _, l := range s.labels {
				if seen[l.name] || (strings.HasPrefix(l.name, "__") && l.name != "__name__") || (l.name == "instance_id" && l.value != "as-1") {
					t.Errorf("%s: labels %v", row.Name, s.labels)
				}
				seen[l.name] = true
			}
			if !seen["instance_id"] || !seen["__name__"] {
				t.Errorf("%s: labels %v", row.Name, s.labels)
			}
		}
	}
}
