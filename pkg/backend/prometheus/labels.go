package prometheus

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/prometheus/otlptranslator"

	"github.com/penstock/penstock/pkg/otlpattr"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// label is a pair of symbols. A weak one is replaced by an attribute of the same name.
type label struct {
	name, value uint32
	weak        bool
}

// maxNames bounds the cache of names over all requests, and maxName the length of each in bytes.
const (
	maxNames = 4096
	maxName  = 256
)

// names builds label and metric names by a strategy, and caches them.
type names struct {
	metric otlptranslator.MetricNamer
	label  otlptranslator.LabelNamer
	unit   otlptranslator.UnitNamer
	escape bool

	labels   map[string]string
	families map[string]family
}

// family is what the samples of a metric have in common.
type family struct {
	name string // empty: no valid name can be built
	unit string
	err  error
}

func newNames(strategy otlptranslator.TranslationStrategyOption) *names {
	escape := strategy.ShouldEscape()
	return &names{
		metric: otlptranslator.NewMetricNamer("", strategy),
		// Prometheus's defaults of otlp.label_name_underscore_sanitization and
		// otlp.label_name_preserve_multiple_underscores.
		label:    otlptranslator.LabelNamer{UTF8Allowed: !escape, UnderscoreLabelSanitization: true, PreserveMultipleUnderscores: true}, //nolint:staticcheck // SA1019: Prometheus 3 still has it, and series must have the same names
		unit:     otlptranslator.UnitNamer{},
		escape:   escape,
		labels:   make(map[string]string),
		families: make(map[string]family),
	}
}

// labelName returns the name of the label that an attribute becomes.
func (n *names) labelName(key []byte) (string, error) {
	if name, ok := n.labels[string(key)]; ok {
		return name, nil
	}
	name, err := n.label.Build(string(key))
	if err != nil {
		return "", err
	}
	if strings.HasPrefix(name, "__") {
		name = "key" + name // reserved for Prometheus
	}
	if len(n.labels) >= maxNames {
		clear(n.labels)
	}
	if len(key) <= maxName {
		n.labels[string(key)] = name
	}
	return name, nil
}

// family returns the names of a metric; id is a scratch buffer.
func (n *names) family(m *otlpwire.Metric, id []byte) (family, []byte) {
	kind := byte(m.Kind)
	if m.Monotonic {
		kind |= 0x80
	}
	id = append(append(append(append(id[:0], kind), m.Unit...), 0), m.Name...)
	f, ok := n.families[string(id)]
	if !ok {
		f.name, f.err = n.metric.Build(otlptranslator.Metric{Name: string(m.Name), Unit: string(m.Unit), Type: metricType(m)})
		f.unit = n.unit.Build(string(m.Unit))
		if len(n.families) >= maxNames {
			clear(n.families)
		}
		if len(id) <= maxName {
			n.families[string(id)] = f
		}
	}
	return f, id
}

func metricType(m *otlpwire.Metric) otlptranslator.MetricType {
	switch m.Kind {
	case otlpwire.Gauge:
		return otlptranslator.MetricTypeGauge
	case otlpwire.Sum:
		if m.Monotonic {
			return otlptranslator.MetricTypeMonotonicCounter
		}
		return otlptranslator.MetricTypeNonMonotonicCounter
	case otlpwire.Histogram:
		return otlptranslator.MetricTypeHistogram
	case otlpwire.ExponentialHistogram:
		return otlptranslator.MetricTypeExponentialHistogram
	case otlpwire.Summary:
		return otlptranslator.MetricTypeSummary
	}
	return otlptranslator.MetricTypeUnknown
}

// The names of the labels that penstock itself writes.
const (
	nameLabel     = "__name__"
	jobLabel      = "job"
	instanceLabel = "instance"
	leLabel       = "le"
	quantileLabel = "quantile"
)

// identifying are the resource attributes from which job and instance are built.
var identifying = []string{"service.namespace", "service.name", "service.instance.id"}

// attribute is a current attribute: slices of the payload.
type attribute struct{ key, value []byte }

// byKey sorts attributes, as Prometheus does before it merges those whose names become equal.
func byKey(as []attribute) {
	cmp := func(a, b attribute) int { return bytes.Compare(a.key, b.key) }
	if !slices.IsSortedFunc(as, cmp) {
		slices.SortStableFunc(as, cmp)
	}
}

// text returns an attribute's value, in t.scratch if it is not a string.
func (t *translation) text(value []byte) []byte {
	if v := otlpwire.ParseValue(value); v.Kind == otlpwire.String {
		return v.Str
	}
	t.scratch = otlpattr.Append(t.scratch[:0], value)
	return t.scratch
}

