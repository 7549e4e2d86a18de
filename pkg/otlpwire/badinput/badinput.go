// Package badinput holds hostile and broken OTLP requests, each with the answer that a receiver must
// give. Tests of the wire path and of the receivers share them, and the fuzz targets start from
// them. Every bug that is found becomes a row.
//
// The letters of a row are those of the project's table of bad input: J for OTLP/JSON, P for
// protobuf. Transports (slow clients, HTTP/2 frames, encodings) are tested in package receive.
//
// # Promises
//
// Bodies are made by [Row.Body], the same bytes each time; a row costs nothing
// until then.
package badinput

import (
	"bytes"
	"encoding/binary"
	"math"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// Row is one request and its answer.
type Row struct {
	ID, Name string
	Signal   string // traces, metrics or logs
	JSON     bool   // else protobuf
	Body     func() []byte

	// Refused says that the whole request is refused: INVALID_ARGUMENT, 400.
	Refused bool
	// Items are accepted, Rejected are reported in a partial success.
	Items, Rejected int
	// Mended are strings that were not valid UTF-8, Crowded items with attributes removed.
	Mended, Crowded int
	// Large says that the row is about memory: it has megabytes, from which a fuzzer cannot start.
	// These answers assume receivers that accept requests up to 32 MiB, and messages up to 256 KiB.
	Large bool
}

const (
	traces  = "traces"
	metrics = "metrics"
	logs    = "logs"
)

// maxAttributes is a copy of otlpwire.MaxAttributes: the answers must not follow the code.
const maxAttributes = 1024

// Rows returns all rows.
func Rows() []Row {
	return append(jsonRows(), protoRows()...)
}

// A sound span's IDs.
const (
	traceHex = "5b8efff798038103d269b633813fc60c"
	spanHex  = "eee19b7ec3c1b174"
	jsonIDs  = `"traceId":"` + traceHex + `","spanId":"` + spanHex + `"`
)

func text(s string) func() []byte { return func() []byte { return []byte(s) } }

// jsonSpans returns a request with the given JSON objects as spans.
func jsonSpans(spans ...string) func() []byte {
	return text(`{"resourceSpans":[{"scopeSpans":[{"spans":[` + strings.Join(spans, ",") + `]}]}]}`)
}

func jsonSpan(members string) func() []byte { return jsonSpans("{" + jsonIDs + members + "}") }

func jsonValue(value string) func() []byte {
	return jsonSpan(`,"attributes":[{"key":"a","value":` + value + `}]`)
}

func jsonRows() (rows []Row) {
	add := func(id, name string, body func() []byte, r Row) {
		r.ID, r.Name, r.JSON, r.Body = id, name, true, body
		if r.Signal == "" {
			r.Signal = traces
		}
		rows = append(rows, r)
	}
	refused, one := Row{Refused: true}, Row{Items: 1}
	large := Row{Refused: true, Large: true}

	array := func(n int) func() []byte {
		return jsonValue(strings.Repeat(`{"arrayValue":{"values":[`, n) + strings.Repeat("]}}", n))
	}
	kvlist := func(n int) func() []byte {
		return jsonValue(strings.Repeat(`{"kvlistValue":{"values":[{"key":"k","value":`, n) + "{}" + strings.Repeat("}]}}", n))
	}
	add("J1", "64 nested arrays", array(64), one)
	add("J1", "65 nested arrays", array(65), refused)
	add("J1", "10,000 nested arrays", array(10_000), large)
	add("J1", "a million nested arrays", func() []byte { return array(1_000_000)() }, large)
	add("J1", "64 nested maps", kvlist(64), one)
	add("J1", "65 nested maps", kvlist(65), refused)
	add("J1", "10,000 nested maps", kvlist(10_000), large)

	add("J2", "10 MiB of brackets", func() []byte { return bytes.Repeat([]byte("["), 10<<20) }, large)
	add("J2", "brackets in an unknown field", func() []byte { return append([]byte(`{"x":`), bytes.Repeat([]byte("["), 10<<20)...) }, large)
	add("J2", "string without an end", text(`{"resourceSpans`), refused)
	add("J2", "object without an end", text(`{"resourceSpans":[`), refused)
	add("J2", "trailing comma", text(`{"resourceSpans":[],}`), refused)
	add("J2", "trailing comma in an array", jsonSpans("{"+jsonIDs+"}", ""), refused)
	add("J2", "second document", text(`{}{}`), refused)
	add("J2", "byte order mark", text("\ufeff{}"), refused)
	add("J2", "an array", text(`[]`), refused)
	add("J2", "a word", text(`nul`), refused)
	add("J2", "white space only", text(" \n"), refused)
	add("J2", "control character in a string", jsonSpan(",\"name\":\"a\x01b\""), refused)
	add("J2", "unknown escape", jsonSpan(`,"name":"\x41"`), refused)
	add("J2", "escape cut short", jsonSpan(`,"name":"\u00"`), refused)

	add("J3", "a field twice", jsonSpan(`,"name":"a","name":"b"`), refused)
	add("J3", "unknown fields", jsonSpan(`,"x":[{"y":[1,-2.5e3,{"z":null}],"t":true,"f":false,"s":"\n"}]`), one)
	add("J3", "unknown field twice", jsonSpan(`,"x":1,"x":2`), one)
	add("J3", "snake_case", text(`{"resource_spans":[{"scope_spans":[{"spans":[{}]}]}]}`), Row{})
	add("J3", "name written with escapes", jsonSpan(`,"\u006eame":"a"`), one)
	add("J3", "null is the default", jsonSpan(`,"attributes":null,"name":null,"status":null`), one)

	add("J4", "IDs in capitals", jsonSpans(`{"traceId":"`+strings.ToUpper(traceHex)+`","spanId":"`+strings.ToUpper(spanHex)+`"}`), one)
	for name, id := range map[string]string{
		"31 digits": traceHex[1:], "33 digits": traceHex + "0", "no hex": "z" + traceHex[1:], "base64": "W47/95gDgQPSabYzgT/GDA==", "empty": "", "all zero": strings.Repeat("0", 32),
	} {
		add("J4", "trace ID: "+name, jsonSpans(`{"traceId":"`+id+`","spanId":"`+spanHex+`"}`, "{"+jsonIDs+"}"), Row{Items: 1, Rejected: 1})
	}
	add("J4", "parent ID: no hex", jsonSpan(`,"parentSpanId":"zz"`), Row{Rejected: 1})
	add("J4", "link: 31 digits", jsonSpan(`,"links":[{"traceId":"`+traceHex[1:]+`"}]`), Row{Rejected: 1})

	for _, n := range []string{`-0`, `1.7e18`, `"1.7E+18"`, `1790000000000000000.0`, `"\u0031"`, `1000e-3`, `0.0e99999`, `5`, `"5"`, `"18446744073709551615"`, `18446744073709551615`, `5.0`, `1e3`, `0`} {
		add("J5", "time "+n, jsonSpan(`,"startTimeUnixNano":`+n), one)
	}
	for _, n := range []string{`"18446744073709551616"`, `-1`, `1.5`, `"x"`, `""`, `01`, `+1`, `.5`, `5.`, `1e`, `0x10`, `NaN`, `true`, `{}`, `1e400`, `1.5e0`, `1e99999999999999999999`, `1e-1`, `" 5"`} {
		add("J5", "time "+n, jsonSpan(`,"startTimeUnixNano":`+n), refused)
	}
	for _, n := range []string{`1.5`, `-0`, `"NaN"`, `"Infinity"`, `"-Infinity"`, `"1.5"`, `1e-400`, `5`} {
		add("J5", "double "+n, jsonValue(`{"doubleValue":`+n+`}`), one)
	}
	for _, n := range []string{`1e400`, `NaN`, `Infinity`, `"nan"`, `"1e400"`, `"0x1p-2"`, `"1_000"`} {
		add("J5", "double "+n, jsonValue(`{"doubleValue":`+n+`}`), refused)
	}
	for _, n := range []string{`-9223372036854775808`, `"9223372036854775807"`, `-0`} {
		add("J5", "int "+n, jsonValue(`{"intValue":`+n+`}`), one)
	}
	for _, n := range []string{`9223372036854775808`, `"-9223372036854775809"`, `"NaN"`, `1e30`} {
		add("J5", "int "+n, jsonValue(`{"intValue":`+n+`}`), refused)
	}
	add("J5", "number of a million digits", func() []byte { return jsonValue(`{"doubleValue":` + strings.Repeat("1", 1_000_000) + `}`)() }, large)
	add("J5", "number of a million digits in an unknown field", func() []byte { return jsonSpan(`,"x":` + strings.Repeat("1", 1_000_000))() }, Row{Items: 1, Large: true})
	add("J5", "many small numbers", func() []byte {
		return []byte(`{"resourceMetrics":[{"scopeMetrics":[{"metrics":[{"name":"h","histogram":{"dataPoints":[{"explicitBounds":[` + strings.Repeat("0,", 4<<20) + `0]}]}}]}]}]}`)
	}, Row{Signal: metrics, Refused: true, Large: true})

	add("J6", "enum by name", jsonSpan(`,"kind":"SPAN_KIND_SERVER"`), refused)
	add("J6", "enum 99", jsonSpan(`,"kind":99`), one)
	add("J6", "enum 2^31", jsonSpan(`,"kind":2147483648`), refused)

	add("J7", "NUL", jsonSpan(`,"name":"a\u0000b"`), one)
	add("J7", "surrogate pair", jsonSpan(`,"name":"\ud83d\ude00"`), one)
	add("J7", "half of a pair", jsonSpan(`,"name":"\ud800"`), Row{Items: 1, Mended: 1})
	add("J7", "halves in the wrong order", jsonSpan(`,"name":"\ude00\ud83d"`), Row{Items: 1, Mended: 1})
	add("J7", "no UTF-8", jsonSpan(",\"name\":\"a\xffb\""), Row{Items: 1, Mended: 1})
	add("J7", "overlong UTF-8", jsonSpan(",\"name\":\"\xc0\xaf\""), Row{Items: 1, Mended: 1})
	add("J7", "no UTF-8 in an unknown field", jsonSpan(",\"x\":\"\xff\""), one)
	add("J7", "11 MiB that are no UTF-8", func() []byte { return jsonSpan(",\"name\":\"" + strings.Repeat("\xff", 11<<20) + `"`)() }, large)

	add("J7", "11 MiB that are no UTF-8 in an unknown field", func() []byte { return jsonSpan(",\"x\":\"" + strings.Repeat("\xff", 11<<20) + `"`)() }, Row{Items: 1, Large: true})

	add("J8", "two values at once", jsonValue(`{"stringValue":"a","intValue":"1"}`), one)
	add("J8", "a map and a number", jsonValue(`{"kvlistValue":{"values":[]},"doubleValue":1}`), one)
	add("J8", "a string where an object belongs", jsonValue(`"a"`), refused)
	add("J8", "no base64", jsonValue(`{"bytesValue":"%"}`), refused)
	add("J8", "base64 for URLs", jsonValue(`{"bytesValue":"_-8"}`), one)

	add("J9", "a million empty spans", func() []byte { return jsonSpans("{}" + strings.Repeat(",{}", 1_000_000))() }, large)
	return rows
}

// Building blocks of protobuf requests.

func field(num protowire.Number, content ...[]byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, num, protowire.BytesType), bytes.Join(content, nil))
}

