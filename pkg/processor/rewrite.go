package processor

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"math"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/otlpattr"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// node describes the parts of a message that rules can change: its attributes, its body, and nested
// messages.
type node struct {
	attributes, body int   // field numbers, 0 for none
	texts            []int // field numbers of further texts that redaction searches
	below            map[int]*node
	resource         bool // its attributes are those of a resource
	item             bool // a span, log record or data point
	named            int  // the field with the name by which a filter selects spans and metrics
	drops            bool
}

// payloads are the messages of requests, by signal.
var payloads = [...]*node{
	otlpwire.Traces: request(&node{attributes: 9, texts: []int{3, 5}, item: true, drops: true, named: 5, below: map[int]*node{ // trace state, name
		11: {attributes: 3, texts: []int{2}}, // events: name
		13: {attributes: 4, texts: []int{3}}, // links: trace state
		15: {texts: []int{2}},                // status: message
	}}),
	otlpwire.Metrics: request(&node{attributes: 12, texts: []int{1, 2}, drops: true, named: 1, below: map[int]*node{ // name, description
		5: points(7, 5), 7: points(7, 5), 9: points(9, 8), 10: points(1, 11), 11: points(7, 0),
	}}),
	otlpwire.Logs: request(&node{attributes: 6, body: 5, texts: []int{3, 12}, item: true, drops: true}), // severity text, event name
}

// request is resources with scopes with items.
func request(item *node) *node {
	scope := &node{below: map[int]*node{1: {attributes: 3, texts: []int{1, 2}}, 2: item}} // of the scope name, version
	resource := &node{below: map[int]*node{1: {attributes: 1, resource: true}, 2: scope}}
	return &node{below: map[int]*node{1: resource}}
}

// points is the data of a metric: points with attributes and exemplars.
func points(attributes, exemplars int) *node {
	point := &node{attributes: attributes, item: true}
	if exemplars != 0 {
		point.below = map[int]*node{exemplars: {attributes: 7}}
	}
	return &node{below: map[int]*node{1: point}}
}

// Apply applies the rules. It returns the payload itself if none matches, and how many spans, log
// records or data points were dropped.
func (r *Rules) Apply(sig otlpwire.Signal, payload []byte) (out []byte, dropped int) {
	if r == nil || len(r.attributes) == 0 && len(r.resource) == 0 && r.redaction == nil && r.filter[sig] == (filter{}) {
		return payload, 0
	}
	w := rewriter{rules: r, sig: sig}
	out, _ = w.message(make([]byte, 0, len(payload)+len(payload)/8), payload, payloads[sig])
	if !w.changed {
		return payload, 0
	}
	if w.dropped {
		dropped = otlpwire.Count(sig, payload) - otlpwire.Count(sig, out)
	}
	return out, dropped
}

type rewriter struct {
	rules            *Rules
	sig              otlpwire.Signal
	changed, dropped bool

	resource []byte // of the current items
	name     []byte // of the current metric
	scratch  []byte // the last text
}

// message appends msg with the changes that rules make, and reports whether it is kept.
func (w *rewriter) message(dst, msg []byte, n *node) (out []byte, keep bool) {
	if n.drops {
		w.name = nil
		if n.named != 0 {
			w.name = field(msg, n.named)
		}
		if !w.meant(&w.rules.filter[w.sig], msg, n) {
			w.changed, w.dropped = true, true
			return dst, false
		}
	}
	if n == payloads[w.sig].below[1] {
		w.resource = otlpwire.Single(msg, 1)
	}
	if n.attributes != 0 {
		msg = w.act(msg, n)
	}
	for i := 0; i < len(msg); {
		f, next := otlpwire.NextField(msg, i)
		whole := msg[i:next]
		i = next
		num := f.Tag >> 3
		below := n.below[num]
		switch {
		case f.Tag&7 != otlpwire.Bytes:
			dst = append(dst, whole...)
		case below != nil:
			dst = w.nested(dst, f, func(dst []byte) ([]byte, bool) { return w.message(dst, f.Bytes, below) })
		default:
			if masked, yes := w.redact(n, num, f.Bytes); yes {
				w.changed = true
				dst = appendBytes(dst, num, masked)
			} else {
				dst = append(dst, whole...)
			}
		}
	}
	return dst, true
}

// redact returns the replacement of the content of a field.
func (w *rewriter) redact(n *node, num int, content []byte) (masked []byte, yes bool) {
	switch r := w.rules.redaction; {
	case r == nil:
	case num == n.attributes:
		return r.pair(content)
	case num == n.body:
		return r.value(content)
	case slices.Contains(n.texts, num):
		return r.text(content)
	}
	return nil, false
}

