package policy

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// trace makes a trace of two spans: one second long, with a status and a few
// attributes.
func trace(t *testing.T, id byte, lasts time.Duration, status tracepb.Status_StatusCode) *Trace {
	t.Helper()
	str := func(k, v string) *commonpb.KeyValue {
		return &commonpb.KeyValue{Key: k, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: v}}}
	}
	tid := make([]byte, 16)
	tid[15] = id
	b, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{
		Resource: &resourcepb.Resource{Attributes: []*commonpb.KeyValue{str("service.name", "shop")}},
		ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{
			{TraceId: tid, SpanId: []byte("aaaaaaaa"), StartTimeUnixNano: 1e9, EndTimeUnixNano: 1e9 + uint64(lasts)/2, Flags: 0x101, TraceState: "a=1, vendor=gold", Attributes: []*commonpb.KeyValue{
				str("url.path", "/cart/17"), {Key: "items", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: 7}}},
				{Key: "vip", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_BoolValue{BoolValue: true}}},
			}},
			{TraceId: tid, SpanId: []byte("bbbbbbbb"), StartTimeUnixNano: 1e9 + uint64(lasts)/2, EndTimeUnixNano: 1e9 + uint64(lasts), Status: &tracepb.Status{Code: status}},
		}}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	tr := &Trace{Spans: 2, Payload: b}
	tr.ID[15] = id
	return tr
}

