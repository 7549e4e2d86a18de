package otlpwire

import "google.golang.org/protobuf/encoding/protowire"

// kind is how a field's value is written on the wire and in OTLP/JSON.
type kind uint8

const (
	kindMessage kind = iota
	kindString
	kindBytes   // base64 in JSON
	kindTraceID // 16 bytes, hex in JSON
	kindSpanID  // 8 bytes, hex in JSON
	kindBool
	kindEnum   // an integer in JSON, never a name (OTLP specification, JSON encoding)
	kindUint32 // varint
	kindInt32  // varint
	kindInt64  // varint, a decimal string in JSON
	kindUint64 // varint, a decimal string in JSON
	kindSint32 // zigzag varint
	kindFixed32
	kindFixed64  // a decimal string in JSON
	kindSfixed64 // a decimal string in JSON
	kindDouble
)

func (k kind) wireType() protowire.Type {
	switch k {
	case kindMessage, kindString, kindBytes, kindTraceID, kindSpanID:
		return protowire.BytesType
	case kindFixed32:
		return protowire.Fixed32Type
	case kindFixed64, kindSfixed64, kindDouble:
		return protowire.Fixed64Type
	}
	return protowire.VarintType
}

// scalar reports whether a repeated field of this kind may be packed.
func (k kind) scalar() bool { return k.wireType() != protowire.BytesType }

// role marks the messages that Scan treats specially.
type role uint8

const (
	plain          role = iota
	span                // an item with obligatory IDs
	record              // an item with optional IDs
	point               // an item without IDs
	histogramPoint      // a point whose buckets must fit its bounds
	metricRole          // holds points of one kind
	nest                // an array or a map, the only values that can nest without end
	attribute           // a key and a value, the bulk of all bytes
	buckets             // of an exponential histogram
)

// item reports whether messages of this role are counted.
func (r role) item() bool { return r >= span && r <= histogramPoint }

// check is what Scan does with the value of a field, besides skipping it.
type check uint8

const (
	checkNothing check = iota
	checkMessage       // descend
	checkString        // UTF-8
	checkID            // length
	checkItemID        // of a span: length, not zero, only once
	checkName          // of a metric: not empty
	checkPacked        // whole numbers
	checkCounts        // of a histogram: how many
	checkBounds        // of a histogram: how many, rising
	checkScale         // of an exponential histogram: its range
	checkOffset        // of its buckets: with their number within an int32
)

// step is what Scan knows of one field; those of a message are adjacent.
type step struct {
	msg   *message
	wire  int8 // wire type; unknown where there is no such field
	pack  bool // may be packed
	check check
	data  bool // one of the kinds of points of a metric
}

const unknown = -1

// field describes one field of a message.
type field struct {
	num      int
	name     string // JSON name, lowerCamelCase
	kind     kind
	repeated bool
	oneof    bool // one of a group of which the last on the wire counts
	msg      *message
}

// message describes one OTLP message.
type message struct {
	name   string // full protobuf name; the schema test compares by it
	role   role
	fields []field

	byNum  [maxField + 1]*field
	byName map[string]*field
	steps  [maxField + 1]step
	leads  bool // to items: it is an item or contains items
}

// positiveBuckets is the field of an exponential histogram's positive buckets; the
// negative ones follow.
const positiveBuckets = 8

// maxField is the highest field number that OTLP 1.11 uses below.
const maxField = 16

func (m *message) lookup(num int) *field {
	if num > maxField {
		return nil
	}
	return m.byNum[num]
}

