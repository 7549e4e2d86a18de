package otlpwire

import (
	"errors"
	"unicode/utf16"
	"unicode/utf8"
)

var (
	errString = errors.New("string without an end")
	errEscape = errors.New("invalid escape in a string")
	errRaw    = errors.New("control character in a string")
)

// str reads the string at its '"' and, if keep is true, appends its content to out: escapes
// resolved, and invalid UTF-8 or a lone surrogate as U+FFFD.
func (r *jsonReader) str(keep bool) error {
	if r.peek() != '"' {
		return r.unexpected("a string")
	}
	b := r.text
	mended := false
	for i := r.pos + 1; i < len(b); {
		// A run of bytes that is copied unchanged.
		from := i
		for i < len(b) && plainByte(b[i]) {
			i++
		}
		if keep {
			r.out = append(r.out, b[from:i]...)
		}
		if i >= len(b) {
			break
		}
		if err := r.bounded(); err != nil {
			return err
		}
		if b[i] == '"' {
			r.pos = i + 1
			if mended && keep {
				r.sanitised++
			}
			return nil
		}
		if b[i] < ' ' {
			r.pos = i
			return errRaw
		}
		v, n, lost := character(b[i:])
		if n == 0 {
			r.pos = i
			return errEscape
		}
		mended = mended || lost
		if keep {
			r.out = utf8.AppendRune(r.out, v)
		}
		i += n
	}
	r.pos = len(b)
	return errString
}

// plainByte reports whether a byte of a string is copied as it is.
func plainByte(c byte) bool { return c >= ' ' && c < utf8.RuneSelf && c != '"' && c != '\\' }

// character reads the character of a string at b[0] that is not copied as it is: an escape, or one
// beyond ASCII. n is its length, 0 for no valid escape; lost says that it stands as U+FFFD.
func character(b []byte) (v rune, n int, lost bool) {
	if b[0] == '\\' {
		return unescape(b)
	}
	v, n = utf8.DecodeRune(b)
	return v, n, v == utf8.RuneError && n == 1
}

// unescape reads the escape at b[0] and returns its length, 0 if it is not valid. lone says that it
// was half of a surrogate pair.
func unescape(b []byte) (v rune, n int, lone bool) {
	if len(b) < 2 {
		return 0, 0, false
	}
	switch b[1] {
	case '"', '\\', '/':
		return rune(b[1]), 2, false
	case 'b':
		return '\b', 2, false
	case 'f':
		return '\f', 2, false
	case 'n':
		return '\n', 2, false
	case 'r':
		return '\r', 2, false
	case 't':
		return '\t', 2, false
	case 'u':
		v, ok := hex4(b[2:])
		if !ok {
			return 0, 0, false
		}
		if !utf16.IsSurrogate(v) {
			return v, 6, false
		}
		if len(b) >= 12 && b[6] == '\\' && b[7] == 'u' {
			if low, ok := hex4(b[8:]); ok {
				if pair := utf16.DecodeRune(v, low); pair != utf8.RuneError {
					return pair, 12, false
				}
			}
		}
		return utf8.RuneError, 6, true
	}
	return 0, 0, false
}

func hex4(b []byte) (v rune, ok bool) {
	if len(b) < 4 {
		return 0, false
	}
	for _, c := range b[:4] {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		v = v<<4 | rune(c)
	}
	return v, true
}

// fieldName reads a name. Known names are short and consist of plain letters: any other name is
// returned in a form that no field has.
func (r *jsonReader) fieldName() ([]byte, error) {
	if r.peek() != '"' {
		return nil, r.unexpected("a name")
	}
	from := r.pos + 1
	for i := from; i < len(r.text); i++ {
		switch c := r.text[i]; {
		case c == '"':
			r.pos = i + 1
			return r.text[from:i], nil
		case c < ' ' || c == '\\' || c >= utf8.RuneSelf:
			return r.escapedName()
		}
	}
	r.pos = len(r.text)
	return nil, errString
}

// escapedName reads a short string with escapes, using the output as a buffer. A long one becomes
// empty.
func (r *jsonReader) escapedName() ([]byte, error) {
	from, sanitised := len(r.out), r.sanitised
	err := r.str(true)
	n := copy(r.name[:], r.out[from:])
	if len(r.out)-from > len(r.name) {
		n = 0
	}
	r.out, r.sanitised = r.out[:from], sanitised
	return r.name[:n], err
}