func TestPolicies(t *testing.T) {
	ok, failed := tracepb.Status_STATUS_CODE_OK, tracepb.Status_STATUS_CODE_ERROR
	for _, tc := range []struct {
		policy string
		lasts  time.Duration
		status tracepb.Status_StatusCode
		keep   bool
	}{
		{`{name: p, type: always_sample}`, 0, ok, true},
		{`{name: p, type: status_code, status_code: {status_codes: [ERROR]}}`, 0, ok, false},
		{`{name: p, type: status_code, status_code: {status_codes: [ERROR]}}`, 0, failed, true},
		{`{name: p, type: status_code, status_code: {status_codes: [UNSET]}}`, 0, failed, true}, // the other span
		{`{name: p, type: latency, latency: {threshold_ms: 999}}`, time.Second, ok, true},
		{`{name: p, type: latency, latency: {threshold_ms: 1000}}`, time.Second, ok, false},
		{`{name: p, type: latency, latency: {threshold_ms: 1000, upper_threshold_ms: 2000}}`, time.Second, ok, false},
		{`{name: p, type: latency, latency: {threshold_ms: 500, upper_threshold_ms: 1000}}`, time.Second, ok, true},
		{`{name: p, type: latency, latency: {threshold_ms: 500, upper_threshold_ms: 999}}`, time.Second, ok, false},
		{`{name: p, type: probabilistic, probabilistic: {sampling_percentage: 100}}`, 0, ok, true},
		{`{name: p, type: probabilistic, probabilistic: {sampling_percentage: 0}}`, 0, ok, false},
		{`{name: p, type: rate_limiting, rate_limiting: {spans_per_second: 2}}`, 0, ok, true},
		{`{name: p, type: rate_limiting, rate_limiting: {spans_per_second: 1}}`, 0, ok, true},
		{`{name: p, type: rate_limiting, rate_limiting: {spans_per_second: 1, burst_capacity: 1}}`, 0, ok, false},
		{`{name: p, type: string_attribute, string_attribute: {key: service.name, values: [shop]}}`, 0, ok, true},
		{`{name: p, type: string_attribute, string_attribute: {key: url.path, values: [/cart]}}`, 0, ok, false},
		{`{name: p, type: string_attribute, string_attribute: {key: url.path, values: ["^/cart/\\d+$"], enabled_regex_matching: true, cache_max_size: 10}}`, 0, ok, true},
		{`{name: p, type: string_attribute, string_attribute: {key: url.path, values: [/cart/17], invert_match: true}}`, 0, ok, false},
		{`{name: p, type: string_attribute, string_attribute: {key: url.path, values: [/cart/18], invert_match: true}}`, 0, ok, true},
		{`{name: p, type: and, and: {and_sub_policy: [{name: a, type: latency, latency: {threshold_ms: 1}}, {name: b, type: status_code, status_code: {status_codes: [ERROR]}}]}}`, time.Second, ok, false},
		{`{name: p, type: and, and: {and_sub_policy: [{name: a, type: latency, latency: {threshold_ms: 1}}, {name: b, type: status_code, status_code: {status_codes: [ERROR]}}]}}`, time.Second, failed, true},
		{`{name: p, type: numeric_attribute, numeric_attribute: {key: items, min_value: 7, max_value: 7}}`, 0, ok, true},
		{`{name: p, type: numeric_attribute, numeric_attribute: {key: items, min_value: 8}}`, 0, ok, false},
		{`{name: p, type: numeric_attribute, numeric_attribute: {key: items, max_value: 6}}`, 0, ok, false},
		{`{name: p, type: numeric_attribute, numeric_attribute: {key: items, min_value: 1, max_value: 9, invert_match: true}}`, 0, ok, false},
		{`{name: p, type: numeric_attribute, numeric_attribute: {key: other, min_value: 1, invert_match: true}}`, 0, ok, true},
		{`{name: p, type: numeric_attribute, numeric_attribute: {key: url.path, min_value: 0}}`, 0, ok, false},
		{`{name: p, type: boolean_attribute, boolean_attribute: {key: vip, value: true}}`, 0, ok, true},
		{`{name: p, type: boolean_attribute, boolean_attribute: {key: vip, value: false}}`, 0, ok, false},
		{`{name: p, type: boolean_attribute, boolean_attribute: {key: vip, value: true, invert_match: true}}`, 0, ok, false},
		{`{name: p, type: span_count, span_count: {min_spans: 2}}`, 0, ok, true},
		{`{name: p, type: span_count, span_count: {min_spans: 3}}`, 0, ok, false},
		{`{name: p, type: span_count, span_count: {min_spans: 1, max_spans: 1}}`, 0, ok, false},
		{`{name: p, type: trace_state, trace_state: {key: vendor, values: [silver, gold]}}`, 0, ok, true},
		{`{name: p, type: trace_state, trace_state: {key: vendor, values: [silver]}}`, 0, ok, false},
		{`{name: p, type: trace_state, trace_state: {key: endor, values: [gold]}}`, 0, ok, false},
		{`{name: p, type: trace_flags}`, 0, ok, true},
		{`{name: p, type: bytes_limiting, bytes_limiting: {bytes_per_second: 100000}}`, 0, ok, true},
		{`{name: p, type: bytes_limiting, bytes_limiting: {bytes_per_second: 100}}`, 0, ok, false},
		{`{name: p, type: not, not: {not_sub_policy: {name: a, type: status_code, status_code: {status_codes: [ERROR]}}}}`, 0, ok, true},
		{`{name: p, type: not, not: {not_sub_policy: {name: a, type: status_code, status_code: {status_codes: [ERROR]}}}}`, 0, failed, false},
		{`{name: p, type: and, and: {and_sub_policy: [{name: a, type: always_sample}, {name: n, type: not, not: {not_sub_policy: {name: b, type: trace_flags}}}]}}`, 0, ok, false},
		{`{name: p, type: ottl_condition, ottl_condition: {error_mode: ignore, span: ['attributes["url.path"] == "/cart/17"']}}`, 0, ok, true},
		{`{name: p, type: ottl_condition, ottl_condition: {span: ['attributes["url.path"] == "/cart/18"', 'resource.attributes["service.name"] == "shop" and attributes["items"] > 6']}}`, 0, ok, true},
		{`{name: p, type: ottl_condition, ottl_condition: {span: ['IsMatch(attributes["url.path"], "^/card")']}}`, 0, ok, false},
		{`{name: p, type: ottl_condition, ottl_condition: {span: ['status.code == STATUS_CODE_ERROR']}}`, 0, failed, true},
		{`{name: p, type: ottl_condition, ottl_condition: {span: ['status.code == STATUS_CODE_ERROR']}}`, 0, ok, false},
		{`{name: p, type: ottl_condition, ottl_condition: {spanevent: ['name == "exception"']}}`, 0, ok, false},
		{`{name: p, type: ottl_condition, ottl_condition: {span: ['Substring(attributes["url.path"], 9, 9) == "x"', 'attributes["vip"] == true']}}`, 0, ok, true},
		{`{name: p, type: ottl_condition, ottl_condition: {error_mode: propagate, span: ['Substring(attributes["url.path"], 9, 9) == "x"', 'false']}}`, 0, ok, false},
		{`{name: p, type: not, not: {not_sub_policy: {name: a, type: ottl_condition, ottl_condition: {span: ['IsRootSpan()']}}}}`, 0, ok, false},
		{`{name: p, type: composite, composite: {max_total_spans_per_second: 10, composite_sub_policy: [{name: a, type: status_code, status_code: {status_codes: [ERROR]}}, {name: b, type: always_sample}], rate_allocation: [{policy: a, percent: 50}, {policy: b, percent: 20}]}}`, 0, ok, true},
		{`{name: p, type: composite, composite: {max_total_spans_per_second: 10, composite_sub_policy: [{name: a, type: always_sample}, {name: b, type: always_sample}], rate_allocation: [{policy: a, percent: 10}, {policy: b, percent: 90}]}}`, 0, ok, false},
		{`{name: p, type: composite, composite: {max_total_spans_per_second: 10, policy_order: [b, a], composite_sub_policy: [{name: a, type: always_sample}, {name: b, type: always_sample}], rate_allocation: [{policy: a, percent: 10}, {policy: b, percent: 90}]}}`, 0, ok, true},
		{`{name: p, type: composite, composite: {max_total_spans_per_second: 3, composite_sub_policy: [{name: a, type: always_sample}, {name: b, type: always_sample}]}}`, 0, ok, false},
	} {
		set, err := Parse("t", []byte("policies: ["+tc.policy+"]\n"))
		if err != nil {
			t.Errorf("%s: %v", tc.policy, err)
			continue
		}
		if v := set.Decide(trace(t, 1, tc.lasts, tc.status), &Budgets{}); v.Keep != tc.keep || (v.Keep && v.By != "p") {
			t.Errorf("%s: %+v, want %v", tc.policy, v, tc.keep)
		}
	}
}

