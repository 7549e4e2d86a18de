package prometheus

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// request makes a payload of the points of one metric, in OTLP/JSON.
func request(t *testing.T, metric string) []byte {
	t.Helper()
	p, _, err := otlpwire.FromJSON(nil, otlpwire.Metrics, []byte(`{"resourceMetrics":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"shop"}}]},"scopeMetrics":[{"metrics":[`+metric+`]}]}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// keeper is a translation with a configuration that writes little.
func keeper(change func(*Config)) *translation {
	cfg := DefaultConfig()
	cfg.Labels, cfg.TargetInfo = nil, false
	if change != nil {
		change(&cfg)
	}
	return newTranslation(&cfg)
}

// step translates a request and says whether it was stored.
func step(t *testing.T, tr *translation, payload []byte, stored bool) (out []string) {
	t.Helper()
	tr.reset("as-1", time.Unix(1_700_000_000, 0))
	tr.add(payload)
	for _, l := range lines(t, tr) {
		name, values, _ := strings.Cut(l, " | ")
		name, _, _ = strings.Cut(strings.TrimPrefix(name, "__name__="), " job=")
		out = append(out, name+" "+values)
	}
	if stored {
		tr.commit()
	}
	return out
}

func TestDeltasAreAddedUp(t *testing.T) {
	tr := keeper(nil)
	delta := func(start, at, v int) []byte {
		return request(t, fmt.Sprintf(`{"name":"n","sum":{"isMonotonic":true,"aggregationTemporality":1,"dataPoints":[{"startTimeUnixNano":"%d000000","timeUnixNano":"%d000000","asInt":"%d"}]}}`, start, at, v))
	}
	for i, s := range []struct {
		payload []byte
		stored  bool
		want    string
	}{
		{delta(5, 10, 3), true, "n_total 3@10"},
		{delta(10, 20, 4), false, "n_total 7@20"}, // not stored: tried again
		{delta(10, 20, 4), true, "n_total 7@20"},
		{delta(10, 20, 4), true, ""}, // came twice
		{delta(20, 30, 0), true, "n_total 7@30"},
		{delta(50, 60, 1), true, "n_total 8@60"}, // a gap
		{delta(60, 61, 9), false, "n_total 17@61"},
		{delta(60, 62, 1), true, "n_total 9@62"}, // the one before was not stored, and does not count
	} {
		got := step(t, tr, s.payload, s.stored)
		if strings.Join(got, "") != s.want || (tr.known == 1) != (s.want == "") {
			t.Errorf("step %d: %v, want %s, %d known", i, got, s.want, tr.known)
		}
		if s.want == "" {
			continue
		}
		if k := tr.samples[0].start; k != 5 {
			t.Errorf("step %d: counts since %d, want 5", i, k)
		}
	}
	if got := step(t, tr, delta(1, 2, 9), true); len(got) != 0 || len(tr.refused) != 1 || tr.refused[0].Reason != ledger.DeadOutOfOrder {
		t.Errorf("an old delta: %v, %v", got, tr.refused)
	}
	// Two points of one request, and one that says that the series has ended.
	two := request(t, `{"name":"n","sum":{"isMonotonic":true,"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"70000000","asInt":"1"},{"timeUnixNano":"80000000","asInt":"1"},{"timeUnixNano":"90000000","flags":1}]}}`)
	if got := step(t, tr, two, true); !slices.Equal(got, []string{"n_total 10@70 | 11@80 | NaN@90"}) {
		t.Errorf("two points: %v", got)
	}
}

func TestDeltaHistogramsAreAddedUp(t *testing.T) {
	tr := keeper(nil)
	delta := func(at int, bounds, counts string, count int) []byte {
		return request(t, fmt.Sprintf(`{"name":"h","histogram":{"aggregationTemporality":1,"dataPoints":[{"startTimeUnixNano":"1000000","timeUnixNano":"%d000000","count":"%d","sum":1.5,"explicitBounds":[%s],"bucketCounts":[%s]}]}}`, at, count, bounds, counts))
	}
	want := func(at int, sum float64, count, first, second int, bound string) []string {
		return []string{fmt.Sprintf("h_count %d@%d", count, at), fmt.Sprintf("h_sum %v@%d", sum, at), fmt.Sprintf("h_bucket %d@%d", first, at), fmt.Sprintf("h_bucket %d@%d", second, at)}
	}
	step(t, tr, delta(10, "1", `"1","2"`, 3), true)
	if got := step(t, tr, delta(20, "1", `"10","20"`, 30), true); !slices.Equal(got, want(20, 3, 33, 11, 33, "1")) {
		t.Errorf("got %v", got)
	}
	if got := step(t, tr, delta(20, "1", `"10","20"`, 30), true); len(got) > 0 || tr.known != 1 { // it comes twice
		t.Errorf("got %v, %d known", got, tr.known)
	}
	// Other bounds: it begins anew, with a start of its own.
	if got := step(t, tr, delta(30, "2", `"1","1"`, 2), true); !slices.Equal(got, want(30, 1.5, 2, 1, 2, "2")) {
		t.Errorf("other bounds: %v", got)
	}
}

func TestExponentialDeltasAreAddedUp(t *testing.T) {
	tr := keeper(nil)
	delta := func(at, scale, offset int, counts string, count int) []byte {
		return request(t, fmt.Sprintf(`{"name":"e","exponentialHistogram":{"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"%d000000","count":"%d","scale":%d,"zeroCount":"1","positive":{"offset":%d,"bucketCounts":[%s]}}]}}`, at, count, scale, offset, counts))
	}
	step(t, tr, delta(10, 1, 0, `"1","2","3"`, 7), true)
	tr.reset("as-1", time.Unix(1_700_000_000, 0))
	tr.add(delta(20, 0, 1, `"10"`, 11))
	// At scale 0 the first three are (1, 2] with 1+2 and (2, 4] with 3; the new one is (2, 4].
	n := tr.native[0]
	if n.count != 18 || n.zeros != 2 || n.schema != 0 || len(n.positive.spans) != 1 || n.positive.spans[0] != (span{1, 2}) || !slices.Equal(n.positive.deltas, []int64{3, 10}) {
		t.Errorf("got %+v", n)
	}
	tr.commit()
	// Far apart the sum has 160 buckets at the most.
	tr.reset("as-1", time.Unix(1_700_000_000, 0))
	tr.add(delta(30, 0, 1500, `"5"`, 6))
	if n = tr.native[0]; n.count != 24 || n.schema >= 0 {
		t.Errorf("far apart: %+v", n)
	}
	tr.commit()
	// No number is that far away: whatever it is, it begins anew.
	for i, offset := range []int{2_000_000_000, -2_000_000_000, 0} {
		tr.reset("as-1", time.Unix(1_700_000_000, 0))
		tr.add(delta(40+10*i, -4, offset, `"5"`, 6))
		if n = tr.native[0]; n.count != 6 || len(n.positive.deltas) != 1 {
			t.Errorf("offset %d: %+v", offset, n)
		}
		tr.commit()
	}
}

// TestWhatWasRefusedBeginsAnew: nobody knows which of the deltas of a refused point a backend has.
func TestWhatWasRefusedBeginsAnew(t *testing.T) {
	tr := keeper(nil)
	delta := func(at, v int) []byte {
		return request(t, fmt.Sprintf(`{"name":"n","sum":{"isMonotonic":true,"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"%d000000","asInt":"%d"}]}}`, at, v))
	}
	step(t, tr, delta(1, 5), true)
	step(t, tr, delta(2, 5), false)
	tr.memory.forget()
	if got := step(t, tr, delta(3, 2), true); !slices.Equal(got, []string{"n_total 2@3"}) {
		t.Errorf("got %v", got)
	}
	// Of two in one request at one time both count.
	two := request(t, `{"name":"n","sum":{"isMonotonic":true,"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"4000000","asInt":"1"},{"timeUnixNano":"4000000","asInt":"2"}]}}`)
	if got := step(t, tr, two, true); !slices.Equal(got, []string{"n_total 5@4"}) {
		t.Errorf("got %v", got)
	}
}

// TestDeltasThatChangeTheirKindBeginAnew: an explicit histogram becomes an exponential one.
func TestDeltasThatChangeTheirKindBeginAnew(t *testing.T) {
	tr := keeper(nil)
	step(t, tr, request(t, `{"name":"h","histogram":{"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"1000000","count":"3","bucketCounts":["3"]}]}}`), true)
	step(t, tr, request(t, `{"name":"h","exponentialHistogram":{"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"2000000","count":"1","positive":{"bucketCounts":["1"]}}]}}`), true)
	if len(tr.native) != 1 || tr.native[0].count != 1 {
		t.Errorf("%+v", tr.native)
	}
	for _, bad := range []string{
		`{"name":"n","sum":{"isMonotonic":true,"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"1000000","asDouble":"NaN"}]}}`,
		`{"name":"h2","histogram":{"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"1000000","count":"3","sum":"Infinity","bucketCounts":["3"]}]}}`,
	} {
		if got := step(t, tr, request(t, bad), true); len(got) != 0 || len(tr.refused) != 1 {
			t.Errorf("%s: %v", bad, got)
		}
	}
}

// TestFineDeltasAreMadeCoarse: a histogram of many buckets is not what is remembered.
func TestFineDeltasAreMadeCoarse(t *testing.T) {
	tr := keeper(nil)
	counts := strings.TrimSuffix(strings.Repeat(`"1",`, 4000), ",")
	step(t, tr, request(t, `{"name":"e","exponentialHistogram":{"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"1000000","count":"4000","scale":8,"positive":{"bucketCounts":[`+counts+`]}}]}}`), true)
	n := 0
	for _, d := range tr.memory.deltas.young {
		n = len(d.histogram.positive.counts)
	}
	if n == 0 || n > maxSum || len(tr.native) != 1 || tr.native[0].count != 4000 {
		t.Errorf("%d buckets are remembered, %+v", n, tr.native)
	}
}

// TestHugeMetricsStayWithinBounds: payloads of a megabyte at the most that would take
// gigabytes.
func TestHugeMetricsStayWithinBounds(t *testing.T) {
	attributes := func(n int, key, value string) string {
		var all []string
		for i := range n {
			all = append(all, fmt.Sprintf(`{"key":%q,"value":{"stringValue":%q}}`, strings.NewReplacer("#", strconv.Itoa(i), "*", string(rune(0x4e00+i))).Replace(key), value))
		}
		return strings.Join(all, ",")
	}
	resource := func(attributes, points string) []byte {
		p, _, err := otlpwire.FromJSON(nil, otlpwire.Metrics, []byte(`{"resourceMetrics":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"shop"}},`+attributes+`]},"scopeMetrics":[{"metrics":[`+points+`]}]}]}`), otlpwire.DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	gauge := `{"name":"g","gauge":{"dataPoints":[%s]}}`
	point := `{"timeUnixNano":"%d","asInt":"1"}`
	var bounds, counts, many []string
	for i := range 5000 {
		bounds, counts = append(bounds, fmt.Sprintf("%de300", i+1)), append(counts, `"1"`)
		many = append(many, fmt.Sprintf(point, 1_700_000_000_000_000_000+i))
	}
	for name, tc := range map[string]struct {
		payload []byte
		series  int // at the most
		refused int
	}{
		"1970 and today":        {resource(attributes(1, "a#", "x"), fmt.Sprintf(gauge, fmt.Sprintf(point, 0)+","+fmt.Sprintf(point, 1_700_000_000_000_000_000))), 2, 0},
		"attributes that join":  {resource(attributes(20_000, "a.#", "x")+","+attributes(20_000, "same*", "xxxxxxxxxxxxxxxx"), fmt.Sprintf(gauge, fmt.Sprintf(point, 1))), 1, 0},
		"a point's that join":   {resource(attributes(1, "a#", "x"), fmt.Sprintf(gauge, `{"timeUnixNano":"1","asInt":"1","attributes":[`+attributes(1000, "same*", strings.Repeat("x", 500))+`]}`)), 0, 1},
		"too many buckets":      {resource(attributes(1, "a#", "x"), `{"name":"h","histogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"1","explicitBounds":[`+strings.Join(bounds, ",")+`],"bucketCounts":[`+strings.Join(counts, ",")+`,"0"]}]}}`), 0, 1},
		"many of one series":    {resource(attributes(1, "a#", "x"), fmt.Sprintf(gauge, strings.Join(many, ","))), 2, 0},
		"names no label can be": {resource(`{"key":"__","value":{"stringValue":"x"}},{"key":"日本","value":{"stringValue":"x"}},{"key":"","value":{"stringValue":"x"}}`, fmt.Sprintf(gauge, fmt.Sprintf(point, 1))), 1, 0},
	} {
		tr := keeper(func(c *Config) { c.TargetInfo, c.Labels = true, []string{"instance.id", "__"} })
		tr.reset("as-1", time.Unix(1_700_000_000, 0))
		tr.add(tc.payload)
		refused := 0
		for _, r := range tr.refused {
			refused += len(r.Items)
		}
		if len(tr.series) > tc.series || refused != tc.refused || len(tr.samples) > 5100 || len(tr.symbols.text) > 4<<20 || tr.large {
			t.Errorf("%s: %d series, %d samples, %d refused, %d bytes of text, large %v", name, len(tr.series), len(tr.samples), refused, len(tr.symbols.text), tr.large)
		}
	}
	// What cannot be bounded by a point is cut by the payload.
	var wide []string
	for i := range 900 {
		wide = append(wide, fmt.Sprintf(`{"name":"m%d","histogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"1","explicitBounds":[%s],"bucketCounts":[%s,"0"]}]}}`, i, strings.Join(bounds[:3000], ","), strings.Join(counts[:3000], ",")))
	}
	tr := keeper(func(c *Config) { c.Limits.NewSeries = 0 })
	tr.reset("as-1", time.Unix(1_700_000_000, 0))
	for _, m := range wide {
		tr.add(resource(attributes(1, "a#", "x"), m))
	}
	if !tr.large || len(tr.pairs) > maxPairs+1<<20 {
		t.Errorf("large %v, %d labels", tr.large, len(tr.pairs)/2)
	}
}

func TestBucketsCountAsSeries(t *testing.T) {
	tr := keeper(func(c *Config) { c.Limits.NewSeries = 10 })
	base := int64(1_699_970_000)
	send := func(minute int, bound float64) int {
		tr.reset("as-1", time.Unix(1_700_000_000, 0))
		tr.add(request(t, fmt.Sprintf(`{"name":"h","histogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"%d","explicitBounds":[%v,1000],"bucketCounts":["1","1","1"]}]}}`, (base+int64(minute)*60)*1e9, bound)))
		return len(tr.series)
	}
	send(1, 0.5)
	total := 0
	for i := range 20 {
		total += min(send(100, float64(i)), 1)
	}
	if total != 4 { // of three series each, ten in a minute, the last may go over
		t.Errorf("%d histograms with other bounds each were taken, want 4", total)
	}
}

func TestOldSumsAreForgotten(t *testing.T) {
	tr := keeper(func(c *Config) { c.Limits.DeltaSeries = 100 })
	for i := range 1000 {
		step(t, tr, request(t, fmt.Sprintf(`{"name":"n","sum":{"isMonotonic":true,"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"%d000000","asInt":"1","attributes":[{"key":"i","value":{"intValue":"%d"}}]}]}}`, i+1, i)), true)
	}
	if n := len(tr.memory.deltas.young) + len(tr.memory.deltas.old); n > 100 {
		t.Errorf("%d sums are remembered", n)
	}
}

func TestTooManySeriesAreRefused(t *testing.T) {
	tr := keeper(func(c *Config) { c.Limits.NewSeries, c.Limits.LabelValues = 10, 300 })
	base := int64(1_699_970_000) / 3600 * 3600
	send := func(minute, from, n int) (kept, refused int) {
		var points []string
		for i := range n {
			points = append(points, fmt.Sprintf(`{"timeUnixNano":"%d","asInt":"1","attributes":[{"key":"request.id","value":{"intValue":"%d"}}]}`, (base+60*int64(minute))*1e9, from+i))
		}
		tr.reset("as-1", time.Unix(1_700_000_000, 0))
		tr.add(request(t, `{"name":"n","gauge":{"dataPoints":[`+strings.Join(points, ",")+`]}}`))
		tr.commit()
		for _, r := range tr.refused {
			if r.Reason == ledger.DeadTooNew && minute == 99999 {
			} else if r.Reason != ledger.DeadCardinality || !errors.Is(r.Err, errCardinality) {
				t.Errorf("refused for %s: %v", r.Reason, r.Err)
			}
			refused += len(r.Items)
		}
		return len(tr.series), refused
	}
	for i, s := range []struct{ minute, from, n, kept int }{
		{0, 0, 150, 100},     // ten times as many while it is new here
		{0, 0, 100, 100},     // known ones always
		{6, 1000, 50, 10},    // then ten a minute
		{6, 1000, 10, 10},    // which are known now
		{7, 2000, 50, 10},    // and ten in the next
		{99999, 3000, 5, 0},  // a point from the future does not move the time
		{8, 4000, 5, 5},      //
		{70, 0, 100, 100},    // still known in the hour after
		{130, 0, 100, 100},   // and in the one after that, for they were seen in between
		{300, 100, 100, 10},  // forgotten
		{301, 1000, 100, 10}, //
	} {
		kept, refused := send(s.minute, s.from, s.n)
		if kept != s.kept || kept+refused != s.n {
			t.Errorf("step %d: %d kept, %d refused, want %d kept of %d", i, kept, refused, s.kept, s.n)
		}
	}
	other := keeper(func(c *Config) { c.Limits.NewSeries, c.Limits.LabelValues = 1000, 20 })
	tr = other
	if kept, _ := send(0, 0, 100); kept != 20 || !strings.Contains(tr.refused[0].Err.Error(), "label request_id has more than 20 values") {
		t.Errorf("values: %d kept, %v", kept, tr.refused)
	}
}

func TestTargetInfoIsWrittenNowAndThen(t *testing.T) {
	tr := keeper(func(c *Config) { c.TargetInfo = true })
	count := func(at int, stored bool) (n int) {
		p, _, err := otlpwire.FromJSON(nil, otlpwire.Metrics, fmt.Appendf(nil, `{"resourceMetrics":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"shop"}},{"key":"host.name","value":{"stringValue":"h"}}]},"scopeMetrics":[{"metrics":[{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"%d000000000","asInt":"1"}]}}]}]}]}`, at), otlpwire.DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range step(t, tr, p, stored) {
			n += strings.Count(l, "target_info")
		}
		return n
	}
	for i, s := range []struct {
		at     int
		stored bool
		want   int
	}{{1000, false, 1}, {1000, true, 1}, {1000, true, 0}, {1100, true, 0}, {1149, true, 0}, {1150, true, 1}, {900, true, 0}} {
		if got := count(s.at, s.stored); got != s.want {
			t.Errorf("step %d at %d s: %d, want %d", i, s.at, got, s.want)
		}
	}
}
