package otlpwire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

const (
	// MaxDepth is how deep array and map values may nest. The generated decoder would accept 10,000
	// levels; pdata accepts any number and dies of a stack overflow (collector issues 15301, 15603).
	MaxDepth = 64

	// MaxAttributes is how many attributes of one item are kept; SDKs stop at
	// 128. A span or log record with more is cut by [Mend], which adds the rest
	// to dropped_attributes_count; a data point with more is invalid, since
	// another set of attributes would be another time series.
	MaxAttributes = 1024

	// The scale of an exponential histogram at which one bucket spans all of float64, and the scale
	// at which every float64 has its own bucket.
	minScale, maxScale = -11, 52

	// maxFrames bounds the scanner's own stack: the frame of a request is at
	// most nine messages deep, a map adds three per level.
	maxFrames = 3*MaxDepth + 10
)

// ErrMalformed marks every refusal of Scan and FromJSON: the sender must not retry
// (INVALID_ARGUMENT, 400).
var ErrMalformed = errors.New("malformed OTLP request")

// Limits bounds what Scan and FromJSON accept in one request.
type Limits struct {
	// MaxElements is how many protobuf messages (items, attributes, values,
	// events and so on) a request may hold. A request of 8,192 spans with 30
	// attributes each has about 500,000.
	MaxElements int
	// MaxBytes bounds the output of FromJSON, 0 for no bound: a number of one digit is eight bytes
	// on the wire.
	MaxBytes int
}

// DefaultLimits accepts what an SDK or a collector sends and refuses what is
// sent to exhaust memory: the two wire bytes of an empty span cost a decoder
// about 230 bytes (collector issue 15302).
var DefaultLimits = Limits{MaxElements: 1 << 19}

// Report says what Scan found in a payload.
type Report struct {
	Items      int // spans, data points or log records, the invalid ones included
	Invalid    int // items that no backend would accept
	Crowded    int // items with more than MaxAttributes attributes, of those that are valid
	BadStrings int // strings that are not valid UTF-8
}

// Sound reports whether the payload needs no change; if it does, see [Mend].
func (r Report) Sound() bool { return r.Invalid == 0 && r.Crowded == 0 && r.BadStrings == 0 }

// scanner is the state of one Scan besides its place in the bytes.
type scanner struct {
	rep  Report
	mend bool // overwrite invalid UTF-8

	// State of the current item.
	bad    bool
	ids    uint8 // of a span: 1 trace ID, 2 span ID
	attrs  int
	bounds int
	bound  float64 // the last one
	side   int     // of the current buckets: 0 of a histogram, 1 and 2 of an exponential one
	counts [3]int  // by side; repeated message fields are merged
	offset [3]int64

	// State of the current metric.
	data    int // the field that holds its points; the last on the wire counts
	named   bool
	points  int
	invalid int
}

type scanFrame struct {
	end  int
	msg  *message
	deep int // arrays and maps above and including this frame
}

// Scan checks a request before anything is allocated for its content: wire
// types, lengths, depth, number of elements, IDs, histograms and UTF-8. It reads
// every byte once and does not allocate unless it fails.
//
// An item is invalid if a backend would refuse it, and everything sent with it:
//
//   - a span without exactly one trace ID of 16 bytes and one span ID of 8, not
//     all zero; any other ID whose length is neither right nor zero
//   - a point of a metric without a name; a histogram whose bucket counts are not
//     one more than its bounds (as many, where the last bound is infinite), or whose
//     bounds are not rising; an
//     exponential histogram whose scale is beyond -11 to 52 or whose buckets leave
//     the range of an int32 (OTLP metrics.proto)
//
// An error wraps [ErrMalformed] and names the message and the byte offset.
func Scan(sig Signal, p []byte, lim Limits) (Report, error) {
	return scan(requests[sig], p, lim, false)
}