func TestDropWinsOverEverything(t *testing.T) {
	set, err := Parse("t", []byte(`
tail_sampling:
  decision_wait: 7s
  num_traces: 100
  expected_new_traces_per_sec: 10
  decision_cache: {sampled_cache_size: 5, non_sampled_cache_size: 6}
  policies:
    - {name: all, type: always_sample}
    - name: no-carts
      type: drop
      drop: {drop_sub_policy: [{name: x, type: string_attribute, string_attribute: {key: url.path, values: [/cart/17]}}]}
`))
	if err != nil {
		t.Fatal(err)
	}
	if set.Wait != 7*time.Second || set.Kept != 5 || set.Dropped != 6 {
		t.Errorf("got %+v", set)
	}
	if v := set.Decide(trace(t, 1, 0, 0), &Budgets{}); v.Keep || v.By != "no-carts" {
		t.Errorf("%+v", v)
	}
}

func TestProbabilisticKeepsItsShare(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, pct := range []float64{1, 10, 50, 99} {
		p := newProbabilistic("", pct)
		kept := 0
		const n = 100_000
		for range n {
			var tr Trace
			binary.LittleEndian.PutUint64(tr.ID[:], rng.Uint64()) // FNV-1a wants random IDs, which SDKs make
			binary.LittleEndian.PutUint64(tr.ID[8:], rng.Uint64())
			if p.evaluate(&tr, nil) == Sampled {
				kept++
			}
		}
		if got := float64(kept) / n * 100; got < pct-1 || got > pct+1 {
			t.Errorf("%v %%: kept %v %%", pct, got)
		}
	}
}

