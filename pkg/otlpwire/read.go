package otlpwire

import (
	"encoding/binary"
	"math"

	"google.golang.org/protobuf/encoding/protowire"
)

// TraceID identifies a trace.
type TraceID [16]byte

// SpanID identifies a span within its trace.
type SpanID [8]byte

// Item is one span, metric or log record with the bytes of what it belongs to.
// The slices are parts of the payload, nil where there is none.
type Item struct {
	Resource []byte // a Resource message
	Scope    []byte // an InstrumentationScope message
	Bytes    []byte // a Span, Metric or LogRecord message
}

// Walk calls visit for every span, metric or log record of a payload, in order,
// until visit returns false. It stops at the first malformed byte.
func Walk(payload []byte, visit func(Item) bool) {
	for len(payload) > 0 {
		num, body, raw, err := nextField(payload)
		if err != nil {
			return
		}
		payload = payload[len(raw):]
		if num == 1 && body != nil && !walkResource(body, visit) {
			return
		}
	}
}

func walkResource(body []byte, visit func(Item) bool) bool {
	resource := single(body, 1)
	for len(body) > 0 {
		num, scope, raw, err := nextField(body)
		if err != nil {
			return false
		}
		body = body[len(raw):]
		if num != 2 || scope == nil {
			continue
		}
		it := Item{Resource: resource, Scope: single(scope, 1)}
		for len(scope) > 0 {
			num, item, raw, err := nextField(scope)
			if err != nil {
				return false
			}
			scope = scope[len(raw):]
			if num != 2 || item == nil {
				continue
			}
			it.Bytes = item
			if !visit(it) {
				return false
			}
		}
	}
	return true
}

// single returns the content of the message field num of msg. It allocates only
// when the field is repeated, whose occurrences protobuf merges.
func single(msg []byte, num protowire.Number) (content []byte) {
	n, size := 0, 0
	_ = eachField(msg, func(got protowire.Number, body, _ []byte) error {
		if got == num && body != nil {
			n, size, content = n+1, size+len(body), body
		}
		return nil
	})
	if n < 2 {
		return content
	}
	content = make([]byte, 0, size)
	_ = eachField(msg, func(got protowire.Number, body, _ []byte) error {
		if got == num {
			content = append(content, body...)
		}
		return nil
	})
	return content
}

// Span is what a sampler reads of a span. The slices are parts of the payload.
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
}

// ParseSpan reads a Span message, without its attributes, events and links.
func ParseSpan(item []byte) (sp Span) {
	sp.Root = true
	for len(item) > 0 {
		num, typ, n := protowire.ConsumeTag(item)
		if n < 0 {
			return sp
		}
		item = item[n:]
		switch typ {
		case protowire.BytesType:
			body, n := protowire.ConsumeBytes(item)
			if n < 0 {
				return sp
			}
			item = item[n:]
			switch num {
			case 1:
				copy(sp.TraceID[:], body)
			case 2:
				copy(sp.SpanID[:], body)
			case 3:
				sp.TraceState = body
			case 4:
				sp.Root = !kindSpanID.validID(body)
			case 5:
				sp.Name = body
			case 15:
				sp.Status = int32(varintField(body, 3, uint64(sp.Status)))
			}
		case protowire.Fixed64Type:
			v, n := protowire.ConsumeFixed64(item)
			if n < 0 {
				return sp
			}
			item = item[n:]
			switch num {
			case 7:
				sp.Start = v
			case 8:
				sp.End = v
			}
		default:
			n := protowire.ConsumeFieldValue(num, typ, item)
			if n < 0 {
				return sp
			}
			switch {
			case num == 6 && typ == protowire.VarintType:
				v, _ := protowire.ConsumeVarint(item)
				sp.Kind = int32(v)
			case num == 16 && typ == protowire.Fixed32Type:
				sp.Flags = binary.LittleEndian.Uint32(item)
			}
			item = item[n:]
		}
	}
	return sp
}

