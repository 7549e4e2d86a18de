package policy

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/config"
)

// settings is the collector's configuration of tail_sampling, as far as it is supported. The sizing
// hints are accepted and ignored: the sampler's memory is bounded in bytes, partitions are its
// shards, and it never evicts.
type settings struct {
	DecisionWait  time.Duration `yaml:"decision_wait"`
	AfterRoot     time.Duration `yaml:"decision_wait_after_root_received"`
	NumTraces     int           `yaml:"num_traces"`
	NumShards     int           `yaml:"num_shards"`
	NewTraces     int           `yaml:"expected_new_traces_per_sec"`
	Block         bool          `yaml:"block_on_overflow"`
	FirstMatch    bool          `yaml:"sample_on_first_match"`
	MaxTraceBytes int           `yaml:"maximum_trace_size_bytes"`
	Strategy      string        `yaml:"sampling_strategy"`
	DropPending   bool          `yaml:"drop_pending_traces_on_shutdown"`
	Cache         struct {
		Sampled    int `yaml:"sampled_cache_size"`
		NonSampled int `yaml:"non_sampled_cache_size"`
	} `yaml:"decision_cache"`
	Policies []spec `yaml:"policies"`
}

// spec is one policy: a name, a type and the section that the type names.
type spec struct {
	Name    string `yaml:"name"`
	Type    string `yaml:"type"`
	Latency *struct {
		Threshold int64 `yaml:"threshold_ms"`
		Upper     int64 `yaml:"upper_threshold_ms"`
	} `yaml:"latency"`
	Status *struct {
		Codes []string `yaml:"status_codes"`
	} `yaml:"status_code"`
	Probabilistic *struct {
		Salt       string  `yaml:"hash_salt"`
		Percentage float64 `yaml:"sampling_percentage"`
	} `yaml:"probabilistic"`
	Rate *struct {
		SpansPerSecond int64 `yaml:"spans_per_second"`
		Burst          int64 `yaml:"burst_capacity"` // 0: twice the rate
	} `yaml:"rate_limiting"`
	Bytes *struct {
		BytesPerSecond int64 `yaml:"bytes_per_second"`
		Burst          int64 `yaml:"burst_capacity"` // 0: twice the rate
	} `yaml:"bytes_limiting"`
	SpanCount *struct {
		Min int `yaml:"min_spans"`
		Max int `yaml:"max_spans"`
	} `yaml:"span_count"`
	TraceState *struct {
		Key    string   `yaml:"key"`
		Values []string `yaml:"values"`
	} `yaml:"trace_state"`
	Numeric *struct {
		Key    string `yaml:"key"`
		Min    *int64 `yaml:"min_value"`
		Max    *int64 `yaml:"max_value"`
		Invert bool   `yaml:"invert_match"`
	} `yaml:"numeric_attribute"`
	Boolean *struct {
		Key    string `yaml:"key"`
		Value  bool   `yaml:"value"`
		Invert bool   `yaml:"invert_match"`
	} `yaml:"boolean_attribute"`
	String *struct {
		Key    string   `yaml:"key"`
		Values []string `yaml:"values"`
		Regex  bool     `yaml:"enabled_regex_matching"`
		Cache  int      `yaml:"cache_max_size"` // not needed: RE2 is linear
		Invert bool     `yaml:"invert_match"`
	} `yaml:"string_attribute"`
	OTTL *struct {
		ErrorMode string   `yaml:"error_mode"`
		Span      []string `yaml:"span"`
		SpanEvent []string `yaml:"spanevent"`
	} `yaml:"ottl_condition"`
	And *struct {
		Sub []spec `yaml:"and_sub_policy"`
	} `yaml:"and"`
	Drop *struct {
		Sub []spec `yaml:"drop_sub_policy"`
	} `yaml:"drop"`
	Not *struct {
		Sub *spec `yaml:"not_sub_policy"`
	} `yaml:"not"`
	Composite *struct {
		Total int64        `yaml:"max_total_spans_per_second"`
		Order []string     `yaml:"policy_order"`
		Sub   []spec       `yaml:"composite_sub_policy"`
		Rates []allocation `yaml:"rate_allocation"`
	} `yaml:"composite"`

	line int
}

// allocation is a sub-policy's share of a composite's budget.
type allocation struct {
	Policy  string `yaml:"policy"`
	Percent int64  `yaml:"percent"`
}

// UnmarshalYAML keeps the line for error messages.
func (s *spec) UnmarshalYAML(n *yaml.Node) error {
	type bare spec
	err := n.Decode((*bare)(s))
	s.line = n.Line
	return err
}