// maxJoined is how long the joined value of a label may be before another attribute is added.
const maxJoined = 4096

// addAttributes appends the labels of attributes to ls, which has none yet. Those whose names become
// equal are joined with ';', in the order of their keys.
func (t *translation) addAttributes(ls []label, as []attribute, prefix string) ([]label, error) {
	byKey(as)
	for _, a := range as {
		if string(a.key) == nameLabel {
			continue
		}
		key := a.key
		if prefix != "" {
			key = append([]byte(prefix), key...)
		}
		name, err := t.names.labelName(key)
		if err != nil {
			return ls, err
		}
		n, v := t.symbols.addString(name), t.symbols.add(t.text(a.value))
		i := slices.IndexFunc(ls, func(l label) bool { return l.name == n })
		switch {
		case i < 0:
			ls = append(ls, label{name: n, value: v})
		case ls[i].value != 0 && t.names.escape:
			if len(t.symbols.get(ls[i].value)) > maxJoined {
				return ls, fmt.Errorf("attributes that become the label %s have more than %d bytes together", name, maxJoined)
			}
			joined := append(append([]byte(nil), t.symbols.get(ls[i].value)...), ';')
			ls[i].value = t.symbols.add(append(joined, t.symbols.get(v)...))
		default:
			ls[i].value = v
		}
	}
	return ls, nil
}

// set sets the value of a label in ls, which is unordered.
func set(ls []label, l label) []label {
	i := slices.IndexFunc(ls, func(have label) bool { return have.name == l.name })
	if i < 0 {
		return append(ls, l)
	}
	ls[i] = l
	return ls
}

// claim is set for a label that must be present: another one of its name is renamed to exported_….
func (t *translation) claim(ls []label, l label) []label {
	if i := slices.IndexFunc(ls, func(have label) bool { return have.name == l.name && have.value != 0 }); i >= 0 {
		ls[i].name = t.export(l.name, func(name uint32) bool {
			return slices.ContainsFunc(ls, func(have label) bool { return have.name == name })
		})
	}
	return set(ls, l)
}

// export returns the first free name with exported_ before it.
func (t *translation) export(name uint32, taken func(uint32) bool) uint32 {
	for text := string(t.symbols.get(name)); taken(name); {
		text = exported + text
		name = t.symbols.addString(text)
	}
	return name
}

// order sorts labels by name and leaves out empty ones.
func (t *translation) order(ls []label) []label {
	out := ls[:0]
	for _, l := range ls {
		if l.value != 0 {
			out = append(out, l)
		}
	}
	for i := 1; i < len(out); i++ { // few, and nearly sorted
		for j := i; j > 0 && t.before(out[j].name, out[j-1].name); j-- {
			out[j], out[j-1] = out[j-1], out[j]
		}
	}
	return out
}

func (t *translation) before(a, b uint32) bool {
	return bytes.Compare(t.symbols.get(a), t.symbols.get(b)) < 0
}

// exported is the prefix of a point's label whose name another label takes, as in Prometheus's scrapes.
const exported = "exported_"

// giveWay renames the labels of the current point that the resource's labels would overwrite, or a
// label that its series need themselves: no customer can forge instance_id, and no label is lost.
func (t *translation) giveWay() {
	moved := false
	for i := range t.own {
		if t.overwritten(t.own[i].name) {
			t.own[i].name, moved = t.export(t.own[i].name, func(name uint32) bool {
				return t.overwritten(name) || slices.ContainsFunc(t.own, func(l label) bool { return l.name == name })
			}), true
		}
	}
	if moved {
		t.own = t.order(t.own)
	}
}

// overwritten reports whether a label of the resource, or of the series, overrides one of the point.
func (t *translation) overwritten(name uint32) bool {
	return name == t.reserved || slices.ContainsFunc(t.resource, func(l label) bool { return l.name == name && !l.weak })
}

// merge merges the labels of a point and of its resource, both sorted, into t.labels. Weak ones of the
// resource are replaced.
func (t *translation) merge(point, resource []label) {
	out := t.labels[:0]
	for len(point) > 0 && len(resource) > 0 {
		p, r := point[0], resource[0]
		switch {
		case p.name == r.name:
			resource = resource[1:]
		case t.before(p.name, r.name):
			out, point = append(out, p), point[1:]
		default:
			out, resource = append(out, r), resource[1:]
		}
	}
	t.labels = append(append(out, point...), resource...)
}
