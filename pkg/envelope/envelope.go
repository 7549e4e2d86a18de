// Package envelope defines the formats of the bus: the identity of an instance, the header of a
// message, its compression, and the frames of the SPANS stream. docs/bus.md describes them for third
// parties.
//
// # Promises
//
//   - Decompress never returns more than [MaxBody], whatever a body declares, and allocates no
//     more than a few times that.
//   - An instance id that [Instance.Validate] accepts is exactly one subject
//     token: it has no dot, wildcard, space or control character.
//
// # Not here
//
// Publishing and reading messages: package bus.
package envelope

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
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

// Rest calls yield with the other attributes of an instance in a tokens file, by their keys there.
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
		return fmt.Errorf("instance id %q: want 1 to 128 letters, digits, '_' or '-', the first a letter or digit, because it becomes part of a NATS subject", i.ID)
	}
	return nil
}

// Stamp returns the attributes that are written into every resource of the instance. The identity is
// overwritten, the rest inserted where it is absent. Without a name the id is used; without a customer
// the attribute is removed, since a payload must not claim one.
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

// What an edge sends with a request to a gateway, in headers or metadata:
// the message id, which is unique within its instance, the arrival at the edge in Unix
// nanoseconds, and its load. Without them the gateway generates its own.
const (
	OriginID      = "penstock-id"
	OriginArrival = "penstock-arrival"
	OriginLoad    = "penstock-load"
)

// Header describes the body of a message.
type Header struct {
	ContentType string
	Encoding    Encoding
	Items       int    // spans, data points or log records in the body
	Arrival     int64  // when the sender's spool stored it, in Unix nanoseconds: the stream time
	ID          string // unique, and not predictable by another instance
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

// Bounds of header values, which penstock never exceeds but other senders may.
const (
	// MaxItems is how many items a message can hold: each takes at least two bytes.
	MaxItems = MaxBody / 2
	// maxID is how long a message id may be, in bytes: an instance id and two numbers.
	maxID = 256
)

// ParseHeader reads a header; get returns "" for a missing field. It fails on values that penstock
// never writes, so that foreign messages are detected where they are read.
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

// wrongField quotes a bounded part of what a sender has written.
func wrongField(name, value string) error {
	const enough = 64
	if len(value) > enough {
		return fmt.Errorf("header %s has %d bytes and begins with %q", name, len(value), value[:enough])
	}
	return fmt.Errorf("header %s is %q", name, value)
}

// How far a sender's clock may be off before the hub's clock is used instead. What an edge has kept
// during an outage of its hub is as old as the outage was long.
const (
	maxAhead  = time.Hour
	maxBehind = 90 * 24 * time.Hour
)

// Place replaces the arrival of a message by stored, the time at which the hub stored it, if the
// arrival is more than an hour later or more than 90 days earlier, and reports whether it did.
func (h *Header) Place(stored time.Time) (moved bool) {
	if at := h.Time(); at.After(stored.Add(maxAhead)) || at.Before(stored.Add(-maxBehind)) {
		h.Arrival, moved = stored.UnixNano(), true
	}
	return moved
}

// Time returns the arrival as a time.
func (h Header) Time() time.Time { return time.Unix(0, h.Arrival) }

// Frame is a part of a message of the SPANS stream, with spans of one instance.
type Frame struct {
	Instance string
	Arrival  int64  // Unix nanoseconds
	Seq      uint64 // of the message of TRACES that it comes from
	Source   uint32 // the publisher of that ([SourceOf]), and its recent load
	Load     Load
	Payload  []byte
}

// A payload in a frame may begin with this field, whose number OTLP's requests do not use: source
// (4 bytes big endian) and load. Readers of OTLP skip it.
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
	if f.Load != (Load{}) || f.Source != 0 {
		load := f.Load.Append(binary.BigEndian.AppendUint32(nil, f.Source))
		field = append(append(field, loadField, byte(len(load))), load...) // 4 + 4 * 9 bytes at the most
	}
	dst = binary.AppendUvarint(dst, uint64(len(field)+len(f.Payload)))
	return append(append(dst, field...), f.Payload...)
}

// cutLoad removes the field of the load from the payload.
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

// Sources are the sources of an instance in a domain that a sampler knows, each with its time when something last came of
// it, in Unix nanoseconds. The next owner of a partition waits for them as the previous one did.
type Sources struct {
	Domain   string
	Instance string
	Seen     map[uint32]int64
}

