package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// leaf is a policy that holds no others.
type leaf struct {
	kind, key string // its type, and the attribute it looks at
	body      string // of its YAML, behind the name
	regex     bool
	over      int64 // of latency, with upTo where there is an upper threshold
	upper     bool
	upTo      int64
	zero      bool // a bound is 0
}

// alone is the configuration that has nothing else.
func (l leaf) alone() string { return "policies: [{name: p, " + l.body + "}]" }

// set is a configuration, and what its kept set depends on.
type set struct {
	text   string
	leaves []int        // of those it holds
	only   string       // the one trace that it is asked about, by its name; "" for all
	meant  func(*trace) // counts a difference that is the configuration's own; nil for none
}

// plenty is a budget that never runs out: both fill it up faster than anybody can spend.
const plenty = 1 << 40

// leaves returns one policy of every type, and more where its settings have edges.
func leaves() (all []leaf) {
	add := func(kind, section string) *leaf {
		body := "type: " + kind
		if section != "" {
			body += ", " + kind + ": {" + section + "}"
		}
		all = append(all, leaf{kind: kind, body: body})
		return &all[len(all)-1]
	}
	add("always_sample", "")
	add("trace_flags", "")
	for _, ms := range []int64{0, 1, 9, 10, 99, 100, 101, 200, 5000} {
		add("latency", fmt.Sprintf("threshold_ms: %d", ms)).over = ms
	}
	for _, upTo := range []int64{100, 101, 200, 5000} {
		l := add("latency", fmt.Sprintf("threshold_ms: 10, upper_threshold_ms: %d", upTo))
		l.over, l.upper, l.upTo = 10, true, upTo
	}
	for _, codes := range []string{"ERROR", "OK", "UNSET", "ERROR, UNSET", "OK, ERROR", "UNSET, OK, ERROR"} {
		add("status_code", "status_codes: ["+codes+"]")
	}
	for _, p := range []string{"0", "0.1", "1", "10", "25", "33.3", "50", "66.6666", "99.9", "100"} {
		add("probabilistic", "sampling_percentage: "+p)
		add("probabilistic", "hash_salt: other, sampling_percentage: "+p)
	}
	for _, n := range []string{"min_spans: 1", "min_spans: 2", "min_spans: 3, max_spans: 5", "max_spans: 2", "min_spans: 2, max_spans: 2", "min_spans: 30"} {
		add("span_count", n)
	}
	for _, values := range []string{"key: k, values: [value1]", "key: k, values: [value1, x, '']", "key: a, values: [b]", "key: t1@sys, values: [v]", "key: none, values: [x]"} {
		add("trace_state", values)
	}
	for _, rate := range []string{"", ", burst_capacity: 1", ", burst_capacity: 2", ", burst_capacity: 5", ", burst_capacity: 1000000"} {
		add("rate_limiting", fmt.Sprintf("spans_per_second: %d%s", plenty, rate))
	}
	for _, rate := range []string{"", ", burst_capacity: 150", ", burst_capacity: 400", ", burst_capacity: 1000", ", burst_capacity: 10000000"} {
		add("bytes_limiting", fmt.Sprintf("bytes_per_second: %d%s", plenty, rate))
	}
	for _, invert := range []string{"", ", invert_match: true"} {
		for _, key := range []string{"k", "http.route", "service.name"} {
			for _, v := range []string{"[value1]", "[value1, /a, s]", "['', x]"} {
				add("string_attribute", "key: "+key+", values: "+v+invert).key = key
			}
			for _, v := range []string{"['^val']", "['/a|^s$', 'x+']", "['.*']", "['^$']"} {
				l := add("string_attribute", "key: "+key+", enabled_regex_matching: true, cache_max_size: 10, values: "+v+invert)
				l.key, l.regex = key, true
			}
		}
		for _, key := range []string{"k", "n"} {
			for _, b := range []string{"min_value: 5", "max_value: 5", "min_value: 1, max_value: 10", "min_value: -3, max_value: -1", "min_value: 5, max_value: 5", "min_value: -10, max_value: 600"} {
				add("numeric_attribute", "key: "+key+", "+b+invert).key = key
			}
			for _, b := range []string{"min_value: 0, max_value: 10", "min_value: -10, max_value: 0"} {
				l := add("numeric_attribute", "key: "+key+", "+b+invert)
				l.key, l.zero = key, true
			}
		}
		for _, key := range []string{"k", "flag"} {
			for _, v := range []string{"true", "false"} {
				add("boolean_attribute", "key: "+key+", value: "+v+invert).key = key
			}
		}
	}
	for _, mode := range []string{"", "error_mode: ignore, ", "error_mode: silent, ", "error_mode: propagate, "} {
		for _, c := range []string{
			`span: ['attributes["k"] == "value1"']`, `span: ['Substring(attributes["k"], 0, 3) == "val"']`, `span: ['Substring(attributes["k"], 0, 3) == "val"', 'status.code == 2']`,
			`span: ['attributes["n"] > 3 and IsRootSpan()', 'name == "op"']`, `spanevent: ['name == "exception"']`, `spanevent: ['attributes["k"] == "value1"']`,
			`span: ['resource.attributes["service.name"] == "cart"'], spanevent: ['Substring(name, 0, 4) == "exce"']`, `span: ['end_time_unix_nano - start_time_unix_nano > 100000000']`,
			`span: ['span.attributes["k"] == "value1" and resource.attributes["k"] != nil', 'scope.name == "other"']`, `spanevent: ['spanevent.name == "exc" and span.status.code == 2']`,
		} {
			add("ottl_condition", mode+c)
		}
	}
	return all
}