func varint(num protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, num, protowire.VarintType), v)
}

func fixed64(num protowire.Number, v uint64) []byte {
	return protowire.AppendFixed64(protowire.AppendTag(nil, num, protowire.Fixed64Type), v)
}

func str(num protowire.Number, s string) []byte { return field(num, []byte(s)) }

func attribute(num protowire.Number, key, val string) []byte {
	return field(num, str(1, key), field(2, str(1, val)))
}

// Request puts items, the content of spans, metrics or log records, into one
// scope of one resource.
func Request(items ...[]byte) []byte {
	var scope []byte
	for _, it := range items {
		scope = append(scope, field(2, it)...)
	}
	return field(1, field(2, scope))
}

var (
	traceID = []byte("\x5b\x8e\xff\xf7\x98\x03\x81\x03\xd2\x69\xb6\x33\x81\x3f\xc6\x0c")
	spanID  = []byte("\xee\xe1\x9b\x7e\xc3\xc1\xb1\x74")
	ids     = append(field(1, traceID), field(2, spanID)...)
)

// span is a sound one with more fields.
func span(more ...[]byte) []byte { return append(bytes.Clone(ids), bytes.Join(more, nil)...) }

// repeated returns n empty messages as field num.
func repeated(num protowire.Number, n int) []byte { return bytes.Repeat(field(num), n) }

