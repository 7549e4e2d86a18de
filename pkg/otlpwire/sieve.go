package otlpwire

import (
	"bytes"
	"math"

	"google.golang.org/protobuf/encoding/protowire"
)

// Mend returns a copy of payload without the items that Scan has counted as invalid, with the
// attributes of crowded ones cut, and with a '?' for every byte of a string that is not valid
// UTF-8, so that one bad item does not make the request lose the others. The copy is sound.
func Mend(sig Signal, payload []byte) ([]byte, error) {
	payload = bytes.Clone(payload)
	if _, err := scan(requests[sig], payload, Limits{MaxElements: math.MaxInt}, true); err != nil {
		return nil, err
	}
	s := sieve{mend: true}
	out, _, err := s.sift(make([]byte, 0, len(payload)), requests[sig], payload)
	return out, err
}

// Halve splits a payload into two with about equal numbers of items, to narrow down what does not
// fit or is refused. ok is false if there is only one item.
func Halve(sig Signal, payload []byte) (first, second []byte, ok bool) {
	n := Count(sig, payload)
	if n < 2 {
		return nil, nil, false
	}
	half := func(first bool) []byte {
		s := sieve{keep: func(item int) bool { return item < n/2 == first }}
		out, _, _ := s.sift(make([]byte, 0, len(payload)*3/4), requests[sig], payload)
		return out
	}
	return half(true), half(false), true
}

// Pick returns a payload with the items of the given numbers, which must be ascending.
func Pick(sig Signal, payload []byte, items []int) []byte {
	s := sieve{keep: func(item int) bool {
		if len(items) == 0 || items[0] != item {
			return false
		}
		items = items[1:]
		return true
	}}
	out, _, _ := s.sift(nil, requests[sig], payload)
	return out
}

// Count returns the number of items of a payload that Scan has accepted.
func Count(sig Signal, payload []byte) int { return count(requests[sig], payload) }

func count(m *message, b []byte) (n int) {
	_, from := points(m, b)
	for i := 0; i < len(b); {
		num, typ, value, end := nextField(b, i)
		if end < 0 {
			return n
		}
		at := i
		i = end
		switch f := m.leading(num, typ); {
		case f == nil || (f.oneof && at < from):
		case f.msg.role.item():
			n++
		default:
			n += count(f.msg, b[value:end])
		}
	}
	return n
}

// points returns the field that holds the points of a metric, and the offset from which it counts.
func points(m *message, b []byte) (f *field, from int) {
	if m.role != metricRole {
		return nil, 0
	}
	return lastOfOneof(m, b)
}

// leading returns the field if it is an item or contains items.
func (m *message) leading(num, typ int) *field {
	f := m.lookup(num)
	if f == nil || f.msg == nil || typ != bytesType || !f.msg.leads {
		return nil
	}
	return f
}

// sieve copies a payload and leaves items out: with mend the invalid ones, else those whose number
// is not listed.
type sieve struct {
	mend bool
	keep func(item int) bool
	seen int
}

// sift appends b, a message m, to dst and returns how many items it has kept. A
// message that would hold no item is left out, and so are unknown fields outside
// of items.
func (s *sieve) sift(dst []byte, m *message, b []byte) (out []byte, kept int, err error) {
	_, counts := points(m, b)
	if s.mend && m.role == metricRole && !named(b) {
		return dst, 0, nil
	}
	for i := 0; i < len(b); {
		num, typ, value, end := nextField(b, i)
		if end < 0 {
			return dst, kept, errTruncated
		}
		at, whole, content := i, b[i:end], b[value:end]
		i = end
		f := m.leading(num, typ)
		if f == nil {
			if m.lookup(num) != nil {
				dst = append(dst, whole...)
			}
			continue
		}
		if f.oneof && at < counts {
			continue
		}
		start := len(dst)
		dst = protowire.AppendTag(dst, FieldNumber(num), protowire.BytesType)
		from, n := len(dst), 0
		if f.msg.role.item() {
			dst, n = s.item(dst, f.msg, content)
		} else if dst, n, err = s.sift(dst, f.msg, content); err != nil {
			return dst, kept, err
		}
		if kept += n; n == 0 && !f.oneof { // the data of a metric may be spread over several fields
			dst = dst[:start]
			continue
		}
		dst = prefixLength(dst, from)
	}
	return dst, kept, nil
}

// item appends an item, if it is to be kept; n is 1 then.
func (s *sieve) item(dst []byte, m *message, item []byte) (out []byte, n int) {
	if !s.mend {
		at := s.seen
		s.seen++
		if !s.keep(at) {
			return dst, 0
		}
		return append(dst, item...), 1
	}
	rep, err := scan(m, item, Limits{MaxElements: math.MaxInt}, false)
	switch {
	case err != nil || rep.Invalid > 0:
		return dst, 0
	case rep.Crowded > 0:
		return appendUncrowded(dst, m, item), 1
	}
	return append(dst, item...), 1
}

// named reports whether a metric has a name.
func named(metric []byte) (yes bool) {
	for i := 0; i < len(metric); {
		num, _, value, end := nextField(metric, i)
		if end < 0 {
			return yes
		}
		if i = end; num == 1 {
			yes = end > value
		}
	}
	return yes
}

// appendUncrowded appends a span or log record with its first MaxAttributes
// attributes, and the number of the others added to its dropped_attributes_count.
func appendUncrowded(dst []byte, m *message, item []byte) []byte {
	attrs, dropped := m.byName["attributes"].num, m.byName["droppedAttributesCount"].num
	n, before := 0, uint64(0)
	for i := 0; i < len(item); {
		num, typ, value, end := nextField(item, i)
		if end < 0 {
			return dst
		}
		switch {
		case num == attrs && typ == bytesType:
			if n++; n <= MaxAttributes {
				dst = append(dst, item[i:end]...)
			}
		case num == dropped && typ == varintType:
			before = uint64(uint32(varintAt(item, value)))
		default:
			dst = append(dst, item[i:end]...)
		}
		i = end
	}
	dst = protowire.AppendTag(dst, FieldNumber(dropped), protowire.VarintType)
	return protowire.AppendVarint(dst, min(before+uint64(n-MaxAttributes), math.MaxUint32))
}

// prefixLength inserts the length of dst[from:] before it.
func prefixLength(dst []byte, from int) []byte {
	size := len(dst) - from
	n := protowire.SizeVarint(uint64(size))
	var pad [10]byte
	dst = append(dst, pad[:n]...)
	copy(dst[from+n:], dst[from:from+size])
	protowire.AppendVarint(dst[:from], uint64(size))
	return dst
}
