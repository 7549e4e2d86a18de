package otlpwire

import (
	"cmp"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
)

// Splitter cuts payloads by a key. It keeps its scratch space between calls;
// the zero Splitter is ready. It is not safe for concurrent use.
type Splitter struct {
	items  []splitItem
	scopes [][]byte // the scopes of the resource at hand, without their items
	rest   []byte   // of the resource at hand: every field but its scopes
	head   []byte   // backing for scopes that had to be put together
	out    []byte
}

type splitItem struct {
	key   int
	scope int
	raw   []byte // the item as a complete field 2 of its scope
}

// Split calls emit once for every key of every resource, in the order of keys,
// with a payload that holds the items of that key in their order, under a copy
// of their resource and scope with schema URLs. keyOf sees the bytes of a span,
// metric or log record; a negative key leaves the item out. The payload that
// emit gets is valid until emit returns.
func (s *Splitter) Split(payload []byte, keyOf func(item []byte) int, emit func(key int, payload []byte)) error {
	for len(payload) > 0 {
		num, body, raw, err := nextField(payload)
		if err != nil {
			return err
		}
		payload = payload[len(raw):]
		if num != 1 || body == nil {
			continue
		}
		if err := s.collect(body, keyOf); err != nil {
			return err
		}
		s.emit(emit)
	}
	return nil
}

// collect reads one resource into the scratch space.
func (s *Splitter) collect(body []byte, keyOf func([]byte) int) error {
	s.items, s.scopes, s.rest, s.head = s.items[:0], s.scopes[:0], s.rest[:0], s.head[:0]
	return eachField(body, func(num protowire.Number, scope, raw []byte) error {
		if num != 2 || scope == nil {
			s.rest = append(s.rest, raw...)
			return nil
		}
		from := len(s.head)
		err := eachField(scope, func(num protowire.Number, item, raw []byte) error {
			if num != 2 || item == nil {
				s.head = append(s.head, raw...)
				return nil
			}
			if key := keyOf(item); key >= 0 {
				s.items = append(s.items, splitItem{key: key, scope: len(s.scopes), raw: raw})
			}
			return nil
		})
		// A grown s.head leaves earlier scopes on the old array, which is as good.
		s.scopes = append(s.scopes, s.head[from:len(s.head):len(s.head)])
		return err
	})
}

// emit writes the collected items out, key by key.
func (s *Splitter) emit(emit func(int, []byte)) {
	byKey := func(a, b splitItem) int { return cmp.Compare(a.key, b.key) }
	if !slices.IsSortedFunc(s.items, byKey) {
		slices.SortStableFunc(s.items, byKey)
	}
	for items := s.items; len(items) > 0; {
		n := 1
		for n < len(items) && items[n].key == items[0].key {
			n++
		}
		s.out = s.appendResource(s.out[:0], items[:n])
		emit(items[0].key, s.out)
		items = items[n:]
	}
}

func (s *Splitter) appendResource(dst []byte, items []splitItem) []byte {
	size := len(s.rest)
	for run := range scopeRuns(items) {
		size += protowire.SizeTag(2) + protowire.SizeBytes(s.scopeSize(run))
	}
	dst = appendLen(dst, 1, size)
	dst = append(dst, s.rest...)
	for run := range scopeRuns(items) {
		dst = appendLen(dst, 2, s.scopeSize(run))
		dst = append(dst, s.scopes[run[0].scope]...)
		for _, it := range run {
			dst = append(dst, it.raw...)
		}
	}
	return dst
}

func (s *Splitter) scopeSize(run []splitItem) int {
	size := len(s.scopes[run[0].scope])
	for _, it := range run {
		size += len(it.raw)
	}
	return size
}

// scopeRuns yields the stretches of items that share a scope.
func scopeRuns(items []splitItem) func(yield func([]splitItem) bool) {
	return func(yield func([]splitItem) bool) {
		for len(items) > 0 {
			n := 1
			for n < len(items) && items[n].scope == items[0].scope {
				n++
			}
			if !yield(items[:n]) {
				return
			}
			items = items[n:]
		}
	}
}

// Prune returns payload without the items that Scan counted as invalid.
func Prune(sig Signal, payload []byte) ([]byte, error) {
	valid := func(item []byte) int {
		if sig == Metrics || validIDs(sig, item) {
			return 0
		}
		return -1
	}
	return keep(payload, valid)
}

// Halve cuts a payload into two of about equal numbers of spans, metrics or log
// records, so that what a backend refuses can be narrowed down. ok is false when
// there is only one left.
func Halve(payload []byte) (first, second []byte, ok bool) {
	n := 0
	Walk(payload, func(Item) bool { n++; return true })
	if n < 2 {
		return nil, nil, false
	}
	i := 0
	half := func(want int) []byte {
		i = 0
		out, _ := keep(payload, func([]byte) int {
			i++
			if (i <= n/2) == (want == 0) {
				return 0
			}
			return -1
		})
		return out
	}
	return half(0), half(1), true
}

func keep(payload []byte, keyOf func([]byte) int) ([]byte, error) {
	var s Splitter
	out := make([]byte, 0, len(payload))
	err := s.Split(payload, keyOf, func(_ int, p []byte) { out = append(out, p...) })
	return out, err
}

// validIDs applies the rules of Scan to one span or log record.
func validIDs(sig Signal, item []byte) bool {
	ids, bad := 0, false
	_ = eachField(item, func(num protowire.Number, body, _ []byte) error {
		f := spanMsg.lookup(num)
		if sig == Logs {
			f = logRecord.lookup(num)
		}
		if f == nil || body == nil || (f.kind != kindTraceID && f.kind != kindSpanID) {
			return nil
		}
		if sig == Logs {
			bad = bad || (len(body) != 0 && len(body) != f.kind.idLen())
		} else if num <= 2 {
			ids = setID(ids, int(num), f.kind.validID(body))
		}
		return nil
	})
	if sig == Logs {
		return !bad
	}
	return ids == 3
}