// nested appends a message field that write fills in; nothing if it is dropped.
func (w *rewriter) nested(dst []byte, f otlpwire.Field, write func([]byte) ([]byte, bool)) []byte {
	start := len(dst)
	dst = protowire.AppendVarint(dst, uint64(f.Tag))
	from := len(dst)
	// Room for the length as it was; usually its size does not change.
	room := protowire.SizeVarint(uint64(len(f.Bytes)))
	dst = append(dst, make([]byte, room)...)
	dst, keep := write(dst)
	if !keep {
		return dst[:start]
	}
	size := len(dst) - from - room
	if need := protowire.SizeVarint(uint64(size)); need != room {
		if need > room {
			dst = append(dst, make([]byte, need-room)...)
		}
		copy(dst[from+need:from+need+size], dst[from+room:from+room+size])
		dst = dst[:from+need+size]
	}
	protowire.AppendVarint(dst[:from], uint64(size))
	return dst
}

// field returns the content of the last occurrence of a text field.
func field(msg []byte, num int) (text []byte) {
	for i := 0; i < len(msg); {
		var f otlpwire.Field
		if f, i = otlpwire.NextField(msg, i); f.Tag == otlpwire.Tag(num, otlpwire.Bytes) {
			text = f.Bytes
		}
	}
	return text
}

// lookup returns the value of the last occurrence of an attribute of a message.
func lookup(msg []byte, num int, key string) (value []byte, ok bool) {
	for i := 0; i < len(msg); {
		var f otlpwire.Field
		if f, i = otlpwire.NextField(msg, i); f.Tag != otlpwire.Tag(num, otlpwire.Bytes) {
			continue
		}
		if k, v := otlpwire.Attribute(f.Bytes); string(k) == key {
			value, ok = v, true
		}
	}
	return value, ok
}

// matches reports whether an item, or a metric, is selected.
func (w *rewriter) matches(m *match, msg []byte, n *node) bool {
	return w.ofService(m) && w.named(m) && w.withBody(m, msg, n) && w.severe(m, msg) &&
		w.haveAll(m.resources, w.resource, 1) && w.haveAll(m.attributes, msg, n.attributes)
}

func (w *rewriter) ofService(m *match) bool {
	if m.services == nil {
		return true
	}
	v, _ := lookup(w.resource, 1, "service.name")
	return m.services(w.text(v))
}

// named reports whether the span or metric has one of the names, if there are any.
func (w *rewriter) named(m *match) bool {
	return m.names == nil || w.sig == m.of && m.names(w.name)
}

func (w *rewriter) withBody(m *match, msg []byte, n *node) bool {
	return m.bodies == nil || n.body != 0 && m.bodies(w.text(field(msg, n.body)))
}

func (w *rewriter) severe(m *match, msg []byte) bool {
	if m.severity == nil {
		return true
	}
	if w.sig != otlpwire.Logs {
		return false
	}
	if number := severityNumber(msg); number != 0 {
		return number >= m.severity.Min
	}
	return m.severity.MatchUndefined
}

// severityNumber is that of a log record, 0 for none.
func severityNumber(record []byte) (number int) {
	for i := 0; i < len(record); {
		var f otlpwire.Field
		if f, i = otlpwire.NextField(record, i); f.Tag == otlpwire.Tag(2, otlpwire.Varint) {
			number = int(f.Bits)
		}
	}
	return number
}

// haveAll reports whether the attributes in field num of msg, 0 for none, have all the pairs.
func (w *rewriter) haveAll(pairs []pair, msg []byte, num int) bool {
	for _, p := range pairs {
		if num == 0 {
			return false
		}
		if v, ok := lookup(msg, num, p.key); !ok || p.text != nil && !p.text(w.text(v)) {
			return false
		}
	}
	return true
}

// text returns the text of an attribute's value, until it is called again.
func (w *rewriter) text(value []byte) []byte {
	w.scratch = otlpattr.Append(w.scratch[:0], value)
	return w.scratch
}

// meant reports whether a rule applies to an item, or a metric.
func (w *rewriter) meant(f *filter, msg []byte, n *node) bool {
	return (f.include == nil || w.matches(f.include, msg, n)) && (f.exclude == nil || !w.matches(f.exclude, msg, n))
}

// act returns an item or resource after the actions that apply to it; msg itself if they change
// nothing.
func (w *rewriter) act(msg []byte, n *node) []byte {
	switch {
	case n.resource:
		msg = w.carryOut(w.rules.resource, msg, n)
	case n.item:
		for i := range w.rules.attributes {
			if rule := &w.rules.attributes[i]; w.meant(&rule.filter, msg, n) {
				msg = w.carryOut(rule.actions, msg, n)
			}
		}
	}
	return msg
}

