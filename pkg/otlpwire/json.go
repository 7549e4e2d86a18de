package otlpwire

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
)

// FromJSON converts an OTLP/JSON request to protobuf bytes appended to dst, by the rules of the
// OTLP specification: IDs in hex of either case, enums as integers only, 64-bit integers as decimal
// strings or numbers, lowerCamelCase names only, unknown fields ignored. sanitised counts the
// strings in which invalid UTF-8, or a lone surrogate, became U+FFFD. An ID that is not hex becomes
// one of a wrong length, which Scan reports as invalid.
//
// It is stricter than the specification in one point: a known name that occurs twice in one object
// is an error, since readers differ on which one counts. And it is more lenient in one: null in an
// array, which JavaScript writes for a hole, is skipped, or keeps the place of a value
// ([jsonReader.null]).
//
// It bounds nesting by [MaxDepth], and messages and bytes by lim, and allocates
// next to nothing beyond dst. Its errors wrap [ErrMalformed] and name the byte
// offset.
func FromJSON(dst []byte, sig Signal, text []byte, lim Limits) (out []byte, sanitised int, err error) {
	out, notes, err := ReadJSON(dst, sig, text, lim)
	return out, notes.Sanitised, err
}

// Notes is what ReadJSON reports about a request besides its content.
type Notes struct {
	Sanitised int    // strings that were repaired
	Unknown   string // the first name that OTLP does not have in an item, or in a message around items
}

// ReadJSON is FromJSON with more results.
func ReadJSON(dst []byte, sig Signal, text []byte, lim Limits) (out []byte, n Notes, err error) {
	r := jsonReader{text: text, lim: lim, out: dst, maxLen: math.MaxInt}
	if lim.MaxBytes > 0 {
		r.maxLen = len(dst) + lim.MaxBytes
	}
	if err := r.request(requests[sig]); err != nil {
		return dst, Notes{}, fmt.Errorf("%w: JSON at byte %d: %w", ErrMalformed, r.pos, err)
	}
	return r.out, Notes{r.sanitised, r.unknown}, nil
}

const (
	// maxNumber is how long a number may be in text.
	maxNumber = 512

	// maxUnknown is how much of an unknown name is kept.
	maxUnknown = 60

	// maxSkip is how deep an unknown field may nest.
	maxSkip = 10_000
)

type jsonReader struct {
	text      []byte
	pos       int
	lim       Limits
	elems     int
	sanitised int
	unknown   string
	out       []byte
	maxLen    int      // of out
	name      [32]byte // a field's name that was written with escapes
}

func (r *jsonReader) request(m *message) error {
	if r.peek() != '{' {
		return r.unexpected("an object")
	}
	if err := r.object(m, 0); err != nil {
		return err
	}
	if r.peek() != 0 || r.pos < len(r.text) {
		return errors.New("unexpected data after the request")
	}
	return r.bounded()
}

func (r *jsonReader) bounded() error {
	if len(r.out) > r.maxLen {
		return fmt.Errorf("more than %d bytes as protobuf", r.lim.MaxBytes)
	}
	return nil
}

// peek skips white space and returns the byte there, 0 at the end.
func (r *jsonReader) peek() byte {
	for ; r.pos < len(r.text); r.pos++ {
		switch c := r.text[r.pos]; c {
		case ' ', '\t', '\n', '\r':
		default:
			return c
		}
	}
	return 0
}

func (r *jsonReader) unexpected(want string) error {
	if r.pos >= len(r.text) {
		return errors.New("the request is cut short")
	}
	return fmt.Errorf("got %q, want %s", r.text[r.pos], want)
}

func (r *jsonReader) expect(c byte, want string) error {
	if r.peek() != c {
		return r.unexpected(want)
	}
	r.pos++
	return nil
}

// next moves to the next element of a list that ends with end: more is false at its end.
func (r *jsonReader) next(first bool, end byte, want string) (more bool, err error) {
	c := r.peek()
	switch {
	case c == end && end != 0:
		r.pos++
		return false, nil
	case first:
		return true, nil
	case c != ',':
		return false, r.unexpected("a comma")
	}
	r.pos++
	if r.peek() == end {
		return false, r.unexpected(want)
	}
	return true, nil
}

