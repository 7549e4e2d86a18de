package envelope

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math"
	"strconv"
	"strings"
)

// Windows are the seconds over which a source reports how much it received.
var Windows = [...]int64{1, 4, 16, 64}

// Load is how many items a source received in the last [Windows], by the time of their arrival. A
// partition sees only a part of an instance's spans; from the load it knows how many there were in
// total. The zero Load means unknown. A sender may lie about it: nothing that protects others may
// depend on it.
type Load [len(Windows)]int64

// Max keeps the higher of both, window by window.
func (l *Load) Max(other Load) {
	for i := range l {
		l[i] = max(l[i], other[i])
	}
}

// String returns the items of each window, separated by commas.
func (l Load) String() string {
	var parts []string
	for _, n := range l {
		parts = append(parts, strconv.FormatInt(n, 10))
	}
	return strings.Join(parts, ",")
}

// maxLoad keeps sums and products of loads from overflowing.
const maxLoad = math.MaxInt64 / (1 << 20)

// ParseLoad reads what String writes; an empty text is the zero Load.
func ParseLoad(text string) (l Load, err error) {
	if text == "" {
		return l, nil
	}
	parts := strings.Split(text, ",")
	if len(parts) != len(l) {
		return l, fmt.Errorf("want %d numbers", len(l))
	}
	for i, part := range parts {
		if l[i], err = strconv.ParseInt(part, 10, 64); err != nil || l[i] < 0 || l[i] > maxLoad {
			return Load{}, fmt.Errorf("%q is not a number of items", part)
		}
	}
	return l, nil
}

// Append appends l as varints.
func (l Load) Append(dst []byte) []byte {
	for _, n := range l {
		dst = binary.AppendUvarint(dst, uint64(n))
	}
	return dst
}

// NextLoad reads what Append appends and returns the rest.
func NextLoad(b []byte) (l Load, rest []byte, ok bool) {
	for i := range l {
		var v uint64
		if v, b, ok = uvarint(b, maxLoad); !ok {
			return Load{}, nil, false
		}
		l[i] = int64(v)
	}
	return l, b, true
}

// SourceOf identifies the process that assigned a message id: an edge's spool, or a gateway.
func SourceOf(id string) uint32 {
	id = id[strings.LastIndexByte(id, '/')+1:]
	id, _, _ = strings.Cut(id, "-")
	h := fnv.New32a()
	_, _ = h.Write([]byte(id))
	return h.Sum32()
}

// Numbered splits the id of a message that an edge has sent to the hub: its spool, and the number of the
// message among those of its signal, which has no gaps. ok is false for all other ids; through a gateway an
// edge sends several of its messages as one.
func Numbered(id string) (spool string, number uint64, ok bool) {
	spool, digits, _ := strings.Cut(id, "-")
	number, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || len(spool) != spoolLength || number == 0 {
		return "", 0, false
	}
	return spool, number, true
}

// spoolLength is that of a spool's nonce: 16 bytes in hexadecimal digits.
const spoolLength = 32

// Meter measures the load of one source. The zero Meter is ready to use.
type Meter struct {
	seconds [64]struct{ second, items int64 }
}

// Add adds items that arrived at the given time, in Unix nanoseconds, and returns the load up to then.
// Items that were not stored after all are subtracted by a second call with a negative number.
func (m *Meter) Add(at, items int64) (l Load) {
	second := at / 1e9
	now := &m.seconds[second&63]
	if now.second != second {
		now.second, now.items = second, 0
	}
	now.items += items
	for back := range int64(len(m.seconds)) {
		s := &m.seconds[(second-back)&63]
		if s.second != second-back {
			continue
		}
		for i, w := range Windows {
			if back < w {
				l[i] += s.items
			}
		}
	}
	return l
}
