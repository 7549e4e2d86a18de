package policy

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/proc"
)

// settings is the collector's configuration of tail_sampling, as far as it is
// supported. The two sizing hints are accepted and not needed: the sampler's
// memory is bounded in bytes.
type settings struct {
	DecisionWait time.Duration `yaml:"decision_wait"`
	NumTraces    int           `yaml:"num_traces"`
	NewTraces    int           `yaml:"expected_new_traces_per_sec"`
	Cache        struct {
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
		SpansPerSecond int `yaml:"spans_per_second"`
	} `yaml:"rate_limiting"`
	String *struct {
		Key    string   `yaml:"key"`
		Values []string `yaml:"values"`
		Regex  bool     `yaml:"enabled_regex_matching"`
		Cache  int      `yaml:"cache_max_size"` // not needed: RE2 is linear
		Invert bool     `yaml:"invert_match"`
	} `yaml:"string_attribute"`
	And *struct {
		Sub []spec `yaml:"and_sub_policy"`
	} `yaml:"and"`
	Drop *struct {
		Sub []spec `yaml:"drop_sub_policy"`
	} `yaml:"drop"`

	line int
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

// LoadFile reads what stands under the collector's tail_sampling key, or that
// key itself. Errors name file, line and key.
func LoadFile(path string) (*Set, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("sampling policies: %w", err)
	}
	return Parse(path, text)
}

// Parse is LoadFile on text; name stands for the file.
func Parse(name string, text []byte) (*Set, error) {
	st := settings{DecisionWait: DefaultWait}
	var keys map[string]yaml.Node
	if yaml.Unmarshal(text, &keys) == nil && keys["tail_sampling"].Kind != 0 {
		outer := struct {
			TailSampling *settings `yaml:"tail_sampling"`
		}{&st}
		if err := proc.Load(name, text, &outer); err != nil {
			return nil, err
		}
	} else if err := proc.Load(name, text, &st); err != nil {
		return nil, err
	}
	b := builder{file: name}
	set := b.build(st)
	if len(b.errs) > 0 {
		return nil, errors.Join(b.errs...)
	}
	return set, nil
}

// KeepAll is the policy of those who have set none.
func KeepAll(wait time.Duration) *Set {
	return &Set{Wait: wait, policies: []named{{"keep-all", always{}}}}
}

type builder struct {
	file     string
	errs     []error
	limiters int
}

func (b *builder) fail(s spec, format string, args ...any) {
	b.errs = append(b.errs, fmt.Errorf("%s:%d: policy %q: %s", b.file, s.line, s.Name, fmt.Sprintf(format, args...)))
}

func (b *builder) build(st settings) *Set {
	set := &Set{Wait: st.DecisionWait, Kept: st.Cache.Sampled, Dropped: st.Cache.NonSampled}
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
			b.fail(s, "the name stands twice")
		}
		names[s.Name] = true
		eval := b.evaluator(s, true)
		if _, is := eval.(drop); is {
			set.drops = append(set.drops, named{s.Name, eval})
		} else {
			set.policies = append(set.policies, named{s.Name, eval})
		}
	}
	return set
}

// evaluator builds one policy; and and drop stand at the top only, as in the
// collector.
func (b *builder) evaluator(s spec, top bool) evaluator {
	section := func(set bool) bool {
		if !set {
			b.fail(s, "type is %s, but there is no section %s", s.Type, s.Type)
		}
		return set
	}
	switch {
	case s.Type == "always_sample":
		return always{}
	case s.Type == "latency" && section(s.Latency != nil):
		if u := s.Latency.Upper; s.Latency.Threshold < 0 || (u != 0 && u < s.Latency.Threshold) {
			b.fail(s, "want 0 <= threshold_ms <= upper_threshold_ms")
		}
		return latency{s.Latency.Threshold, s.Latency.Upper}
	case s.Type == "status_code" && section(s.Status != nil):
		return b.statusCode(s)
	case s.Type == "probabilistic" && section(s.Probabilistic != nil):
		p := s.Probabilistic
		if !(p.Percentage >= 0 && p.Percentage <= 100) {
			b.fail(s, "sampling_percentage is %v, want 0 to 100", p.Percentage)
		}
		return newProbabilistic(p.Salt, p.Percentage)
	case s.Type == "rate_limiting" && section(s.Rate != nil):
		if s.Rate.SpansPerSecond <= 0 {
			b.fail(s, "spans_per_second is %d, want more than 0", s.Rate.SpansPerSecond)
		}
		b.limiters++
		return rateLimiting{b.limiters - 1, s.Rate.SpansPerSecond}
	case s.Type == "string_attribute" && section(s.String != nil):
		return b.stringAttribute(s)
	case s.Type == "and" && top && section(s.And != nil):
		return b.all(s, s.And.Sub, "and_sub_policy")
	case s.Type == "drop" && top && section(s.Drop != nil):
		return drop{b.all(s, s.Drop.Sub, "drop_sub_policy")}
	case !isKnown(s.Type) || ((s.Type == "and" || s.Type == "drop") && !top):
		b.fail(s, "type %q is not supported here; supported: %s", s.Type, strings.Join(knownTypes, ", "))
	}
	return always{}
}

var knownTypes = []string{"always_sample", "latency", "status_code", "probabilistic", "rate_limiting", "string_attribute", "and", "drop"}

func isKnown(typ string) bool {
	for _, k := range knownTypes {
		if k == typ {
			return true
		}
	}
	return false
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

func (b *builder) stringAttribute(s spec) stringAttribute {
	a := stringAttribute{key: s.String.Key, invert: s.String.Invert, match: matchExact(s.String.Values)}
	if a.key == "" || len(s.String.Values) == 0 {
		b.fail(s, "key and values must be set")
	}
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
		a.match = matchAny(patterns)
	}
	return a
}