// TestErrorsNameFileLineAndPolicy has one row a mistake; what is not supported
// is refused, never ignored.
func TestErrorsNameFileLineAndPolicy(t *testing.T) {
	for text, want := range map[string]string{
		"policies:\n  - {name: a, type: ottl_condition, ottl_condition: {}}":                                                                                               "span and spanevent are empty",
		"policies:\n  - {name: a, type: ottl_condition, ottl_condition: {span: ['nonsense']}}":                                                                             `s.yaml:2: policy "a": unable to parse OTTL condition`,
		"policies:\n  - {name: a, type: ottl_condition, ottl_condition: {span: ['end_time > Now()']}}":                                                                     `undefined function "Now"`,
		"policies:\n  - {name: a, type: ottl_condition, ottl_condition: {error_mode: hope, span: ['true']}}":                                                               `error_mode is "hope"`,
		"policies:\n  - {name: a, type: rare}":                                                                                                                             `s.yaml:2: policy "a": type "rare" is not supported here; supported: always_sample`,
		"policies:\n  - {name: a, type: composite}":                                                                                                                        `s.yaml:2: policy "a": type is composite, but there is no section composite`,
		"tail_storage: x\npolicies: []":                                                                                                                                    "s.yaml:1: tail_storage: unknown key",
		"sampling_strategy: span-ingest\npolicies: []":                                                                                                                     `sampling_strategy is "span-ingest"; only trace-complete`,
		"drop_pending_traces_on_shutdown: true\npolicies: []":                                                                                                              "pending traces stay in the hub",
		"decision_wait_after_root_received: -1s\npolicies: []":                                                                                                             "want 0 or more",
		"policies:\n  - {name: a, type: numeric_attribute, numeric_attribute: {key: k}}":                                                                                   "min_value or max_value must be set",
		"policies:\n  - {name: a, type: numeric_attribute, numeric_attribute: {key: k, min_value: 2, max_value: 1}}":                                                       "min_value is 2, more than max_value 1",
		"policies:\n  - {name: a, type: boolean_attribute, boolean_attribute: {value: true}}":                                                                              "key and values must be set",
		"policies:\n  - {name: a, type: bytes_limiting, bytes_limiting: {bytes_per_second: 1, burst_capacity: -2}}":                                                        "burst_capacity is -2",
		"policies:\n  - {name: a, type: not, not: {}}":                                                                                                                     "not_sub_policy is missing",
		"policies:\n  - {name: a, type: and, and: {and_sub_policy: [{name: b, type: drop, drop: {}}]}}":                                                                    `policy "b": type drop is not allowed inside another policy`,
		"policies:\n  - {name: a, type: composite, composite: {max_total_spans_per_second: 1, policy_order: [c], composite_sub_policy: [{name: b, type: always_sample}]}}": `policy_order names "c"`,
		"policies:\n  - {name: a, type: composite, composite: {max_total_spans_per_second: 1, rate_allocation: [{policy: b, percent: 101}], composite_sub_policy: [{name: b, type: always_sample}]}}": "adds up to 101 percent",
		"policies:\n\n  - {name: a, type: probabilistic, probabilistic: {sampling_percentage: 150}}":                                                                                                  `s.yaml:3: policy "a": sampling_percentage is 150`,
		"policies:\n  - {name: a, type: latency}": `s.yaml:2: policy "a": type is latency, but there is no section latency`,
		"policies:\n  - {name: a, type: string_attribute, string_attribute: {key: k, values: ['('], enabled_regex_matching: true}}": `s.yaml:2: policy "a": values: error parsing regexp`,
		"policies:\n  - {name: a, type: status_code, status_code: {status_codes: [BAD]}}":                                           `status code "BAD"`,
		"policies:\n  - {name: a, type: always_sample}\n  - {name: a, type: always_sample}":                                         `s.yaml:3: policy "a": the name occurs twice`,
		"policies:\n  - {type: always_sample}":                                                                                      "name is empty",
		"policies: []":                                                                                                              "policies is empty",
		"decision_wait: 0s\npolicies: [{name: a, type: always_sample}]":                                                             "decision_wait is 0s",
		"decision_wait: 10\npolicies: [{name: a, type: always_sample}]":                                                             "s.yaml:1: decision_wait: 10 has no unit",
		"policies:\n  - {name: a, type: rate_limiting, rate_limiting: {spans_per_second: 0}}":                                       "spans_per_second is 0",
		"policies:\n  - {name: a, type: and, and: {and_sub_policy: [{name: b, type: and, and: {and_sub_policy: []}}]}}":             `policy "b": and_sub_policy is empty`,
		"policies:\n  - {name: a, type: and, and: {and_sub_policy: []}}":                                                            "and_sub_policy is empty",
		"tail_sampling:\n  policies: [{name: a, type: always_sample}]\nprocessors: {}":                                              "s.yaml:3: processors: unknown key",
		"policies: {a: b}": "s.yaml:1: policies: got a mapping, want a list",
		"policies:\n  - {name: a, type: latency, latency: {threshold_ms: 10, upper_threshold_ms: 5}}": "threshold_ms <= upper_threshold_ms",
		"policies:\n  - {name: a, type: always_sample}\n  bad indent":                                 "s.yaml:",
	} {
		if _, err := Parse("s.yaml", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q:\n got %v\nwant %s", text, err, want)
		}
	}
}

