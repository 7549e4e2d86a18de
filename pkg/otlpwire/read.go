package otlpwire

import (
	"encoding/binary"
	"iter"
	"math"
)

// TraceID identifies a trace.
type TraceID [16]byte

// SpanID identifies a span within its trace.
type SpanID [8]byte

// Resources iterates over the resources of a payload with their content: each a
// ResourceSpans, ResourceMetrics or ResourceLogs message. Like all iterators here
// it stops at the first malformed byte.
//
//	for r := range otlpwire.Resources(payload) {
//		name, _ := otlpwire.ResourceAttribute(r.Resource(), "service.name")
//		for s := range r.Scopes() {
//			for item := range s.Items() { // a Span, Metric or LogRecord message
func Resources(payload []byte) iter.Seq[Resource] {
	return func(yield func(Resource) bool) {
		each(payload, 1, func(r []byte) bool { return yield(Resource(r)) })
	}
}

// Items iterates over the spans, metrics or log records of a payload.
func Items(payload []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		each(payload, 1, func(r []byte) bool {
			return each(r, 2, func(s []byte) bool { return each(s, 2, yield) })
		})
	}
}

// Resource is a resource with its scopes.
type Resource []byte

// Resource returns the Resource message, nil if there is none.
func (r Resource) Resource() []byte { return single(r, 1) }

// Scopes iterates over the scopes: each a ScopeSpans, ScopeMetrics or ScopeLogs
// message.
func (r Resource) Scopes() iter.Seq[Scope] {
	return func(yield func(Scope) bool) {
		each(r, 2, func(s []byte) bool { return yield(Scope(s)) })
	}
}

// Scope is a scope with its items.
type Scope []byte

// Scope returns the InstrumentationScope message, nil if there is none.
func (s Scope) Scope() []byte { return single(s, 1) }

// Items iterates over the Span, Metric or LogRecord messages.
func (s Scope) Items() iter.Seq[[]byte] {
	return func(yield func([]byte) bool) { each(s, 2, yield) }
}

// each calls visit for the content of every field num of msg, which holds
// messages, until it returns false; it returns false then, too.
func each(msg []byte, num int, visit func([]byte) bool) bool {
	for i := 0; i < len(msg); {
		got, typ, value, end := int(msg[i]>>3), bytesType, i+2, shortField(msg, i)
		if end == 0 {
			if got, typ, value, end = nextField(msg, i); end < 0 {
				return true
			}
		}
		if i = end; got == num && typ == bytesType && !visit(msg[value:end]) {
			return false
		}
	}
	return true
}

// single returns the content of the message field num of msg. It allocates only
// when the field is repeated, whose occurrences protobuf merges.
func single(msg []byte, num int) (content []byte) {
	n, size := 0, 0
	for i := 0; i < len(msg); {
		got, typ, value, end := nextField(msg, i)
		if end < 0 {
			break
		}
		if i = end; got == num && typ == bytesType {
			n, size, content = n+1, size+end-value, msg[value:end]
		}
	}
	if n < 2 {
		return content
	}
	content = make([]byte, 0, size)
	for i := 0; i < len(msg); {
		got, typ, value, end := nextField(msg, i)
		if end < 0 {
			break
		}
		if i = end; got == num && typ == bytesType {
			content = append(content, msg[value:end]...)
		}
	}
	return content
}

// Span is the part of a span that a sampler reads. The slices are parts of the payload.
type Span struct {
	TraceID    TraceID
	SpanID     SpanID
	Root       bool // no parent
	Kind       int32
	Status     int32 // 0 unset, 1 ok, 2 error
	Flags      uint32
	Start, End uint64 // Unix nanoseconds
	TraceState []byte
	Name       []byte

	// attrs and events are the parts of the span from the first such field to the last; other
	// fields may be between them.
	attrs, events []byte
}

// Attribute looks up an attribute of the span.
func (sp *Span) Attribute(key string) (Value, bool) { return find(sp.attrs, spanAttributes, key) }

// Events iterates over the bytes of the Span.Event messages.
func (sp *Span) Events() iter.Seq[[]byte] {
	return func(yield func([]byte) bool) { each(sp.events, spanEvents, yield) }
}

// The numbers of the fields that are read by name.
const (
	resourceAttributes = 1
	scopeAttributes    = 3
	eventAttributes    = 3
	spanTraceState     = 3
	spanAttributes     = 9
	spanEvents         = 11

	keyTag       = 1<<3 | byte(bytesType)
	valueTag     = 2<<3 | byte(bytesType)
	attributeTag = spanAttributes<<3 | byte(bytesType)
	kindTag      = 6<<3 | byte(varintType)
	startTag     = 7<<3 | byte(fixed64Type)
	endTag       = 8<<3 | byte(fixed64Type)
	flagsTag     = (16<<3|byte(fixed32Type))&0x7f | 0x80 // field 16 has a tag of two bytes
	flagsTag2    = 1
)

