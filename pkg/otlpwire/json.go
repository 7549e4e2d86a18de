package otlpwire

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// FromJSON converts an OTLP/JSON request to protobuf bytes appended to dst, by
// the rules of the OTLP specification: IDs in hex of either case, enums as
// integers only, 64-bit integers as decimal strings or numbers, lowerCamelCase
// names only, unknown fields ignored. Of a key that stands twice the last
// counts; text that is no UTF-8 or a lone surrogate becomes U+FFFD. An ID that
// is no hex becomes an empty one, which Scan reports as invalid. It bounds
// nesting by [MaxDepth] and messages by lim, and its errors wrap [ErrMalformed].
func FromJSON(dst []byte, sig Signal, text []byte, lim Limits) ([]byte, error) {
	r := jsonReader{dec: json.NewDecoder(bytes.NewReader(text)), lim: lim, out: dst}
	r.dec.UseNumber()
	err := r.request(requests[sig])
	if err != nil {
		return dst, fmt.Errorf("%w: JSON at byte %d: %w", ErrMalformed, r.dec.InputOffset(), err)
	}
	return r.out, nil
}

type jsonReader struct {
	dec   *json.Decoder
	lim   Limits
	elems int
	out   []byte
}

func (r *jsonReader) request(m *message) error {
	if err := r.open('{'); err != nil {
		return err
	}
	if err := r.fields(m, 0); err != nil {
		return err
	}
	if _, err := r.dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the request")
	}
	return nil
}

func (r *jsonReader) open(want json.Delim) error {
	tok, err := r.dec.Token()
	if err != nil {
		return err
	}
	if tok != want {
		return fmt.Errorf("got %v, want %v", tok, want)
	}
	return nil
}