// nest puts a value into depth arrays, maps, or both in turn.
func nest(depth int, array func(level int) bool) []byte {
	// From the inside out, written backwards: each level adds a few bytes before.
	var rev []byte
	push := func(b ...byte) {
		for i := len(b) - 1; i >= 0; i-- {
			rev = append(rev, b[i])
		}
	}
	length := func() {
		push(protowire.AppendVarint(nil, uint64(len(rev)))...)
	}
	for level := range depth {
		if array(level) {
			length()
			push(0x0a) // ArrayValue.values
			length()
			push(0x2a) // AnyValue.array_value
			continue
		}
		length()
		push(0x12) // KeyValue.value
		length()
		push(0x0a) // KeyValueList.values
		length()
		push(0x32) // AnyValue.kvlist_value
	}
	out := make([]byte, len(rev))
	for i, b := range rev {
		out[len(rev)-1-i] = b
	}
	return out
}

func protoRows() (rows []Row) {
	add := func(id, name string, sig string, body func() []byte, r Row) {
		r.ID, r.Name, r.Signal, r.Body = id, name, sig, body
		rows = append(rows, r)
	}
	refused, one := Row{Refused: true}, Row{Items: 1}
	large := Row{Refused: true, Large: true}
	spans := func(spans ...[]byte) func() []byte { return func() []byte { return Request(spans...) } }
	raw := func(b []byte) func() []byte { return func() []byte { return b } }

	const many = 2 << 20
	add("P2", "2 Mi empty spans", traces, func() []byte { return field(1, field(2, repeated(2, many))) }, large)
	add("P2", "2 Mi empty resources", traces, func() []byte { return repeated(1, many) }, large)
	add("P2", "2 Mi empty log records", logs, func() []byte { return field(1, field(2, repeated(2, many))) }, large)
	add("P2", "2 Mi empty points", metrics, func() []byte { return Request(append(str(1, "m"), field(5, repeated(1, many))...)) }, large)
	add("P2", "2 Mi empty attributes", traces, func() []byte { return Request(span(repeated(9, many))) }, large)
	add("P2", "2 Mi empty events", traces, func() []byte { return Request(span(repeated(11, many))) }, large)
	add("P2", "2 Mi empty links", traces, func() []byte { return Request(span(repeated(13, many))) }, large)
	add("P2", "2 Mi empty values", logs, func() []byte { return Request(field(5, field(5, repeated(1, many)))) }, large)

	for name, array := range map[string]func(int) bool{
		"arrays": func(int) bool { return true }, "maps": func(int) bool { return false }, "arrays and maps": func(n int) bool { return n%2 == 0 },
	} {
		body := func(depth int) func() []byte {
			return func() []byte { return Request(field(5, nest(depth, array))) }
		}
		add("P3", "64 nested "+name, logs, body(64), one)
		add("P3", "65 nested "+name, logs, body(65), refused)
		add("P3", "100,000 nested "+name, logs, body(100_000), large)
	}

	for name, b := range map[string][]byte{
		"varint of eleven bytes":    Request(append([]byte{0x30}, bytes.Repeat([]byte{0xff}, 11)...)),
		"varint beyond 64 bits":     Request(append([]byte{0x30}, append(bytes.Repeat([]byte{0xff}, 9), 0x7f)...)),
		"varint without an end":     Request([]byte{0x30, 0x80}),
		"length past the end":       {0x0a, 0x05, 0x00},
		"length of 2^63":            {0x0a, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01},
		"negative length":           {0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01},
		"length past its message":   field(1, []byte{0x12, 0x7f, 0x00}),
		"group":                     Request(span([]byte{0x0b, 0x0c})),
		"group of an unknown field": Request(span([]byte{0xfb, 0x07})),
		"end of a group":            Request([]byte{0x0c}),
		"field number zero":         Request([]byte{0x02, 0x00}),
		"field number beyond 2^29":  Request(append(protowire.AppendVarint(nil, 1<<32|2), 0)),
		"wire type 6":               Request([]byte{0x0e}),
		"wire type 7":               Request([]byte{0x0f}),
		"name as a number":          Request([]byte{0x28, 0x01}),
		"time as a string":          Request([]byte{0x3a, 0x01, 'x'}),
		"time cut short":            Request([]byte{0x39, 1, 2}),
		"flags cut short":           Request([]byte{0x85, 0x01, 1}),
		"tag alone":                 {0x0a},
		"text":                      []byte("GET / HTTP/1.1\r\n\r\n"),
	} {
		add("P4", name, traces, raw(b), refused)
	}
	for name, val := range map[string][]byte{"short": str(1, "v"), "long": str(1, strings.Repeat("v", 200)), "number": varint(3, 7), "double": fixed64(4, 1)} {
		add("P4", "garbage behind a value: "+name, traces, spans(span(field(9, str(1, "k"), field(2, val, []byte{0x07})))), refused)
		add("P4", "garbage behind an attribute: "+name, traces, spans(span(field(9, str(1, "k"), field(2, val), []byte{0x07}))), refused)
	}
	add("P4", "a million nested groups", traces, func() []byte { return bytes.Repeat([]byte{0x0b}, 1_000_000) }, large)
	add("P4", "packed numbers cut short", metrics, func() []byte {
		return Request(append(str(1, "h"), field(9, field(1, str(7, "abc")))...))
	}, refused)

	add("P6", "unknown fields", traces, func() []byte {
		return append(Request(span(varint(100, 7), str(2000, "x"))), varint(3000, 1)...)
	}, one)
	add("P6", "1 MiB of unknown fields", traces, func() []byte {
		return append(Request(span()), bytes.Repeat(varint(100, 7), 1<<18)...)
	}, Row{Items: 1, Large: true})

	for name, id := range map[string][]byte{"none": nil, "15 bytes": traceID[1:], "17 bytes": append(bytes.Clone(traceID), 1), "all zero": make([]byte, 16)} {
		add("P7", "trace ID: "+name, traces, spans(append(field(1, id), field(2, spanID)...), span()), Row{Items: 1, Rejected: 1})
	}
	for name, id := range map[string][]byte{"none": nil, "7 bytes": spanID[1:], "9 bytes": append(bytes.Clone(spanID), 1), "all zero": make([]byte, 8)} {
		add("P7", "span ID: "+name, traces, spans(append(field(1, traceID), field(2, id)...), span()), Row{Items: 1, Rejected: 1})
	}
	other := bytes.Repeat([]byte{7}, 16)
	add("P7", "two trace IDs", traces, spans(span(field(1, other)), span()), Row{Items: 1, Rejected: 1})
	add("P7", "two span IDs", traces, spans(span(field(2, other[:8])), span()), Row{Items: 1, Rejected: 1})
	add("P7", "parent is itself", traces, spans(span(field(4, spanID))), one)
	add("P7", "parent all zero", traces, spans(span(field(4, make([]byte, 8)))), one)
	add("P7", "parent of 3 bytes", traces, spans(span(field(4, []byte{1, 2, 3})), span()), Row{Items: 1, Rejected: 1})
	add("P7", "link to 3 bytes", traces, spans(span(field(13, field(1, []byte{1, 2, 3}))), span()), Row{Items: 1, Rejected: 1})
	add("P7", "log record: trace ID of 15 bytes", logs, spans(field(9, traceID[1:]), nil), Row{Items: 1, Rejected: 1})
	add("P7", "log record: span ID of 7 bytes", logs, spans(field(10, spanID[1:]), nil), Row{Items: 1, Rejected: 1})

	times := func(start, end uint64) func() []byte { return spans(span(fixed64(7, start), fixed64(8, end))) }
	add("P8", "ends before it starts", traces, times(2, 1), one)
	add("P8", "starts at zero", traces, times(0, 1), one)
	add("P8", "the end of time", traces, times(math.MaxUint64, math.MaxUint64), one)
	add("P8", "longer than an int64", traces, times(0, math.MaxUint64), one)

	add("P8", "kind and start alone", traces, spans(span(varint(6, 2), fixed64(7, 1), str(5, "a name of 20 bytes or so"))), one)
	add("P8", "kind, start, and another field", traces, spans(span(varint(6, 2), fixed64(7, 1), fixed64(9+100, 2), varint(6, 3))), one)
	add("P8", "kind of five bytes", traces, spans(span(varint(6, math.MaxInt32), fixed64(7, 1), fixed64(8, 2), varint(6, 1))), one)

	garbled := "a\xffb"
	mended := Row{Items: 1, Mended: 1}
	add("P9", "no UTF-8: span name", traces, spans(span(str(5, garbled))), mended)
	add("P9", "no UTF-8: trace state", traces, spans(span(str(3, garbled))), mended)
	add("P9", "no UTF-8: key", traces, spans(span(attribute(9, garbled, "v"))), mended)
	add("P9", "no UTF-8: value", traces, spans(span(attribute(9, "k", garbled))), mended)
	add("P9", "no UTF-8: long value", traces, spans(span(attribute(9, "k", strings.Repeat("x", 300)+garbled))), mended)
	add("P9", "no UTF-8: overlong", traces, spans(span(str(5, "\xc0\xaf"))), mended)
	add("P9", "no UTF-8: surrogate", traces, spans(span(str(5, "\xed\xa0\x80"))), mended)
	add("P9", "no UTF-8: body", logs, spans(field(5, str(1, garbled))), mended)
	add("P9", "no UTF-8: scope and schema URLs", traces, raw(field(1,
		field(1, attribute(1, "k", garbled)), field(2, field(1, str(1, garbled)), field(2, span()), str(3, garbled)), str(3, garbled))), Row{Items: 1, Mended: 4})
	add("P9", "no UTF-8 in a span that is rejected", traces, spans(str(5, garbled), span()), Row{Items: 1, Rejected: 1, Mended: 1})

	var crowd [][]byte
	for n := range 10_000 {
		crowd = append(crowd, attribute(9, "key-"+string(rune('a'+n%26))+string(binary.AppendUvarint(nil, uint64(n%128))), "v"))
	}
	add("P10", "attribute of 10 MiB", traces, func() []byte {
		return Request(span(attribute(9, "k", strings.Repeat("x", 10<<20))), span())
	}, Row{Items: 1, Rejected: 1, Large: true})
	add("P10", "key of 1 MiB", traces, func() []byte {
		return Request(span(attribute(9, strings.Repeat("k", 1<<20), "v")), span())
	}, Row{Items: 1, Rejected: 1, Large: true})
	add("P10", "10,000 attributes", traces, func() []byte { return Request(span(crowd...)) }, Row{Items: 1, Crowded: 1, Large: true})
	add("P10", "1,025 attributes", traces, spans(span(append(crowd[:maxAttributes+1:maxAttributes+1], varint(10, 2))...)), Row{Items: 1, Crowded: 1})
	add("P10", "1,024 attributes", traces, spans(span(crowd[:maxAttributes]...)), one)
	add("P10", "empty key", traces, spans(span(attribute(9, "", "v"))), one)
	add("P10", "key twice", traces, spans(span(attribute(9, "k", "a"), attribute(9, "k", "b"))), one)
	// What decoders make one of, and short cuts must not miss.
	for name, kv := range map[string][]byte{
		"two keys":                     append(str(1, "k"), append(field(2, str(1, "v")), str(1, "other")...)...),
		"two values":                   append(str(1, "k"), append(field(2, str(1, "v")), field(2, varint(3, 7))...)...),
		"value before its key":         append(field(2, str(1, "v")), str(1, "k")...),
		"an unknown field":             append(str(1, "k"), append(field(2, str(1, "v")), varint(90, 1)...)...),
		"a string and a number":        append(str(1, "k"), field(2, str(1, "v"), varint(3, 7))...),
		"a long string and a number":   append(str(1, "k"), field(2, str(1, strings.Repeat("v", 200)), varint(3, 7))...),
		"a number and a string":        append(str(1, "k"), field(2, varint(3, 7), str(1, "v"))...),
		"a double and an unknown":      append(str(1, "k"), field(2, fixed64(4, 1), varint(90, 1))...),
		"no value":                     str(1, "k"),
		"an empty value":               append(str(1, "k"), field(2)...),
		"a key of 200 bytes":           append(str(1, strings.Repeat("k", 200)), field(2, str(1, "v"))...),
		"an index into a string table": append(str(1, "k"), field(2, varint(3, 7), varint(8, 1))...),
	} {
		add("P10", "attribute with "+name, traces, spans(span(field(9, kv), attribute(9, "last", "v"))), one)
		add("P10", "resource attribute with "+name, traces, raw(field(1, field(1, field(1, kv), attribute(1, "last", "v")), field(2, field(2, span())))), one)
	}
	add("P10", "identity twice", traces, raw(field(1, field(1, attribute(1, "instance.id", "a"), attribute(1, "instance.id", "b")), field(2, field(2, span())))), one)

	rows = append(rows, metricRows()...)

	add("P13", "body of 5 MiB", logs, func() []byte { return Request(field(5, str(1, strings.Repeat("x", 5<<20))), nil) }, Row{Items: 1, Rejected: 1, Large: true})
	add("P13", "nested map as body", logs, spans(field(5, nest(8, func(int) bool { return false }))), one)
	add("P13", "bytes as body", logs, spans(field(5, str(7, "\x00\xff"))), one)
	add("P13", "severity 999", logs, spans(varint(2, 999)), one)
	add("P13", "escapes and line breaks", logs, spans(field(5, str(1, "\x1b[31mred\r\n\u2028next"))), one)
	add("P13", "empty log record", logs, spans(nil), one)
	add("P13", "array, string, array as body", logs, spans(field(5, field(5, field(1, str(1, "a"))), str(1, "s"), field(5, field(1, str(1, "b"))))), one)
	add("P13", "two bodies", logs, spans(append(field(5, str(1, "a")), field(5, varint(3, 1))...)), one)
	return rows
}

