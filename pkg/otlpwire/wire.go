package otlpwire

import (
	"encoding/binary"
	"errors"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

var errTruncated = errors.New("truncated field")

// FieldNumber is a protobuf field number.
type FieldNumber = protowire.Number

// The wire types, as integers for the loops below.
const (
	varintType  = int(protowire.VarintType)
	fixed64Type = int(protowire.Fixed64Type)
	bytesType   = int(protowire.BytesType)
	fixed32Type = int(protowire.Fixed32Type)
)

// nextField reads the field that begins at b[i], i < len(b): its number and wire type, where its
// value begins (after the length, if it has one) and where the field ends. end is negative if the
// field is cut short, a group, or not a field.
func nextField(b []byte, i int) (num, typ, value, end int) { //nolint:gocyclo // a table: one case a wire type, with the lengths that most fields have read in place
	tag := uint64(b[i])
	if tag < 0x80 {
		i++
	} else if tag, i = shortVarint(b, i); i < 0 || tag>>3 > uint64(protowire.MaxValidNumber) {
		return 0, 0, 0, -1
	}
	num, typ = int(tag>>3), int(tag&7)
	if num == 0 {
		return 0, 0, 0, -1
	}
	switch typ {
	case fixed64Type:
		end = i + 8
	case fixed32Type:
		end = i + 4
	case varintType:
		if i < len(b) && b[i] < 0x80 {
			return num, typ, i, i + 1
		}
		_, end = shortVarint(b, i)
		return num, typ, i, end
	case bytesType:
		if i+1 < len(b) && b[i] >= 0x80 && b[i+1] < 0x80 { // 128 to 16,383 bytes
			if end = i + 2 + int(b[i]&0x7f) + int(b[i+1])<<7; end <= len(b) {
				return num, typ, i + 2, end
			}
		}
		size, i := shortVarint(b, i)
		if i < 0 || size > uint64(len(b)-i) {
			return num, typ, 0, -1
		}
		return num, typ, i, i + int(size)
	default:
		return num, typ, 0, -1
	}
	if end > len(b) {
		end = -1
	}
	return num, typ, i, end
}

// shortField returns the end of the field at b[i] if it has the most common form, a string or
// message of less than 128 bytes with a tag of one byte, else 0. Its number is b[i]>>3, its value
// begins at i+2. It is inlined; loops over all bytes try it before nextField.
func shortField(b []byte, i int) (end int) {
	if i+1 < len(b) && b[i]&0x87 == 2 && b[i] != 2 && b[i+1] < 0x80 {
		if end = i + 2 + int(b[i+1]); end > len(b) {
			end = 0
		}
	}
	return end
}

// shortVarint reads the varint at b[i], most of which have one or two bytes, and
// returns its end, -1 when it is cut short or does not fit into 64 bits.
func shortVarint(b []byte, i int) (v uint64, end int) {
	if i < len(b) && b[i] < 0x80 {
		return uint64(b[i]), i + 1
	}
	if i+1 < len(b) && b[i+1] < 0x80 {
		return uint64(b[i]&0x7f) | uint64(b[i+1])<<7, i + 2
	}
	v, n := protowire.ConsumeVarint(b[min(i, len(b)):])
	if n < 0 {
		return 0, -1
	}
	return v, i + n
}

// varintAt returns the value of a varint that nextField has found sound.
func varintAt(b []byte, i int) uint64 {
	if b[i] < 0x80 {
		return uint64(b[i])
	}
	v, _ := protowire.ConsumeVarint(b[i:])
	return v
}

// appendLen appends tag and length of a field of size bytes.
func appendLen(dst []byte, num FieldNumber, size int) []byte {
	dst = protowire.AppendTag(dst, num, protowire.BytesType)
	return protowire.AppendVarint(dst, uint64(size))
}

// lenSize is how many bytes a message of size bytes takes as a field with a tag
// of one byte.
func lenSize(size int) int { return 1 + protowire.SizeBytes(size) }

// shortLen reads the length at b[i], i < len(b), if it has one or two bytes, and returns where the
// content begins; size is negative if it has more.
func shortLen(b []byte, i int) (size, value int) {
	if size = int(b[i]); size < 0x80 {
		return size, i + 1
	}
	if i+1 < len(b) && b[i+1] < 0x80 {
		return size&0x7f | int(b[i+1])<<7, i + 2
	}
	return -1, i
}

// validUTF8 is utf8.Valid, but faster for short strings such as keys.
func validUTF8(b []byte) bool { return ascii(b) || utf8.Valid(b) }

// ascii reports whether b has only ASCII bytes. It reads words, the last of which may overlap the
// previous one.
func ascii(b []byte) bool {
	const beyond = 0x8080808080808080
	le := binary.LittleEndian
	n := len(b)
	switch {
	case n >= 8:
		or := le.Uint64(b[n-8:])
		for ; len(b) > 8; b = b[8:] {
			or |= le.Uint64(b)
		}
		return or&beyond == 0
	case n >= 4:
		return uint64(le.Uint32(b)|le.Uint32(b[n-4:]))&beyond == 0
	}
	var or byte
	for _, c := range b {
		or |= c
	}
	return or < utf8.RuneSelf
}