// scan is Scan for the bytes of any message. With mend it overwrites invalid UTF-8 in p with '?',
// which leaves all lengths unchanged.
func scan(msg *message, p []byte, lim Limits, mend bool) (Report, error) { //nolint:gocyclo // one loop over the fields of all messages, with its stack in local variables
	var (
		s     = scanner{mend: mend}
		stack [maxFrames]scanFrame
		top   int
		elems int
		pos   int

		end  = len(p) // together with msg and deep the top frame
		deep int
	)
	for {
		for pos == end {
			s.leave(msg)
			if top == 0 {
				return s.rep, nil
			}
			top--
			msg, end, deep = stack[top].msg, stack[top].end, stack[top].deep
		}
		num, typ, value, next := int(p[pos]>>3), bytesType, pos+2, shortField(p[:end], pos)
		if next == 0 {
			if num, typ, value, next = nextField(p[:end], pos); next < 0 {
				return s.rep, fieldError(msg, p[:end], pos)
			}
		}
		if num > maxField {
			pos = next
			continue
		}
		st := &msg.steps[num]
		if int(st.wire) != typ {
			if st.wire != unknown && (typ != bytesType || !st.pack) {
				return s.rep, malformed(msg, pos, "field %s has wire type %d, want %d", msg.byNum[num].name, typ, st.wire)
			}
			if st.wire == unknown {
				pos = next
				continue
			}
		}
		switch st.check {
		case checkNothing:
		case checkMessage:
			row := 0
			if st.msg.role == attribute {
				after, n := plainAttributes(p[:end], pos)
				if row = n; n > 0 {
					next = after
				}
				if msg.role.item() {
					s.attrs += max(row, 1)
				}
			}
			if elems += max(2*row, 1); elems > lim.MaxElements { // a plain attribute has a value
				return s.rep, malformed(msg, pos, "more than %d elements in one request", lim.MaxElements)
			}
			if row > 0 {
				break
			}
			if st.data {
				s.enterData(num)
			}
			stack[top] = scanFrame{end: end, msg: msg, deep: deep}
			top++
			if st.msg.role == nest {
				if deep++; deep > MaxDepth {
					return s.rep, malformed(msg, pos, "values nested deeper than %d", MaxDepth)
				}
			}
			msg, end, pos = st.msg, next, value
			s.enter(msg, num)
			continue
		case checkString:
			s.text(p[value:next])
		case checkName:
			s.text(p[value:next])
			s.named = next > value
		case checkID:
			s.id(msg.byNum[num].kind, p[value:next])
		case checkItemID:
			s.itemID(num, msg.byNum[num].kind, p[value:next])
		default:
			if !s.numbers(st, typ, msg.byNum[num].kind, p[value:next]) {
				return s.rep, malformed(msg, pos, "packed field %s is cut short", msg.byNum[num].name)
			}
		}
		pos = next
	}
}

// enter is called where a message begins, with the number of its field.
func (s *scanner) enter(m *message, num int) {
	switch {
	case m.role.item():
		s.bad, s.ids, s.attrs, s.bounds, s.side = false, 0, 0, 0, 0
		s.counts, s.offset = [3]int{}, [3]int64{}
	case m.role == metricRole:
		s.data, s.named, s.points, s.invalid = 0, false, 0, 0
	case m.role == buckets:
		s.side = num - positiveBuckets + 1
	}
}

// enterData is called where the points of a metric begin. Points of another kind
// before them do not count: the fields are a oneof.
func (s *scanner) enterData(num int) {
	if s.data != num {
		s.rep.Items -= s.points
		s.rep.Invalid -= s.invalid
		s.data, s.points, s.invalid = num, 0, 0
	}
}

// leave is called where a message ends.
func (s *scanner) leave(m *message) {
	switch m.role {
	case span:
		s.item(s.bad || s.ids != 3)
	case record:
		s.item(s.bad)
	case point:
		s.point(s.bad)
	case histogramPoint:
		s.point(s.bad || s.misfit())
	case metricRole:
		if !s.named {
			s.rep.Invalid += s.points - s.invalid
		}
	}
}

// item counts a span or a log record.
func (s *scanner) item(bad bool) {
	s.rep.Items++
	if bad {
		s.rep.Invalid++
	} else if s.attrs > MaxAttributes {
		s.rep.Crowded++
	}
}

// point counts a point of a metric.
func (s *scanner) point(bad bool) {
	s.rep.Items++
	s.points++
	beyond := max(s.offset[1]+int64(s.counts[1]), s.offset[2]+int64(s.counts[2])) > math.MaxInt32
	if bad || beyond || s.attrs > MaxAttributes {
		s.rep.Invalid++
		s.invalid++
	}
}

// misfit reports whether a histogram has another number of buckets than its bounds make.
func (s *scanner) misfit() bool {
	if s.counts[0] == 0 && s.bounds == 0 || s.counts[0] == s.bounds+1 {
		return false
	}
	empty := s.bounds > 0 && math.IsInf(s.bound, 1) // no bucket lies above
	return !empty || s.counts[0] != s.bounds
}

func (s *scanner) text(b []byte) {
	if !validUTF8(b) {
		s.rep.BadStrings++
		if s.mend {
			sanitise(b)
		}
	}
}

func (s *scanner) id(k kind, b []byte) {
	if len(b) != 0 && len(b) != k.idLen() {
		s.bad = true
	}
}

// itemID checks an ID of a span. A repeated ID is invalid, so that readers that use the first and
// readers that use the last agree about the span.
func (s *scanner) itemID(num int, k kind, b []byte) {
	if s.ids&uint8(num) != 0 || !k.validID(b) {
		s.bad = true
	}
	s.ids |= uint8(num)
}

