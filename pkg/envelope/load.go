package envelope

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math"
	"strconv"
	"strings"
)

// Windows are the seconds over which a source says how much it took.
var Windows = [...]int64{1, 4, 16, 64}

// Load is how many items and bytes a source took in the last [Windows], by the time of
// their arrival. A partition sees a part of an instance's spans; by this it knows how
// many there were in all. The zero Load says nothing.
type Load struct {
	Items, Bytes [len(Windows)]int64
}

// Add adds what another source took.
func (l *Load) Add(other Load) {
	for i := range Windows {
		l.Items[i] += other.Items[i]
		l.Bytes[i] += other.Bytes[i]
	}
}

// Max keeps the higher of both, window by window.
func (l *Load) Max(other Load) {
	for i := range Windows {
		l.Items[i], l.Bytes[i] = max(l.Items[i], other.Items[i]), max(l.Bytes[i], other.Bytes[i])
	}
}

func (l *Load) each(visit func(*int64)) {
	for i := range Windows {
		visit(&l.Items[i])
		visit(&l.Bytes[i])
	}
}

// String writes items and bytes of each window, with commas between.
func (l Load) String() string {
	var parts []string
	l.each(func(n *int64) { parts = append(parts, strconv.FormatInt(*n, 10)) })
	return strings.Join(parts, ",")
}

// ParseLoad reads what String writes; an empty text is the zero Load.
func ParseLoad(text string) (l Load, err error) {
	if text == "" {
		return l, nil
	}
	parts := strings.Split(text, ",")
	if len(parts) != 2*len(Windows) {
		return l, fmt.Errorf("want %d numbers", 2*len(Windows))
	}
	l.each(func(n *int64) {
		v, failed := strconv.ParseInt(parts[0], 10, 64)
		if parts = parts[1:]; failed != nil || v < 0 || v > math.MaxInt64/1024 {
			err = fmt.Errorf("%d is no amount", v)
		}
		*n = v
	})
	if err != nil {
		return Load{}, err
	}
	return l, nil
}

// Append appends l as varints.
func (l Load) Append(dst []byte) []byte {
	l.each(func(n *int64) { dst = binary.AppendUvarint(dst, uint64(*n)) })
	return dst
}

// NextLoad reads what Append appends and returns the rest.
func NextLoad(b []byte) (l Load, rest []byte, ok bool) {
	ok = true
	l.each(func(n *int64) {
		var v uint64
		if ok {
			v, b, ok = uvarint(b, math.MaxInt64/1024)
		}
		*n = int64(v)
	})
	return l, b, ok
}

// SourceOf names who gave out a message id: an edge's spool, or a gateway.
func SourceOf(id string) uint32 {
	id = id[strings.LastIndexByte(id, '/')+1:]
	id, _, _ = strings.Cut(id, "-")
	h := fnv.New32a()
	_, _ = h.Write([]byte(id))
	return h.Sum32()
}

// Meter measures the load of one source. The zero Meter is ready.
type Meter struct {
	seconds [64]struct{ second, items, bytes int64 }
}

// Add takes in what arrived at, in Unix nanoseconds, and returns the load up to then.
func (m *Meter) Add(at, items, bytes int64) (l Load) {
	second := at / 1e9
	now := &m.seconds[second&63]
	if now.second != second {
		now.second, now.items, now.bytes = second, 0, 0
	}
	now.items += items
	now.bytes += bytes
	for back := range int64(len(m.seconds)) {
		s := &m.seconds[(second-back)&63]
		if s.second != second-back {
			continue
		}
		for i, w := range Windows {
			if back < w {
				l.Items[i] += s.items
				l.Bytes[i] += s.bytes
			}
		}
	}
	return l
}
