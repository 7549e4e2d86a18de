package otlpwire

import (
	"errors"
	"fmt"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

const (
	// MaxDepth is how deep array and map values may nest. The generated decoder
	// would take 10,000 levels; pdata takes any number and dies of stack
	// overflow (collector issues 15301, 15603).
	MaxDepth = 64

	// maxFrames bounds the scanner's own stack: the frame of a request is at
	// most nine messages deep, a map adds three per level.
	maxFrames = 3*MaxDepth + 10
)

// ErrMalformed marks every refusal of Scan and FromJSON: the sender must not
// try again (INVALID_ARGUMENT, 400).
var ErrMalformed = errors.New("malformed OTLP request")

// Limits bounds what Scan and FromJSON accept in one request.
type Limits struct {
	// MaxElements is how many protobuf messages (items, attributes, values,
	// events and so on) a request may hold. A request of 8,192 spans with 30
	// attributes each has about 500,000.
	MaxElements int
}

// DefaultLimits accepts what an SDK or a collector sends and refuses what is
// sent to exhaust memory: the two wire bytes of an empty span cost a decoder
// about 230 bytes (collector issue 15302).
var DefaultLimits = Limits{MaxElements: 1 << 19}

// Report says what Scan found in a payload.
type Report struct {
	Items     int // spans, data points or log records, the invalid ones included
	Invalid   int // items whose IDs have a wrong length or are zero; see Prune
	Sanitised int // strings with invalid UTF-8, mended in place
}

type scanFrame struct {
	end  int
	msg  *message
	deep int // arrays and maps above and including this frame
}

// Scan checks a request before anything is allocated for its content: wire
// types, lengths, depth, number of elements, IDs and UTF-8. It does not
// allocate unless it fails. Bytes of a string that are no UTF-8 are overwritten
// with '?', so that one bad string does not cost the request its other items
// and the length stays as it was; Scan therefore writes to p.
//
// An error wraps [ErrMalformed] and names the message and the byte offset.
func Scan(sig Signal, p []byte, lim Limits) (Report, error) {
	var (
		rep   Report
		stack [maxFrames]scanFrame
		top   int
		ids   int // which IDs of the current span are sound: 1 trace, 2 span
		bad   bool
		elems int
		pos   int
	)
	stack[0] = scanFrame{end: len(p), msg: requests[sig]}
	for {
		for pos == stack[top].end {
			switch stack[top].msg.role {
			case span:
				rep.Items++
				if ids != 3 {
					rep.Invalid++
				}
			case record:
				rep.Items++
				if bad {
					rep.Invalid++
				}
			case point:
				rep.Items++
			}
			if top == 0 {
				return rep, nil
			}
			top--
		}
		at := &stack[top]
		tag, n := protowire.ConsumeVarint(p[pos:at.end])
		if n < 0 {
			return rep, malformed(at.msg, pos, "truncated tag")
		}
		num, typ := protowire.DecodeTag(tag)
		if num < protowire.MinValidNumber || num > protowire.MaxValidNumber {
			return rep, malformed(at.msg, pos, "invalid field number")
		}
		pos += n
		f := at.msg.lookup(num)
		if f != nil && f.kind.wireType() != typ && (typ != protowire.BytesType || !f.repeated) {
			return rep, malformed(at.msg, pos, "field %s has wire type %d, want %d", f.name, typ, f.kind.wireType())
		}
		switch typ {
		case protowire.VarintType:
			_, n = protowire.ConsumeVarint(p[pos:at.end])
		case protowire.Fixed64Type:
			_, n = protowire.ConsumeFixed64(p[pos:at.end])
		case protowire.Fixed32Type:
			_, n = protowire.ConsumeFixed32(p[pos:at.end])
		case protowire.BytesType:
			var b []byte
			b, n = protowire.ConsumeBytes(p[pos:at.end])
			if n < 0 || f == nil {
				break
			}
			switch f.kind {
			case kindMessage:
				if elems++; elems > lim.MaxElements {
					return rep, malformed(at.msg, pos, "more than %d elements in one request", lim.MaxElements)
				}
				deep := at.deep
				if f.msg.role == nest {
					if deep++; deep > MaxDepth {
						return rep, malformed(at.msg, pos, "values nested deeper than %d", MaxDepth)
					}
				}
				pos += n - len(b)
				top++
				stack[top] = scanFrame{end: pos + len(b), msg: f.msg, deep: deep}
				if f.msg.role == span || f.msg.role == record {
					ids, bad = 0, false
				}
				continue
			case kindString:
				if !utf8.Valid(b) {
					sanitise(b)
					rep.Sanitised++
				}
			case kindTraceID, kindSpanID:
				// IDs of links and exemplars are not items' IDs: as they are.
				switch at.msg.role {
				case span:
					if f.num <= 2 {
						ids = setID(ids, int(f.num), f.kind.validID(b))
					}
				case record:
					bad = bad || (len(b) != 0 && len(b) != f.kind.idLen())
				}
			case kindBytes:
			default: // packed
				if !validPacked(f.kind, b) {
					return rep, malformed(at.msg, pos, "packed field %s is cut short", f.name)
				}
			}
		default:
			return rep, malformed(at.msg, pos, "wire type %d", typ)
		}
		if n < 0 {
			return rep, malformed(at.msg, pos, "field %d is cut short or too long", num)
		}
		pos += n
	}
}

func setID(ids, bit int, ok bool) int {
	if ok {
		return ids | bit
	}
	return ids &^ bit
}

func (k kind) idLen() int {
	if k == kindTraceID {
		return 16
	}
	return 8
}

// validID reports whether b has the ID's length and is not all zero (W3C Trace
// Context).
func (k kind) validID(b []byte) bool {
	if len(b) != k.idLen() {
		return false
	}
	for _, c := range b {
		if c != 0 {
			return true
		}
	}
	return false
}

func validPacked(k kind, b []byte) bool {
	switch k.wireType() {
	case protowire.Fixed64Type:
		return len(b)%8 == 0
	case protowire.Fixed32Type:
		return len(b)%4 == 0
	}
	for len(b) > 0 {
		_, n := protowire.ConsumeVarint(b)
		if n < 0 {
			return false
		}
		b = b[n:]
	}
	return true
}

// sanitise overwrites every byte that is not part of valid UTF-8 with '?'.
func sanitise(b []byte) {
	for i := 0; i < len(b); {
		r, n := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError && n == 1 {
			b[i] = '?'
		}
		i += n
	}
}

func malformed(m *message, pos int, format string, args ...any) error {
	return fmt.Errorf("%w: %s at byte %d: %s", ErrMalformed, m.name, pos, fmt.Sprintf(format, args...))
}
