package processor

import (
	"bytes"
	"regexp"
	"regexp/syntax"
	"slices"

	"github.com/penstock/penstock/pkg/otlpattr"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// mask replaces masked text.
var mask = []byte("****")

type redaction struct {
	values  []blocked
	keys    []*regexp.Regexp
	ignored []string
	allowed []*regexp.Regexp
}

// blocked is a regular expression with a text that every match contains: most values do not have it,
// and need not be searched.
type blocked struct {
	re      *regexp.Regexp
	literal []byte // empty: unknown
}

func (p *parser) redaction(key string, cfg RedactionConfig) *redaction {
	r := &redaction{keys: p.regexps(key+".blocked_key_patterns", cfg.BlockedKeys), ignored: cfg.IgnoredKeys, allowed: p.regexps(key+".allowed_values", cfg.Allowed)}
	for _, re := range p.regexps(key+".blocked_values", cfg.BlockedValues) {
		if re.MatchString("") {
			p.fail(key+".blocked_values", "has %q, which matches the empty text", re)
		}
		r.values = append(r.values, blocked{re, literal(re)})
	}
	if len(r.values)+len(r.keys) == 0 {
		return nil
	}
	return r
}

// literal returns the longest text that every match of a regular expression contains.
func literal(re *regexp.Regexp) (longest []byte) {
	tree, err := syntax.Parse(re.String(), syntax.Perl)
	if err != nil {
		return nil
	}
	parts := []*syntax.Regexp{tree}
	if tree.Op == syntax.OpConcat {
		parts = tree.Sub
	}
	for _, s := range parts {
		if s.Op == syntax.OpLiteral && s.Flags&syntax.FoldCase == 0 && len(string(s.Rune)) > len(longest) {
			longest = []byte(string(s.Rune))
		}
	}
	return longest
}

// pair returns the replacement of a KeyValue message.
func (r *redaction) pair(kv []byte) (masked []byte, yes bool) {
	key, value := otlpwire.Attribute(kv)
	if masked, yes = r.attribute(key, value); !yes {
		return nil, false
	}
	return appendBytes(appendBytes(nil, 1, key), 2, masked), true
}

// attribute returns the replacement of an attribute's AnyValue message.
func (r *redaction) attribute(key, value []byte) (masked []byte, yes bool) {
	if slices.Contains(r.ignored, string(key)) || slices.Contains(identity, string(key)) {
		return nil, false
	}
	for _, re := range r.keys {
		if re.Match(key) {
			return appendBytes(nil, 1, mask), true
		}
	}
	return r.value(value)
}

// value returns the replacement of an AnyValue message.
func (r *redaction) value(value []byte) (masked []byte, yes bool) {
	v := otlpwire.ParseValue(value)
	switch v.Kind {
	case otlpwire.String:
		return r.string(v.Str)
	case otlpwire.Int, otlpwire.Double, otlpwire.Bool: // as backends show them
		var buf [32]byte
		return r.string(otlpattr.Append(buf[:0], value))
	case otlpwire.Binary:
		if _, yes := r.text(v.Str); yes {
			return appendBytes(nil, 1, mask), true
		}
	case otlpwire.Array:
		return r.list(otlpwire.Single(value, 5), 5, r.value)
	case otlpwire.Map:
		return r.list(otlpwire.Single(value, 6), 6, r.pair)
	}
	return nil, false
}

// string returns the AnyValue message of a text with the blocked parts masked.
func (r *redaction) string(text []byte) (masked []byte, yes bool) {
	if text, yes = r.text(text); !yes {
		return nil, false
	}
	return appendBytes(nil, 1, text), true
}

// list masks the elements (field 1) of an ArrayValue or KeyValueList, which is field num of the
// AnyValue.
func (r *redaction) list(msg []byte, num int, each func([]byte) ([]byte, bool)) (masked []byte, yes bool) {
	var out []byte
	for i := 0; i < len(msg); {
		f, next := otlpwire.NextField(msg, i)
		if f.Tag == otlpwire.Tag(1, otlpwire.Bytes) {
			if m, changed := each(f.Bytes); changed {
				out = appendBytes(out, 1, m)
				i, yes = next, true
				continue
			}
		}
		out = append(out, msg[i:next]...)
		i = next
	}
	if !yes {
		return nil, false
	}
	return appendBytes(nil, num, out), true
}

// text masks the blocked parts of a text.
func (r *redaction) text(text []byte) (masked []byte, yes bool) {
	for _, b := range r.values {
		if !bytes.Contains(text, b.literal) || !b.re.Match(text) {
			continue
		}
		if !yes && slices.ContainsFunc(r.allowed, func(re *regexp.Regexp) bool { return re.Match(text) }) {
			return nil, false
		}
		text, yes = b.re.ReplaceAllLiteral(text, mask), true
	}
	return text, yes
}
