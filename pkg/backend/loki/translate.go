package loki

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/otlptranslator"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpattr"
	"github.com/penstock/penstock/pkg/otlpwire"
)

const instanceID = "instance.id"

// batch turns OTLP requests into pushes, one after the other. It has no side effects: the time is an
// argument.
type batch struct {
	cfg      *Config
	instance string
	now      uint64 // nanoseconds: when the payload arrived, for records without a time
	names    map[string]string
	guards   map[string]*guard

	streams []stream
	index   map[string]int
	entries []byte // of all streams, encoded
	refused fault.Rejections
	record  int  // number of the next one
	large   bool // more than a writer should hold: its result is not used

	// Of the current resource and scope.
	labels   []pair
	byLevel  [len(levels) + 1]int // number of the stream + 1
	resource []byte               // metadata, encoded
	scope    []byte

	sent                int // streams
	body, message, part []byte
	text                []byte
}

type pair struct{ name, value string }

type stream struct {
	labels  string
	entries []entry
	sent    int
}

// entry is one line: its position in batch.entries.
type entry struct {
	at       uint64 // Unix nanoseconds
	from, to int
}

func newBatch(cfg *Config) *batch {
	return &batch{cfg: cfg, names: make(map[string]string), guards: make(map[string]*guard), index: make(map[string]int)}
}

func (b *batch) reset(instance string, now time.Time) {
	b.instance, b.now = instance, uint64(now.UnixNano())
	clear(b.index)
	b.streams, b.entries, b.refused, b.record, b.large, b.sent = b.streams[:0], b.entries[:0], b.refused[:0], 0, false, 0
}

// maxNames bounds the cache of names over all requests, and maxName the length of each in bytes; Loki
// accepts no longer label.
const (
	maxNames = 4096
	maxName  = 1024
)

// maxEntries is how many bytes the entries of one payload may have, and maxEntry each of them: the
// attributes of a resource are repeated on every line, and a name in everything nested in it.
const (
	maxEntries = 64 << 20
	maxEntry   = 4 << 20

	// maxShared is how much metadata a resource and a scope may add to each line; Loki accepts 64 KiB
	// by default.
	maxShared = 256 << 10
)

// name turns an attribute's key into a label name, as Loki does; a key that cannot become one is called
// unnamed.
func (b *batch) name(key []byte) string {
	if n, ok := b.names[string(key)]; ok {
		return n
	}
	namer := otlptranslator.LabelNamer{}
	n, err := namer.Build(string(key))
	if err != nil {
		n = "unnamed"
	}
	if len(b.names) >= maxNames {
		clear(b.names)
	}
	n = n[:min(len(n), maxName)]
	if len(key) <= maxName {
		b.names[string(key)] = n
	}
	return n
}

// add translates an OTLP request, which must be valid.
func (b *batch) add(payload []byte) {
	for r := range otlpwire.Resources(payload) {
		b.setResource(r.Resource())
		for s := range r.Scopes() {
			b.setScope(s.Scope())
			for item := range s.Items() {
				if b.large = b.large || len(b.entries) > maxEntries; b.large {
					return
				}
				b.add1(item)
				b.record++
			}
		}
	}
}

func (b *batch) setResource(resource []byte) {
	b.labels, b.resource = b.labels[:0], b.resource[:0]
	clear(b.byLevel[:])
	var theirs map[string]bool // other spellings, and whether the resource has them
	otlpwire.EachResourceAttribute(resource, func(key, value []byte) {
		switch {
		case string(key) == instanceID:
		case string(key) == levelLabel: // the label is the record's level
			b.resource = b.metadata(b.resource, levelLabel, value)
		case slices.Contains(b.cfg.Labels, string(key)):
			b.label(b.name(key), value)
		default:
			if other := otlpattr.OtherSpelling(key); other != "" && slices.Contains(b.cfg.Labels, other) {
				own, asked := theirs[other]
				if !asked {
					_, own = otlpwire.ResourceAttribute(resource, other)
					theirs = map[string]bool{other: own}
				}
				if !own {
					b.label(b.name([]byte(other)), value)
				}
			}
			b.resource = b.metadata(b.resource, b.name(key), value)
		}
	})
	if slices.Contains(b.cfg.Labels, instanceID) {
		b.labels = slices.DeleteFunc(b.labels, func(p pair) bool { return p.name == "instance_id" })
		b.labels = append(b.labels, pair{"instance_id", b.instance}) // from the subject
	} else {
		b.resource = b.pair(b.resource, "instance_id", []byte(b.instance))
	}
	if !slices.ContainsFunc(b.labels, func(p pair) bool { return p.name == "service_name" }) {
		b.labels = append(b.labels, pair{"service_name", "unknown_service"})
	}
}