// object reads an object at its '{' and appends its known fields.
func (r *jsonReader) object(m *message, deep int) error {
	if m.role == nest {
		if deep++; deep > MaxDepth {
			return fmt.Errorf("values nested deeper than %d", MaxDepth)
		}
	}
	if r.elems++; r.elems > r.lim.MaxElements {
		return r.tooMany()
	}
	r.pos++
	var seen uint32 // by field number
	for first := true; ; first = false {
		more, err := r.next(first, '}', "a name")
		if err != nil || !more {
			return err
		}
		name, err := r.fieldName()
		if err != nil {
			return err
		}
		f := m.byName[string(name)]
		if err := r.expect(':', "a colon"); err != nil {
			return err
		}
		if f == nil {
			if m.leads && r.unknown == "" {
				r.unknown = cmp.Or(string(name[:min(len(name), maxUnknown)]), "?") // empty, or long and not plain
			}
			if err := r.skip(0); err != nil {
				return err
			}
			continue
		}
		if seen&(1<<f.num) != 0 {
			return fmt.Errorf("%s occurs twice in one object", f.name)
		}
		seen |= 1 << f.num
		if err := r.member(f, deep); err != nil {
			return inField(f, err)
		}
	}
}

// jsonError is a path of names and what is wrong at its end.
type jsonError struct {
	path string
	err  error
}

func (e *jsonError) Error() string { return e.path + ": " + e.err.Error() }

// inField puts a name before an error. Only the last few names are kept: a hostile request nests
// deep.
func inField(f *field, err error) error {
	const longest = 200
	if e, ok := errors.AsType[*jsonError](err); ok {
		if len(e.path) < longest {
			e.path = f.name + "." + e.path
		}
		return e
	}
	return &jsonError{f.name, err}
}

func (r *jsonReader) member(f *field, deep int) error {
	c := r.peek()
	if c == 'n' { // null is the default value
		return r.literal("null")
	}
	if !f.repeated {
		return r.value(f, deep)
	}
	if c != '[' {
		return r.unexpected("an array")
	}
	r.pos++
	for first := true; ; first = false {
		more, err := r.next(first, ']', "a value")
		if err != nil || !more {
			return err
		}
		if r.peek() == 'n' {
			err = r.null(f)
		} else {
			err = r.value(f, deep)
		}
		if err != nil {
			return err
		}
	}
}

// null reads a null in an array. In an array of values an empty value takes its place, in an array
// of numbers 0, or NaN for floating-point numbers, which no bound can be. Among messages and
// strings it is skipped.
func (r *jsonReader) null(f *field) error {
	if err := r.literal("null"); err != nil {
		return err
	}
	num := FieldNumber(f.num)
	switch {
	case f.msg == anyValue:
		if r.elems++; r.elems > r.lim.MaxElements {
			return r.tooMany()
		}
		r.out = append(protowire.AppendTag(r.out, num, protowire.BytesType), 0)
	case f.kind == kindDouble:
		r.out = protowire.AppendFixed64(protowire.AppendTag(r.out, num, protowire.Fixed64Type), math.Float64bits(math.NaN()))
	case f.kind.wireType() == protowire.Fixed64Type:
		r.out = protowire.AppendFixed64(protowire.AppendTag(r.out, num, protowire.Fixed64Type), 0)
	case f.kind.wireType() == protowire.VarintType:
		r.out = append(protowire.AppendTag(r.out, num, protowire.VarintType), 0)
	}
	return r.bounded()
}

func (r *jsonReader) tooMany() error {
	return fmt.Errorf("more than %d elements in one request", r.lim.MaxElements)
}

func (r *jsonReader) value(f *field, deep int) error {
	if err := r.bounded(); err != nil {
		return err
	}
	c := r.peek()
	if f.kind == kindMessage {
		if c != '{' {
			return r.unexpected("an object")
		}
		r.out = protowire.AppendTag(r.out, FieldNumber(f.num), protowire.BytesType)
		from := len(r.out)
		if err := r.object(f.msg, deep); err != nil {
			return err
		}
		r.out = prefixLength(r.out, from)
		return nil
	}
	r.out = protowire.AppendTag(r.out, FieldNumber(f.num), f.kind.wireType())
	switch f.kind.wireType() {
	case protowire.BytesType:
		if c != '"' {
			return r.unexpected("a string")
		}
		return r.bytes(f.kind)
	case protowire.Fixed64Type:
		v, err := r.bits64(f.kind)
		r.out = protowire.AppendFixed64(r.out, v)
		return err
	case protowire.Fixed32Type:
		v, err := r.unsigned(32)
		r.out = protowire.AppendFixed32(r.out, uint32(v))
		return err
	}
	v, err := r.varint(f.kind)
	r.out = protowire.AppendVarint(r.out, v)
	return err
}