// Parse reads a Span message in one pass. It skips what it does not need; of a repeated field the
// last occurrence counts.
func (sp *Span) Parse(item []byte) { //nolint:gocyclo // a table: one case a field, and the forms that most spans have
	*sp = Span{}
	sp.Root = true
	var attrs, events stretch
	for i := 0; i < len(item); {
		num, typ, value, end := int(item[i]>>3), bytesType, i+2, shortField(item, i)
		if end == 0 {
			// Kind and times, which every span has, are 20 bytes that need no further check.
			if item[i] == kindTag && i+20 <= len(item) && item[i+1] < 0x80 && item[i+2] == startTag && item[i+11] == endTag {
				sp.Kind = int32(item[i+1])
				sp.Start, sp.End = binary.LittleEndian.Uint64(item[i+3:]), binary.LittleEndian.Uint64(item[i+12:])
				i += 20
				continue
			}
			if item[i] == flagsTag && i+6 <= len(item) && item[i+1] == flagsTag2 {
				sp.Flags = binary.LittleEndian.Uint32(item[i+2:])
				i += 6
				continue
			}
			if num, typ, value, end = nextField(item, i); end < 0 {
				break
			}
		}
		switch {
		case typ == bytesType:
			switch num {
			case spanAttributes:
				for end < len(item) && item[end] == attributeTag {
					next := shortField(item, end)
					if next == 0 {
						break
					}
					end = next
				}
				attrs.add(i, end)
			case spanEvents:
				events.add(i, end)
			case 1:
				if end-value == len(sp.TraceID) {
					sp.TraceID = TraceID(item[value:])
				}
			case 2:
				if end-value == len(sp.SpanID) {
					sp.SpanID = SpanID(item[value:])
				}
			case 3:
				sp.TraceState = item[value:end]
			case 4:
				sp.Root = !kindSpanID.validID(item[value:end])
			case 5:
				sp.Name = item[value:end]
			case 15:
				sp.Status = statusCode(item[value:end], sp.Status)
			}
		case num == 7 && typ == fixed64Type:
			sp.Start = binary.LittleEndian.Uint64(item[value:])
		case num == 8 && typ == fixed64Type:
			sp.End = binary.LittleEndian.Uint64(item[value:])
		case num == 6 && typ == varintType:
			sp.Kind = int32(varintAt(item, value))
		case num == 16 && typ == fixed32Type:
			sp.Flags = binary.LittleEndian.Uint32(item[value:])
		}
		i = end
	}
	sp.attrs, sp.events = item[attrs.first:attrs.end], item[events.first:events.end]
}

// stretch is the part of a message from the first of some fields to the last.
type stretch struct{ first, end int }

func (s *stretch) add(i, end int) {
	if s.end == 0 {
		s.first = i
	}
	s.end = end
}

// statusCode returns the code of a Status message, or before if it has none: the occurrences of a
// repeated message field are merged.
func statusCode(status []byte, before int32) int32 {
	for i := 0; i < len(status); {
		num, typ, value, end := nextField(status, i)
		if end < 0 {
			return before
		}
		if i = end; num == 3 && typ == varintType {
			before = int32(varintAt(status, value))
		}
	}
	return before
}

// SpanTrace returns the trace ID of a Span message: what a router needs, at the
// cost of one field. ok is false when the ID is not valid. A span with two trace
// IDs is invalid, see [Scan].
func SpanTrace(item []byte) (id TraceID, ok bool) {
	for i := 0; i < len(item); {
		num, typ, value, end := nextField(item, i)
		if end < 0 {
			return id, false
		}
		if i = end; num == 1 && typ == bytesType {
			if id, ok := item[value:end], kindTraceID.validID(item[value:end]); ok {
				return TraceID(id), true
			}
			return id, false
		}
	}
	return id, false
}

// ValueKind is the type of an attribute's value.
type ValueKind uint8

// The kinds of values. None is an AnyValue with nothing set.
const (
	None ValueKind = iota
	String
	Bool
	Int
	Double
	Array
	Map
	Binary
	Other // used only by profiles
)

// Value is an attribute's value. Str is a part of the payload: the text, the bytes, or
// the ArrayValue or KeyValueList message, whose repeated field 1 has the elements.
type Value struct {
	Kind ValueKind
	bits uint64
	Str  []byte
}

