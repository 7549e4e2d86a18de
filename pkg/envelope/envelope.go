// Package envelope defines what travels on the bus: the identity of an
// instance, the header of a message, its compression, and the frames of the
// SPANS stream. docs/bus.md states the same for third parties.
//
// # Promises
//
//   - Decompress never returns more than [MaxBody], whatever a body claims, and
//     allocates no more than a few times that.
//   - An instance id that [Instance.Validate] accepts is exactly one subject
//     token: no dot, wildcard, space or control character gets through.
//
// # Not here
//
// How a message gets on the bus: package bus.
package envelope

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math"
	"regexp"
	"strconv"
	"time"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// Instance is one AppServer deployment.
type Instance struct {
	ID          string // instance.id; a subject token
	Name        string // instance.name
	Customer    string // customer.id
	Namespace   string // service.namespace
	Environment string // deployment.environment
}

// Rest calls yield with what else a tokens file says of an instance, by its keys there.
func (i Instance) Rest() iter.Seq2[string, string] {
	return func(yield func(key, value string) bool) {
		for _, field := range [][2]string{
			{"instance_name", i.Name}, {"customer_id", i.Customer}, {"service_namespace", i.Namespace}, {"deployment_environment", i.Environment},
		} {
			if field[1] != "" && !yield(field[0], field[1]) {
				return
			}
		}
	}
}