// bytes reads a string into a length-delimited field whose tag is written.
func (r *jsonReader) bytes(k kind) error {
	from := len(r.out)
	if err := r.str(true); err != nil {
		return err
	}
	s := r.out[from:]
	switch k {
	case kindTraceID, kindSpanID:
		n, err := hex.Decode(s, s) // in place: it never writes beyond what it has read
		if err != nil {
			n = copy(s, "?")
		}
		r.out = r.out[:from+n]
	case kindBytes:
		n, err := decodeBase64(s)
		if err != nil {
			return err
		}
		r.out = r.out[:from+n]
	}
	r.out = prefixLength(r.out, from)
	return nil
}

// decodeBase64 decodes in place, the standard alphabet or the one for URLs, with
// or without padding, as protobuf's JSON does.
func decodeBase64(s []byte) (int, error) {
	s = bytes.TrimRight(s, "=")
	for i, c := range s {
		switch c {
		case '-':
			s[i] = '+'
		case '_':
			s[i] = '/'
		}
	}
	n, err := base64.RawStdEncoding.Decode(s, s)
	if err != nil {
		return 0, fmt.Errorf("invalid base64: %w", err)
	}
	return n, nil
}

func (r *jsonReader) bits64(k kind) (uint64, error) {
	switch k {
	case kindDouble:
		v, err := r.double()
		return math.Float64bits(v), err
	case kindSfixed64:
		v, err := r.signed(64)
		return uint64(v), err
	}
	return r.unsigned(64)
}

func (r *jsonReader) varint(k kind) (uint64, error) {
	switch k {
	case kindBool:
		if r.peek() == 't' {
			return 1, r.literal("true")
		}
		return 0, r.literal("false")
	case kindEnum:
		if r.peek() == '"' {
			return 0, errors.New("got a string, want an integer: OTLP/JSON has no enum names")
		}
		v, err := r.signed(32)
		return uint64(v), err
	case kindInt64:
		v, err := r.signed(64)
		return uint64(v), err
	case kindInt32:
		v, err := r.signed(32)
		return uint64(v), err
	case kindSint32:
		v, err := r.signed(32)
		return protowire.EncodeZigZag(v), err
	case kindUint32:
		return r.unsigned(32)
	}
	return r.unsigned(64)
}

func (r *jsonReader) literal(want string) error {
	if !bytes.HasPrefix(r.text[min(r.pos, len(r.text)):], []byte(want)) {
		return r.unexpected(want)
	}
	r.pos += len(want)
	return nil
}

// integer reads a number, or a string that holds one, and writes it without
// exponent and fraction (1.7e18, 5.0), which protobuf's JSON allows where the value
// is whole.
func (r *jsonReader) integer() ([]byte, error) {
	s, err := r.numberText()
	if err != nil || !bytes.ContainsAny(s, ".eE") {
		return s, err
	}
	mantissa, exponent, _ := bytes.Cut(bytes.ReplaceAll(s, []byte("E"), []byte("e")), []byte("e"))
	shift := 0
	if len(exponent) > 0 {
		if shift, err = strconv.Atoi(string(exponent)); err != nil {
			return nil, fmt.Errorf("%.40q is out of range", s)
		}
	}
	whole, fraction, _ := bytes.Cut(mantissa, []byte("."))
	digits := append(bytes.Clone(whole), fraction...)
	shift -= len(fraction)
	if len(bytes.Trim(digits, "-0")) == 0 {
		return []byte("0"), nil
	}
	for ; shift < 0 && bytes.HasSuffix(digits, []byte("0")); shift++ {
		digits = digits[:len(digits)-1]
	}
	const longest = 20 // digits of a 64-bit number
	switch {
	case shift < 0:
		return nil, fmt.Errorf("%.40q is not an integer", s)
	case shift > longest:
		return nil, fmt.Errorf("%.40q is out of range", s)
	}
	return append(digits, bytes.Repeat([]byte("0"), shift)...), nil
}

func (r *jsonReader) signed(size int) (int64, error) {
	s, err := r.integer()
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseInt(string(s), 10, size)
	return v, numberError(s, err)
}

