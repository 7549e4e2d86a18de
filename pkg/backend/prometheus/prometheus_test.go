package prometheus

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/otlpwire/badinput"
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
	cfg := DefaultConfig()
	cfg.Labels, cfg.TargetInfo = []string{"instance.id", "instance.name"}, false
	tr := newTranslation(&cfg)
	tr.reset("as-1", time.Now())
	tr.add(p)
	if len(tr.refused) > 0 {
		return nil, tr.refused[0].Err
	}
	return lines(t, tr), nil
}

// lines returns what a translation holds, a series each.
func lines(t *testing.T, tr *translation) (out []string) {
	t.Helper()
	for i := range tr.series {
		s := &tr.series[i]
		var ls []string
		for k := s.labels; k < s.end; k += 2 {
			ls = append(ls, string(tr.symbols.get(tr.pairs[k]))+"="+string(tr.symbols.get(tr.pairs[k+1])))
		}
		if !slices.IsSorted(ls) {
			t.Errorf("labels are not in order: %v", ls)
		}
		line := strings.Join(ls, " ")
		tr.ordered(s, func(v sample) { line += fmt.Sprintf(" | %v@%d", v.value, v.at) })
		out = append(out, line)
	}
	return out
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
				"__name__=d_seconds_count" + common + " | 6@1", "__name__=d_seconds_sum" + common + " | 9@1",
				"__name__=d_seconds_bucket" + common + " le=0.1 | 1@1", "__name__=d_seconds_bucket" + common + " le=1 | 3@1", "__name__=d_seconds_bucket" + common + " le=+Inf | 6@1",
			},
		},
		"summary": {
			`{"name":"q","summary":{"dataPoints":[{"timeUnixNano":"1000000","count":"2","sum":3,"quantileValues":[{"quantile":0.5,"value":1}]}]}}`,
			[]string{"__name__=q_count" + common + " | 2@1", "__name__=q_sum" + common + " | 3@1", "__name__=q" + common + " quantile=0.5 | 1@1"},
		},
		"identity wins over attributes": {
			`{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"1000000","asInt":"1","attributes":[{"key":"instance_id","value":{"stringValue":"forged"}},{"key":"job","value":{"stringValue":"forged"}},{"key":"__name__","value":{"stringValue":"forged"}}]}]}}`,
			[]string{"__name__=g exported_instance_id=forged exported_job=forged" + common + " | 1@1"},
		},
		"names that become one are joined": {
			`{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"1000000","asInt":"1","attributes":[{"key":"a.b","value":{"stringValue":"1"}},{"key":"a_b","value":{"stringValue":"2"}}]}]}}`,
			[]string{"__name__=g a_b=1;2" + common + " | 1@1"},
		},
		"out of order, and twice in a millisecond": {
			`{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"3000000","asInt":"3"},{"timeUnixNano":"1000000","asInt":"1"},{"timeUnixNano":"1000001","asInt":"2"},{"timeUnixNano":"3000001","asInt":"4"}]}}`,
			[]string{"__name__=g" + common + " | 2@1 | 4@3"},
		},
		"twice in a millisecond": {
			`{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"1000000","asInt":"1"},{"timeUnixNano":"1000001","asInt":"2"}]}}`,
			[]string{"__name__=g" + common + " | 2@1"},
		},
		"no data": {`{"name":"g"}`, nil},
	} {
		got, err := translate(t, tc.metric)
		if err != nil || !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v\n got %s\nwant %s", name, err, strings.Join(got, "\n     "), strings.Join(tc.want, "\n     "))
		}
	}
	stale, err := translate(t, `{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"1000000","flags":1}]}}`)
	if err != nil || len(stale) != 1 || !strings.HasSuffix(stale[0], "NaN@1") || math.Float64bits(staleNaN) != 0x7ff0000000000002 {
		t.Errorf("no recorded value: %v, %v", stale, err)
	}
}

func TestUnsupportedIsRefusedByName(t *testing.T) {
	for metric, want := range map[string]string{
		`{"name":"a.b","sum":{"dataPoints":[{"asInt":"1"}]}}`:                                                                                           `metric "a.b": the aggregation temporality is neither`,
		`{"name":"e","exponentialHistogram":{"aggregationTemporality":2,"dataPoints":[{"scale":-5}]}}`:                                                  "scale of the exponential histogram is below -4",
		`{"name":"e","exponentialHistogram":{"aggregationTemporality":2,"dataPoints":[{"count":"10","positive":{"bucketCounts":["27"]}}]}}`:             "do not add up to its count",
		`{"name":"...","gauge":{"dataPoints":[{"asInt":"1"}]}}`:                                                                                         "empty name",
		`{"name":"h","histogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"1","bucketCounts":["1","2"],"explicitBounds":[1,2]}]}}`:     "number of bucket counts",
		`{"name":"h","histogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"1","bucketCounts":["1","2","3"],"explicitBounds":[2,1]}]}}`: "bounds are not in order",
	} {
		if _, err := translate(t, metric); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
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
		cfg := DefaultConfig()
		cfg.Labels = []string{"instance.id", "instance.name"}
		tr := newTranslation(&cfg)
		tr.reset("as-1", time.Now())
		tr.add(p)
		if n := len(tr.series); n == 0 && len(tr.refused) == 0 && otlpwire.Count(otlpwire.Metrics, p) > 0 {
			t.Errorf("%s: nothing came of it", row.Name)
		}
		for _, line := range lines(t, tr) {
			seen := map[string]bool{}
			for l := range strings.FieldsSeq(line) {
				name, value, ok := strings.Cut(l, "=")
				if !ok {
					break // of its labels
				}
				if seen[name] || (strings.HasPrefix(name, "__") && name != "__name__") || (name == "instance_id" && value != "as-1") {
					t.Errorf("%s: %s", row.Name, line)
				}
				seen[name] = true
			}
			if !seen["instance_id"] || !seen["__name__"] {
				t.Errorf("%s: %s", row.Name, line)
			}
		}
	}
}
