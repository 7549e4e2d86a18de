package otlpwire

import (
	"encoding/binary"
	"iter"
	"math"
)

// Field is one field of a message, for callers that read more of an item than the types here have.
type Field struct {
	// Tag is the field's number times eight plus its wire type, see [Tag].
	Tag int
	// Bytes is the content of a string, a message or packed numbers.
	Bytes []byte
	// Bits is the value of a number; of an sint32 in its wire encoding.
	Bits uint64
}

// Wire types for [Tag].
const (
	Varint  = varintType
	Fixed64 = fixed64Type
	Bytes   = bytesType
	Fixed32 = fixed32Type
)

// Tag is what [Field.Tag] is for a field.
func Tag(num, typ int) int { return num<<3 | typ }

// Double returns the value of a double.
func (f Field) Double() float64 { return math.Float64frombits(f.Bits) }

// Sint32 returns the value of an sint32.
func (f Field) Sint32() int32 { return int32(uint32(f.Bits)>>1) ^ -int32(f.Bits&1) }

// NextField returns the field that begins at msg[i], i < len(msg), and where the next
// one does. At a malformed byte that is len(msg), and the field has no tag.
func NextField(msg []byte, i int) (f Field, next int) {
	if end := shortField(msg, i); end != 0 {
		return Field{Tag: int(msg[i]), Bytes: msg[i+2 : end]}, end
	}
	num, typ, value, end := nextField(msg, i)
	if end < 0 {
		return Field{}, len(msg)
	}
	f.Tag = num<<3 | typ
	switch typ {
	case bytesType:
		f.Bytes = msg[value:end]
	case fixed64Type:
		f.Bits = binary.LittleEndian.Uint64(msg[value:])
	case fixed32Type:
		f.Bits = uint64(binary.LittleEndian.Uint32(msg[value:]))
	default:
		f.Bits = varintAt(msg, value)
	}
	return f, end
}

// Single returns the content of the message field num of msg; the occurrences of a repeated one are
// merged, as protobuf does.
func Single(msg []byte, num int) []byte { return single(msg, num) }

// MetricKind says what the points of a metric are.
type MetricKind uint8

// The kinds of metrics.
const (
	NoMetric MetricKind = iota
	Gauge
	Sum
	Histogram
	ExponentialHistogram
	Summary
)

// Temporality says from which time on the points of a sum or histogram count.
type Temporality uint8

// The temporalities, as the protocol numbers them.
const (
	Unspecified Temporality = iota
	Delta
	Cumulative
)

// Metric is a Metric message without its points. The slices are parts of the payload.
type Metric struct {
	Name, Description, Unit []byte
	Kind                    MetricKind
	Monotonic               bool
	Temporality             Temporality
	data                    []byte
}

// Points iterates over the data points: NumberDataPoint of gauges and sums,
// HistogramDataPoint, ExponentialHistogramDataPoint or SummaryDataPoint.
func (m *Metric) Points() iter.Seq[[]byte] {
	return func(yield func([]byte) bool) { each(m.data, 1, yield) }
}

// Parse reads a Metric message. Of the kinds of points, which exclude each other, the
// last on the wire counts.
func (m *Metric) Parse(item []byte) { //nolint:gocyclo // a table: one case a field
	*m = Metric{}
	parts := 0
	for i := 0; i < len(item); {
		var f Field
		f, i = NextField(item, i)
		kind := NoMetric
		switch f.Tag {
		case 1<<3 | bytesType:
			m.Name = f.Bytes
		case 2<<3 | bytesType:
			m.Description = f.Bytes
		case 3<<3 | bytesType:
			m.Unit = f.Bytes
		case 5<<3 | bytesType:
			kind = Gauge
		case 7<<3 | bytesType:
			kind = Sum
		case 9<<3 | bytesType:
			kind = Histogram
		case 10<<3 | bytesType:
			kind = ExponentialHistogram
		case 11<<3 | bytesType:
			kind = Summary
		}
		switch {
		case kind == NoMetric:
			continue
		case kind != m.Kind:
			m.Kind, m.data, parts = kind, f.Bytes, 1
		case parts == 1: // two concatenated messages are their union
			m.data, parts = append(append(make([]byte, 0, len(m.data)+len(f.Bytes)), m.data...), f.Bytes...), 2
		default:
			m.data = append(m.data, f.Bytes...)
		}
	}
	if m.Kind == Gauge || m.Kind == Summary {
		return
	}
	for i := 0; i < len(m.data); {
		var f Field
		switch f, i = NextField(m.data, i); f.Tag {
		case 2<<3 | varintType:
			m.Temporality = Temporality(min(f.Bits, 3))
		case 3<<3 | varintType:
			m.Monotonic = f.Bits != 0
		}
	}
}
