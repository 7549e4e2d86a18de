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

// exemplar reads an exemplar of the current point; one without a value is left out.
func (t *translation) exemplar(b []byte) {
	w := &t.incoming
	w.read(b)
	if !w.valued || t.ahead(uint64(max(w.at, 0))*1e6) { // one from the future would keep later ones out
		return
	}
	e := exemplar{next: none, at: w.at, value: w.value, labels: uint32(len(t.pairs))}
	own := t.exemplarLabels(w)
	for i, l := range own {
		if l.name != 0 && (i == 0 || own[i-1].name != l.name) {
			t.pairs = append(t.pairs, l.name, l.value)
		}
	}
	e.end = uint32(len(t.pairs))
	t.refs = append(t.refs, exemplarRef{e.value, int32(len(t.exemplars))})
	t.exemplars = append(t.exemplars, e)
}

// otlpExemplar is an exemplar of a point. Its slices are used again.
type otlpExemplar struct {
	at          int64 // milliseconds
	value       float64
	valued      bool
	trace, span []byte
	attributes  []attribute
	labels      []label
}

func (w *otlpExemplar) read(b []byte) {
	*w = otlpExemplar{attributes: w.attributes[:0], labels: w.labels}
	for i := 0; i < len(b); {
		var f otlpwire.Field
		switch f, i = otlpwire.NextField(b, i); f.Tag {
		case 7<<3 | otlpwire.Bytes:
			key, value := otlpwire.Attribute(f.Bytes)
			w.attributes = append(w.attributes, attribute{key, value})
		case 2<<3 | otlpwire.Fixed64:
			w.at = int64(f.Bits) / 1e6
		case 3<<3 | otlpwire.Fixed64:
			w.value, w.valued = f.Double(), true
		case 6<<3 | otlpwire.Fixed64:
			w.value, w.valued = float64(int64(f.Bits)), true
		case 4<<3 | otlpwire.Bytes:
			w.span = f.Bytes
		case 5<<3 | otlpwire.Bytes:
			w.trace = f.Bytes
		}
	}
}

// exemplarLabels returns the labels of an exemplar in order: where all of them would be too long, those
// of its trace alone.
func (t *translation) exemplarLabels(w *otlpExemplar) []label {
	runes, own := 0, 0
	w.labels = w.labels[:0]
	for _, id := range [...]struct {
		name string
		id   []byte
	}{{"trace_id", w.trace}, {"span_id", w.span}} {
		if len(id.id) > 0 && !allZero(id.id) {
			t.scratch = hex.AppendEncode(t.scratch[:0], id.id)
			w.labels = append(w.labels, label{name: t.symbols.addString(id.name), value: t.symbols.add(t.scratch)})
			runes += len(id.name) + len(t.scratch)
			own++
		}
	}
	for _, a := range w.attributes {
		text := t.text(a.value)
		runes += utf8.RuneCount(a.key) + utf8.RuneCount(text)
		w.labels = append(w.labels, label{name: t.symbols.add(a.key), value: t.symbols.add(text)})
	}
	if runes > maxExemplarRunes {
		w.labels = w.labels[:own]
	}
	slices.SortStableFunc(w.labels, func(a, b label) int { return bytes.Compare(t.symbols.get(a.name), t.symbols.get(b.name)) })
	return w.labels
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// attach adds an exemplar to a series.
func (t *translation) attach(n int, entry int32) {
	s := &t.series[n]
	if s.lastSeen == none {
		s.firstSeen = entry
	} else {
		t.exemplars[s.lastSeen].next = entry
	}
	s.lastSeen = entry
}