// TestEveryKnownTypeIsBuilt: with an empty section each type is built or refused for what its
// section lacks, and without one it is refused unless it needs none.
func TestEveryKnownTypeIsBuilt(t *testing.T) {
	for _, kind := range knownTypes {
		plain := slices.Contains(plainTypes, kind)
		_, err := Parse("s.yaml", []byte("policies:\n  - {name: a, type: "+kind+"}"))
		if missing := err != nil && strings.Contains(err.Error(), "there is no section "+kind); missing == plain {
			t.Errorf("%s without a section: %v", kind, err)
		}
		if plain {
			continue
		}
		_, err = Parse("s.yaml", []byte("policies:\n  - {name: a, type: "+kind+", "+kind+": {}}"))
		if err != nil && strings.Contains(err.Error(), "section") {
			t.Errorf("%s with a section: %v", kind, err)
		}
	}
	_, err := Parse("s.yaml", []byte("policies:\n  - {name: a, type: always_sample, latency: {}}"))
	if want := "does not read the section latency"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("a section of another type: %v, want %s", err, want)
	}
}

// TestBudgetsNeverGoBack: a trace that is due in a minute that is over spends from the
// budget of the minute at hand.
func TestBudgetsNeverGoBack(t *testing.T) {
	var b Budgets
	for i, tc := range []struct {
		minute int64
		want   bool
	}{{1, true}, {1, false}, {2, true}, {1, false}, {2, false}, {3, true}} {
		tr := &Trace{Due: tc.minute * minute, partitions: 1}
		if got := b.spend(limiter{0, 1, 10}, tr, 6, tr.Load); got != tc.want {
			t.Errorf("step %d, minute %d: %v, want %v", i, tc.minute, got, tc.want)
		}
	}
}

// TestThresholdTellsTheChance: a kept trace says with what chance one like it is
// kept, when that is known.
func TestThresholdTellsTheChance(t *testing.T) {
	const (
		errs  = `{name: e, type: status_code, status_code: {status_codes: [ERROR]}}`
		half  = `{name: h, type: probabilistic, probabilistic: {sampling_percentage: 50}}`
		most  = `{name: m, type: probabilistic, probabilistic: {sampling_percentage: 99.9}}`
		few   = `{name: f, type: rate_limiting, rate_limiting: {spans_per_second: 1000}}`
		slow  = `{name: s, type: and, and: {and_sub_policy: [{name: l, type: latency, latency: {threshold_ms: 1}}, {name: h, type: probabilistic, probabilistic: {sampling_percentage: 50}}]}}`
		both  = `{name: b, type: and, and: {and_sub_policy: [{name: h, type: probabilistic, probabilistic: {sampling_percentage: 50}}, {name: g, type: probabilistic, probabilistic: {sampling_percentage: 20}}]}}`
		other = `{name: o, type: not, not: {not_sub_policy: {name: h, type: probabilistic, probabilistic: {sampling_percentage: 75}}}}`
	)
	for policies, want := range map[string]float64{
		half: 0.5, most: 0.999, few: 0, slow: 0.5, both: 0.2, other: 0.25,
		`{name: a, type: always_sample}`: 1,
		half + "," + most:                0.999,
		errs + "," + half:                0.5, // no trace here is an error
		few + "," + half:                 0,
		half + "," + few + `,{name: a, type: always_sample}`: 1,
	} {
		set, err := Parse("t", []byte("policies: ["+policies+"]\n"))
		if err != nil {
			t.Fatal(err)
		}
		kept := 0
		rng := rand.New(rand.NewPCG(1, 1))
		for range 100 {
			tr := trace(t, 1, time.Second, 0)
			binary.LittleEndian.PutUint64(tr.ID[:], rng.Uint64())
			binary.LittleEndian.PutUint64(tr.ID[8:], rng.Uint64())
			v := set.Decide(tr, &Budgets{})
			if !v.Keep {
				if v.Threshold != 0 {
					t.Errorf("%s: a dropped trace has a threshold", policies)
				}
				continue
			}
			kept++
			got := float64(otlpwire.Unknown-v.Threshold) / float64(otlpwire.Unknown)
			if got < want-1e-9 || got > want+1e-9 {
				t.Errorf("%s: chance %v, want %v", policies, got, want)
			}
		}
		if kept == 0 {
			t.Errorf("%s: nothing is kept", policies)
		}
	}
}