// sets returns each leaf alone, and leaves within and beside others.
func sets(all []leaf, rng *rand.Rand, random int) (out []set) {
	for i, l := range all {
		out = append(out, set{text: l.alone(), leaves: []int{i}})
	}
	b := builder{all: all, rng: rng}
	for i := range all {
		b.begin()
		b.finish(&out, "{name: n, "+b.not(i)+"}")
		b.begin()
		b.finish(&out, "{name: d, type: drop, drop: {drop_sub_policy: [{name: s, "+b.leaf(i)+"}]}}, {name: all, type: always_sample}")
	}
	for range random {
		b.begin()
		var policies []string
		for n := range 1 + rng.IntN(4) {
			policies = append(policies, fmt.Sprintf("{name: p%d, %s}", n, b.top()))
		}
		b.finish(&out, strings.Join(policies, ", "))
	}
	return append(out, ownDifferences()...)
}

// builder writes policies as deep as the collector lets them nest.
type builder struct {
	all  []leaf
	rng  *rand.Rand
	used []int
	n    int
}

func (b *builder) begin() { b.used = nil }

func (b *builder) finish(out *[]set, policies string) {
	head := []string{"", "sample_on_first_match: true\n"}[b.rng.IntN(2)]
	*out = append(*out, set{text: head + "policies: [" + policies + "]", leaves: b.used})
}

func (b *builder) leaf(i int) string {
	b.used = append(b.used, i)
	return b.all[i].body
}

func (b *builder) any() string { return b.leaf(b.rng.IntN(len(b.all))) }

func (b *builder) not(i int) string {
	return "type: not, not: {not_sub_policy: {name: s, " + b.leaf(i) + "}}"
}

// some returns a list of one to three sub-policies.
func (b *builder) some(one func() string) string {
	var subs []string
	for range 1 + b.rng.IntN(3) {
		b.n++
		subs = append(subs, fmt.Sprintf("{name: s%d, %s}", b.n, one()))
	}
	return strings.Join(subs, ", ")
}

// within is a sub-policy of and, or of drop.
func (b *builder) within() string {
	if b.rng.IntN(3) == 0 {
		return b.not(b.rng.IntN(len(b.all)))
	}
	return b.any()
}

func (b *builder) and() string {
	return "type: and, and: {and_sub_policy: [" + b.some(b.within) + "]}"
}

func (b *builder) top() string {
	switch b.rng.IntN(6) {
	case 0:
		return b.and()
	case 1:
		return b.not(b.rng.IntN(len(b.all)))
	case 2:
		return "type: drop, drop: {drop_sub_policy: [" + b.some(b.within) + "]}"
	case 3:
		return fmt.Sprintf("type: composite, composite: {max_total_spans_per_second: %d, composite_sub_policy: [%s]}", plenty, b.some(func() string {
			if b.rng.IntN(3) == 0 {
				return b.and()
			}
			return b.any()
		}))
	}
	return b.any()
}
