package otlpwire

import (
	"encoding/base64"
	"encoding/hex"
	"math"
	"strconv"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// AppendJSON appends a payload that Scan has accepted as one line of OTLP/JSON,
// without a line break: what the collector's file exporter writes.
func AppendJSON(dst []byte, sig Signal, payload []byte) []byte {
	return appendObject(dst, requests[sig], payload)
}

// appendObject writes the fields of one message in the order of the schema. Each field costs one
// scan over the tags of the message; contents are skipped.
func appendObject(dst []byte, m *message, b []byte) []byte {
	dst = append(dst, '{')
	open := len(dst)
	chosen, from := lastOfOneof(m, b)
	for i := range m.fields {
		f := &m.fields[i]
		if f.oneof {
			if f == chosen {
				dst = appendSingle(dst, open, f, b[from:])
			}
			continue
		}
		if f.repeated {
			dst = appendArray(dst, open, f, b)
		} else {
			dst = appendSingle(dst, open, f, b)
		}
	}
	return append(dst, '}')
}

// lastOfOneof returns the member of m's oneof that counts, the last on the wire, and the offset
// from which it counts: earlier occurrences before another member are discarded.
func lastOfOneof(m *message, b []byte) (chosen *field, from int) {
	for i := 0; i < len(b); {
		num, _, _, end := nextField(b, i)
		if end < 0 {
			break
		}
		if f := m.lookup(num); f != nil && f.oneof && f != chosen {
			chosen, from = f, i
		}
		i = end
	}
	return chosen, from
}

func appendName(dst []byte, open int, f *field) []byte {
	if len(dst) > open {
		dst = append(dst, ',')
	}
	dst = append(dst, '"')
	dst = append(dst, f.name...)
	return append(dst, '"', ':')
}

func appendArray(dst []byte, open int, f *field, b []byte) []byte {
	n := 0
	element := func(val []byte) {
		if n++; n == 1 {
			dst = append(appendName(dst, open, f), '[')
		} else {
			dst = append(dst, ',')
		}
		dst = appendValue(dst, f, val)
	}
	for i := 0; i < len(b); {
		num, typ, value, end := nextField(b, i)
		if end < 0 {
			break
		}
		body := b[value:end]
		if i = end; num != f.num {
			continue
		}
		if typ != bytesType || !f.kind.scalar() {
			element(body)
			continue
		}
		for len(body) > 0 { // packed
			n := protowire.ConsumeFieldValue(FieldNumber(num), f.kind.wireType(), body)
			if n < 0 {
				break
			}
			element(body[:n])
			body = body[n:]
		}
	}
	if n > 0 {
		dst = append(dst, ']')
	}
	return dst
}

func appendSingle(dst []byte, open int, f *field, b []byte) []byte {
	if f.kind == kindMessage {
		if body := single(b, f.num); body != nil {
			dst = appendValue(appendName(dst, open, f), f, body)
		}
		return dst
	}
	var val []byte
	for i := 0; i < len(b); {
		num, _, value, end := nextField(b, i)
		if end < 0 {
			break
		}
		if i = end; num == f.num {
			val = b[value:end]
		}
	}
	if val == nil {
		return dst
	}
	return appendValue(appendName(dst, open, f), f, val)
}

// appendValue writes one value: val is the content of a length-delimited field
// or the bytes of a scalar.
func appendValue(dst []byte, f *field, val []byte) []byte {
	switch f.kind {
	case kindMessage:
		return appendObject(dst, f.msg, val)
	case kindString:
		return appendString(dst, val)
	case kindBytes:
		dst = append(dst, '"')
		dst = base64.StdEncoding.AppendEncode(dst, val)
		return append(dst, '"')
	case kindTraceID, kindSpanID:
		dst = append(dst, '"')
		dst = hex.AppendEncode(dst, val)
		return append(dst, '"')
	case kindFixed32:
		v, _ := protowire.ConsumeFixed32(val)
		return strconv.AppendUint(dst, uint64(v), 10)
	case kindFixed64, kindSfixed64, kindDouble:
		v, _ := protowire.ConsumeFixed64(val)
		return append64(dst, f.kind, v)
	}
	v, _ := protowire.ConsumeVarint(val)
	switch f.kind {
	case kindBool:
		return strconv.AppendBool(dst, v != 0)
	case kindEnum, kindInt32:
		return strconv.AppendInt(dst, int64(int32(v)), 10)
	case kindSint32:
		return strconv.AppendInt(dst, int64(int32(protowire.DecodeZigZag(v&math.MaxUint32))), 10)
	case kindUint32:
		return strconv.AppendUint(dst, uint64(uint32(v)), 10)
	}
	return append64(dst, f.kind, v)
}

func append64(dst []byte, k kind, v uint64) []byte {
	if k == kindDouble {
		return appendDouble(dst, math.Float64frombits(v))
	}
	dst = append(dst, '"')
	if k == kindInt64 || k == kindSfixed64 {
		dst = strconv.AppendInt(dst, int64(v), 10)
	} else {
		dst = strconv.AppendUint(dst, v, 10)
	}
	return append(dst, '"')
}

func appendDouble(dst []byte, v float64) []byte {
	switch {
	case math.IsNaN(v):
		return append(dst, `"NaN"`...)
	case math.IsInf(v, 1):
		return append(dst, `"Infinity"`...)
	case math.IsInf(v, -1):
		return append(dst, `"-Infinity"`...)
	}
	return strconv.AppendFloat(dst, v, 'g', -1, 64)
}

const hexDigits = "0123456789abcdef"

func appendString(dst, s []byte) []byte {
	dst = append(dst, '"')
	for i := 0; i < len(s); {
		c := s[i]
		switch {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
		case c == '\n':
			dst = append(dst, '\\', 'n')
		case c < 0x20:
			dst = append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		case c < utf8.RuneSelf:
			dst = append(dst, c)
		default:
			r, n := utf8.DecodeRune(s[i:])
			dst = utf8.AppendRune(dst, r)
			i += n
			continue
		}
		i++
	}
	return append(dst, '"')
}
