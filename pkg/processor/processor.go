// Package processor changes telemetry by rules in the terms of the OpenTelemetry Collector's
// processors: actions on attributes, redaction of values and bodies, and filters.
//
//	rules, err := processor.New("processing", cfg)
//	payload, dropped := rules.Apply(otlpwire.Logs, payload)
//
// # Promises
//
//   - Bytes are changed only where a rule matches: a payload in which none matches is returned
//     unchanged, and the parts of another that do not match are copied.
//   - A valid payload stays valid.
//   - Rules have no state: the same payload always gives the same result.
//
// # Not here
//
// The protection of the identity: edges process before they stamp, sinks after they have checked it,
// and no rule may name instance.id, instance.name or customer.id.
package processor

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// Config is what an operator may set. Empty sections do nothing.
type Config struct {
	// Rules for the attributes of spans, log records and data points, as in the collector's
	// attributes processor; each is applied to the result of the previous one.
	Attributes []AttributesConfig `yaml:"attributes"`
	// Actions on the attributes of resources.
	Resource []Action `yaml:"resource"`
	// Redaction masks values.
	Redaction RedactionConfig `yaml:"redaction"`
	// Drops whole items. It runs first.
	Filter FilterConfig `yaml:"filter"`
}

// AttributesConfig is a rule for the attributes of some items.
type AttributesConfig struct {
	Include *Match   `yaml:"include"` // only to items that match
	Exclude *Match   `yaml:"exclude"` // not to items that match
	Actions []Action `yaml:"actions"`
}

// Action is what is done with one attribute.
type Action struct {
	Key string `yaml:"key"`
	// Action is insert (where it is absent), update (where it is present), upsert, delete or
	// hash (SHA-256 in hexadecimal digits).
	Action string `yaml:"action"`
	// Value is a text, number or boolean.
	Value any `yaml:"value"`
	// FromAttribute uses the value of another attribute, if the item has it.
	FromAttribute string `yaml:"from_attribute"`
	// Pattern is a regular expression for the keys to delete or hash.
	Pattern string `yaml:"pattern"`
}

// RedactionConfig says what is masked. The attributes of resources, scopes, items, events, links and
// exemplars, and bodies, are searched, at any depth and of any type; so are names, descriptions,
// status messages, trace states and severity texts.
type RedactionConfig struct {
	// Regular expressions: matching text in values is replaced by ****.
	BlockedValues []string `yaml:"blocked_values"`
	// Regular expressions for keys whose values are replaced as a whole.
	BlockedKeys []string `yaml:"blocked_key_patterns"`
	// Keys whose values are never changed.
	IgnoredKeys []string `yaml:"ignored_keys"`
	// Regular expressions for values that are not changed, although a part of them is blocked.
	Allowed []string `yaml:"allowed_values"`
}

// FilterConfig says which items are kept.
type FilterConfig struct {
	Spans   Filter `yaml:"spans"`
	Metrics Filter `yaml:"metrics"`
	Logs    Filter `yaml:"logs"`
}

// Filter drops items.
type Filter struct {
	// Drops the items that do not match.
	Include *Match `yaml:"include"`
	// Drops the items that match.
	Exclude *Match `yaml:"exclude"`
}

// Rules are compiled rules. They are safe for concurrent use.
type Rules struct {
	attributes []attributes
	resource   []action
	redaction  *redaction
	filter     [len(otlpwire.Signals)]filter
}

type attributes struct {
	filter
	actions []action
}

type filter struct{ include, exclude *match }

type action struct {
	key     string
	do      string
	value   []byte // an AnyValue message
	from    string
	pattern *regexp.Regexp
}

var identity = []string{"instance.id", "instance.name", "customer.id"}