// sourcesMark begins a message of sources in DECISIONS. It is the length of an instance id that no message has,
// so that sinks of earlier versions skip such a message.
const sourcesMark = 1 << 40

// AppendSources appends the sources of instances, as a message of its own: the mark, and of each instance length
// and bytes of its id, and the number of its sources, as a varint, with four bytes of each and eight of its time,
// big endian.
func AppendSources(dst []byte, all []Sources) []byte {
	dst = binary.AppendUvarint(dst, sourcesMark)
	for _, s := range all {
		dst = appendName(dst, s.Domain, s.Instance)
		dst = binary.AppendUvarint(dst, uint64(len(s.Seen)))
		for _, source := range slices.Sorted(maps.Keys(s.Seen)) {
			dst = binary.BigEndian.AppendUint32(dst, source)
			dst = binary.BigEndian.AppendUint64(dst, uint64(s.Seen[source]))
		}
	}
	return dst
}

// ReadSources reads what AppendSources appends; is reports whether the message is one of sources.
func ReadSources(b []byte) (all []Sources, is bool, err error) {
	mark, rest, ok := uvarint(b, sourcesMark)
	if !ok || mark != sourcesMark {
		return nil, false, nil
	}
	for r := (reader{rest: rest}); len(r.rest) > 0; {
		s := Sources{Seen: map[uint32]int64{}}
		s.Domain, s.Instance = cutName(string(r.chunk()))
		for n := r.uvarint(maxSources); n > 0 && !r.failed; n-- {
			if source := r.bytes(4); source != nil {
				s.Seen[binary.BigEndian.Uint32(source)] = int64(r.uint64())
			}
		}
		if r.failed {
			return all, true, errSources
		}
		all = append(all, s)
	}
	return all, true, nil
}

// maxSources bounds the sources of an instance in a message.
const maxSources = 1 << 10

var errSources = errors.New("truncated sources")

// appendName appends length and bytes of an instance id, or of the name of a domain that is none, a slash and the id.
func appendName(dst []byte, domain, instance string) []byte {
	if domain == instance || domain == "" {
		dst = binary.AppendUvarint(dst, uint64(len(instance)))
		return append(dst, instance...)
	}
	dst = binary.AppendUvarint(dst, uint64(len(domain)+1+len(instance)))
	return append(append(append(dst, domain...), '/'), instance...)
}

func cutName(name string) (domain, instance string) {
	domain, instance, named := strings.Cut(name, "/")
	if !named {
		instance = domain
	}
	return domain, instance
}

// Decision is the sampling decision about a trace. One without an instance is a checkpoint: the
// backend has everything that the same sink has recorded before it.
type Decision struct {
	// Domain is that of the trace, and Instance the one whose budgets it took from; where an instance is a domain
	// of its own both are its id.
	Domain   string
	Instance string
	TraceID  otlpwire.TraceID
	Kept     bool
	// Upto is the sequence of SPANS up to which its spans were part of the decision.
	Upto uint64
	// Begun is the sequence of TRACES of its first span; recorded only where the domain is a named one.
	Begun uint64
	// Policy, of kept traces, is the policy that wanted it.
	Policy string
	// Threshold, of kept traces, is the rejection threshold in its spans' trace state
	// ([otlpwire.Annotation]).
	Threshold uint64
	// Spent is what the decision took from the instance's budgets for the period of Due; the next
	// owner needs it. Due, in Unix nanoseconds of stream time, and
	// Version, of the policies, are recorded only with it.
	Due     int64
	Version uint64
	Spent   []Spend

	// From is the lowest sequence of SPANS with its spans, where it may be read again; 0: not recorded. With it Late is
	// recorded, and At, when it was decided, in Unix nanoseconds by the time of most of its domain's sources.
	From uint64
	Late Late
	At   int64
}

// Late is what a decision has to do with late spans.
type Late uint8

// The cases.
const (
	OnTime     Late = iota // nothing
	Rescued                // they have turned "not kept" into kept: what stands from From to Upto is to be sent
	RescueSent             // the backend has that
)

// Spend is spans or bytes taken from one budget.
type Spend struct {
	Limiter int // its index among the limiters of the policies
	Amount  int64
}

// The bits of a decision's last byte.
const (
	decisionKept  = 1 << 0
	decisionSpent = 1 << 1
	decisionBegun = 1 << 2
)