// The schema of opentelemetry-proto 1.11, checked against the generated
// descriptors by TestSchemaMatchesGeneratedDescriptors.
var (
	anyValue    = &message{name: "opentelemetry.proto.common.v1.AnyValue"}
	arrayValue  = &message{name: "opentelemetry.proto.common.v1.ArrayValue", role: nest}
	kvList      = &message{name: "opentelemetry.proto.common.v1.KeyValueList", role: nest}
	keyValue    = &message{name: "opentelemetry.proto.common.v1.KeyValue", role: attribute}
	scope       = &message{name: "opentelemetry.proto.common.v1.InstrumentationScope"}
	entityRef   = &message{name: "opentelemetry.proto.common.v1.EntityRef"}
	resource    = &message{name: "opentelemetry.proto.resource.v1.Resource"}
	spanMsg     = &message{name: "opentelemetry.proto.trace.v1.Span", role: span}
	spanEvent   = &message{name: "opentelemetry.proto.trace.v1.Span.Event"}
	spanLink    = &message{name: "opentelemetry.proto.trace.v1.Span.Link"}
	spanStatus  = &message{name: "opentelemetry.proto.trace.v1.Status"}
	metric      = &message{name: "opentelemetry.proto.metrics.v1.Metric", role: metricRole}
	gauge       = &message{name: "opentelemetry.proto.metrics.v1.Gauge"}
	sum         = &message{name: "opentelemetry.proto.metrics.v1.Sum"}
	histogram   = &message{name: "opentelemetry.proto.metrics.v1.Histogram"}
	expHist     = &message{name: "opentelemetry.proto.metrics.v1.ExponentialHistogram"}
	summary     = &message{name: "opentelemetry.proto.metrics.v1.Summary"}
	numberPoint = &message{name: "opentelemetry.proto.metrics.v1.NumberDataPoint", role: point}
	histPoint   = &message{name: "opentelemetry.proto.metrics.v1.HistogramDataPoint", role: histogramPoint}
	expPoint    = &message{name: "opentelemetry.proto.metrics.v1.ExponentialHistogramDataPoint", role: point}
	expBuckets  = &message{name: "opentelemetry.proto.metrics.v1.ExponentialHistogramDataPoint.Buckets", role: buckets}
	sumPoint    = &message{name: "opentelemetry.proto.metrics.v1.SummaryDataPoint", role: point}
	quantile    = &message{name: "opentelemetry.proto.metrics.v1.SummaryDataPoint.ValueAtQuantile"}
	exemplar    = &message{name: "opentelemetry.proto.metrics.v1.Exemplar"}
	logRecord   = &message{name: "opentelemetry.proto.logs.v1.LogRecord", role: record}

	// requests are the export requests, by signal.
	requests = [...]*message{
		Traces: frame("trace", "Spans", "ExportTraceServiceRequest", field{name: "spans", msg: spanMsg}),

		Metrics: frame("metrics", "Metrics", "ExportMetricsServiceRequest", field{name: "metrics", msg: metric}),

		Logs: frame("logs", "Logs", "ExportLogsServiceRequest", field{name: "logRecords", msg: logRecord}),
	}
)

// frame builds request → resource → scope → item for one signal.
func frame(pkg, noun, request string, item field) *message {
	item.num, item.repeated = 2, true
	scopes := &message{name: "opentelemetry.proto." + pkg + ".v1.Scope" + noun, fields: []field{
		{num: 1, name: "scope", msg: scope},
		item,
		{num: 3, name: "schemaUrl", kind: kindString},
	}}
	resources := &message{name: "opentelemetry.proto." + pkg + ".v1.Resource" + noun, fields: []field{
		{num: 1, name: "resource", msg: resource},
		{num: 2, name: "scope" + noun, repeated: true, msg: scopes},
		{num: 3, name: "schemaUrl", kind: kindString},
	}}
	return &message{name: "opentelemetry.proto.collector." + pkg + ".v1." + request, fields: []field{
		{num: 1, name: "resource" + noun, repeated: true, msg: resources},
	}}
}

func attributes(num int, name string) field {
	return field{num: num, name: name, repeated: true, msg: keyValue}
}

func init() {
	anyValue.fields = []field{
		{num: 1, name: "stringValue", kind: kindString, oneof: true},
		{num: 2, name: "boolValue", kind: kindBool, oneof: true},
		{num: 3, name: "intValue", kind: kindInt64, oneof: true},
		{num: 4, name: "doubleValue", kind: kindDouble, oneof: true},
		{num: 5, name: "arrayValue", msg: arrayValue, oneof: true},
		{num: 6, name: "kvlistValue", msg: kvList, oneof: true},
		{num: 7, name: "bytesValue", kind: kindBytes, oneof: true},
		{num: 8, name: "stringValueStrindex", kind: kindInt32, oneof: true}, // of the profiles signal
	}
	arrayValue.fields = []field{{num: 1, name: "values", repeated: true, msg: anyValue}}
	kvList.fields = []field{attributes(1, "values")}
	keyValue.fields = []field{
		{num: 1, name: "key", kind: kindString},
		{num: 2, name: "value", msg: anyValue},
		{num: 3, name: "keyStrindex", kind: kindInt32}, // of the profiles signal
	}
	scope.fields = []field{
		{num: 1, name: "name", kind: kindString},
		{num: 2, name: "version", kind: kindString},
		attributes(3, "attributes"),
		{num: 4, name: "droppedAttributesCount", kind: kindUint32},
	}
	entityRef.fields = []field{
		{num: 1, name: "schemaUrl", kind: kindString},
		{num: 2, name: "type", kind: kindString},
		{num: 3, name: "idKeys", kind: kindString, repeated: true},
		{num: 4, name: "descriptionKeys", kind: kindString, repeated: true},
	}
	resource.fields = []field{
		attributes(1, "attributes"),
		{num: 2, name: "droppedAttributesCount", kind: kindUint32},
		{num: 3, name: "entityRefs", repeated: true, msg: entityRef},
	}
	traceFields()
	metricFields()
	logRecord.fields = []field{
		{num: 1, name: "timeUnixNano", kind: kindFixed64},
		{num: 11, name: "observedTimeUnixNano", kind: kindFixed64},
		{num: 2, name: "severityNumber", kind: kindEnum},
		{num: 3, name: "severityText", kind: kindString},
		{num: 5, name: "body", msg: anyValue},
		attributes(6, "attributes"),
		{num: 7, name: "droppedAttributesCount", kind: kindUint32},
		{num: 8, name: "flags", kind: kindFixed32},
		{num: 9, name: "traceId", kind: kindTraceID},
		{num: 10, name: "spanId", kind: kindSpanID},
		{num: 12, name: "eventName", kind: kindString},
	}
	for _, m := range requests {
		index(m)
	}
}