// label adds a label; of several with the same name the first counts, as in Loki.
func (b *batch) label(name string, value []byte) {
	b.text = otlpattr.Append(b.text[:0], value)
	if len(b.text) > 0 && !slices.ContainsFunc(b.labels, func(p pair) bool { return p.name == name }) {
		b.labels = append(b.labels, pair{name, string(b.text)})
	}
}

func (b *batch) setScope(scope []byte) {
	b.scope = b.scope[:0]
	otlpwire.EachScopeAttribute(scope, func(key, value []byte) { b.scope = b.metadata(b.scope, b.name(key), value) })
	for i := 0; i < len(scope); {
		var f otlpwire.Field
		switch f, i = otlpwire.NextField(scope, i); f.Tag {
		case 1<<3 | otlpwire.Bytes:
			b.scope = b.pair(b.scope, "scope_name", f.Bytes)
		case 2<<3 | otlpwire.Bytes:
			b.scope = b.pair(b.scope, "scope_version", f.Bytes)
		case 4<<3 | otlpwire.Varint:
			b.scope = b.number(b.scope, "scope_dropped_attributes_count", f.Bits)
		}
	}
}

// pair appends a pair of structured metadata; nothing if it has no value.
func (b *batch) pair(dst []byte, name string, value []byte) []byte {
	if len(value) == 0 {
		return dst
	}
	size := 2 + protowire.SizeBytes(len(name)) + protowire.SizeBytes(len(value))
	dst = protowire.AppendVarint(append(dst, 3<<3|byte(protowire.BytesType)), uint64(size))
	dst = protowire.AppendString(append(dst, 1<<3|byte(protowire.BytesType)), name)
	return protowire.AppendBytes(append(dst, 2<<3|byte(protowire.BytesType)), value)
}

func (b *batch) number(dst []byte, name string, v uint64) []byte {
	if v == 0 {
		return dst
	}
	b.text = strconv.AppendUint(b.text[:0], v, 10)
	return b.pair(dst, name, b.text)
}

// metadata appends an attribute; a map as one pair for each of its values, as Loki does.
func (b *batch) metadata(dst []byte, name string, value []byte) []byte {
	v := otlpwire.ParseValue(value)
	switch v.Kind {
	case otlpwire.String:
		return b.pair(dst, name, v.Str)
	case otlpwire.Map:
		for i := 0; i < len(v.Str) && len(dst) <= maxEntry; {
			var f otlpwire.Field
			if f, i = otlpwire.NextField(v.Str, i); f.Tag == 1<<3|otlpwire.Bytes {
				key, inner := otlpwire.Attribute(f.Bytes)
				dst = b.metadata(dst, b.name([]byte(name+"_"+string(key))), inner)
			}
		}
		return dst
	}
	b.text = otlpattr.Append(b.text[:0], value)
	return b.pair(dst, name, b.text)
}

// add1 adds one LogRecord message.
func (b *batch) add1(rec []byte) {
	var r record
	r.read(rec)
	if len(b.resource)+len(b.scope) > maxShared {
		b.refused.Add(ledger.DeadTooLarge, errShared, b.record)
		return
	}
	n, ok := b.stream(level(r.number, r.severity, r.body, r.eachAttribute))
	if !ok {
		return
	}
	at := r.at
	if at == 0 {
		at = cmp.Or(r.observed, b.now)
	}
	b.message = b.appendEntry(b.message[:0], &r, at)
	if len(b.message) > maxEntry {
		b.refused.Add(ledger.DeadTooLarge, errEntry, b.record)
		return
	}
	s := &b.streams[n]
	from := len(b.entries)
	b.entries = appendBytes(b.entries, 2, b.message)
	s.entries = append(s.entries, entry{at, from, len(b.entries)})
}