func (r *jsonReader) unsigned(size int) (uint64, error) {
	s, err := r.integer()
	if err != nil {
		return 0, err
	}
	if string(s) == "-0" {
		return 0, nil
	}
	v, err := strconv.ParseUint(string(s), 10, size)
	return v, numberError(s, err)
}

func (r *jsonReader) double() (float64, error) {
	quoted := r.peek() == '"'
	s, err := r.numberText()
	if err != nil {
		return 0, err
	}
	if quoted {
		switch string(s) {
		case "NaN":
			return math.NaN(), nil
		case "Infinity":
			return math.Inf(1), nil
		case "-Infinity":
			return math.Inf(-1), nil
		}
	}
	v, err := strconv.ParseFloat(string(s), 64)
	return v, numberError(s, err)
}

// numberError describes a number that strconv has refused, which may be long.
func numberError(s []byte, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, strconv.ErrRange):
		return fmt.Errorf("%.40q is out of range", s)
	}
	return fmt.Errorf("%.40q is not a number of this type", s)
}

// numberText reads a number or the content of a string, which the caller parses.
func (r *jsonReader) numberText() ([]byte, error) {
	c := r.peek()
	from := r.pos
	if c == '"' {
		n := bytes.IndexAny(r.text[from+1:min(len(r.text), from+maxNumber)], `"\`)
		if n < 0 {
			return nil, r.unexpected("a number")
		}
		s := r.text[from+1 : from+1+n]
		if r.text[from+1+n] == '"' {
			r.pos += n + 2
		} else {
			var err error
			if s, err = r.escapedName(); err != nil {
				return nil, err
			}
		}
		if !isNumber(s) && string(s) != "NaN" && string(s) != "Infinity" && string(s) != "-Infinity" {
			return nil, fmt.Errorf("got %q, want a number", s[:min(len(s), 40)])
		}
		return s, nil
	}
	end := from
	for end < len(r.text) && end-from < maxNumber && isNumberByte(r.text[end]) {
		end++
	}
	s := r.text[from:end]
	if !isNumber(s) {
		return nil, r.unexpected("a number")
	}
	r.pos = end
	return s, nil
}

func isNumberByte(c byte) bool {
	return '0' <= c && c <= '9' || c == '-' || c == '+' || c == '.' || c == 'e' || c == 'E'
}

// isNumber reports whether s is a number by RFC 8259, section 6.
func isNumber(s []byte) bool { //nolint:gocyclo // the grammar of RFC 8259, part by part
	digits := func() bool {
		n := 0
		for n < len(s) && '0' <= s[n] && s[n] <= '9' {
			n++
		}
		s = s[n:]
		return n > 0
	}
	if len(s) > 0 && s[0] == '-' {
		s = s[1:]
	}
	if len(s) > 1 && s[0] == '0' && '0' <= s[1] && s[1] <= '9' {
		return false
	}
	if !digits() {
		return false
	}
	if len(s) > 0 && s[0] == '.' {
		if s = s[1:]; !digits() {
			return false
		}
	}
	if len(s) > 0 && (s[0] == 'e' || s[0] == 'E') {
		s = s[1:]
		if len(s) > 0 && (s[0] == '+' || s[0] == '-') {
			s = s[1:]
		}
		if !digits() {
			return false
		}
	}
	return len(s) == 0
}

// skip reads the value of an unknown field.
func (r *jsonReader) skip(deep int) error { //nolint:gocyclo // a table: one case a kind of value
	if deep > maxSkip {
		return fmt.Errorf("unknown field nested deeper than %d", maxSkip)
	}
	switch c := r.peek(); c {
	case '{', '[':
		r.pos++
		for first := true; ; first = false {
			more, err := r.next(first, c+2, "a value") // '}' and ']' follow '{' and '[' by two
			if err != nil || !more {
				return err
			}
			if c == '{' {
				if err := r.str(false); err != nil {
					return err
				}
				if err := r.expect(':', "a colon"); err != nil {
					return err
				}
			}
			if err := r.skip(deep + 1); err != nil {
				return err
			}
		}
	case '"':
		return r.str(false)
	case 't':
		return r.literal("true")
	case 'f':
		return r.literal("false")
	case 'n':
		return r.literal("null")
	}
	from := r.pos
	for r.pos < len(r.text) && isNumberByte(r.text[r.pos]) {
		r.pos++
	}
	if !isNumber(r.text[from:r.pos]) {
		r.pos = from
		return r.unexpected("a value")
	}
	return nil
}
