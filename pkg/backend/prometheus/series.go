package prometheus

import (
	"cmp"
	"hash/maphash"
	"slices"
)

// none ends the lists of samples and exemplars.
const none = -1

// series are the samples, or histograms, with one set of labels.
type series struct {
	hash                 uint64 // of the labels, the same in every request of this process
	labels, end          uint32 // the range of its pairs of symbols
	family               uint32 // number of its metric
	count                int32  // of samples
	first, last          int32
	firstSeen, lastSeen  int32 // exemplars
	histograms, unsorted bool
}

type sample struct {
	value     float64
	at, start int64 // milliseconds
	stream    uint64
	histogram int32 // none: a number
	next      int32
}

type exemplar struct {
	labels, end uint32
	value       float64
	at          int64 // milliseconds
	next        int32
}

// place determines the position of the name among t.labels.
func (t *translation) place() {
	t.nameAt, t.extra = t.position(t.nameLabel), 0
}

// position is the position of a label name among t.labels.
func (t *translation) position(name uint32) int {
	i := 0
	for i < len(t.labels) && t.before(t.labels[i].name, name) {
		i++
	}
	return i
}

// at returns the series with name, t.labels and an extra label. The extra one replaces another of its
// name.
func (t *translation) at(name uint32, extra label, histograms bool) int {
	if extra.name != t.extra {
		t.extra, t.extraAt = extra.name, t.position(extra.name)
	}
	from := uint32(len(t.pairs))
	hash := uint64(0)
	if histograms {
		hash = 1
	}
	put := func(name, value uint32) {
		t.pairs = append(t.pairs, name, value)
		hash = (hash^t.symbols.hashes[name])*0x9e3779b97f4a7c15 + t.symbols.hashes[value]
		hash ^= hash >> 29
	}
	for i := 0; i <= len(t.labels); i++ {
		if i == t.nameAt {
			put(t.nameLabel, name)
		}
		if i == t.extraAt && extra.name != 0 {
			put(extra.name, extra.value)
		}
		if i < len(t.labels) && (t.labels[i].name != extra.name || extra.name == 0) {
			put(t.labels[i].name, t.labels[i].value)
		}
	}
	t.index.grow(func(n uint32) uint64 { return t.series[n].hash })
	i := int(hash)
	for ; ; i++ {
		n := t.index.slots[i&(len(t.index.slots)-1)]
		if n == 0 {
			break
		}
		if s := &t.series[n-1]; s.hash == hash && s.histograms == histograms && slices.Equal(t.pairs[s.labels:s.end], t.pairs[from:]) {
			t.pairs = t.pairs[:from]
			return int(n - 1)
		}
	}
	t.index.slots[i&(len(t.index.slots)-1)] = uint32(len(t.series)) + 1
	t.index.used++
	t.series = append(t.series, series{
		hash: hash, labels: from, end: uint32(len(t.pairs)), family: t.family,
		first: none, last: none, firstSeen: none, lastSeen: none, histograms: histograms,
	})
	return len(t.series) - 1
}

// place is a millisecond of a series.
type place struct {
	series int
	at     int64
}

// taken returns the sample that a series has in a millisecond, or none.
func (t *translation) taken(n int, at int64) int32 {
	s := &t.series[n]
	switch {
	case s.last == none || !s.unsorted && t.samples[s.last].at < at:
		return none
	case t.samples[s.last].at == at:
		return s.last
	case !s.unsorted:
		s.unsorted = true
		for k := s.first; k != none; k = t.samples[k].next {
			t.places[place{n, t.samples[k].at}] = k
		}
	}
	if k, ok := t.places[place{n, at}]; ok {
		return k
	}
	return none
}

// put adds a sample to a series: a histogram, or a number if histogram is none. A series has one sample
// a millisecond: of one stream the last is kept, of several streams the first.
func (t *translation) put(n int, pt point, v float64, histogram int32) {
	at := int64(pt.at) / 1e6
	one := sample{value: v, at: at, start: int64(pt.start) / 1e6, stream: t.stream, histogram: histogram, next: none}
	if k := t.taken(n, at); k != none {
		if t.samples[k].stream != t.stream {
			t.collides = true
			return
		}
		t.replaces = true
		one.next = t.samples[k].next
		t.samples[k] = one
		return
	}
	s, k := &t.series[n], int32(len(t.samples))
	t.samples = append(t.samples, one)
	if s.last == none {
		s.first = k
	} else {
		t.samples[s.last].next = k
	}
	s.last = k
	s.count++
	if s.unsorted {
		t.places[place{n, at}] = k
	}
}

// ordered calls visit with the samples of a series in the order of time.
func (t *translation) ordered(s *series, visit func(sample)) {
	if !s.unsorted {
		for k := s.first; k != none; k = t.samples[k].next {
			visit(t.samples[k])
		}
		return
	}
	t.sort = t.sort[:0]
	for k := s.first; k != none; k = t.samples[k].next {
		t.sort = append(t.sort, t.samples[k])
	}
	slices.SortFunc(t.sort, func(a, b sample) int { return cmp.Compare(a.at, b.at) })
	for _, v := range t.sort {
		visit(v)
	}
}

// hashOf is a second hash of a series, computed from its texts.
func (t *translation) hashOf(name uint32) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	_, _ = h.Write(t.symbols.get(name))
	for _, l := range t.labels {
		_ = h.WriteByte(0)
		_, _ = h.Write(t.symbols.get(l.name))
		_ = h.WriteByte(1)
		_, _ = h.Write(t.symbols.get(l.value))
	}
	return h.Sum64()
}

// identity is the key of the series of name and t.labels in the memory.
func (t *translation) identity(name uint32) identity {
	return identity{t.shape(name).first, t.hashOf(name)}
}

// shape is the half of the identity that is known without reading texts.
func (t *translation) shape(name uint32) identity {
	first := t.symbols.hashes[name]
	for _, l := range t.labels {
		first = (first^t.symbols.hashes[l.name])*0x9e3779b97f4a7c15 + t.symbols.hashes[l.value]
	}
	return identity{first: first}
}