// varintField returns the last varint field num of msg, or def.
func varintField(msg []byte, num protowire.Number, def uint64) uint64 {
	for len(msg) > 0 {
		got, typ, n := protowire.ConsumeTag(msg)
		if n < 0 {
			return def
		}
		m := protowire.ConsumeFieldValue(got, typ, msg[n:])
		if m < 0 {
			return def
		}
		if got == num && typ == protowire.VarintType {
			def, _ = protowire.ConsumeVarint(msg[n:])
		}
		msg = msg[n+m:]
	}
	return def
}

// SpanTrace returns the trace ID of a Span message: what a router needs, at the
// cost of one field. ok is false when it is no valid ID.
func SpanTrace(item []byte) (id TraceID, ok bool) {
	for len(item) > 0 {
		num, body, raw, err := nextField(item)
		if err != nil {
			return id, ok
		}
		item = item[len(raw):]
		if num == 1 && body != nil {
			ok = kindTraceID.validID(body)
			copy(id[:], body)
			return id, ok
		}
	}
	return id, ok
}

// FieldNumber is a protobuf field number.
type FieldNumber = protowire.Number

// The field numbers of the attributes in the messages that have some.
const (
	ResourceAttributes FieldNumber = 1
	ScopeAttributes    FieldNumber = 3
	SpanAttributes     FieldNumber = 9
)

// ValueKind is the type of an attribute's value.
type ValueKind uint8

// The kinds of values. None is an AnyValue with nothing set.
const (
	None ValueKind = iota
	String
	Bool
	Int
	Double
	Other // array, map or bytes
)

// Value is an attribute's value. Str is a part of the payload.
type Value struct {
	Kind   ValueKind
	Str    []byte
	Bool   bool
	Int    int64
	Double float64
}

// Attribute looks up a key among the attributes of msg, a message that has them
// in field num. Of a key that is there twice the last counts.
func Attribute(msg []byte, num protowire.Number, key string) (val Value, ok bool) {
	for len(msg) > 0 {
		got, kv, raw, err := nextField(msg)
		if err != nil {
			return val, ok
		}
		msg = msg[len(raw):]
		if got == num && kv != nil && string(attributeKey(kv)) == key {
			val, ok = parseValue(single(kv, 2)), true
		}
	}
	return val, ok
}

func parseValue(b []byte) (v Value) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return v
		}
		m := protowire.ConsumeFieldValue(num, typ, b[n:])
		if m < 0 {
			return v
		}
		body := b[n : n+m]
		b = b[n+m:]
		switch {
		case num == 1 && typ == protowire.BytesType:
			s, _ := protowire.ConsumeBytes(body)
			v = Value{Kind: String, Str: s}
		case num == 2 && typ == protowire.VarintType:
			x, _ := protowire.ConsumeVarint(body)
			v = Value{Kind: Bool, Bool: x != 0}
		case num == 3 && typ == protowire.VarintType:
			x, _ := protowire.ConsumeVarint(body)
			v = Value{Kind: Int, Int: int64(x)}
		case num == 4 && typ == protowire.Fixed64Type:
			x, _ := protowire.ConsumeFixed64(body)
			v = Value{Kind: Double, Double: math.Float64frombits(x)}
		case num >= 5 && num <= 7:
			v = Value{Kind: Other}
		}
	}
	return v
}

// Count returns the number of items of a payload that Scan has accepted.
func Count(sig Signal, payload []byte) (n int) {
	Walk(payload, func(it Item) bool {
		if sig == Metrics {
			n += countPoints(it.Bytes)
		} else {
			n++
		}
		return true
	})
	return n
}

// countPoints counts the data points of a Metric: field 1 of whichever of gauge,
// sum, histogram, exponential histogram and summary is set.
func countPoints(m []byte) (n int) {
	_ = eachField(m, func(num protowire.Number, body, _ []byte) error {
		if f := metric.lookup(num); f == nil || !f.oneof || body == nil {
			return nil
		}
		return eachField(body, func(num protowire.Number, point, _ []byte) error {
			if num == 1 && point != nil {
				n++
			}
			return nil
		})
	})
	return n
}