// DefaultWait is the collector's decision_wait.
const DefaultWait = 30 * time.Second

// LoadFile reads the content of the collector's tail_sampling key, or that key itself. Errors name
// file, line and key.
func LoadFile(path string) (*Set, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("sampling policies: %w", err)
	}
	return Parse(path, text)
}

// Parse is LoadFile for a text; name is used as the name of the file.
func Parse(name string, text []byte) (*Set, error) {
	st := settings{DecisionWait: DefaultWait}
	var keys map[string]yaml.Node
	if yaml.Unmarshal(text, &keys) == nil && keys["tail_sampling"].Kind != 0 {
		outer := struct {
			TailSampling *settings `yaml:"tail_sampling"`
		}{&st}
		if err := config.Load(name, text, &outer); err != nil {
			return nil, err
		}
	} else if err := config.Load(name, text, &st); err != nil {
		return nil, err
	}
	b := builder{file: name}
	set := b.build(st)
	set.limiters, set.wanted = b.limiters, b.wanted
	if len(b.errs) > 0 {
		return nil, errors.Join(b.errs...)
	}
	return set, nil
}

// KeepAll is the set of policies if none is configured.
func KeepAll(wait time.Duration) *Set {
	return (&Set{Wait: wait}).With("keep-all", func(*Trace) Outcome { return Sampled })
}

// With returns s with one more policy. It must want a whole trace when it wants some of its spans.
func (s *Set) With(name string, evaluate func(*Trace) Outcome) *Set {
	more := *s
	more.policies, more.growing = slices.Clone(s.policies), slices.Clone(s.growing)
	more.add(name, function(evaluate))
	return &more
}

func (s *Set) add(name string, eval evaluator) {
	s.policies = append(s.policies, named{name, eval})
	if grows(eval) {
		s.growing = append(s.growing, named{name, eval})
	}
}

type builder struct {
	file     string
	errs     []error
	limiters int
	wanted   wanted
}

func (b *builder) fail(s spec, format string, args ...any) {
	b.errs = append(b.errs, fmt.Errorf("%s:%d: policy %q: %s", b.file, s.line, s.Name, fmt.Sprintf(format, args...)))
}

func (b *builder) build(st settings) *Set {
	set := &Set{
		Wait: st.DecisionWait, WaitAfterRoot: st.AfterRoot, MaxTraceBytes: st.MaxTraceBytes,
		Kept: st.Cache.Sampled, Dropped: st.Cache.NonSampled, firstMatch: st.FirstMatch,
	}
	if st.AfterRoot < 0 || st.MaxTraceBytes < 0 {
		b.errs = append(b.errs, fmt.Errorf("%s: decision_wait_after_root_received and maximum_trace_size_bytes: want 0 or more", b.file))
	}
	if st.Strategy != "" && st.Strategy != "trace-complete" {
		b.errs = append(b.errs, fmt.Errorf("%s: sampling_strategy is %q; only trace-complete is supported: a trace is decided as a whole", b.file, st.Strategy))
	}
	if st.DropPending {
		b.errs = append(b.errs, fmt.Errorf("%s: drop_pending_traces_on_shutdown is true, which is not supported: pending traces stay in the hub", b.file))
	}
	if st.DecisionWait <= 0 || st.DecisionWait > time.Hour {
		b.errs = append(b.errs, fmt.Errorf("%s: decision_wait is %v, want more than 0 and at most 1h", b.file, st.DecisionWait))
	}
	if len(st.Policies) == 0 {
		b.errs = append(b.errs, fmt.Errorf("%s: policies is empty: nothing would be kept", b.file))
	}
	names := map[string]bool{}
	for _, s := range st.Policies {
		switch {
		case s.Name == "":
			b.fail(s, "name is empty")
		case names[s.Name]:
			b.fail(s, "the name occurs twice")
		}
		names[s.Name] = true
		eval := b.evaluator(s, true)
		if _, is := eval.(drop); is {
			set.drops = append(set.drops, named{s.Name, eval})
		} else {
			set.add(s.Name, eval)
		}
	}
	return set
}

// evaluator builds one policy; composite and drop are allowed only at the top, as in the collector.
func (b *builder) evaluator(s spec, top bool) evaluator {
	b.strayed(s)
	switch {
	case !slices.Contains(knownTypes, s.Type):
		b.fail(s, "type %q is not supported here; supported: %s", s.Type, strings.Join(knownTypes, ", "))
	case !top && slices.Contains(topTypes, s.Type):
		b.fail(s, "type %s is not allowed inside another policy", s.Type)
	case !slices.Contains(plainTypes, s.Type) && !slices.Contains(s.sections(), s.Type):
		b.fail(s, "type is %s, but there is no section %s", s.Type, s.Type)
	default:
		return b.ofType(s)
	}
	return always{}
}