// AppendDecision appends a decision: length and bytes of the instance id, the trace ID, and a byte
// of which the lowest bit says that the trace was kept, the next that budgets were spent, and the third that Begun follows
// Upto. Then
// Due follows as eight bytes big endian, the number of spends, and limiter and amount of each, as
// varints.
func AppendDecision(dst []byte, d Decision) []byte {
	dst = appendName(dst, d.Domain, d.Instance)
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
	named := d.Domain != "" && d.Domain != d.Instance
	if named {
		flags |= decisionBegun
	}
	dst = append(dst, flags)
	dst = binary.AppendUvarint(dst, d.Upto)
	if named {
		dst = binary.AppendUvarint(dst, d.Begun)
	}
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

// originsMark begins what follows the decisions of a message, and is no length of an instance id either.
const originsMark = sourcesMark + 1

// AppendDecisions appends a message of decisions: each by [AppendDecision], and if one has From, the mark, and for
// each the varint Late + 4 times From, and where that is not 0, At as eight bytes big endian.
func AppendDecisions(dst []byte, all ...Decision) []byte {
	for _, d := range all {
		dst = AppendDecision(dst, d)
	}
	if !slices.ContainsFunc(all, func(d Decision) bool { return d.From != 0 }) {
		return dst
	}
	dst = binary.AppendUvarint(dst, originsMark)
	for _, d := range all {
		if d.From == 0 {
			dst = append(dst, 0)
			continue
		}
		dst = binary.AppendUvarint(dst, d.From<<2+uint64(d.Late))
		dst = binary.BigEndian.AppendUint64(dst, uint64(d.At))
	}
	return dst
}

// ReadDecisions reads a message of decisions. After an error it returns those before it.
func ReadDecisions(b []byte) (all []Decision, err error) {
	for r := (reader{rest: b}); len(r.rest) > 0; {
		if mark, rest, ok := uvarint(r.rest, originsMark); ok && mark == originsMark {
			r.rest = rest
			return all, r.origins(all)
		}
		d := r.decision()
		if r.failed {
			return all, errDecision
		}
		all = append(all, d)
	}
	return all, nil
}

// origins reads what follows decisions.
func (r *reader) origins(all []Decision) error {
	for i := range all {
		d := &all[i]
		if n := r.uvarint(math.MaxInt64); n > 3 {
			d.From, d.Late, d.At = n>>2, Late(n&3), int64(r.uint64())
		} else if n > 0 {
			r.failed = true
		}
	}
	if r.failed || len(r.rest) > 0 {
		return errDecision
	}
	return nil
}

// decision reads the next decision.
func (r *reader) decision() (d Decision) {
	instance := r.chunk()
	if len(instance) == 0 {
		return d
	}
	d.Domain, d.Instance = cutName(string(instance))
	copy(d.TraceID[:], r.bytes(len(d.TraceID)))
	flags := r.byte()
	d.Upto = r.uvarint(math.MaxInt64)
	if flags&decisionBegun != 0 {
		d.Begun = r.uvarint(math.MaxInt64)
	}
	if d.Kept = flags&decisionKept != 0; d.Kept {
		d.Policy = string(r.chunk())
		d.Threshold = r.uvarint(otlpwire.Unknown)
	}
	if flags&decisionSpent != 0 {
		d.Due = int64(r.uint64())
		d.Version = r.uvarint(math.MaxInt64)
		for n := r.uvarint(maxSpends); n > 0 && !r.failed; n-- {
			limiter, amount := r.uvarint(maxSpends), r.uvarint(math.MaxInt64)
			d.Spent = append(d.Spent, Spend{int(limiter), int64(amount)})
		}
	}
	return d
}

// reader reads one value after the other. When one is cut short or out of its bounds, all that
// follow are zero.
type reader struct {
	rest   []byte
	failed bool
}

// bytes returns the next n bytes, nil when there are not as many.
func (r *reader) bytes(n int) (content []byte) {
	if r.failed = r.failed || n > len(r.rest); r.failed {
		return nil
	}
	content, r.rest = r.rest[:n], r.rest[n:]
	return content
}

func (r *reader) byte() byte {
	if b := r.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if b := r.bytes(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *reader) uvarint(limit uint64) (v uint64) {
	if r.failed {
		return 0
	}
	v, rest, ok := uvarint(r.rest, limit)
	r.rest, r.failed = rest, !ok
	return v
}

func (r *reader) chunk() (content []byte) {
	if r.failed {
		return nil
	}
	content, rest, ok := chunk(r.rest)
	r.rest, r.failed = rest, !ok
	return content
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