func traceFields() {
	spanMsg.fields = []field{
		{num: 1, name: "traceId", kind: kindTraceID},
		{num: 2, name: "spanId", kind: kindSpanID},
		{num: 3, name: "traceState", kind: kindString},
		{num: 4, name: "parentSpanId", kind: kindSpanID},
		{num: 16, name: "flags", kind: kindFixed32},
		{num: 5, name: "name", kind: kindString},
		{num: 6, name: "kind", kind: kindEnum},
		{num: 7, name: "startTimeUnixNano", kind: kindFixed64},
		{num: 8, name: "endTimeUnixNano", kind: kindFixed64},
		attributes(9, "attributes"),
		{num: 10, name: "droppedAttributesCount", kind: kindUint32},
		{num: 11, name: "events", repeated: true, msg: spanEvent},
		{num: 12, name: "droppedEventsCount", kind: kindUint32},
		{num: 13, name: "links", repeated: true, msg: spanLink},
		{num: 14, name: "droppedLinksCount", kind: kindUint32},
		{num: 15, name: "status", msg: spanStatus},
	}
	spanEvent.fields = []field{
		{num: 1, name: "timeUnixNano", kind: kindFixed64},
		{num: 2, name: "name", kind: kindString},
		attributes(3, "attributes"),
		{num: 4, name: "droppedAttributesCount", kind: kindUint32},
	}
	spanLink.fields = []field{
		{num: 1, name: "traceId", kind: kindTraceID},
		{num: 2, name: "spanId", kind: kindSpanID},
		{num: 3, name: "traceState", kind: kindString},
		attributes(4, "attributes"),
		{num: 5, name: "droppedAttributesCount", kind: kindUint32},
		{num: 6, name: "flags", kind: kindFixed32},
	}
	spanStatus.fields = []field{
		{num: 2, name: "message", kind: kindString},
		{num: 3, name: "code", kind: kindEnum},
	}
}