// New checks and compiles rules. section is the key under which they are configured; all errors are
// reported.
func New(section string, cfg Config) (*Rules, error) {
	p := parser{}
	r := &Rules{
		resource:  p.actions(section+".resource", cfg.Resource),
		redaction: p.redaction(section+".redaction", cfg.Redaction),
	}
	for i, a := range cfg.Attributes {
		key := fmt.Sprintf("%s.attributes[%d]", section, i)
		if len(a.Actions) == 0 {
			p.fail(key+".actions", "is empty")
		}
		r.attributes = append(r.attributes, attributes{
			filter:  filter{include: p.match(key+".include", a.Include), exclude: p.match(key+".exclude", a.Exclude)},
			actions: p.actions(key+".actions", a.Actions),
		})
	}
	for sig, f := range []struct {
		key string
		Filter
	}{otlpwire.Traces: {"spans", cfg.Filter.Spans}, otlpwire.Metrics: {"metrics", cfg.Filter.Metrics}, otlpwire.Logs: {"logs", cfg.Filter.Logs}} {
		key := section + ".filter." + f.key
		for name, m := range map[string]*Match{"include": f.Include, "exclude": f.Exclude} {
			p.filters(key+"."+name, otlpwire.Signal(sig), m)
		}
		r.filter[sig] = filter{include: p.match(key+".include", f.Include), exclude: p.match(key+".exclude", f.Exclude)}
	}
	return r, errors.Join(p.errs...)
}

// parser collects errors.
type parser struct{ errs []error }

func (p *parser) fail(key, format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%s %s", key, fmt.Sprintf(format, args...)))
}

func (p *parser) regexps(key string, all []string) (out []*regexp.Regexp) {
	for i, text := range all {
		if re := p.regexp(fmt.Sprintf("%s[%d]", key, i), text); re != nil {
			out = append(out, re)
		}
	}
	return out
}

func (p *parser) regexp(key, text string) *regexp.Regexp {
	re, err := regexp.Compile(text)
	if err != nil {
		p.fail(key, "is not a regular expression (RE2): %v", err)
		return nil
	}
	return re
}

func (p *parser) actions(key string, all []Action) (out []action) {
	for i, a := range all {
		at := fmt.Sprintf("%s[%d]", key, i)
		if slices.Contains(identity, a.Key) {
			p.fail(at+".key", "is %q: the identity comes from the credential, no rule may change it", a.Key)
			continue
		}
		made := action{key: a.Key, do: a.Action, from: a.FromAttribute}
		switch a.Action {
		case "insert", "update", "upsert":
			made.value = p.newValue(at, a)
		case "delete", "hash":
			made.pattern = p.keyPattern(at, a)
		default:
			p.fail(at+".action", "is %q, want insert, update, upsert, delete or hash", a.Action)
		}
		out = append(out, made)
	}
	return out
}

// newValue checks an action that sets an attribute, and returns the AnyValue message it
// sets, if that is not another attribute's.
func (p *parser) newValue(at string, a Action) []byte {
	if a.Key == "" || a.Pattern != "" {
		p.fail(at, "needs key, and no pattern, to %s", a.Action)
	}
	if (a.Value == nil) == (a.FromAttribute == "") {
		p.fail(at, "needs value or from_attribute to %s", a.Action)
		return nil
	}
	if a.Value == nil {
		return nil
	}
	value, ok := anyValue(a.Value)
	if !ok {
		p.fail(at+".value", "is %v, want a text, number or boolean", a.Value)
	}
	return value
}

// keyPattern checks an action on attributes as they are, and returns what their keys match,
// if it is for more than one key.
func (p *parser) keyPattern(at string, a Action) *regexp.Regexp {
	if (a.Key == "") == (a.Pattern == "") {
		p.fail(at, "needs key or pattern to %s", a.Action)
	}
	if a.Value != nil || a.FromAttribute != "" {
		p.fail(at, "has a value, which %s does not need", a.Action)
	}
	if a.Pattern == "" {
		return nil
	}
	pattern := p.regexp(at+".pattern", a.Pattern)
	for _, key := range identity {
		if pattern != nil && pattern.MatchString(key) {
			p.fail(at+".pattern", "matches %q: the identity comes from the credential, no rule may change it", key)
		}
	}
	return pattern
}

// Match selects items. All kinds of conditions that are set must match; of a list of names or texts
// one entry, of attributes and resources all.
type Match struct {
	// Type is strict or regexp, for all of the following.
	Type        string   `yaml:"match_type"`
	Services    []string `yaml:"services"` // service.name of the resource
	SpanNames   []string `yaml:"span_names"`
	MetricNames []string `yaml:"metric_names"`
	LogBodies   []string `yaml:"log_bodies"`
	// Severity matches records whose severity number is at least this.
	Severity   *Severity `yaml:"log_severity_number"`
	Attributes []Pair    `yaml:"attributes"` // of the item
	Resources  []Pair    `yaml:"resources"`  // of the resource
}