// record has the fields of a LogRecord message.
type record struct {
	at, observed           uint64
	number, dropped, flags uint64
	severity, event        []byte
	body, trace, span      []byte

	attributes []byte // part of the message: from the first attribute to the last
}

func (r *record) read(rec []byte) {
	first, end := -1, 0
	for i := 0; i < len(rec); {
		was := i
		var f otlpwire.Field
		switch f, i = otlpwire.NextField(rec, i); f.Tag {
		case 1<<3 | otlpwire.Fixed64:
			r.at = f.Bits
		case 11<<3 | otlpwire.Fixed64:
			r.observed = f.Bits
		case 2<<3 | otlpwire.Varint:
			r.number = f.Bits
		case 3<<3 | otlpwire.Bytes:
			r.severity = f.Bytes
		case 5<<3 | otlpwire.Bytes:
			r.body = f.Bytes
		case 6<<3 | otlpwire.Bytes:
			if first < 0 {
				first = was
			}
			end = i
		case 7<<3 | otlpwire.Varint:
			r.dropped = f.Bits
		case 8<<3 | otlpwire.Fixed32:
			r.flags = f.Bits
		case 9<<3 | otlpwire.Bytes:
			r.trace = f.Bytes
		case 10<<3 | otlpwire.Bytes:
			r.span = f.Bytes
		case 12<<3 | otlpwire.Bytes:
			r.event = f.Bytes
		}
	}
	r.attributes = rec[max(first, 0):end]
}

// eachAttribute calls visit with the record's attributes.
func (r *record) eachAttribute(visit func(key, value []byte)) {
	for i := 0; i < len(r.attributes); {
		var f otlpwire.Field
		if f, i = otlpwire.NextField(r.attributes, i); f.Tag == 6<<3|otlpwire.Bytes {
			visit(otlpwire.Attribute(f.Bytes))
		}
	}
}

// appendEntry appends a record as Loki has it: its time, its line, and everything else as structured
// metadata.
func (b *batch) appendEntry(m []byte, r *record, at uint64) []byte {
	b.part = appendNumber(appendNumber(b.part[:0], 1, at/1e9), 2, at%1e9)
	m = appendBytes(m, 1, b.part)
	if v := otlpwire.ParseValue(r.body); v.Kind == otlpwire.String {
		m = appendBytes(m, 2, v.Str)
	} else {
		b.text = otlpattr.Append(b.text[:0], r.body)
		m = appendBytes(m, 2, b.text)
	}
	r.eachAttribute(func(key, value []byte) { m = b.metadata(m, b.name(key), value) })
	if r.at != 0 {
		m = b.number(m, "observed_timestamp", r.observed)
	}
	if r.number != 0 {
		b.text = strconv.AppendInt(b.text[:0], int64(int32(r.number)), 10)
		m = b.pair(m, "severity_number", b.text)
	}
	m = b.pair(m, "severity_text", r.severity)
	m = b.number(m, "dropped_attributes_count", r.dropped)
	m = b.number(m, "flags", r.flags)
	m = b.id(m, "trace_id", r.trace)
	m = b.id(m, "span_id", r.span)
	m = b.pair(m, "event_name", r.event)
	return append(append(m, b.resource...), b.scope...)
}

func (b *batch) id(dst []byte, name string, id []byte) []byte {
	for _, c := range id {
		if c != 0 {
			b.text = hex.AppendEncode(b.text[:0], id)
			return b.pair(dst, name, b.text)
		}
	}
	return dst
}