var idGrammar = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,127}$`)

// Validate reports whether the id can be a subject token.
func (i Instance) Validate() error {
	if !idGrammar.MatchString(i.ID) {
		return fmt.Errorf("instance id %q: want 1 to 128 letters, digits, '_' or '-', the first a letter or digit: it becomes a part of a NATS subject", i.ID)
	}
	return nil
}

// Stamp returns what is written into every resource of the instance. Identity
// is overwritten, the rest inserted where it is absent. A name that is not set is
// the id; a customer that is not set is removed, since a payload must not claim
// one.
func (i Instance) Stamp() *otlpwire.Stamp {
	if i.Name == "" {
		i.Name = i.ID
	}
	var s otlpwire.Stamp
	s.Overwrite("instance.id", i.ID)
	s.Overwrite("instance.name", i.Name)
	s.Overwrite("customer.id", i.Customer)
	if i.Namespace != "" {
		s.Insert("service.namespace", i.Namespace)
	}
	if i.Environment != "" {
		s.InsertUnless("deployment.environment", "deployment.environment.name", i.Environment)
	}
	return &s
}

// The names of the headers of a message.
const (
	HeaderContentType     = "Content-Type"
	HeaderContentEncoding = "Content-Encoding"
	HeaderItems           = "Penstock-Items"
	HeaderArrival         = "Penstock-Arrival"
	HeaderID              = "Nats-Msg-Id"
	HeaderLoad            = "Penstock-Load"

	ContentTypeOTLP      = "application/x-protobuf"
	ContentTypeFrames    = "application/x-penstock-spans"
	ContentTypeDecisions = "application/x-penstock-decisions"
	ContentTypeJSON      = "application/json"
)

// What an edge says of a request that it sends to a gateway, in headers or metadata:
// the message id, which counts within its own instance, the arrival at the edge in Unix
// nanoseconds, and its load. Without them the gateway makes its own.
const (
	OriginID      = "penstock-id"
	OriginArrival = "penstock-arrival"
	OriginLoad    = "penstock-load"
)

// Header is what a message says of its body.
type Header struct {
	ContentType string
	Encoding    Encoding
	Items       int    // spans, data points or log records in the body
	Arrival     int64  // when the sender's spool took it, in Unix nanoseconds: the stream time
	ID          string // unique, and not to be guessed by another instance
	Load        Load   // of its source; traces only
}

// Fields calls set for every header field in a fixed order.
func (h Header) Fields(set func(name, value string)) {
	set(HeaderContentType, h.ContentType)
	if h.Encoding != "" {
		set(HeaderContentEncoding, string(h.Encoding))
	}
	set(HeaderItems, strconv.Itoa(h.Items))
	set(HeaderArrival, strconv.FormatInt(h.Arrival, 10))
	if h.ID != "" {
		set(HeaderID, h.ID)
	}
	if h.Load != (Load{}) {
		set(HeaderLoad, h.Load.String())
	}
}

// What no penstock goes beyond in a header, and a sender of something else may.
const (
	// MaxItems is how many items a message can hold: each takes two bytes at the least.
	MaxItems = MaxBody / 2
	// maxID is how long a message id may be, in bytes: an instance id and two numbers.
	maxID = 256
)

// ParseHeader reads a header; get returns "" for a field that is not there. It
// fails on what no penstock writes, so that a message of someone else is found
// at the door.
func ParseHeader(get func(name string) string) (h Header, err error) {
	h.ContentType, h.Encoding, h.ID = get(HeaderContentType), Encoding(get(HeaderContentEncoding)), get(HeaderID)
	if h.ContentType != ContentTypeOTLP && h.ContentType != ContentTypeFrames && h.ContentType != ContentTypeDecisions && h.ContentType != ContentTypeJSON {
		return Header{}, wrongField(HeaderContentType, h.ContentType)
	}
	if h.Encoding != "" && h.Encoding != S2 && h.Encoding != Zstd {
		return Header{}, wrongField(HeaderContentEncoding, string(h.Encoding))
	}
	if len(h.ID) > maxID {
		return Header{}, wrongField(HeaderID, h.ID)
	}
	if h.Items, err = strconv.Atoi(get(HeaderItems)); err != nil || h.Items < 0 || h.Items > MaxItems {
		return Header{}, wrongField(HeaderItems, get(HeaderItems))
	}
	if h.Arrival, err = strconv.ParseInt(get(HeaderArrival), 10, 64); err != nil {
		return Header{}, wrongField(HeaderArrival, get(HeaderArrival))
	}
	if h.Load, err = ParseLoad(get(HeaderLoad)); err != nil {
		return Header{}, wrongField(HeaderLoad, get(HeaderLoad))
	}
	return h, nil
}

// wrongField quotes what a sender has written, not all of it.
func wrongField(name, value string) error {
	const enough = 64
	if len(value) > enough {
		return fmt.Errorf("header %s has %d bytes and begins with %q", name, len(value), value[:enough])
	}
	return fmt.Errorf("header %s is %q", name, value)
}

// How far a sender's clock may be off before that of the hub is taken instead. What an edge
// has kept while its hub was away is as old as that was long.
const (
	maxAhead  = time.Hour
	maxBehind = 90 * 24 * time.Hour
)

// Place makes stored, when the hub got the message, the arrival of a message whose own is
// more than an hour later or more than 90 days earlier, and reports whether it was.
func (h *Header) Place(stored time.Time) (moved bool) {
	if at := h.Time(); at.After(stored.Add(maxAhead)) || at.Before(stored.Add(-maxBehind)) {
		h.Arrival, moved = stored.UnixNano(), true
	}
	return moved
}

// Time returns the arrival as a time.
func (h Header) Time() time.Time { return time.Unix(0, h.Arrival) }

// Frame is a stretch of one instance's spans in a message of the SPANS stream.
type Frame struct {
	Instance string
	Arrival  int64  // Unix nanoseconds
	Seq      uint64 // of the message of TRACES that it comes from
	Source   uint32 // who published that ([SourceOf]), and what of late
	Load     Load
	Payload  []byte
}

// A payload in a frame may begin with this field, of a number that OTLP's requests do
// not have: source (4 bytes big endian) and load. Readers of OTLP skip it.
const loadField = 15<<3 | 2

// AppendFrame appends a frame: length and bytes of the instance id, arrival as
// eight bytes big endian, sequence, length and bytes of the payload; sequence and
// lengths are varints.
func AppendFrame(dst []byte, f Frame) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(f.Instance)))
	dst = append(dst, f.Instance...)
	dst = binary.BigEndian.AppendUint64(dst, uint64(f.Arrival))
	dst = binary.AppendUvarint(dst, f.Seq)
	var field []byte
	if f.Load != (Load{}) {
		load := f.Load.Append(binary.BigEndian.AppendUint32(nil, f.Source))
		field = append(append(field, loadField, byte(len(load))), load...) // 4 + 4 * 9 bytes at the most
	}
	dst = binary.AppendUvarint(dst, uint64(len(field)+len(f.Payload)))
	return append(append(dst, field...), f.Payload...)
}

// cutLoad takes the field of the load off the payload.
func (f *Frame) cutLoad() bool {
	if len(f.Payload) < 2 || f.Payload[0] != loadField {
		return true
	}
	field, rest, ok := chunk(f.Payload[1:])
	if !ok || len(field) < 4 {
		return false
	}
	f.Source, f.Payload = binary.BigEndian.Uint32(field), rest
	f.Load, _, ok = NextLoad(field[4:])
	return ok
}

var errFrame = errors.New("truncated frame")

// NextFrame reads the first frame of b and returns the rest. The payload is a
// part of b.
func NextFrame(b []byte) (f Frame, rest []byte, err error) {
	instance, b, ok := chunk(b)
	if !ok || len(b) < 8 {
		return f, nil, errFrame
	}
	f.Instance = string(instance)
	f.Arrival = int64(binary.BigEndian.Uint64(b))
	if f.Seq, b, ok = uvarint(b[8:], math.MaxInt64); ok {
		f.Payload, rest, ok = chunk(b)
	}
	if !ok || !f.cutLoad() {
		return f, nil, errFrame
	}
	return f, rest, Instance{ID: f.Instance}.Validate()
}

// Decision says what became of a trace. One without an instance is a checkpoint:
// what the same sink has recorded before it, the backend has.
type Decision struct {
	Instance string
	TraceID  otlpwire.TraceID
	Kept     bool
	// Upto is the sequence of SPANS up to which its spans were part of the decision.
	Upto uint64
	// Policy, of kept traces, is the policy that wanted it.
	Policy string
	// Threshold, of kept traces, is what its spans' trace state says of the chance
	// to be kept ([otlpwire.Annotation]).
	Threshold uint64
	// Spent is what the decision took out of the instance's budgets for the period
	// of Due, for the next owner. Due, in Unix nanoseconds of stream time, and
	// Version, of the policies, are recorded only with it.
	Due     int64
	Version uint64
	Spent   []Spend
}

// Spend is spans or bytes taken out of one budget.
type Spend struct {
	Limiter int // its place among those of the policies
	Amount  int64
}

// The bits of a decision's last byte.
const (
	decisionKept  = 1 << 0
	decisionSpent = 1 << 1
)

// AppendDecision appends a decision: length and bytes of the instance id, the
// trace ID, and a byte of which the lowest bit says that the trace was kept and
// the next that budgets were spent from. Then Due follows as eight bytes big
// endian, the number of spends, and limiter and amount of each, as varints.
func AppendDecision(dst []byte, d Decision) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(d.Instance)))
	dst = append(dst, d.Instance...)
	if d.Instance == "" {
		return dst
	}
	dst = append(dst, d.TraceID[:]...)
	flags := byte(0)
	if d.Kept {
		flags |= decisionKept
	}
	if len(d.Spent) > 0 {
		flags |= decisionSpent
	}
	dst = append(dst, flags)
	dst = binary.AppendUvarint(dst, d.Upto)
	if d.Kept {
		dst = binary.AppendUvarint(dst, uint64(len(d.Policy)))
		dst = append(dst, d.Policy...)
		dst = binary.AppendUvarint(dst, d.Threshold)
	}
	if len(d.Spent) == 0 {
		return dst
	}
	dst = binary.BigEndian.AppendUint64(dst, uint64(d.Due))
	dst = binary.AppendUvarint(dst, d.Version)
	dst = binary.AppendUvarint(dst, uint64(len(d.Spent)))
	for _, sp := range d.Spent {
		dst = binary.AppendUvarint(dst, uint64(sp.Limiter))
		dst = binary.AppendUvarint(dst, uint64(sp.Amount))
	}
	return dst
}

var errDecision = errors.New("truncated decision")

// maxSpends bounds the limiters of a recorded decision; policies have fewer.
const maxSpends = 1 << 12

// NextDecision reads the first decision of b and returns the rest.
func NextDecision(b []byte) (d Decision, rest []byte, err error) {
	instance, b, ok := chunk(b)
	if ok && len(instance) == 0 {
		return d, b, nil
	}
	if !ok || len(b) < len(d.TraceID)+1 {
		return d, nil, errDecision
	}
	d.Instance = string(instance)
	n := copy(d.TraceID[:], b)
	flags := b[n]
	b = b[n+1:]
	d.Kept = flags&decisionKept != 0
	if d.Upto, b, ok = uvarint(b, math.MaxInt64); !ok {
		return d, nil, errDecision
	}
	if d.Kept {
		var policy []byte
		if policy, b, ok = chunk(b); ok {
			d.Policy = string(policy)
			d.Threshold, b, ok = uvarint(b, otlpwire.Unknown)
		}
		if !ok {
			return d, nil, errDecision
		}
	}
	if flags&decisionSpent == 0 {
		return d, b, nil
	}
	if len(b) < 8 {
		return d, nil, errDecision
	}
	d.Due = int64(binary.BigEndian.Uint64(b))
	d.Version, b, ok = uvarint(b[8:], math.MaxInt64)
	var count uint64
	if ok {
		count, b, ok = uvarint(b, maxSpends)
	}
	for range count {
		var limiter, amount uint64
		if ok {
			limiter, b, ok = uvarint(b, maxSpends)
		}
		if ok {
			amount, b, ok = uvarint(b, math.MaxInt64)
		}
		if !ok {
			break
		}
		d.Spent = append(d.Spent, Spend{int(limiter), int64(amount)})
	}
	if !ok {
		return d, nil, errDecision
	}
	return d, b, nil
}

// uvarint reads a varint of at most limit.
func uvarint(b []byte, limit uint64) (v uint64, rest []byte, ok bool) {
	v, n := binary.Uvarint(b)
	if n <= 0 || v > limit {
		return 0, nil, false
	}
	return v, b[n:], true
}

func chunk(b []byte) (content, rest []byte, ok bool) {
	n, size := binary.Uvarint(b)
	if size <= 0 || n > uint64(len(b)-size) {
		return nil, nil, false
	}
	b = b[size:]
	return b[:n], b[n:], true
}