// numbers checks a repeated number, packed or not, and the constraints of a histogram. It returns
// false if b ends within a number.
func (s *scanner) numbers(st *step, typ int, k kind, b []byte) bool {
	n := 1
	if typ == bytesType && st.pack {
		if n = packedLen(k, b); n < 0 {
			return false
		}
	}
	switch st.check {
	case checkCounts:
		s.counts[s.side] += n
	case checkBounds:
		for ; len(b) >= 8; b = b[8:] {
			v := math.Float64frombits(binary.LittleEndian.Uint64(b))
			if math.IsNaN(v) || (s.bounds > 0 && v <= s.bound) {
				s.bad = true
			}
			s.bound = v
			s.bounds++
		}
	case checkScale:
		if v := sint32(b); v < minScale || v > maxScale {
			s.bad = true
		}
	case checkOffset:
		s.offset[s.side] = int64(sint32(b))
	}
	return true
}

func sint32(b []byte) int32 {
	return int32(protowire.DecodeZigZag(varintAt(b, 0) & math.MaxUint32))
}

// packedLen returns how many numbers b holds, or -1 when it ends within one.
func packedLen(k kind, b []byte) (n int) {
	switch k.wireType() {
	case protowire.Fixed64Type:
		if len(b)%8 != 0 {
			return -1
		}
		return len(b) / 8
	case protowire.Fixed32Type:
		if len(b)%4 != 0 {
			return -1
		}
		return len(b) / 4
	}
	for i := 0; i < len(b); n++ {
		if _, i = shortVarint(b, i); i < 0 {
			return -1
		}
	}
	return n
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
	if k == kindTraceID {
		return len(b) == 16 && binary.LittleEndian.Uint64(b)|binary.LittleEndian.Uint64(b[8:]) != 0
	}
	return len(b) == 8 && binary.LittleEndian.Uint64(b) != 0
}

// minAttribute is the shortest field that plainAttributes knows: an empty key and a
// bool, with all their tags and lengths.
const minAttribute = 8

// plainAttributes skips consecutive attributes in the form in which encoders write most of them:
// each under the tag at p[pos], a key, then a value of one string or number, with lengths of one or
// two bytes, in valid UTF-8. It returns where they end and how many there are. It is a faster way
// to the result that Scan would have; Scan continues after them. A tag of more than one byte ends
// them, too: the rest of it is read as a length, which is 0.
func plainAttributes(p []byte, pos int) (next, n int) { //nolint:gocyclo // most bytes of a request go through this loop: with a function for one attribute it is 5 % slower
	for tag := p[pos]; pos+minAttribute <= len(p) && p[pos] == tag; n++ {
		size, at := shortLen(p, pos+1)
		end := at + size
		if size < minAttribute-2 || end > len(p) || p[at] != 0x0a {
			break
		}
		size, key := shortLen(p, at+1)
		val := key + size
		if size < 0 || val+4 > end || p[val] != 0x12 {
			break
		}
		size, in := shortLen(p, val+1)
		if size < 2 || in+size != end {
			break
		}
		ok := false
		switch p[in] {
		case 0x0a: // string
			size, text := shortLen(p, in+1)
			short := at == pos+2 // all lengths are of one byte, which is ASCII, as the tags are
			ok = text+size == end && (short && ascii(p[pos:end]) || validUTF8(p[key:val]) && validUTF8(p[text:end]))
		case 0x10, 0x18: // bool, int
			_, stop := shortVarint(p[:end], in+1)
			ok = stop == end && validUTF8(p[key:val])
		case 0x21: // double
			ok = end-in == 9 && validUTF8(p[key:val])
		}
		if !ok {
			break
		}
		pos = end
	}
	return pos, n
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

// fieldError describes what is wrong with the field at b[pos], which nextField has refused.
func fieldError(m *message, b []byte, pos int) error {
	tag, n := protowire.ConsumeVarint(b[pos:])
	if n < 0 {
		return malformed(m, pos, "truncated tag")
	}
	num, typ := protowire.DecodeTag(tag)
	if num < protowire.MinValidNumber || num > protowire.MaxValidNumber {
		return malformed(m, pos, "invalid field number")
	}
	if typ > protowire.Fixed32Type || typ == protowire.StartGroupType || typ == protowire.EndGroupType {
		return malformed(m, pos, "wire type %d", typ)
	}
	return malformed(m, pos, "field %d is cut short or too long", num)
}

func malformed(m *message, pos int, format string, args ...any) error {
	return fmt.Errorf("%w: %s at byte %d: %s", ErrMalformed, m.name, pos, fmt.Sprintf(format, args...))
}