// fields reads the members of an object whose '{' has been read, up to and with
// the '}'.
func (r *jsonReader) fields(m *message, deep int) error {
	if m.role == nest {
		if deep++; deep > MaxDepth {
			return fmt.Errorf("values nested deeper than %d", MaxDepth)
		}
	}
	if r.elems++; r.elems > r.lim.MaxElements {
		return fmt.Errorf("more than %d elements in one request", r.lim.MaxElements)
	}
	seen := map[*field]int{} // where the last occurrence of a field begins
	for {
		tok, err := r.dec.Token()
		if err != nil {
			return err
		}
		name, ok := tok.(string)
		if !ok {
			return nil // '}'
		}
		f := m.byName[name]
		if f == nil {
			if err := r.skip(); err != nil {
				return err
			}
			continue
		}
		if from, again := seen[f]; again {
			r.forget(f, from, seen)
		}
		seen[f] = len(r.out)
		if err := r.member(f, deep); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
}

// forget takes back what an earlier occurrence of f wrote: its fields stand
// together from offset from on.
func (r *jsonReader) forget(f *field, from int, seen map[*field]int) {
	end := from
	for b := r.out[from:]; len(b) > 0; {
		num, _, raw, err := nextField(b)
		if err != nil || num != f.num {
			break
		}
		end += len(raw)
		b = b[len(raw):]
	}
	r.out = append(r.out[:from], r.out[end:]...)
	for g, at := range seen {
		if at >= end {
			seen[g] = at - (end - from)
		}
	}
}

func (r *jsonReader) member(f *field, deep int) error {
	tok, err := r.dec.Token()
	if err != nil {
		return err
	}
	if tok == nil { // null is the default value
		return nil
	}
	if !f.repeated {
		return r.value(f, tok, deep)
	}
	if tok != json.Delim('[') {
		return fmt.Errorf("got %v, want an array", tok)
	}
	for {
		tok, err := r.dec.Token()
		if err != nil {
			return err
		}
		if tok == json.Delim(']') {
			return nil
		}
		if err := r.value(f, tok, deep); err != nil {
			return err
		}
	}
}

func (r *jsonReader) value(f *field, tok json.Token, deep int) error {
	if f.kind == kindMessage {
		if tok != json.Delim('{') {
			return fmt.Errorf("got %v, want an object", tok)
		}
		r.out = protowire.AppendTag(r.out, f.num, protowire.BytesType)
		from := len(r.out)
		if err := r.fields(f.msg, deep); err != nil {
			return err
		}
		r.prefixLength(from)
		return nil
	}
	if _, nested := tok.(json.Delim); nested {
		return fmt.Errorf("got %v, want a single value", tok)
	}
	r.out = protowire.AppendTag(r.out, f.num, f.kind.wireType())
	switch f.kind.wireType() {
	case protowire.BytesType:
		return r.text(f, tok)
	case protowire.Fixed64Type:
		v, err := bits64(f.kind, tok)
		r.out = protowire.AppendFixed64(r.out, v)
		return err
	case protowire.Fixed32Type:
		v, err := unsigned(tok, 32)
		r.out = protowire.AppendFixed32(r.out, uint32(v))
		return err
	}
	v, err := varint(f.kind, tok)
	r.out = protowire.AppendVarint(r.out, v)
	return err
}

// prefixLength puts the length of what was written since from before it.
func (r *jsonReader) prefixLength(from int) {
	size := len(r.out) - from
	n := protowire.SizeVarint(uint64(size))
	var pad [10]byte
	r.out = append(r.out, pad[:n]...)
	copy(r.out[from+n:], r.out[from:from+size])
	protowire.AppendVarint(r.out[:from], uint64(size))
}

func (r *jsonReader) text(f *field, tok json.Token) error {
	s, ok := tok.(string)
	if !ok {
		return fmt.Errorf("got %v, want a string", tok)
	}
	switch f.kind {
	case kindTraceID, kindSpanID:
		id, err := hex.DecodeString(s)
		if err != nil {
			id = nil
		}
		r.out = protowire.AppendBytes(r.out, id)
	case kindBytes:
		b, err := base64.StdEncoding.DecodeString(s)
		if err != nil {
			if b, err = base64.RawURLEncoding.DecodeString(strings.TrimRight(s, "=")); err != nil {
				return fmt.Errorf("no base64: %w", err)
			}
		}
		r.out = protowire.AppendBytes(r.out, b)
	default:
		r.out = protowire.AppendString(r.out, s)
	}
	return nil
}

func bits64(k kind, tok json.Token) (uint64, error) {
	switch k {
	case kindDouble:
		v, err := double(tok)
		return math.Float64bits(v), err
	case kindSfixed64:
		v, err := signed(tok, 64)
		return uint64(v), err
	}
	return unsigned(tok, 64)
}

func varint(k kind, tok json.Token) (uint64, error) {
	switch k {
	case kindBool:
		b, ok := tok.(bool)
		if !ok {
			return 0, fmt.Errorf("got %v, want true or false", tok)
		}
		return protowire.EncodeBool(b), nil
	case kindEnum:
		n, ok := tok.(json.Number)
		if !ok {
			return 0, fmt.Errorf("got %v, want an integer: OTLP/JSON has no enum names", tok)
		}
		v, err := signed(n, 32)
		return uint64(v), err
	case kindInt64:
		v, err := signed(tok, 64)
		return uint64(v), err
	case kindSint32:
		v, err := signed(tok, 32)
		return protowire.EncodeZigZag(v), err
	case kindUint32:
		return unsigned(tok, 32)
	}
	return unsigned(tok, 64)
}

// digits returns the text of a number or of a string that holds one, with an
// exponent or a zero fraction (1e3, 5.0) written out, as protobuf's JSON allows.
func digits(tok json.Token) (string, error) {
	var s string
	switch v := tok.(type) {
	case json.Number:
		s = v.String()
	case string:
		s = v
	default:
		return "", fmt.Errorf("got %v, want a number", tok)
	}
	if strings.ContainsAny(s, ".eE") {
		f, err := strconv.ParseFloat(s, 64)
		if err != nil || f != math.Trunc(f) || math.Abs(f) > 1<<53 {
			return "", fmt.Errorf("%q is no integer", s)
		}
		s = strconv.FormatInt(int64(f), 10)
	}
	return s, nil
}

func signed(tok json.Token, size int) (int64, error) {
	s, err := digits(tok)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(s, 10, size)
}

func unsigned(tok json.Token, size int) (uint64, error) {
	s, err := digits(tok)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(s, 10, size)
}

func double(tok json.Token) (float64, error) {
	switch v := tok.(type) {
	case json.Number:
		return v.Float64()
	case string:
		switch v {
		case "NaN":
			return math.NaN(), nil
		case "Infinity":
			return math.Inf(1), nil
		case "-Infinity":
			return math.Inf(-1), nil
		}
		return strconv.ParseFloat(v, 64)
	}
	return 0, fmt.Errorf("got %v, want a number", tok)
}

// maxSkip is how deep an unknown field may nest: the tokenizer keeps a stack.
const maxSkip = 10_000

// skip reads the value of an unknown field.
func (r *jsonReader) skip() error {
	for deep := 0; ; {
		tok, err := r.dec.Token()
		if err != nil {
			return err
		}
		switch tok {
		case json.Delim('{'), json.Delim('['):
			if deep++; deep > maxSkip {
				return fmt.Errorf("unknown field nested deeper than %d", maxSkip)
			}
		case json.Delim('}'), json.Delim(']'):
			deep--
		}
		if deep == 0 {
			return nil
		}
	}
}
