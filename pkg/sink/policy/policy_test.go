package policy

import (
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
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
			{TraceId: tid, SpanId: []byte("aaaaaaaa"), StartTimeUnixNano: 1e9, EndTimeUnixNano: 1e9 + uint64(lasts)/2, Attributes: []*commonpb.KeyValue{str("url.path", "/cart/17")}},
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
		{`{name: p, type: latency, latency: {threshold_ms: 1000}}`, time.Second, ok, true},
		{`{name: p, type: latency, latency: {threshold_ms: 1001}}`, time.Second, ok, false},
		{`{name: p, type: latency, latency: {threshold_ms: 1000, upper_threshold_ms: 2000}}`, time.Second, ok, false},
		{`{name: p, type: latency, latency: {threshold_ms: 500, upper_threshold_ms: 1000}}`, time.Second, ok, true},
		{`{name: p, type: latency, latency: {threshold_ms: 500, upper_threshold_ms: 999}}`, time.Second, ok, false},
		{`{name: p, type: probabilistic, probabilistic: {sampling_percentage: 100}}`, 0, ok, true},
		{`{name: p, type: probabilistic, probabilistic: {sampling_percentage: 0}}`, 0, ok, false},
		{`{name: p, type: rate_limiting, rate_limiting: {spans_per_second: 2}}`, 0, ok, true},
		{`{name: p, type: rate_limiting, rate_limiting: {spans_per_second: 1}}`, 0, ok, false},
		{`{name: p, type: string_attribute, string_attribute: {key: service.name, values: [shop]}}`, 0, ok, true},
		{`{name: p, type: string_attribute, string_attribute: {key: url.path, values: [/cart]}}`, 0, ok, false},
		{`{name: p, type: string_attribute, string_attribute: {key: url.path, values: ["^/cart/\\d+$"], enabled_regex_matching: true, cache_max_size: 10}}`, 0, ok, true},
		{`{name: p, type: string_attribute, string_attribute: {key: url.path, values: [/cart/17], invert_match: true}}`, 0, ok, false},
		{`{name: p, type: string_attribute, string_attribute: {key: url.path, values: [/cart/18], invert_match: true}}`, 0, ok, true},
		{`{name: p, type: and, and: {and_sub_policy: [{name: a, type: latency, latency: {threshold_ms: 1}}, {name: b, type: status_code, status_code: {status_codes: [ERROR]}}]}}`, time.Second, ok, false},
		{`{name: p, type: and, and: {and_sub_policy: [{name: a, type: latency, latency: {threshold_ms: 1}}, {name: b, type: status_code, status_code: {status_codes: [ERROR]}}]}}`, time.Second, failed, true},
	} {
		set, err := Parse("t", []byte("policies: ["+tc.policy+"]\n"))
		if err != nil {
			t.Errorf("%s: %v", tc.policy, err)
			continue
		}
		if keep, by := set.Decide(trace(t, 1, tc.lasts, tc.status), &Budgets{}); keep != tc.keep || (keep && by != "p") {
			t.Errorf("%s: kept %v by %q, want %v", tc.policy, keep, by, tc.keep)
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
	if keep, by := set.Decide(trace(t, 1, 0, 0), &Budgets{}); keep || by != "no-carts" {
		t.Errorf("kept %v by %q", keep, by)
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
		"policies:\n  - {name: a, type: ottl_condition, ottl_condition: {}}":                                                        "s.yaml:2: policies[0].ottl_condition: unknown key",
		"policies:\n  - {name: a, type: composite}":                                                                                 `s.yaml:2: policy "a": type "composite" is not supported here; supported: always_sample`,
		"decision_wait_after_root_received: 1s\npolicies: []":                                                                       "s.yaml:1: decision_wait_after_root_received: unknown key",
		"policies:\n\n  - {name: a, type: probabilistic, probabilistic: {sampling_percentage: 150}}":                                `s.yaml:3: policy "a": sampling_percentage is 150`,
		"policies:\n  - {name: a, type: latency}":                                                                                   `s.yaml:2: policy "a": type is latency, but there is no section latency`,
		"policies:\n  - {name: a, type: string_attribute, string_attribute: {key: k, values: ['('], enabled_regex_matching: true}}": `s.yaml:2: policy "a": values: error parsing regexp`,
		"policies:\n  - {name: a, type: status_code, status_code: {status_codes: [BAD]}}":                                           `status code "BAD"`,
		"policies:\n  - {name: a, type: always_sample}\n  - {name: a, type: always_sample}":                                         `s.yaml:3: policy "a": the name stands twice`,
		"policies:\n  - {type: always_sample}":                                                                                      "name is empty",
		"policies: []":                                                                                                              "policies is empty",
		"decision_wait: 0s\npolicies: [{name: a, type: always_sample}]":                                                             "decision_wait is 0s",
		"decision_wait: 10\npolicies: [{name: a, type: always_sample}]":                                                             "s.yaml:1: decision_wait: 10 has no unit",
		"policies:\n  - {name: a, type: rate_limiting, rate_limiting: {spans_per_second: 0}}":                                       "spans_per_second is 0",
		"policies:\n  - {name: a, type: and, and: {and_sub_policy: [{name: b, type: and, and: {and_sub_policy: []}}]}}":             `policy "b": type "and" is not supported here`,
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
