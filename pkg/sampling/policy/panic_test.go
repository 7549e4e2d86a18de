package policy

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// bomb is a policy that panics, and leaves a mess.
type bomb struct{}

func (bomb) evaluate(t *Trace, _ *Budgets) Outcome {
	t.chance = 0.999
	panic("what no one expects")
}

// plant replaces the policies of type span_count, wherever they are.
func plant(p evaluator) evaluator {
	switch p := p.(type) {
	case spanCount:
		return bomb{}
	case and:
		for i := range p {
			p[i] = plant(p[i])
		}
	case drop:
		plant(p.and)
	case not:
		return not{plant(p.evaluator)}
	case composite:
		for i := range p {
			p[i].evaluator = plant(p[i].evaluator)
		}
	}
	return p
}

// mined parses policies, in which every span_count panics.
func mined(t *testing.T, text string) *Set {
	t.Helper()
	set, err := Parse("t", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	for _, all := range [][]named{set.drops, set.policies, set.growing} {
		for i := range all {
			all[i].eval = plant(all[i].eval)
		}
	}
	return set
}

const (
	mine   = `{name: m%d, type: span_count, span_count: {min_spans: 1}}`
	errs   = `{name: errors, type: status_code, status_code: {status_codes: [ERROR]}}`
	noErrs = `{name: fine, type: not, not: {not_sub_policy: {name: a, type: status_code, status_code: {status_codes: [ERROR]}}}}`
)

// TestAPolicyThatPanicsHasNoAnswer wherever it stands, and the others decide as without it: each time, and with the same
// threshold. How many have panicked is told, with the first one's name and stack.
func TestAPolicyThatPanicsHasNoAnswer(t *testing.T) {
	first, second := fmt.Sprintf(mine, 1), fmt.Sprintf(mine, 2)
	for _, tc := range []struct {
		policies, by string
		panics       int
	}{
		{first, "", 1},
		{first + "," + errs, "errors", 1},
		{errs + "," + first, "errors", 1},
		{"first:" + errs + "," + first, "errors", 0}, // not asked
		{"first:" + first + "," + errs, "errors", 1},
		{first + "," + errs + "," + second, "errors", 2},
		{`{name: m1, type: not, not: {not_sub_policy: ` + second + `}}`, "", 1},
		{`{name: m1, type: and, and: {and_sub_policy: [{name: a, type: always_sample}, ` + second + `]}},` + errs, "errors", 1},
		{`{name: m1, type: drop, drop: {drop_sub_policy: [` + second + `]}},` + errs, "errors", 1},
		{`{name: m1, type: composite, composite: {max_total_spans_per_second: 100, composite_sub_policy: [` + second + `, {name: a, type: always_sample}]}},` + errs, "errors", 1},
		{first + `,{name: some, type: probabilistic, probabilistic: {sampling_percentage: 99}}`, "some", 1},
	} {
		head := ""
		list, is := strings.CutPrefix(tc.policies, "first:")
		if is {
			head = "sample_on_first_match: true\n"
		}
		set := mined(t, head+"policies: ["+list+"]")
		alone := Verdict{}
		if tc.by == "some" {
			alone = mined(t, strings.Replace("policies: ["+list+"]", first+",", "", 1)).Decide(trace(t, 1, 0, tracepb.Status_STATUS_CODE_ERROR), new(Budgets))
		}
		for range 2 {
			tr := trace(t, 1, 0, tracepb.Status_STATUS_CODE_ERROR)
			for range 2 {
				v := set.Decide(tr, new(Budgets))
				if v.By != tc.by || v.Keep != (tc.by != "") || v.Threshold != alone.Threshold {
					t.Errorf("%s: %+v, want %q", tc.policies, v, tc.by)
				}
				switch p := v.Panicked; {
				case p == nil:
					if tc.panics != 0 {
						t.Errorf("%s: no panic", tc.policies)
					}
				case p.Policies != tc.panics || p.Policy != "m1" || p.Value != "what no one expects" || !strings.Contains(p.Stack, "bomb"):
					t.Errorf("%s: %d panicked, first %s: %v\n%s", tc.policies, p.Policies, p.Policy, p.Panic, p.Stack)
				}
			}
		}
	}
}

// TestLateSpansAndPanics: the other policies decide about late spans, too.
func TestLateSpansAndPanics(t *testing.T) {
	for policies, by := range map[string]string{
		mine: "", mine + "," + errs: "errors", errs + "," + mine: "errors",
		`{name: m1, type: drop, drop: {drop_sub_policy: [` + mine + `]}},` + errs: "errors",
	} {
		panics := 1
		if strings.HasPrefix(policies, errs) {
			panics = 0 // not asked
		}
		v := mined(t, "policies: ["+strings.ReplaceAll(policies, "m%d", "m2")+"]").WantsLate(trace(t, 1, 0, tracepb.Status_STATUS_CODE_ERROR))
		if v.By != by || v.Keep != (by != "") || panics > 0 != (v.Panicked != nil) || v.Panicked != nil && v.Panicked.Policies != panics {
			t.Errorf("%s: %+v, %+v", policies, v, v.Panicked)
		}
	}
}

// TestAMatcherThatPanics: what other policies read in the same pass is complete, and nothing of it is left for the next trace.
// Whether a matcher comes across the value that it panics at before or after the one that it looks for makes no difference.
func TestAMatcherThatPanics(t *testing.T) {
	set, err := Parse("t", []byte(`policies:
  - {name: path, type: string_attribute, string_attribute: {key: k, values: [wanted]}}
  - {name: not-path, type: string_attribute, string_attribute: {key: k, values: [wanted], invert_match: true}}
  - {name: vip, type: boolean_attribute, boolean_attribute: {key: vip, value: true}}
  - {name: late-key, type: string_attribute, string_attribute: {key: z, values: [wanted]}}
  - `+errs+`
  - {name: slow, type: latency, latency: {threshold_ms: 500}}
`))
	if err != nil {
		t.Fatal(err)
	}
	k := set.wanted.keys["k"]
	for i, q := range set.wanted.want[k] {
		set.wanted.want[k][i].match = func(v otlpwire.Value) bool {
			if string(v.Str) == "poison" {
				panic(errors.New("a matcher"))
			}
			return q.match(v)
		}
	}
	span := func(attributes string) string {
		return `{"traceId":"5b8efff798038103d269b63300000001","spanId":"eee19b7ec3c10011","name":"x",` + attributes + `}`
	}
	str := func(key, value string) string { return `{"key":"` + key + `","value":{"stringValue":"` + value + `"}}` }
	poison := span(`"attributes":[` + str("z", "other") + `,` + str("k", "poison") + `,{"key":"vip","value":{"boolValue":false}}]`)
	wanted := span(`"attributes":[` + str("k", "wanted") + `]`)
	tr := new(Trace)
	for _, tc := range []struct {
		spans, by string
		panics    int
	}{
		{poison, "", 2},
		{span(`"attributes":[]`), "not-path", 0}, // with nothing of the one before: z and vip would be taken as they were
		{poison + "," + span(`"attributes":[`+str("z", "wanted")+`]`), "late-key", 2},
		{poison + "," + span(`"attributes":[{"key":"vip","value":{"boolValue":true}}]`), "vip", 2},
		{poison + "," + span(`"status":{"code":2}`), "errors", 2},
		{poison + "," + span(`"startTimeUnixNano":"1","endTimeUnixNano":"900000000"`), "slow", 2},
		{poison + "," + wanted, "path", 0},
		{wanted + "," + poison, "path", 0},
	} {
		one := tracesOf(t, []byte(`{"resourceSpans":[{"scopeSpans":[{"spans":[`+tc.spans+`]}]}]}`))[0]
		tr.Reset(one.ID, one.Spans, one.Payload, 0)
		v, panics := set.Decide(tr, new(Budgets)), 0
		if v.Panicked != nil {
			if panics = v.Panicked.Policies; v.Panicked.Policy != "path" || v.Panicked.Error() != "panic: a matcher" || !strings.Contains(v.Panicked.Stack, "TestAMatcherThatPanics") {
				t.Errorf("%s: %s, %v\n%s", tc.spans, v.Panicked.Policy, v.Panicked.Panic, v.Panicked.Stack)
			}
		}
		if v.By != tc.by || panics != tc.panics {
			t.Errorf("%s: %+v, %d panicked; want %q, %d", tc.spans, v, panics, tc.by, tc.panics)
		}
	}
}

// TestSpansThatCannotBeRead: policies that need what has been read only in part have no answer, each time, and those that do
// not need it have theirs.
func TestSpansThatCannotBeRead(t *testing.T) {
	set := mined(t, `policies:
  - {name: attribute, type: string_attribute, string_attribute: {key: none, values: [x], invert_match: true}}
  - `+noErrs+`
  - {name: short, type: latency, latency: {threshold_ms: 0, upper_threshold_ms: 700}}
  - {name: vendor, type: trace_state, trace_state: {key: vendor, values: [gold]}}
`)
	set.wanted.keys["url.path"] = 99 // there is no such place: reading panics at the first span, and the second one has the error
	set.wanted.lengths = math.MaxUint64
	tr := trace(t, 1, time.Second, tracepb.Status_STATUS_CODE_ERROR)
	for range 2 {
		tr.Reset(tr.ID, tr.Spans, tr.Payload, 0)
		v := set.Decide(tr, new(Budgets))
		if v.By != "vendor" || v.Panicked == nil || v.Panicked.Policies != 3 || v.Panicked.Policy != "attribute" {
			t.Errorf("%+v, %+v", v, v.Panicked)
		}
	}
}