func (w *rewriter) carryOut(actions []action, msg []byte, n *node) []byte {
	for i := range actions {
		msg = w.one(&actions[i], msg, n.attributes)
	}
	return msg
}

// one applies one action to the attributes in field num of msg.
func (w *rewriter) one(a *action, msg []byte, num int) []byte {
	value, ok := a.newValue(msg, num)
	if !ok {
		return msg
	}
	found, others := a.find(msg, num)
	if !a.wanted(found) {
		return msg
	}
	if !found && others >= otlpwire.MaxAttributes {
		return msg // with one more, backends would refuse it
	}
	out := a.rewrite(make([]byte, 0, len(msg)+len(a.key)+len(value)+16), msg, num, value)
	if !found {
		out = appendAttribute(out, num, []byte(a.key), value)
	}
	if !bytes.Equal(out, msg) {
		w.changed = true
	}
	return out
}

// newValue is what the action sets; there may be no attribute to take it from.
func (a *action) newValue(msg []byte, num int) (value []byte, ok bool) {
	if a.from == "" {
		return a.value, true
	}
	return lookup(msg, num, a.from)
}

// means reports whether the action is for an attribute.
func (a *action) means(kv []byte) bool {
	key, _ := otlpwire.Attribute(kv)
	if a.pattern != nil {
		return a.pattern.Match(key)
	}
	return string(key) == a.key
}

// find reports whether the action is for one of the attributes, and how many come before it.
func (a *action) find(msg []byte, num int) (found bool, before int) {
	for i := 0; i < len(msg); {
		var f otlpwire.Field
		if f, i = otlpwire.NextField(msg, i); f.Tag != otlpwire.Tag(num, otlpwire.Bytes) {
			continue
		}
		if a.means(f.Bytes) {
			return true, before
		}
		before++
	}
	return false, before
}

// wanted reports whether there is something to do, where an attribute it is for was found or not.
func (a *action) wanted(found bool) bool {
	switch a.do {
	case "insert":
		return !found
	case "upsert":
		return true
	}
	return found
}

// rewrite appends msg with the attributes changed that the action is for.
func (a *action) rewrite(out, msg []byte, num int, value []byte) []byte {
	for i := 0; i < len(msg); {
		f, next := otlpwire.NextField(msg, i)
		whole := msg[i:next]
		i = next
		if f.Tag != otlpwire.Tag(num, otlpwire.Bytes) || !a.means(f.Bytes) {
			out = append(out, whole...)
			continue
		}
		switch key, old := otlpwire.Attribute(f.Bytes); a.do {
		case "update", "upsert":
			out = appendAttribute(out, num, key, value)
		case "hash":
			out = appendAttribute(out, num, key, hash(old))
		}
	}
	return out
}

// hash returns the SHA-256 of a value as a text; for a number that of its eight bytes, as the
// collector's hash action does.
func hash(value []byte) []byte {
	v := otlpwire.ParseValue(value)
	var text []byte
	switch v.Kind {
	case otlpwire.Int:
		text = binary.LittleEndian.AppendUint64(nil, uint64(v.Int()))
	case otlpwire.Double:
		text = binary.LittleEndian.AppendUint64(nil, math.Float64bits(v.Double()))
	case otlpwire.Bool:
		if text = []byte{0}; v.Bool() {
			text[0] = 1
		}
	default:
		text = otlpattr.Append(nil, value)
	}
	sum := sha256.Sum256(text)
	return appendBytes(nil, 1, hex.AppendEncode(nil, sum[:]))
}

func appendBytes(dst []byte, num int, b []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(dst, protowire.Number(num), protowire.BytesType), b)
}

// appendAttribute appends a KeyValue with an AnyValue message as field num.
func appendAttribute(dst []byte, num int, key, value []byte) []byte {
	return appendBytes(dst, num, appendBytes(appendBytes(nil, 1, key), 2, value))
}

// anyValue returns the AnyValue message of a configured value.
func anyValue(v any) (msg []byte, ok bool) {
	switch v := v.(type) {
	case string:
		return appendBytes(nil, 1, []byte(v)), true
	case bool:
		return protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.VarintType), protowire.EncodeBool(v)), true
	case int:
		return protowire.AppendVarint(protowire.AppendTag(nil, 3, protowire.VarintType), uint64(v)), true
	case float64:
		return protowire.AppendFixed64(protowire.AppendTag(nil, 4, protowire.Fixed64Type), math.Float64bits(v)), true
	}
	return nil, false
}
