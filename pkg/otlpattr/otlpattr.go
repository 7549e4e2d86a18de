// Package otlpattr writes OTLP attribute values as text, the same way for every backend,
// and as the collector does (pdata, Value.AsString): scalars plainly, bytes in base64,
// arrays and maps as JSON.
package otlpattr

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"math"
	"strconv"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// Append appends the text of an AnyValue message to dst; nothing for an empty one.
func Append(dst, value []byte) []byte {
	v := otlpwire.ParseValue(value)
	switch v.Kind {
	case otlpwire.String:
		return append(dst, v.Str...)
	case otlpwire.Bool:
		return strconv.AppendBool(dst, v.Bool())
	case otlpwire.Int:
		return strconv.AppendInt(dst, v.Int(), 10)
	case otlpwire.Double:
		return appendDouble(dst, v.Double())
	case otlpwire.Binary:
		return base64.StdEncoding.AppendEncode(dst, v.Str)
	case otlpwire.Array, otlpwire.Map:
		var out bytes.Buffer
		enc := json.NewEncoder(&out)
		enc.SetEscapeHTML(false)
		_ = enc.Encode(plain(v)) // what plain returns can be encoded
		return append(dst, bytes.TrimSuffix(out.Bytes(), []byte("\n"))...)
	}
	return dst
}

// appendDouble writes a number as JavaScript does; NaN and infinities by name.
func appendDouble(dst []byte, f float64) []byte {
	switch {
	case math.IsNaN(f):
		return append(dst, "NaN"...)
	case math.IsInf(f, 0):
		if f < 0 {
			dst = append(dst, '-')
		}
		return append(dst, "Infinity"...)
	}
	if abs := math.Abs(f); abs == 0 || abs >= 1e-6 && abs < 1e21 {
		return strconv.AppendFloat(dst, f, 'f', -1, 64)
	}
	dst = strconv.AppendFloat(dst, f, 'e', -1, 64)
	if n := len(dst); dst[n-2] == '0' && dst[n-3] == '-' { // e-09 is e-9
		dst = append(dst[:n-2], dst[n-1])
	}
	return dst
}

// plain turns a value into one that encoding/json writes as plain JSON, with sorted keys. Numbers that JSON
// does not have become text.
func plain(v otlpwire.Value) any {
	switch v.Kind {
	case otlpwire.String:
		return string(v.Str)
	case otlpwire.Bool:
		return v.Bool()
	case otlpwire.Int:
		return v.Int()
	case otlpwire.Double:
		if f := v.Double(); math.IsNaN(f) || math.IsInf(f, 0) {
			return string(appendDouble(nil, f))
		}
		return v.Double()
	case otlpwire.Binary:
		return v.Str
	case otlpwire.Array:
		out := []any{}
		each(v.Str, func(e []byte) { out = append(out, plain(otlpwire.ParseValue(e))) })
		return out
	case otlpwire.Map:
		out := map[string]any{}
		each(v.Str, func(kv []byte) {
			key, value := otlpwire.Attribute(kv)
			out[string(key)] = plain(otlpwire.ParseValue(value))
		})
		return out
	}
	return nil
}

// each calls visit with the messages of the repeated field 1.
func each(msg []byte, visit func([]byte)) {
	for i := 0; i < len(msg); {
		var f otlpwire.Field
		if f, i = otlpwire.NextField(msg, i); f.Tag == otlpwire.Tag(1, otlpwire.Bytes) {
			visit(f.Bytes)
		}
	}
}