// Bool returns a value of kind Bool.
func (v Value) Bool() bool { return v.bits != 0 }

// Int returns a value of kind Int.
func (v Value) Int() int64 { return int64(v.bits) }

// Double returns a value of kind Double.
func (v Value) Double() float64 { return math.Float64frombits(v.bits) }

// ResourceAttribute looks up an attribute of a Resource message.
func ResourceAttribute(resource []byte, key string) (Value, bool) {
	return find(resource, resourceAttributes, key)
}

// ScopeAttribute looks up an attribute of an InstrumentationScope message.
func ScopeAttribute(scope []byte, key string) (Value, bool) {
	return find(scope, scopeAttributes, key)
}

// EventAttribute looks up an attribute of a Span.Event message.
func EventAttribute(event []byte, key string) (Value, bool) {
	return find(event, eventAttributes, key)
}

// EachAttribute calls visit with the key and the value, for [ParseValue], of every attribute of the
// span, in order.
func (sp *Span) EachAttribute(visit func(key, value []byte)) {
	eachAttribute(sp.attrs, spanAttributes, visit)
}

// EachResourceAttribute is [Span.EachAttribute] of a Resource message.
func EachResourceAttribute(resource []byte, visit func(key, value []byte)) {
	eachAttribute(resource, resourceAttributes, visit)
}

// EachScopeAttribute is [Span.EachAttribute] of an InstrumentationScope message.
func EachScopeAttribute(scope []byte, visit func(key, value []byte)) {
	eachAttribute(scope, scopeAttributes, visit)
}

func eachAttribute(msg []byte, num int, visit func(key, value []byte)) {
	each(msg, num, func(kv []byte) bool {
		visit(Attribute(kv))
		return true
	})
}

// Attribute returns the key and the AnyValue message, for [ParseValue], of a KeyValue message.
func Attribute(kv []byte) (key, value []byte) {
	// What encoders write: the key, then the value and nothing else.
	if n := shortField(kv, 0); n != 0 && kv[0] == keyTag {
		if n < len(kv) && kv[n] == valueTag && shortField(kv, n) == len(kv) {
			return kv[2:n], kv[n+2:]
		}
	}
	return attributeKey(kv), single(kv, 2)
}

// find looks up a key among the attributes of msg, which are its field num. If the key occurs twice,
// the last one counts.
func find(msg []byte, num int, key string) (v Value, ok bool) { //nolint:gocyclo // with a function for the form that most attributes have it is 1.4 times slower
	var val []byte
	for i := 0; i < len(msg); {
		got, typ, value, end := int(msg[i]>>3), bytesType, i+2, shortField(msg, i)
		if end == 0 {
			if got, typ, value, end = nextField(msg, i); end < 0 {
				break
			}
		}
		i = end
		if got != num || typ != bytesType {
			continue
		}
		// What encoders write: the key, then the value and nothing else.
		if value+1 < end && msg[value] == keyTag && msg[value+1] < 0x80 {
			at := value + 2 + int(msg[value+1])
			if at+1 < end && msg[at] == valueTag && msg[at+1] < 0x80 && at+2+int(msg[at+1]) == end {
				if at-value-2 == len(key) && string(msg[value+2:at]) == key {
					val, ok = msg[at+2:end], true
				}
				continue
			}
		}
		if kv := msg[value:end]; string(attributeKey(kv)) == key {
			val, ok = single(kv, 2), true
		}
	}
	if ok {
		v = ParseValue(val)
	}
	return v, ok
}

// ParseValue reads an AnyValue message.
func ParseValue(b []byte) (v Value) { //nolint:gocyclo // a table: one case a field
	if shortField(b, 0) == len(b) && len(b) > 0 && b[0] == 0x0a {
		return Value{Kind: String, Str: b[2:]}
	}
	for i := 0; i < len(b); {
		num, typ, value, end := nextField(b, i)
		if end < 0 {
			return v
		}
		i = end
		switch {
		case num == 1 && typ == bytesType:
			v = Value{Kind: String, Str: b[value:end]}
		case num == 2 && typ == varintType:
			v = Value{Kind: Bool, bits: min(varintAt(b, value), 1)}
		case num == 3 && typ == varintType:
			v = Value{Kind: Int, bits: varintAt(b, value)}
		case num == 4 && typ == fixed64Type:
			v = Value{Kind: Double, bits: binary.LittleEndian.Uint64(b[value:])}
		case num >= 5 && num <= 7 && typ == bytesType:
			v = Value{Kind: Array + ValueKind(num-5), Str: b[value:end]}
		case num == 8:
			v = Value{Kind: Other}
		}
	}
	return v
}