func metricRows() (rows []Row) {
	add := func(id, name string, metric []byte, r Row) {
		r.ID, r.Name, r.Signal, r.Body = id, name, metrics, func() []byte { return Request(metric, metricOf("good", 5, nil)) }
		r.Items++ // the good one
		rows = append(rows, r)
	}
	one, rejected := Row{Items: 1}, Row{Rejected: 1}
	bounds := func(vals ...float64) (b []byte) {
		for _, v := range vals {
			b = protowire.AppendFixed64(b, math.Float64bits(v))
		}
		return field(7, b)
	}
	counts := func(n int) []byte { return field(6, make([]byte, 8*n)) }
	histogram := func(point ...[]byte) []byte { return metricOf("h", 9, bytes.Join(point, nil)) }

	add("P11", "no data", str(1, "m"), Row{})
	add("P11", "no points", append(str(1, "m"), field(5)...), Row{})
	add("P11", "no name", metricOf("", 5, nil), rejected)
	add("P11", "name with a line break and quotes", metricOf("a\nb\"c", 5, nil), one)
	add("P11", "as many counts as bounds", histogram(bounds(1, 2), counts(2)), rejected)
	add("P11", "counts without bounds", histogram(counts(1)), one)
	add("P11", "bounds without counts", histogram(bounds(1)), rejected)
	add("P11", "neither", histogram(), one)
	add("P11", "negative bounds", histogram(bounds(-2, -1), counts(3)), one)
	add("P11", "bounds not sorted", histogram(bounds(2, 1), counts(3)), rejected)
	add("P11", "equal bounds", histogram(bounds(1, 1), counts(3)), rejected)
	add("P11", "NaN as bound", histogram(bounds(math.NaN()), counts(2)), rejected)
	add("P11", "infinite bound", histogram(bounds(1, math.Inf(1)), counts(3)), one)
	add("P11", "infinite bounds", histogram(bounds(math.Inf(-1), 1, math.Inf(1)), counts(4)), one)
	add("P11", "infinite bound without the bucket behind it", histogram(bounds(1, math.Inf(1)), counts(2)), one)
	add("P11", "infinite bound twice", histogram(bounds(1, math.Inf(1), math.Inf(1)), counts(4)), rejected)
	add("P11", "bound behind the infinite one", histogram(bounds(math.Inf(1), 1), counts(3)), rejected)
	add("P11", "bounds one by one", histogram(fixed64(7, math.Float64bits(1)), fixed64(7, math.Float64bits(2)), counts(3)), one)
	add("P11", "scale of a million", metricOf("e", 10, varint(6, protowire.EncodeZigZag(1_000_000))), rejected)
	add("P11", "scale of -12", metricOf("e", 10, varint(6, protowire.EncodeZigZag(-12))), rejected)
	add("P11", "scale of 20", metricOf("e", 10, varint(6, protowire.EncodeZigZag(20))), one)
	add("P11", "offset overflows", metricOf("e", 10, field(8, varint(1, protowire.EncodeZigZag(math.MaxInt32)), field(2, []byte{1, 1}))), rejected)
	add("P11", "delta temporality", append(str(1, "d"), field(7, field(1), varint(2, 1))...), one)
	add("P11", "gauge and sum at once", append(metricOf("m", 5, nil), field(7, field(1), field(1))...), Row{Items: 2})
	gauge, sum := field(5, field(1)), field(7, field(1), varint(2, 2), varint(3, 1))
	add("P11", "gauge, sum, gauge", bytes.Join([][]byte{str(1, "m"), gauge, sum, gauge}, nil), one)
	add("P11", "sum in two parts", bytes.Join([][]byte{str(1, "m"), field(7, varint(2, 2), varint(3, 1)), field(7, field(1))}, nil), one)
	add("P11", "sum in two parts beside a bad string", bytes.Join([][]byte{str(1, "m"), str(2, "\xff"), field(7, varint(2, 2), varint(3, 1)), field(7, field(1))}, nil), Row{Items: 1, Mended: 1})
	add("P11", "offset overflows in two parts", metricOf("e", 10, append(field(8, varint(1, protowire.EncodeZigZag(math.MaxInt32))), field(8, field(2, []byte{1, 1}))...)), rejected)
	add("P11", "counts overflow in two parts", metricOf("e", 10, append(field(8, varint(1, protowire.EncodeZigZag(math.MaxInt32-1)), field(2, []byte{1})), field(8, field(2, []byte{1}))...)), rejected)
	add("P11", "scale in more than 32 bits", metricOf("e", 10, varint(6, 1<<32|3)), one)
	add("P11", "unit of 1 MiB", append(metricOf("m", 5, nil), str(3, strings.Repeat("u", 1<<20))...), Row{Rejected: 1, Large: true})
	add("P11", "exemplar with a trace ID of 3 bytes", metricOf("m", 5, field(5, str(5, "abc"))), rejected)

	crowd := bytes.Repeat(attribute(7, "k", "v"), maxAttributes+1)
	add("P10", "point with 1,025 attributes", metricOf("m", 5, crowd), rejected)
	add("P12", "reserved name", metricOf("__name__", 5, nil), one)
	for _, key := range []string{"__tenant_id__", "__name__", "le", "job", "instance", "instance_id"} {
		add("P12", "label "+key, metricOf("m", 5, attribute(7, key, "forged")), one)
	}
	add("P12", "labels that collide", metricOf("m", 5, append(attribute(7, "a.b", "1"), attribute(7, "a_b", "2")...)), one)
	return rows
}

// metricOf is a metric whose data is in field num and has one point.
func metricOf(name string, num protowire.Number, point []byte) []byte {
	m := field(num, field(1, point))
	if name != "" {
		m = append(str(1, name), m...)
	}
	return m
}