// ofType builds a policy of a known type, whose section is there. One line a type.
func (b *builder) ofType(s spec) evaluator { //nolint:gocyclo // a table of the types
	switch s.Type {
	case "always_sample":
		return always{}
	case "trace_flags":
		return traceFlags{}
	case "latency":
		return b.latency(s)
	case "status_code":
		return b.statusCode(s)
	case "probabilistic":
		return b.probabilistic(s)
	case "rate_limiting":
		return rateLimiting{b.bucket(s, "spans_per_second", s.Rate.SpansPerSecond, s.Rate.Burst)}
	case "bytes_limiting":
		return bytesLimiting{b.bucket(s, "bytes_per_second", s.Bytes.BytesPerSecond, s.Bytes.Burst)}
	case "span_count":
		return b.spanCount(s)
	case "trace_state":
		return b.traceState(s)
	case "string_attribute":
		return b.stringAttribute(s)
	case "numeric_attribute":
		return b.numericAttribute(s)
	case "boolean_attribute":
		return b.booleanAttribute(s)
	case "ottl_condition":
		return b.ottlCondition(s)
	case "and":
		return b.all(s, s.And.Sub, "and_sub_policy")
	case "not":
		return b.opposite(s)
	case "drop":
		return drop{b.all(s, s.Drop.Sub, "drop_sub_policy")}
	case "composite":
		return b.composite(s)
	}
	panic("policy: no builder for type " + s.Type) // a test builds every known type
}

// sections lists the sections that are there.
func (s spec) sections() (keys []string) {
	v := reflect.ValueOf(s)
	for i := range v.NumField() {
		if f := v.Type().Field(i); f.Type.Kind() == reflect.Pointer && !v.Field(i).IsNil() {
			keys = append(keys, f.Tag.Get("yaml"))
		}
	}
	return keys
}

// strayed reports sections that the policy's type does not read.
func (b *builder) strayed(s spec) {
	for _, key := range s.sections() {
		if key != s.Type {
			b.fail(s, "type is %s, which does not read the section %s", s.Type, key)
		}
	}
}

var knownTypes = []string{
	"always_sample", "latency", "numeric_attribute", "probabilistic", "status_code", "string_attribute", "rate_limiting", "bytes_limiting",
	"span_count", "trace_state", "trace_flags", "boolean_attribute", "ottl_condition", "and", "not", "drop", "composite",
}

// plainTypes have no section, topTypes cannot stand inside another policy.
var (
	plainTypes = []string{"always_sample", "trace_flags"}
	topTypes   = []string{"drop", "composite"}
)

func (b *builder) limiter(rate, burst int64) limiter {
	b.limiters++
	return limiter{b.limiters - 1, rate, burst}
}

// bucket returns a limiter whose burst is twice the rate if it is not set, as in the collector (contrib
// #48226).
func (b *builder) bucket(s spec, key string, rate, burst int64) limiter {
	b.positive(s, key, rate)
	if burst < 0 || burst > maxRate {
		b.fail(s, "burst_capacity is %d, want more than 0 and at most %d", burst, int64(maxRate))
	}
	if burst == 0 {
		burst = 2 * rate
	}
	return b.limiter(rate, burst)
}

// maxRate is a terabyte a second: rates are multiplied.
const maxRate = 1 << 40

func (b *builder) positive(s spec, key string, n int64) {
	if n <= 0 || n > maxRate {
		b.fail(s, "%s is %d, want more than 0 and at most %d", key, n, int64(maxRate))
	}
}

func (b *builder) present(s spec, key string, values int) {
	if key == "" || values == 0 {
		b.fail(s, "key and values must be set")
	}
}

func (b *builder) latency(s spec) latency {
	l := s.Latency
	if l.Threshold < 0 || (l.Upper != 0 && l.Upper < l.Threshold) {
		b.fail(s, "want 0 <= threshold_ms <= upper_threshold_ms")
	}
	return latency{l.Threshold, l.Upper}
}

func (b *builder) probabilistic(s spec) evaluator {
	p := s.Probabilistic
	if !(p.Percentage >= 0 && p.Percentage <= 100) {
		b.fail(s, "sampling_percentage is %v, want 0 to 100", p.Percentage)
		return always{}
	}
	return newProbabilistic(p.Salt, p.Percentage)
}