// TestFirstValueOfAKeyCounts: of a key that a span has twice, as in the collector.
func TestFirstValueOfAKeyCounts(t *testing.T) {
	set, err := Parse("t", []byte("policies: [{name: a, type: string_attribute, string_attribute: {key: k, values: [first]}}, {name: b, type: string_attribute, string_attribute: {key: k, values: [second]}}]"))
	if err != nil {
		t.Fatal(err)
	}
	str := func(v string) *commonpb.KeyValue {
		return &commonpb.KeyValue{Key: "k", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: v}}}
	}
	b, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{{Attributes: []*commonpb.KeyValue{str("first"), str("second")}}}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	if v := set.Decide(&Trace{Spans: 1, Payload: b}, &Budgets{}); v.By != "a" {
		t.Errorf("%+v", v)
	}
	set.policies = set.policies[1:]
	if v := set.Decide(&Trace{Spans: 1, Payload: b}, &Budgets{}); v.Keep {
		t.Errorf("the last value counts: %+v", v)
	}
}

// TestRatesHoldOverPartitions decides the traces of an instance in eight
// partitions: together they keep to the rate, and a budget that is smaller than
// eight traces still lets some pass.
func TestRatesHoldOverPartitions(t *testing.T) {
	const partitions, seconds, perSecond = 8, 80, 5
	set, err := Parse("t", fmt.Appendf(nil, "policies: [{name: f, type: rate_limiting, rate_limiting: {spans_per_second: %d}}]", perSecond))
	if err != nil {
		t.Fatal(err)
	}
	set.Partitions = partitions
	var budgets [partitions]Budgets
	spans := 0
	for second := range seconds {
		for p := range partitions {
			for range 4 {
				tr := trace(t, 1, 0, 0)
				tr.Due = int64(second) * int64(time.Second)
				if set.Decide(tr, &budgets[p]).Keep {
					spans += tr.Spans
				}
			}
		}
	}
	if spans > seconds*perSecond*11/10 || spans < seconds*perSecond*9/10 {
		t.Errorf("%d spans kept in %d seconds at %d a second", spans, seconds, perSecond)
	}
}

// TestMaxKept: one instance cannot have more than its share, whatever wants its
// traces, and the next owner knows what has been taken.
func TestMaxKept(t *testing.T) {
	set, err := Parse("t", []byte("policies: [{name: all, type: always_sample}, {name: f, type: rate_limiting, rate_limiting: {spans_per_second: 1}}]"))
	if err != nil {
		t.Fatal(err)
	}
	set.MaxKept = 5
	var b, next Budgets
	for i := range 3 {
		v := set.Decide(trace(t, byte(i), 0, 0), &b) // two spans each
		if v.Keep != (i < 2) || (!v.Keep && v.By != OverShare) {
			t.Errorf("trace %d: %+v", i, v)
		}
		next.Restore(0, v.Took)
	}
	if v := set.Decide(trace(t, 9, 0, 0), &next); v.Keep {
		t.Errorf("the next owner keeps more: %+v", v)
	}
}

// TestDocumentationNamesEverything: docs/sampling.md has every policy type and
// every key.
func TestDocumentationNamesEverything(t *testing.T) {
	text, err := os.ReadFile("../../../docs/sampling.md")
	if err != nil {
		t.Fatal(err)
	}
	names := slices.Clone(knownTypes)
	for _, f := range reflect.VisibleFields(reflect.TypeFor[settings]()) {
		names = append(names, f.Tag.Get("yaml"))
	}
	for _, name := range names {
		if !strings.Contains(string(text), "`"+name) {
			t.Errorf("%s is not in docs/sampling.md", name)
		}
	}
}