func metricFields() {
	start := field{num: 2, name: "startTimeUnixNano", kind: kindFixed64}
	at := field{num: 3, name: "timeUnixNano", kind: kindFixed64}
	temporality := field{num: 2, name: "aggregationTemporality", kind: kindEnum}
	points := func(m *message) field {
		return field{num: 1, name: "dataPoints", repeated: true, msg: m}
	}
	exemplars := func(num int) field {
		return field{num: num, name: "exemplars", repeated: true, msg: exemplar}
	}
	metric.fields = []field{
		{num: 1, name: "name", kind: kindString},
		{num: 2, name: "description", kind: kindString},
		{num: 3, name: "unit", kind: kindString},
		{num: 5, name: "gauge", msg: gauge, oneof: true},
		{num: 7, name: "sum", msg: sum, oneof: true},
		{num: 9, name: "histogram", msg: histogram, oneof: true},
		{num: 10, name: "exponentialHistogram", msg: expHist, oneof: true},
		{num: 11, name: "summary", msg: summary, oneof: true},
		attributes(12, "metadata"),
	}
	gauge.fields = []field{points(numberPoint)}
	sum.fields = []field{points(numberPoint), temporality, {num: 3, name: "isMonotonic", kind: kindBool}}
	histogram.fields = []field{points(histPoint), temporality}
	expHist.fields = []field{points(expPoint), temporality}
	summary.fields = []field{points(sumPoint)}
	numberPoint.fields = []field{
		attributes(7, "attributes"), start, at,
		{num: 4, name: "asDouble", kind: kindDouble, oneof: true},
		{num: 6, name: "asInt", kind: kindSfixed64, oneof: true},
		exemplars(5),
		{num: 8, name: "flags", kind: kindUint32},
	}
	histPoint.fields = []field{
		attributes(9, "attributes"), start, at,
		{num: 4, name: "count", kind: kindFixed64},
		{num: 5, name: "sum", kind: kindDouble},
		{num: 6, name: "bucketCounts", kind: kindFixed64, repeated: true},
		{num: 7, name: "explicitBounds", kind: kindDouble, repeated: true},
		exemplars(8),
		{num: 10, name: "flags", kind: kindUint32},
		{num: 11, name: "min", kind: kindDouble},
		{num: 12, name: "max", kind: kindDouble},
	}
	expPoint.fields = []field{
		attributes(1, "attributes"), start, at,
		{num: 4, name: "count", kind: kindFixed64},
		{num: 5, name: "sum", kind: kindDouble},
		{num: 6, name: "scale", kind: kindSint32},
		{num: 7, name: "zeroCount", kind: kindFixed64},
		{num: positiveBuckets, name: "positive", msg: expBuckets},
		{num: 9, name: "negative", msg: expBuckets},
		{num: 10, name: "flags", kind: kindUint32},
		exemplars(11),
		{num: 12, name: "min", kind: kindDouble},
		{num: 13, name: "max", kind: kindDouble},
		{num: 14, name: "zeroThreshold", kind: kindDouble},
	}
	expBuckets.fields = []field{
		{num: 1, name: "offset", kind: kindSint32},
		{num: 2, name: "bucketCounts", kind: kindUint64, repeated: true},
	}
	sumPoint.fields = []field{
		attributes(7, "attributes"), start, at,
		{num: 4, name: "count", kind: kindFixed64},
		{num: 5, name: "sum", kind: kindDouble},
		{num: 6, name: "quantileValues", repeated: true, msg: quantile},
		{num: 8, name: "flags", kind: kindUint32},
	}
	quantile.fields = []field{
		{num: 1, name: "quantile", kind: kindDouble},
		{num: 2, name: "value", kind: kindDouble},
	}
	exemplar.fields = []field{
		attributes(7, "filteredAttributes"),
		{num: 2, name: "timeUnixNano", kind: kindFixed64},
		{num: 3, name: "asDouble", kind: kindDouble, oneof: true},
		{num: 6, name: "asInt", kind: kindSfixed64, oneof: true},
		{num: 4, name: "spanId", kind: kindSpanID},
		{num: 5, name: "traceId", kind: kindTraceID},
	}
}

// index fills the look-up tables of m and of every message below it.
func index(m *message) {
	if m.byName != nil {
		return
	}
	m.byName = make(map[string]*field, len(m.fields))
	m.leads = m.role.item()
	for i := range m.steps {
		m.steps[i].wire = unknown
	}
	for i := range m.fields {
		f := &m.fields[i]
		m.byNum[f.num] = f
		m.byName[f.name] = f
		m.steps[f.num] = step{
			msg: f.msg, wire: int8(f.kind.wireType()), pack: f.repeated && f.kind.scalar(),
			check: m.check(f), data: m.role == metricRole && f.oneof,
		}
		if f.msg != nil {
			index(f.msg)
			m.leads = m.leads || f.msg.leads
		}
	}
}

// check returns what Scan does with field f of m.
func (m *message) check(f *field) check { //nolint:gocyclo // a table: one case a check
	switch {
	case f.kind == kindMessage:
		return checkMessage
	case m.role == metricRole && f.name == "name":
		return checkName
	case m.role == histogramPoint && f.name == "bucketCounts":
		return checkCounts
	case m.role == histogramPoint && f.name == "explicitBounds":
		return checkBounds
	case f.name == "scale":
		return checkScale
	case m.role == buckets && f.name == "offset":
		return checkOffset
	case m.role == buckets && f.name == "bucketCounts":
		return checkCounts
	case m.role == span && f.num <= 2:
		return checkItemID
	case f.kind == kindTraceID || f.kind == kindSpanID:
		return checkID
	case f.kind == kindString:
		return checkString
	case f.repeated && f.kind.scalar():
		return checkPacked
	}
	return checkNothing
}
