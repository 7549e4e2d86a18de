package prometheus

import (
	"bytes"
	"encoding/hex"
	"slices"
	"unicode/utf8"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// maxExemplarRunes is how long the labels of an exemplar may be together (OpenMetrics).
const maxExemplarRunes = 128

// exemplar reads one of the point at hand; one without a value is left out.
func (t *translation) exemplar(b []byte) {
	var (
		e             = exemplar{next: none}
		valued        bool
		trace, spanID []byte
		attributes    [16]attribute
		as            = attributes[:0]
	)
	for i := 0; i < len(b); {
		var f otlpwire.Field
		switch f, i = otlpwire.NextField(b, i); f.Tag {
		case 7<<3 | otlpwire.Bytes:
			key, value := otlpwire.Attribute(f.Bytes)
			as = append(as, attribute{key, value})
		case 2<<3 | otlpwire.Fixed64:
			e.at = int64(f.Bits) / 1e6
		case 3<<3 | otlpwire.Fixed64:
			e.value, valued = f.Double(), true
		case 6<<3 | otlpwire.Fixed64:
			e.value, valued = float64(int64(f.Bits)), true
		case 4<<3 | otlpwire.Bytes:
			spanID = f.Bytes
		case 5<<3 | otlpwire.Bytes:
			trace = f.Bytes
		}
	}
	if !valued || t.ahead(uint64(max(e.at, 0))*1e6) { // ahead of its time it would keep later ones out
		return
	}
	var (
		own   []label
		runes int
		ids   [2]struct {
			name string
			id   []byte
		}
	)
	ids[0].name, ids[0].id, ids[1].name, ids[1].id = "trace_id", trace, "span_id", spanID
	for _, id := range ids {
		if len(id.id) > 0 && !allZero(id.id) {
			t.scratch = hex.AppendEncode(t.scratch[:0], id.id)
			own = append(own, label{name: t.symbols.addString(id.name), value: t.symbols.add(t.scratch)})
			runes += len(id.name) + len(t.scratch)
		}
	}
	with := own
	for _, a := range as {
		text := t.text(a.value)
		runes += utf8.RuneCount(a.key) + utf8.RuneCount(text)
		with = append(with, label{name: t.symbols.add(a.key), value: t.symbols.add(text)})
	}
	if runes <= maxExemplarRunes {
		own = with
	}
	slices.SortStableFunc(own, func(a, b label) int { return bytes.Compare(t.symbols.get(a.name), t.symbols.get(b.name)) })
	e.labels = uint32(len(t.pairs))
	for i, l := range own {
		if l.name != 0 && (i == 0 || own[i-1].name != l.name) {
			t.pairs = append(t.pairs, l.name, l.value)
		}
	}
	e.end = uint32(len(t.pairs))
	t.marks = append(t.marks, mark{e.value, int32(len(t.exemplars))})
	t.exemplars = append(t.exemplars, e)
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// attach gives a series an exemplar.
func (t *translation) attach(n int, entry int32) {
	s := &t.series[n]
	if s.lastSeen == none {
		s.firstSeen = entry
	} else {
		t.exemplars[s.lastSeen].next = entry
	}
	s.lastSeen = entry
}
