package prometheus

import (
	"fmt"
	"math"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// arrived is when the inputs of testdata arrive.
var arrived = time.Unix(1_700_000_000, 0)

var relative = regexp.MustCompile(`"@([+-]\d+)s"`)

// expand reads an input in OTLP/JSON, in which "@-5s" stands for five seconds before it arrives.
func expand(t *testing.T, text string) []byte {
	t.Helper()
	text = relative.ReplaceAllStringFunc(text, func(m string) string {
		n, err := strconv.Atoi(m[2 : len(m)-2])
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf(`"%d"`, arrived.Add(time.Duration(n)*time.Second).UnixNano())
	})
	p, _, err := otlpwire.FromJSON(nil, otlpwire.Metrics, []byte(text), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	if p, err = otlpwire.Mend(otlpwire.Metrics, p); err != nil { // as the door does
		t.Fatal(err)
	}
	return p
}

func input(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	return expand(t, string(text))
}

// metrics makes a payload of a resource of a service, with further attributes, and a scope.
func metrics(t *testing.T, attributes, scope, metric string) []byte {
	t.Helper()
	return expand(t, `{"resourceMetrics":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"web"}}`+attributes+`]},"scopeMetrics":[{"scope":{"name":"`+scope+`"},"metrics":[`+metric+`]}]}]}`)
}

// deliver translates a payload that is then stored. Times are in seconds relative to the arrival.
func deliver(t *testing.T, tr *translation, payload []byte) []string {
	t.Helper()
	tr.reset("as-1", arrived)
	tr.add(payload)
	out := lines(t, tr)
	for i, l := range out {
		out[i] = regexp.MustCompile(`@(\d+)`).ReplaceAllStringFunc(l, func(m string) string {
			ms, _ := strconv.ParseInt(m[1:], 10, 64)
			return fmt.Sprintf("@%v", float64(ms-arrived.UnixMilli())/1000)
		})
	}
	tr.commit()
	return out
}

// dead says how many points a translation has refused, by reason.
func dead(tr *translation) string {
	var all []string
	for _, r := range tr.refused {
		all = append(all, fmt.Sprintf("%s %d", r.Reason, len(r.Items)))
	}
	return strings.Join(all, ", ")
}

func want(t *testing.T, name string, got, want []string) {
	t.Helper()
	for i := range got {
		got[i] = strings.TrimPrefix(got[i], "__name__=")
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%s\n got %s\nwant %s", name, strings.Join(got, "\n     "), strings.Join(want, "\n     "))
	}
}

// TestFromTheFuture: what is stored ahead of time would make the points of all others too old.
func TestFromTheFuture(t *testing.T) {
	tr := keeper(nil)
	for _, in := range []struct{ name, dead string }{{"good", ""}, {"good", ""}, {"future-2h", "too_new 1"}, {"good", ""}, {"good", ""}} {
		if n := len(deliver(t, tr, input(t, in.name))); dead(tr) != in.dead || (n == 0) != (in.dead != "") {
			t.Errorf("%s: %d series, dead: %s", in.name, n, dead(tr))
		}
	}
	// An exemplar alone is left out.
	exemplars := `{"name":"n","sum":{"isMonotonic":true,"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"@-1s","asInt":"1","exemplars":[{"timeUnixNano":"@+700s","asInt":"1"},{"timeUnixNano":"@-1s","asInt":"1"}]}]}}`
	if deliver(t, tr, metrics(t, "", "", exemplars)); len(tr.exemplars) != 1 || len(tr.refused) > 0 {
		t.Errorf("%d exemplars, dead: %s", len(tr.exemplars), dead(tr))
	}
	all := []string{
		`{"name":"n","sum":{"isMonotonic":true,"aggregationTemporality":%d,"dataPoints":[{"timeUnixNano":"@%s","asInt":"1"},{"timeUnixNano":"@-1s","asInt":"1"}]}}`,
		`{"name":"h","histogram":{"aggregationTemporality":%d,"dataPoints":[{"timeUnixNano":"@%s","count":"1"},{"timeUnixNano":"@-1s","count":"1"}]}}`,
		`{"name":"e","exponentialHistogram":{"aggregationTemporality":%d,"dataPoints":[{"timeUnixNano":"@%s","count":"1","zeroCount":"1"},{"timeUnixNano":"@-1s","count":"1","zeroCount":"1"}]}}`,
		`{"name":"s","summary":{"dataPoints":[{"timeUnixNano":"@%[2]s","count":"%[1]d"},{"timeUnixNano":"@-1s","count":"1"}]}}`,
		`{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"@%[2]s","asInt":"%[1]d"},{"timeUnixNano":"@-1s","flags":1}]}}`,
	}
	for _, m := range all {
		for temporality := 1; temporality <= 2; temporality++ {
			for at, reason := range map[string]string{"+601s": "too_new 1", "+600s": ""} {
				tr := keeper(nil)
				got := strings.Join(deliver(t, tr, metrics(t, "", "", fmt.Sprintf(m, temporality, at))), "\n")
				// A delta behind the one that is taken is old.
				if reason == "" && temporality == 1 && strings.Contains(m, "emporality") {
					reason = "out_of_order 1"
				}
				if dead(tr) != reason || strings.Contains(got, "@601") || (reason == "too_new 1") != !strings.Contains(got, "@600") {
					t.Errorf("%s: dead: %s, want %s\n%s", fmt.Sprintf(m, temporality, at), dead(tr), reason, got)
				}
			}
		}
	}
}

// TestTwoProcessesOfOneService: their deltas come in any order, and have the same labels.
func TestTwoProcessesOfOneService(t *testing.T) {
	tr := keeper(nil)
	var got []string
	for i := range 6 {
		for _, l := range deliver(t, tr, input(t, fmt.Sprintf("two-processes-%d", i))) {
			if strings.Contains(l, "=hits_total") {
				got = append(got, l[strings.Index(l, " | ")+3:])
			}
		}
		if len(tr.refused) > 0 || tr.known > 0 {
			t.Errorf("request %d: %s, %d known", i, dead(tr), tr.known)
		}
	}
	// Never twice at one time, nor before what is there.
	if want := []string{"5@-50", "12@-49.999", "13@-40", "16@-39.999", "18@-30", "22@-29.999"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, i := range []int{4, 5} {
		if got := strings.Join(deliver(t, tr, input(t, fmt.Sprintf("two-processes-%d", i))), " "); strings.Contains(got, "=hits_total") || tr.known != 1 || len(tr.refused) > 0 {
			t.Errorf("request %d again: %s, %d known", i, got, tr.known)
		}
	}
	if deliver(t, tr, input(t, "two-processes-2")); dead(tr) != "out_of_order 1" {
		t.Errorf("a delta before the last one of its process: %s", dead(tr))
	}
}

// TestStreamsWithTheSameLabels: deltas of scopes, of resources and of attributes that no label tells.
func TestStreamsWithTheSameLabels(t *testing.T) {
	delta := func(at, v int, bounds string) string {
		if bounds != "" {
			return fmt.Sprintf(`{"name":"n","histogram":{"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"@%ds","count":"%d","explicitBounds":[1],"bucketCounts":["%d","0"]}]}}`, at, v, v)
		}
		return fmt.Sprintf(`{"name":"n","sum":{"isMonotonic":true,"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"@%ds","asInt":"%d"}]}}`, at, v)
	}
	pid := `,{"key":"process.pid","value":{"intValue":"%d"}}`
	for _, bounds := range []string{"", "1"} {
		tr := keeper(nil)
		last := ""
		for _, p := range [][]byte{
			metrics(t, "", "a", delta(-50, 1, bounds)), metrics(t, "", "b", delta(-50, 2, bounds)), metrics(t, fmt.Sprintf(pid, 1), "a", delta(-55, 4, bounds)),
			metrics(t, fmt.Sprintf(pid, 2), "a", delta(-50, 8, bounds)), metrics(t, "", "a", delta(-40, 16, bounds)), metrics(t, "", "b", delta(-41, 32, bounds)),
		} {
			got := deliver(t, tr, p)
			if len(got) == 0 || tr.known > 0 || len(tr.refused) > 0 {
				t.Fatalf("%v, %d known, dead: %s", got, tr.known, dead(tr))
			}
			last = got[0]
		}
		if !strings.HasSuffix(last, "| 63@-39.999") {
			t.Errorf("got %s", last)
		}
	}
}

// TestStreamsWithOtherBuckets: two that go on side by side must not begin their sum again and again.
func TestStreamsWithOtherBuckets(t *testing.T) {
	tr := keeper(nil)
	delta := func(start, at, bound int) string {
		return fmt.Sprintf(`{"name":"h","histogram":{"aggregationTemporality":1,"dataPoints":[{"startTimeUnixNano":"@%ds","timeUnixNano":"@%ds","count":"4","explicitBounds":[%d],"bucketCounts":["4","0"]}]}}`, start, at, bound)
	}
	for i, s := range []struct {
		scope            string
		start, at, bound int
		want, dead       string
	}{
		{"a", -90, -80, 1, "4@-80", ""}, {"b", -90, -80, 2, "", "unsupported 1"},
		{"a", -80, -70, 1, "8@-70", ""}, {"b", -75, -65, 2, "", "unsupported 1"},
		{"a", -70, -60, 5, "4@-60", ""}, // its own have changed
		{"b", -60, -50, 2, "4@-50", ""}, // it has taken the place of a
		{"b", -50, -40, 2, "8@-40", ""},
	} {
		got := strings.Join(deliver(t, tr, metrics(t, "", s.scope, delta(s.start, s.at, s.bound))), "\n")
		if dead(tr) != s.dead || s.want != "" && !strings.HasPrefix(got, "__name__=h_count job=web | "+s.want) {
			t.Errorf("step %d: %s, dead: %s", i, got, dead(tr))
		}
	}
	// One with bounds and an exponential one are no series of each other.
	e := `{"name":"h","exponentialHistogram":{"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"@%ds","count":"1","zeroCount":"1"}]}}`
	for i := range 2 {
		deliver(t, tr, metrics(t, "", "b", delta(-40+10*i, -30+10*i, 2)+","+fmt.Sprintf(e, -30+10*i)))
		if len(tr.refused) > 0 || tr.native[0].count != uint64(i+1) || tr.samples[0].value != float64(12+4*i) {
			t.Errorf("step %d: %+v, %+v, dead: %s", i, tr.native, tr.samples, dead(tr))
		}
	}
}

func TestInfiniteBounds(t *testing.T) {
	tr := keeper(nil)
	var got []string
	for _, l := range deliver(t, tr, input(t, "inf-bound")) {
		got = append(got, strings.NewReplacer("__name__=", "", " job=i", "", "_milliseconds", "").Replace(l))
	}
	if len(tr.refused) > 0 {
		t.Errorf("dead: %s", dead(tr))
	}
	var all []string
	for name, buckets := range map[string]string{
		"go_sdk": "1:5 2:7", "dotnet": "0:4", "only_inf": "", "go_delta": "1:5 2:7", "micrometer_1_11": "1:5 2:7", "good": "1:5 2:7",
	} {
		all = append(all, name+"_count | 10@-5", name+"_sum | 40@-5", name+"_bucket le=+Inf | 10@-5")
		for b := range strings.FieldsSeq(buckets) {
			le, n, _ := strings.Cut(b, ":")
			all = append(all, name+"_bucket le="+le+" | "+n+"@-5")
		}
	}
	want(t, "infinite bounds", got, all)
}

func TestPointsKeepTheirLabels(t *testing.T) {
	tr := keeper(func(c *Config) { c.Labels = DefaultConfig().Labels })
	own := " instance=prom:9090 instance_id=as-1 job=federate service_name=federate | "
	want(t, "federate", deliver(t, tr, input(t, "federate-job-instance")), []string{
		"up exported_instance=a:9100 exported_job=node" + own + "1@-5", "up exported_instance=b:9187 exported_job=db" + own + "0@-5", "up exported_instance=c:9187 exported_job=db" + own + "1@-5",
	})
	own = " instance=gw-1 instance_id=as-1 job=otelcol-gateway service_name=otelcol-gateway span_name=GET / | "
	want(t, "spanmetrics", deliver(t, tr, input(t, "spanmetrics-service-name")), []string{
		"traces_span_metrics_calls_total exported_service_name=checkout" + own + "10@-5", "traces_span_metrics_calls_total exported_service_name=cart" + own + "7@-5",
	})
	attributes := func(pairs ...string) string {
		var all []string
		for i := 0; i < len(pairs); i += 2 {
			all = append(all, fmt.Sprintf(`{"key":%q,"value":{"stringValue":%q}}`, pairs[i], pairs[i+1]))
		}
		return `"attributes":[` + strings.Join(all, ",") + `]`
	}
	gauge := func(a string) string {
		return `{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"@-5s","asInt":"1",` + a + `}]}}`
	}
	tr = keeper(nil)
	for name, tc := range map[string]struct {
		metric string
		want   []string
	}{
		"the exported name is taken": {gauge(attributes("job", "a", "exported_job", "b")), []string{"g exported_exported_job=a exported_job=b job=web | 1@-5"}},
		"both are":                   {gauge(attributes("job", "a", "exported_job", "b", "exported.exported.job", "c")), []string{"g exported_exported_exported_job=a exported_exported_job=c exported_job=b job=web | 1@-5"}},
		"the same value":             {gauge(attributes("job", "web")), []string{"g exported_job=web job=web | 1@-5"}},
		"no value":                   {gauge(attributes("job", "")), []string{"g job=web | 1@-5"}},
		"names that become one":      {gauge(attributes("b_a", "3", "b.a", "2", "b-a", "1")), []string{"g b_a=1;2;3 job=web | 1@-5"}},
		"le of a histogram": {`{"name":"h","histogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"@-5s","count":"1","explicitBounds":[1],"bucketCounts":["0","1"],` + attributes("le", "mine") + `}]}}`, []string{
			"h_bucket exported_le=mine job=web le=+Inf | 1@-5", "h_bucket exported_le=mine job=web le=1 | 0@-5", "h_count exported_le=mine job=web | 1@-5",
		}},
		"quantile of a summary": {`{"name":"s","summary":{"dataPoints":[{"timeUnixNano":"@-5s","count":"1","sum":2,"quantileValues":[{"quantile":0.5,"value":3}],` + attributes("quantile", "mine") + `}]}}`, []string{
			"s exported_quantile=mine job=web quantile=0.5 | 3@-5", "s_count exported_quantile=mine job=web | 1@-5", "s_sum exported_quantile=mine job=web | 2@-5",
		}},
		"le of a gauge": {gauge(attributes("le", "mine")), []string{"g job=web le=mine | 1@-5"}},
	} {
		want(t, name, deliver(t, tr, metrics(t, "", "", tc.metric)), tc.want)
	}
	// What is on the resource, too.
	tr = keeper(func(c *Config) { c.Labels, c.TargetInfo = []string{"job"}, true })
	want(t, "a resource's job", deliver(t, tr, metrics(t, `,{"key":"job","value":{"stringValue":"mine"}}`, "", gauge(attributes()))), []string{
		"g exported_job=mine job=web | 1@-5", "target_info exported_job=mine job=web | 1@-5",
	})
}

// TestStreamsThatCollide: in one request, at one time. The first is sent.
func TestStreamsThatCollide(t *testing.T) {
	metric := map[string]string{
		"gauge":       `{"name":"m","gauge":{"dataPoints":[{"timeUnixNano":"@-5s","asInt":"%d"}]}}`,
		"sum":         `{"name":"m","sum":{"isMonotonic":true,"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"@-5s","asInt":"%d"}]}}`,
		"histogram":   `{"name":"m","histogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"@-5s","count":"%[1]d","explicitBounds":[%[1]d],"bucketCounts":["%[1]d","0"]}]}}`,
		"exponential": `{"name":"m","exponentialHistogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"@-5s","count":"%[1]d","zeroCount":"%[1]d"}]}}`,
		"summary":     `{"name":"m","summary":{"dataPoints":[{"timeUnixNano":"@-5s","count":"%[1]d","quantileValues":[{"quantile":0.%[1]d,"value":1}]}]}}`,
	}
	scopes := func(m string, names ...string) []byte {
		var all []string
		for i, n := range names {
			all = append(all, fmt.Sprintf(`{"scope":{"name":%q,"version":"%d"},"metrics":[%s]}`, n, i, fmt.Sprintf(m, i+1)))
		}
		return expand(t, `{"resourceMetrics":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"web"}}]},"scopeMetrics":[`+strings.Join(all, ",")+`]}]}`)
	}
	for kind, m := range metric {
		tr := keeper(nil)
		alone := len(deliver(t, tr, scopes(m, "a")))
		if got := deliver(t, tr, scopes(m, "a", "b", "b")); len(got) != alone || dead(tr) != "unsupported 2" || !slices.Equal(tr.refused[0].Items, []int{1, 2}) || !strings.Contains(tr.refused[0].Err.Error(), "scope_labels") {
			t.Errorf("%s: %v, dead: %s %v", kind, got, dead(tr), tr.refused)
		}
		// With the scope's labels all are there, and always under the same ones.
		tr = keeper(func(c *Config) { c.ScopeLabels = true })
		if got := deliver(t, tr, scopes(m, "a", "b", "b")); len(got) != 3*alone || len(tr.refused) > 0 || !strings.Contains(strings.Join(got, "\n"), "otel_scope_name=b otel_scope_version=2") {
			t.Errorf("%s with scope labels: %v, dead: %s", kind, got, dead(tr))
		}
	}
	// Points of one metric, whose times are in no order.
	point := `{"timeUnixNano":"@%ds","asInt":"%d","attributes":[{"key":"__name__","value":{"stringValue":"%d"}}]}`
	var points []string
	for i, at := range []int{-1, -2, -3} {
		points = append(points, fmt.Sprintf(point, at, i, 1))
	}
	for i, at := range []int{-4, -3, -2, -1, -5} {
		points = append(points, fmt.Sprintf(point, at, 10+i, 2))
	}
	tr := keeper(nil)
	want(t, "out of order", deliver(t, tr, metrics(t, "", "", `{"name":"g","gauge":{"dataPoints":[`+strings.Join(points, ",")+`]}}`)), []string{"g job=web | 14@-5 | 10@-4 | 2@-3 | 1@-2 | 0@-1"})
	if dead(tr) != "unsupported 3" || !slices.Equal(tr.refused[0].Items, []int{4, 5, 6}) {
		t.Errorf("dead: %s %v", dead(tr), tr.refused)
	}
	// Of one stream the last of a millisecond is sent, and the others counted.
	if deliver(t, tr, metrics(t, "", "", `{"name":"g","gauge":{"dataPoints":[`+fmt.Sprintf(point, -5, 1, 1)+","+fmt.Sprintf(point, -5, 2, 1)+`]}}`)); tr.known != 1 || len(tr.refused) > 0 || tr.samples[0].value != 2 {
		t.Errorf("%d known, dead: %s, %v", tr.known, dead(tr), tr.samples)
	}
	// One of a point's series.
	if got := deliver(t, tr, metrics(t, "", "", `{"name":"m_bucket","gauge":{"dataPoints":[{"timeUnixNano":"@-5s","asInt":"7","attributes":[{"key":"le","value":{"stringValue":"3"}}]}]}},`+fmt.Sprintf(metric["histogram"], 3))); dead(tr) != "unsupported 1" || !slices.Contains(got, "__name__=m_bucket job=web le=3 | 7@-5") {
		t.Errorf("a gauge like a bucket: %v, dead: %s", got, dead(tr))
	}
	// Other resources.
	two := strings.Repeat(`,{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"web"}},{"key":"process.pid","value":{"intValue":"%d"}}]},"scopeMetrics":[{"metrics":[`+fmt.Sprintf(metric["sum"], 1)+`]}]}`, 2)
	if deliver(t, tr, expand(t, `{"resourceMetrics":[`+fmt.Sprintf(two, 1, 2)[1:]+`]}`)); dead(tr) != "unsupported 1" {
		t.Errorf("two processes: dead: %s", dead(tr))
	}
}

func TestDoubtsEnd(t *testing.T) {
	m := newMemory(&Config{})
	a, b := identity{1, 1}, identity{2, 2}
	m.doubt([]identity{a, b}, 0)
	m.wroteTarget(a, 5)
	m.commit()
	if _, doubted := m.doubts.get(a); doubted {
		t.Error("what has been written is doubted")
	}
	if until, doubted := m.doubts.get(b); !doubted || until != 0 {
		t.Error("what has not been written is not")
	}
}

func TestBothNamesOfTheEnvironment(t *testing.T) {
	own := func(c *Config) { c.Labels = DefaultConfig().Labels }
	want(t, "stable", deliver(t, keeper(own), input(t, "environment-name")), []string{"temp deployment_environment=staging instance_id=as-1 job=shop service_name=shop | 1@-5"})
	gauge := `{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"@-5s","asInt":"1"}]}}`
	old, stable := `,{"key":"deployment.environment","value":{"stringValue":"old"}}`, `,{"key":"deployment.environment.name","value":{"stringValue":"stable"}}`
	for _, tc := range []struct{ labels, resource, want string }{
		{"deployment.environment", old, "deployment_environment=old"}, {"deployment.environment", stable, "deployment_environment=stable"},
		{"deployment.environment.name", old, "deployment_environment_name=old"}, {"deployment.environment.name", stable, "deployment_environment_name=stable"},
		{"deployment.environment", stable + old, "deployment_environment=old"}, {"deployment.environment.name", stable + old, "deployment_environment_name=stable"},
		{"deployment.environment deployment.environment.name", stable + old, "deployment_environment=old deployment_environment_name=stable"},
	} {
		tr := keeper(func(c *Config) { c.Labels = strings.Fields(tc.labels) })
		want(t, tc.labels, deliver(t, tr, metrics(t, tc.resource, "", gauge)), []string{"g " + tc.want + " job=web | 1@-5"})
	}
}

// TestDeltasThatMayFall: the compatibility specification has no translation for them.
func TestDeltasThatMayFall(t *testing.T) {
	tr := keeper(nil)
	for i := range 3 {
		if got := deliver(t, tr, input(t, fmt.Sprintf("delta-updown-%d", i))); len(got) > 0 || dead(tr) != "unsupported 1" || !strings.Contains(tr.refused[0].Err.Error(), `metric "queue.depth": the deltas of a sum that may fall`) {
			t.Errorf("request %d: %v, dead: %s", i, got, dead(tr))
		}
	}
	point := `{"name":"n","sum":{"isMonotonic":true,"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"@%ds","%s":%s}]}}`
	for i, v := range []string{`"5"`, `"-3"`, `"2"`} {
		got := deliver(t, tr, metrics(t, "", "", fmt.Sprintf(point, i-10, "asInt", v)))
		if i == 1 && (len(got) > 0 || dead(tr) != "unsupported 1") || i == 2 && !slices.Equal(got, []string{"__name__=n_total job=web | 7@-8"}) {
			t.Errorf("delta of %s: %v, dead: %s", v, got, dead(tr))
		}
	}
	// A sum that no double can hold begins again.
	for i, want := range []string{"1.7e+308@-6", "1.7e+308@-5"} {
		if got := strings.Join(deliver(t, tr, metrics(t, "", "", fmt.Sprintf(strings.Replace(point, `"n"`, `"big"`, 1), i-6, "asDouble", "1.7e308"))), ""); !strings.HasSuffix(got, want) {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestZeroThreshold(t *testing.T) {
	tr := keeper(nil)
	deliver(t, tr, input(t, "exponential"))
	found := map[string]float64{}
	for i := range tr.series {
		if s := &tr.series[i]; s.histograms {
			found[string(tr.symbols.get(tr.pairs[s.labels+1]))] = tr.native[tr.samples[s.first].histogram].threshold
		}
	}
	if found["x_zt"] != 0.25 || found["x_neg"] != zeroThreshold {
		t.Errorf("thresholds are %v", found)
	}
	for _, r := range tr.refused {
		if r.Reason != ledger.DeadUnsupported {
			t.Errorf("dead: %v", r)
		}
	}
	for version := 1; version <= 2; version++ {
		e := &encoder{}
		if body := e.next(tr, version); !strings.Contains(string(body), string(appendDouble(nil, 5, 0.25))) {
			t.Errorf("version %d does not say it", version)
		}
	}
	point := func(at int, threshold string, zeros int, scale, offset int, counts string, count int) []byte {
		return metrics(t, "", "", fmt.Sprintf(`{"name":"d","exponentialHistogram":{"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"@%ds","zeroThreshold":%s,"zeroCount":"%d","scale":%d,"count":"%d","positive":{"offset":%d,"bucketCounts":[%s]}}]}}`, at, threshold, zeros, scale, count, offset, counts))
	}
	// What is added up has the wider zero bucket: (0.25, 0.5] and the bucket around 0.75 are in it.
	tr = keeper(nil)
	deliver(t, tr, point(-10, "0", 1, 0, -2, `"1","2","4"`, 8))
	deliver(t, tr, point(-9, "0.75", 1, 0, 1, `"8"`, 9))
	if n := tr.native[0]; n.count != 17 || n.zeros != 5 || n.threshold != 1 || !slices.Equal(n.positive.deltas, []int64{4, 4}) {
		t.Errorf("got %+v", n)
	}
	deliver(t, tr, point(-8, "0", 0, 0, -2, `"1","1","1"`, 3))
	if n := tr.native[0]; n.count != 20 || n.zeros != 7 || n.threshold != 1 || !slices.Equal(n.positive.deltas, []int64{5, 3}) {
		t.Errorf("got %+v", n)
	}
	for _, bad := range []string{`"NaN"`, `-1`, `"Infinity"`} {
		if deliver(t, tr, point(-7, bad, 1, 0, 0, "", 1)); dead(tr) != "unsupported 1" {
			t.Errorf("threshold %s: dead: %s", bad, dead(tr))
		}
	}
}

// TestStaleHistograms: all of a histogram's series end, also those of which the last point says nothing.
func TestStaleHistograms(t *testing.T) {
	tr := keeper(nil)
	deliver(t, tr, metrics(t, "", "", `{"name":"s.h2","histogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"@-9s","count":"0","sum":0,"explicitBounds":[5,9],"bucketCounts":["0","0","0"]}]}},
		{"name":"s.q","summary":{"dataPoints":[{"timeUnixNano":"@-9s","count":"0","quantileValues":[{"quantile":0.9,"value":1}]}]}}`))
	own := strings.NewReplacer(`"u"`, `"web"`)
	text, err := os.ReadFile("testdata/stale-histogram.json")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range deliver(t, tr, expand(t, own.Replace(string(text)))) {
		if !strings.Contains(l, "s_novalue") && !strings.Contains(l, "s_nan") {
			got = append(got, strings.Replace(l, " job=web", "", 1))
		}
	}
	want(t, "stale", got, []string{
		"s_h_count | NaN@-5", "s_h_sum | NaN@-5", "s_h_bucket le=1 | NaN@-5", "s_h_bucket le=2 | NaN@-5", "s_h_bucket le=+Inf | NaN@-5",
		"s_h2_count | NaN@-5", "s_h2_sum | NaN@-5", "s_h2_bucket le=5 | NaN@-5", "s_h2_bucket le=9 | NaN@-5", "s_h2_bucket le=+Inf | NaN@-5",
		"s_g | NaN@-5", "s_c_total | NaN@-5", "s_sum_count | NaN@-5", "s_sum_sum | NaN@-5", "s_sum quantile=0.5 | NaN@-5", "s_e | 0@-5",
	})
	for _, s := range tr.native {
		if math.Float64bits(s.sum) != stale {
			t.Errorf("a native histogram goes on: %+v", s)
		}
	}
	want(t, "a summary without quantiles", deliver(t, tr, metrics(t, "", "", `{"name":"s.q","summary":{"dataPoints":[{"timeUnixNano":"@-5s","flags":1}]}}`)), []string{
		"s_q_count job=web | NaN@-5", "s_q_sum job=web | NaN@-5", "s_q job=web quantile=0.9 | NaN@-5",
	})
	// A delta histogram goes on where it was.
	delta := `{"name":"d","histogram":{"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"@%ds",%s}]}}`
	for i, point := range []string{`"count":"2","explicitBounds":[1],"bucketCounts":["2","0"]`, `"flags":1`, `"count":"3","explicitBounds":[1],"bucketCounts":["3","0"]`} {
		got := deliver(t, tr, metrics(t, "", "", fmt.Sprintf(delta, i-9, point)))
		if i == 1 && (len(got) != 4 || strings.Count(strings.Join(got, ""), "NaN") != 4) || i == 2 && got[0] != "__name__=d_count job=web | 5@-7" {
			t.Errorf("step %d: %v", i, got)
		}
	}
}