// Severity is a bound for log records.
type Severity struct {
	Min int `yaml:"min"` // 1 to 24, see the OpenTelemetry log data model
	// MatchUndefined says that a record without a severity number matches.
	MatchUndefined bool `yaml:"match_undefined"`
}

// Pair is an attribute; without a value it must only exist.
type Pair struct {
	Key   string `yaml:"key"`
	Value any    `yaml:"value"`
}

type match struct {
	services, names, bodies func(text []byte) bool // nil: no condition
	severity                *Severity
	attributes, resources   []pair
	// of is the signal to which names apply.
	of otlpwire.Signal
}

type pair struct {
	key  string
	text func(text []byte) bool // nil: any value
}

func (p *parser) match(key string, m *Match) *match {
	if m == nil {
		return nil
	}
	if m.Type != "strict" && m.Type != "regexp" {
		p.fail(key+".match_type", "is %q, want strict or regexp", m.Type)
		return nil
	}
	if len(m.SpanNames) > 0 && len(m.MetricNames) > 0 {
		p.fail(key, "has span_names and metric_names: no item has both")
	}
	out := &match{services: p.texts(key+".services", m.Type, m.Services), bodies: p.texts(key+".log_bodies", m.Type, m.LogBodies), severity: m.Severity}
	if out.names = p.texts(key+".span_names", m.Type, m.SpanNames); out.names == nil {
		out.names, out.of = p.texts(key+".metric_names", m.Type, m.MetricNames), otlpwire.Metrics
	}
	for _, list := range []struct {
		key  string
		all  []Pair
		into *[]pair
	}{{"attributes", m.Attributes, &out.attributes}, {"resources", m.Resources, &out.resources}} {
		for i, a := range list.all {
			at := fmt.Sprintf("%s.%s[%d]", key, list.key, i)
			if a.Key == "" {
				p.fail(at+".key", "is empty")
			}
			made := pair{key: a.Key}
			if a.Value != nil {
				made.text = p.texts(at+".value", m.Type, []string{plain(a.Value)})
			}
			*list.into = append(*list.into, made)
		}
	}
	if out.services == nil && out.names == nil && out.bodies == nil && out.severity == nil && len(out.attributes)+len(out.resources) == 0 {
		p.fail(key, "has no condition: it would match everything")
	}
	return out
}

// filters reports conditions that no item of a signal can meet: an include with such a condition would
// drop everything.
func (p *parser) filters(key string, sig otlpwire.Signal, m *Match) {
	if m == nil {
		return
	}
	for name, c := range map[string]struct {
		set  bool
		when bool
	}{
		"span_names":          {len(m.SpanNames) > 0, sig == otlpwire.Traces},
		"metric_names":        {len(m.MetricNames) > 0, sig == otlpwire.Metrics},
		"log_bodies":          {len(m.LogBodies) > 0, sig == otlpwire.Logs},
		"log_severity_number": {m.Severity != nil, sig == otlpwire.Logs},
		"attributes":          {len(m.Attributes) > 0, sig != otlpwire.Metrics}, // a metric has none, only its points
	} {
		if c.set && !c.when {
			p.fail(key+"."+name, "is not a condition for %s", sig)
		}
	}
}

// texts returns a function that reports whether a text matches one of all; nil if all is empty.
func (p *parser) texts(key, kind string, all []string) func([]byte) bool {
	if len(all) == 0 {
		return nil
	}
	if kind == "strict" {
		return func(text []byte) bool {
			return slices.ContainsFunc(all, func(one string) bool { return one == string(text) })
		}
	}
	res := p.regexps(key, all)
	return func(text []byte) bool {
		return slices.ContainsFunc(res, func(re *regexp.Regexp) bool { return re.Match(text) })
	}
}

// plain writes a configured value as the text of an attribute.
func plain(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	}
	return fmt.Sprint(v)
}