func (b *builder) spanCount(s spec) spanCount {
	c := s.SpanCount
	if c.Min < 0 || c.Max < 0 || (c.Max != 0 && c.Max < c.Min) {
		b.fail(s, "want 0 <= min_spans <= max_spans, or max_spans 0 for no bound")
	}
	return spanCount{c.Min, c.Max}
}

func (b *builder) traceState(s spec) traceState {
	b.present(s, s.TraceState.Key, len(s.TraceState.Values))
	return traceState{s.TraceState.Key, slices.DeleteFunc(s.TraceState.Values, func(v string) bool { return v == "" })}
}

func (b *builder) booleanAttribute(s spec) attribute {
	b.present(s, s.Boolean.Key, 1)
	return attribute{b.wanted.add(s.Boolean.Key, matchBool(s.Boolean.Value)), s.Boolean.Invert}
}

func (b *builder) opposite(s spec) evaluator {
	if s.Not.Sub == nil {
		b.fail(s, "not_sub_policy is missing")
		return always{}
	}
	return not{b.evaluator(*s.Not.Sub, false)}
}

func (b *builder) numericAttribute(s spec) attribute {
	n := s.Numeric
	b.present(s, n.Key, 1)
	low, high := int64(math.MinInt64), int64(math.MaxInt64)
	if n.Min == nil && n.Max == nil {
		b.fail(s, "min_value or max_value must be set")
	}
	if n.Min != nil {
		low = *n.Min
	}
	if n.Max != nil {
		high = *n.Max
	}
	if low > high {
		b.fail(s, "min_value is %d, more than max_value %d", low, high)
	}
	return attribute{b.wanted.add(n.Key, matchInt(low, high)), n.Invert}
}

// composite orders the sub-policies by policy_order, with those that it does not name at the end, and
// gives each its share of the budget: rate_allocation's percentage,
// or an equal part.
func (b *builder) composite(s spec) composite {
	cfg := s.Composite
	b.positive(s, "max_total_spans_per_second", cfg.Total)
	if len(cfg.Sub) == 0 {
		b.fail(s, "composite_sub_policy is empty")
		return nil
	}
	place := func(name string) int {
		return slices.IndexFunc(cfg.Sub, func(sub spec) bool { return sub.Name == name })
	}
	order := map[string]int{}
	for i, name := range cfg.Order {
		if place(name) < 0 {
			b.fail(s, "policy_order names %q, which is not a sub-policy", name)
		}
		order[name] = i - len(cfg.Order)
	}
	percent, total := map[string]int64{}, int64(0)
	for _, r := range cfg.Rates {
		if place(r.Policy) < 0 || r.Percent < 0 {
			b.fail(s, "rate_allocation: %d percent for %q, want a share for a sub-policy", r.Percent, r.Policy)
		}
		percent[r.Policy] = r.Percent
		total += r.Percent
	}
	if total > 100 {
		b.fail(s, "rate_allocation adds up to %d percent", total)
	}
	subs := slices.Clone(cfg.Sub)
	slices.SortStableFunc(subs, func(x, y spec) int { return cmp.Compare(order[x.Name], order[y.Name]) })
	var c composite
	for _, sub := range subs {
		rate := cfg.Total / int64(len(subs))
		if p := percent[sub.Name]; p > 0 {
			rate = cfg.Total * p / 100
		}
		c = append(c, share{b.evaluator(sub, false), b.limiter(rate, rate)})
	}
	return c
}

func (b *builder) all(s spec, subs []spec, key string) and {
	if len(subs) == 0 {
		b.fail(s, "%s is empty", key)
	}
	var a and
	for _, sub := range subs {
		a = append(a, b.evaluator(sub, false))
	}
	return a
}

func (b *builder) statusCode(s spec) statusCode {
	var mask statusCode
	for _, c := range s.Status.Codes {
		switch strings.ToUpper(c) {
		case "UNSET":
			mask |= 1 << 0
		case "OK":
			mask |= 1 << 1
		case "ERROR":
			mask |= 1 << 2
		default:
			b.fail(s, "status code %q, want ERROR, OK or UNSET", c)
		}
	}
	if mask == 0 {
		b.fail(s, "status_codes is empty")
	}
	return mask
}

func (b *builder) stringAttribute(s spec) attribute {
	b.present(s, s.String.Key, len(s.String.Values))
	match := matchExact(s.String.Values)
	if s.String.Regex {
		var patterns []*regexp.Regexp
		for _, v := range s.String.Values {
			p, err := regexp.Compile(v)
			if err != nil {
				b.fail(s, "values: %v", err)
				continue
			}
			patterns = append(patterns, p)
		}
		match = matchAny(patterns)
	}
	return attribute{b.wanted.add(s.String.Key, matchString(match)), s.String.Invert}
}