// stream returns the number of the stream of the current resource and a level. ok is false if the
// instance has too many.
func (b *batch) stream(level int) (n int, ok bool) {
	if !slices.Contains(b.cfg.Labels, levelLabel) {
		level = 0
	}
	if n := b.byLevel[level]; n > 0 {
		return n - 1, true
	}
	own := b.labels
	if slices.Contains(b.cfg.Labels, levelLabel) {
		own = append(slices.Clone(b.labels), pair{levelLabel, levelName(level)})
	}
	labels := labelString(own)
	n, have := b.index[labels]
	if !have {
		if err := b.admit(labels); err != nil {
			b.refused.Add(ledger.DeadCardinality, err, b.record)
			return 0, false
		}
		n = len(b.streams)
		if n < cap(b.streams) { // reuse its memory for entries
			b.streams = b.streams[:n+1]
			b.streams[n] = stream{labels: labels, entries: b.streams[n].entries[:0]}
		} else {
			b.streams = append(b.streams, stream{labels: labels})
		}
		b.index[labels] = n
	}
	b.byLevel[level] = n + 1
	return n, true
}

// labelString writes labels in Loki's selector syntax, in the order of names.
func labelString(ls []pair) string {
	slices.SortFunc(ls, func(a, b pair) int { return cmp.Compare(a.name, b.name) })
	var sb strings.Builder
	sb.WriteByte('{')
	for i, l := range ls {
		if i > 0 {
			sb.WriteString(", ")
		}
		sb.WriteString(l.name)
		sb.WriteByte('=')
		sb.WriteString(strconv.Quote(l.value))
	}
	sb.WriteByte('}')
	return sb.String()
}

// maxRequest is after how many bytes a push is closed: Loki accepts at most a tenant's burst at once,
// 6 MB by default, and answers a larger one with a retryable code for ever.
const maxRequest = 1 << 20

// request returns the next logproto.PushRequest: streams = 1 {labels = 1, entries = 2
// {timestamp = 1 {seconds = 1, nanos = 2}, line = 2, structuredMetadata = 3 {name = 1,
// value = 2}}}; nil when all entries have been written. Entries of a stream are in the
// order of time.
func (b *batch) request() []byte {
	if b.sent == len(b.streams) {
		return nil
	}
	b.body = b.body[:0]
	for b.sent < len(b.streams) && len(b.body) < maxRequest {
		s := &b.streams[b.sent]
		if s.sent == 0 {
			slices.SortStableFunc(s.entries, func(x, y entry) int { return cmp.Compare(x.at, y.at) })
		}
		b.message = appendBytes(b.message[:0], 1, []byte(s.labels))
		for from := s.sent; s.sent < len(s.entries) && (s.sent == from || len(b.body)+len(b.message) < maxRequest); s.sent++ {
			e := s.entries[s.sent]
			b.message = append(b.message, b.entries[e.from:e.to]...)
		}
		b.body = appendBytes(b.body, 1, b.message)
		if s.sent == len(s.entries) {
			b.sent++
		}
	}
	return b.body
}

func appendBytes(dst []byte, num protowire.Number, v []byte) []byte {
	return protowire.AppendBytes(append(dst, byte(num<<3)|byte(protowire.BytesType)), v)
}

func appendNumber(dst []byte, num protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(append(dst, byte(num<<3)|byte(protowire.VarintType)), v)
}

var errShared = fmt.Errorf("a resource and scope with more than %d bytes of metadata for each line", maxShared)

var errEntry = fmt.Errorf("a record with more than %d bytes of line and metadata", maxEntry)

var errStreams = errors.New("too many streams")

// guard counts the streams of one instance in this hour.
type guard struct {
	hour    uint64
	streams map[uint64]struct{}
}

const hourNanos = 3600e9

var seed = maphash.MakeSeed()

// admit refuses a new stream if the instance has too many.
func (b *batch) admit(labels string) error {
	most := b.cfg.Limits.Streams
	if most == 0 {
		return nil
	}
	g := b.guards[b.instance]
	if g == nil {
		g = &guard{streams: make(map[uint64]struct{})}
		b.guards[b.instance] = g
	}
	if hour := b.now / hourNanos; hour > g.hour { // the time comes from the sender, and may jump back and forth
		g.hour = hour
		clear(g.streams)
	}
	hash := maphash.String(seed, labels)
	if _, have := g.streams[hash]; !have && len(g.streams) >= most {
		return fmt.Errorf("%w of instance %s: more than %d in an hour (loki.limits.streams_per_instance)", errStreams, b.instance, most)
	}
	g.streams[hash] = struct{}{}
	return nil
}
