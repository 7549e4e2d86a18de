package policy

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// traces reads OTLP/JSON and returns its traces, in the order in which they come up.
func traces(t *testing.T, file string) (all []*Trace) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	return tracesOf(t, text)
}

func tracesOf(t *testing.T, text []byte) (all []*Trace) {
	t.Helper()
	payload, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, text, otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	byID := map[otlpwire.TraceID]*Trace{}
	var split otlpwire.Splitter
	var ids []otlpwire.TraceID
	err = split.Split(payload, func(item []byte) int {
		id, _ := otlpwire.SpanTrace(item)
		if n := slices.Index(ids, id); n >= 0 {
			return n
		}
		ids = append(ids, id)
		return len(ids) - 1
	}, func(key int, piece []byte) {
		tr := byID[ids[key]]
		if tr == nil {
			tr = &Trace{ID: ids[key]}
			byID[tr.ID] = tr
			all = append(all, tr)
		}
		tr.Payload = append(tr.Payload, piece...)
		tr.Spans += otlpwire.Count(otlpwire.Traces, piece)
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func load(t *testing.T, file string) *Set {
	t.Helper()
	set, err := LoadFile(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// kept decides one trace after the other, each with budgets of its own.
func kept(set *Set, all []*Trace) (ids []string) {
	for _, tr := range all {
		tr.Reset(tr.ID, tr.Spans, tr.Payload, tr.Due)
		if set.Decide(tr, &Budgets{}).Keep {
			ids = append(ids, hex.EncodeToString(tr.ID[15:]))
		}
	}
	return ids
}

// TestInvertedMatchIsPlain: an inverted policy that does not want a trace leaves it to
// the others (contrib #44132, #48976).
func TestInvertedMatchIsPlain(t *testing.T) {
	if got := kept(load(t, "invert-match.yaml"), traces(t, "invert-match.json")); !slices.Equal(got, []string{"01", "03", "04"}) {
		t.Errorf("kept %v; /cart with an error must be kept, /cart without must not", got)
	}
	const (
		numeric = `{name: n, type: numeric_attribute, numeric_attribute: {key: k, min_value: 1, max_value: 10, invert_match: true}}`
		boolean = `{name: b, type: boolean_attribute, boolean_attribute: {key: k, value: true, invert_match: true}}`
		text    = `{name: s, type: string_attribute, string_attribute: {key: k, values: [x], invert_match: true}}`
		all     = `{name: all, type: always_sample}`
	)
	for value, policy := range map[string]string{`{"intValue": "5"}`: numeric, `{"boolValue": true}`: boolean, `{"stringValue": "x"}`: text} {
		trace := tracesOf(t, []byte(`{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"5b8efff798038103d269b63300000001","spanId":"eee19b7ec3c10011","name":"x","attributes":[{"key":"k","value":`+value+`}]}]}]}]}`))
		for policies, want := range map[string]string{
			policy: "", policy + "," + all: "all", all + "," + policy: "all",
			"sample_on_first_match: true," + policy: "", "sample_on_first_match: true," + policy + "," + all: "all",
		} {
			head, list, is := strings.Cut(policies, ",{")
			if !is || head[0] == '{' {
				head, list = "decision_wait: 1s", policies[1:]
			}
			set, err := Parse("t", []byte(head+"\npolicies: [{"+list+"]"))
			if err != nil {
				t.Fatal(err)
			}
			trace[0].Reset(trace[0].ID, 1, trace[0].Payload, 0)
			if v := set.Decide(trace[0], &Budgets{}); v.By != want || v.Keep != (want != "") {
				t.Errorf("%s: %+v, want %q", policies, v, want)
			}
		}
	}
	// Two of them: either may want it.
	both := tracesOf(t, []byte(`{"resourceSpans":[{"scopeSpans":[{"spans":[
		{"traceId":"5b8efff798038103d269b63300000001","spanId":"eee19b7ec3c10011","name":"x","attributes":[{"key":"k","value":{"stringValue":"value1"}},{"key":"http.route","value":{"stringValue":"/b"}}]},
		{"traceId":"5b8efff798038103d269b63300000002","spanId":"eee19b7ec3c10012","name":"x","attributes":[{"key":"k","value":{"stringValue":"value1"}},{"key":"http.route","value":{"stringValue":"/a"}}]}]}]}]}`))
	if got := kept(load(t, "invert-twice.yaml"), both); !slices.Equal(got, []string{"01"}) {
		t.Errorf("two inverted policies keep %v, want the one that one of them wants", got)
	}
}

// TestFortyOneTraces decides the edges of every policy; test/oracle asks the collector's
// processor the same.
func TestFortyOneTraces(t *testing.T) {
	var labels map[string]string
	text, err := os.ReadFile("testdata/41-traces-labels.json")
	if err != nil || json.Unmarshal(text, &labels) != nil {
		t.Fatal(err)
	}
	all := traces(t, "41-traces.json")
	if len(all) != len(labels) {
		t.Fatalf("%d traces, %d labels", len(all), len(labels))
	}
	ends := func(text string) func(string) bool {
		return func(id string) bool { return slices.Contains(strings.Fields(text), id) }
	}
	for file, wants := range map[string]func(id string) bool{
		"latency-100.yaml":   ends("04 06 07 09 0c"), // exactly 100 ms and 100.9 ms are not longer than 100 ms
		"boolean-false.yaml": ends("14"),
	} {
		got := kept(load(t, file), all)
		for _, tr := range all {
			id := hex.EncodeToString(tr.ID[15:])
			if slices.Contains(got, id) != wants(id) {
				t.Errorf("%s: %s (%s): kept is %v", file, id, labels[hex.EncodeToString(tr.ID[:])], !wants(id))
			}
		}
	}
	// A span whose k is no text of ten bytes makes the expression fail: not has no answer
	// then, and nobody else wants the trace.
	if got := kept(load(t, "not-ottl-propagate-error.yaml"), all); len(got) != 0 {
		t.Errorf("not turns a failure into yes: %v", got)
	}
}

// TestFailuresAreNoAnswer of a policy, wherever it stands.
func TestFailuresAreNoAnswer(t *testing.T) {
	const fails = `{name: f, type: ottl_condition, ottl_condition: {error_mode: propagate, span: ['Substring(attributes["none"], 0, 9) == "x"', 'true']}}`
	const all = `{name: all, type: always_sample}`
	for policy, want := range map[string]string{
		fails:             "",
		fails + "," + all: "all",
		`{name: p, type: not, not: {not_sub_policy: ` + fails + `}}`:                                                                                                             "",
		`{name: p, type: and, and: {and_sub_policy: [` + fails + `,` + all + `]}}`:                                                                                               "",
		`{name: p, type: drop, drop: {drop_sub_policy: [{name: n, type: not, not: {not_sub_policy: ` + fails + `}}]}},` + all:                                                    "all",
		`{name: p, type: composite, composite: {max_total_spans_per_second: 100, composite_sub_policy: [` + fails + `,` + all + `]}}`:                                            "",
		`{name: p, type: composite, composite: {max_total_spans_per_second: 100, composite_sub_policy: [` + strings.ReplaceAll(fails, "propagate", "IGNORE") + `,` + all + `]}}`: "p",
	} {
		set, err := Parse("t", []byte("policies: ["+policy+"]"))
		if err != nil {
			t.Fatal(err)
		}
		if v := set.Decide(trace(t, 1, 0, 0), &Budgets{}); v.By != want {
			t.Errorf("%s: %+v, want %q", policy, v, want)
		}
	}
}

// TestWhatIsNeverIgnored: values that would be cut, sections that nothing reads, a second
// document.
func TestWhatIsNeverIgnored(t *testing.T) {
	for file, want := range map[string]string{
		"numeric-min-half.yaml":        `numeric-min-half.yaml:2: policies[0].numeric_attribute.min_value: got "0.5", want a whole number`,
		"section-of-another-type.yaml": `section-of-another-type.yaml:2: policy "p": type is latency, which does not read the section status_code`,
		"two-docs.yaml":                `two-docs.yaml:3: a second YAML document begins here`,
	} {
		if _, err := LoadFile(filepath.Join("testdata", file)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", file, err, want)
		}
	}
	for text, want := range map[string]string{
		`policies: [{name: p, type: probabilistic, probabilistic: {sampling_percentage: .nan}}]`:                                                                   "want 0 to 100",
		`policies: [{name: p, type: rate_limiting, rate_limiting: {spans_per_second: 1.5}}]`:                                                                       "want a whole number",
		`policies: [{name: p, type: and, and: {and_sub_policy: [{name: q, type: latency, latency: {threshold_ms: 1}, probabilistic: {sampling_percentage: 1}}]}}]`: "section probabilistic",
	} {
		if _, err := Parse("s", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

// TestRates: traffic below a rate passes whole, a burst of twice the rate, too; what is
// above is cut to the rate.
func TestRates(t *testing.T) {
	for _, tc := range []struct {
		name, policy  string
		spans         int           // of a trace
		every, during time.Duration // one trace
		least, most   int           // traces that are kept
	}{
		{"one trace of 50 spans", "type: rate_limiting, rate_limiting: {spans_per_second: 35}", 50, time.Hour, time.Second, 1, 1},
		{"one trace of the burst", "type: rate_limiting, rate_limiting: {spans_per_second: 35}", 70, time.Hour, time.Second, 1, 1},
		{"one trace above the burst", "type: rate_limiting, rate_limiting: {spans_per_second: 35}", 71, time.Hour, time.Second, 0, 0},
		{"a burst of its own", "type: rate_limiting, rate_limiting: {spans_per_second: 35, burst_capacity: 100}", 100, time.Hour, time.Second, 1, 1},
		{"a burst below the rate", "type: rate_limiting, rate_limiting: {spans_per_second: 35, burst_capacity: 10}", 11, time.Hour, time.Second, 0, 0},
		{"20 spans a second", "type: rate_limiting, rate_limiting: {spans_per_second: 35}", 20, time.Second, 40 * time.Second, 40, 40},
		{"80 of 100 a second", "type: rate_limiting, rate_limiting: {spans_per_second: 100}", 8, 100 * time.Millisecond, time.Minute, 600, 600},
		{"twice the rate", "type: rate_limiting, rate_limiting: {spans_per_second: 100}", 10, 50 * time.Millisecond, time.Minute, 540, 660},
		{"composite", "type: composite, composite: {max_total_spans_per_second: 100, composite_sub_policy: [{name: a, type: always_sample}], rate_allocation: [{policy: a, percent: 50}]}", 20, 500 * time.Millisecond, 40 * time.Second, 80, 80},
		{"composite above", "type: composite, composite: {max_total_spans_per_second: 100, composite_sub_policy: [{name: a, type: always_sample}], rate_allocation: [{policy: a, percent: 50}]}", 10, 100 * time.Millisecond, time.Minute, 270, 330},
	} {
		set, err := Parse("t", []byte("policies: [{name: r, "+tc.policy+"}]"))
		if err != nil {
			t.Fatal(err)
		}
		// However the traces fall on the partitions, and whenever a minute ends.
		for seed := range uint64(40) {
			rng := rand.New(rand.NewPCG(seed, 1))
			set.Partitions = []int{1, 8, 64}[seed%3]
			n, budgets := 0, make([]Budgets, set.Partitions)
			var meter envelope.Meter
			start := 123*time.Minute + time.Duration(rng.Int64N(int64(time.Minute)))
			for now := start; now < start+tc.during; now += tc.every {
				tr := trace(t, 1, 0, 0)
				tr.Spans, tr.Due, tr.Load = tc.spans, int64(now), meter.Add(int64(now), int64(tc.spans))
				if set.Decide(tr, &budgets[rng.IntN(set.Partitions)]).Keep {
					n++
				}
			}
			least := tc.least
			if set.Partitions == 64 && tc.least < tc.most {
				least = tc.least * 2 / 3 // a 64th of such a rate is a trace in seven seconds or more
			}
			if n < least || n > tc.most {
				t.Errorf("%s, over %d partitions (seed %d): %d traces are kept, want %d to %d", tc.name, set.Partitions, seed, n, tc.least, tc.most)
			}
		}
	}
	set := load(t, "bytes.yaml")
	if v := set.Decide(traces(t, "one-span-1400-bytes.json")[0], &Budgets{}); !v.Keep {
		t.Error("a trace of 1400 bytes, at 1000 a second, is not kept")
	}
}

// TestBudgetsDoNotDependOnTheBeginning: from the next minute on the verdicts are the same,
// wherever reading began; and the next owner goes on where the one before was.
func TestBudgetsDoNotDependOnTheBeginning(t *testing.T) {
	set := load(t, "rate35.yaml")
	set.Partitions = 4
	decide := func(b *Budgets, second int) Verdict {
		tr := trace(t, 1, 0, 0)
		tr.Spans, tr.Due = 1+second%23, int64(second)*int64(time.Second)
		return set.Decide(tr, b)
	}
	var whole, late, next Budgets
	var from []string
	for second := range 300 {
		v := decide(&whole, second)
		if second >= 90 {
			if w := decide(&late, second); second >= 120 && w.Keep != v.Keep {
				t.Errorf("second %d: %v, and %v when reading began at 90", second, v.Keep, w.Keep)
			}
		}
		if second < 200 {
			next.Restore(int64(second)*int64(time.Second), v.Took)
		} else if w := decide(&next, second); w.Keep != v.Keep {
			t.Errorf("second %d: %v, and %v of the next owner", second, v.Keep, w.Keep)
		}
		from = append(from, fmt.Sprint(v.Keep))
	}
	if !slices.Contains(from, "true") || !slices.Contains(from, "false") {
		t.Error("the test tests nothing")
	}
}

// TestDebtsAreOfTheirMinute: what is kept because all of the traffic is below the rate puts
// a bucket into no debt that the rest of the minute does not pay.
func TestDebtsAreOfTheirMinute(t *testing.T) {
	var b Budgets
	tr := &Trace{Due: 50 * int64(time.Second), partitions: 8}
	for range 20 {
		if !b.spend(limiter{0, 40, 80}, tr, 20, envelope.Load{40, 40, 40, 40}) {
			t.Fatal("traffic below the rate is not kept")
		}
	}
	if level := b.buckets[0].level; level != -50 { // ten seconds of an eighth of 40
		t.Errorf("the bucket holds %v, want -50", level)
	}
}

// TestTheNextOwnerHasTheSameBudgets knows only what was taken, and comes to the same verdicts, wherever it takes over: what was
// asked for in vain, debts, and traces of the minute before the current one make no difference.
func TestTheNextOwnerHasTheSameBudgets(t *testing.T) {
	l := limiter{0, 12, 24}
	rng := rand.New(rand.NewPCG(1, 1))
	type decision struct {
		Trace
		amount int64
		load   envelope.Load
		kept   bool
	}
	for _, partitions := range []int{1, 3, 8} {
		var all []decision
		var b Budgets
		for tick := range 3000 {
			for range rng.IntN(3) {
				d := decision{amount: 1 + rng.Int64N(27), Trace: Trace{Due: int64(tick-rng.IntN(2)*rng.IntN(20)) * int64(100*time.Millisecond), partitions: partitions}}
				d.Due = max(d.Due, 0)
				if rng.IntN(8) == 0 {
					d.load = envelope.Load{1, 1, 1, 1}
				}
				d.kept = b.spend(l, &d.Trace, d.amount, d.load)
				all = append(all, d)
			}
		}
		kept := 0
		for from := 0; from < len(all); from += 97 {
			var next Budgets
			for i, d := range all {
				if i >= from {
					if next.spend(l, &d.Trace, d.amount, d.load) != d.kept {
						t.Fatalf("%d partitions: an owner from decision %d on decides otherwise about %d, due at %v", partitions, from, i, time.Duration(d.Due))
					}
				} else if d.kept {
					kept++
					next.Restore(d.Due, []envelope.Spend{{Limiter: 0, Amount: d.amount}})
					if r := next.buckets[0].restored; d.Due/minute > r[0].due/minute {
						t.Fatalf("what was taken in minute %d is still there in minute %d", r[0].due/minute, d.Due/minute)
					}
				}
			}
		}
		if kept == 0 {
			t.Error("nothing is kept")
		}
	}
}
