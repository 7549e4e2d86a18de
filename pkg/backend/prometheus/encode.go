package prometheus

import (
	"math"

	"google.golang.org/protobuf/encoding/protowire"
)

// encoder writes a translation's series as requests of one version of remote_write. Its slices are
// reused.
type encoder struct {
	out, message, part []byte
	series             int // number of the next one
	samples, histogram int // in the request
}

// maxRequest is after how many bytes of series a request is closed: Prometheus accepts 32 MiB, other
// receivers often less.
const maxRequest = 4 << 20

// next returns the next request, uncompressed, and how many samples and histograms it
// has; nil when all series have been written. A series is never split between requests.
func (e *encoder) next(t *translation, version int) []byte {
	if e.series == len(t.series) {
		return nil
	}
	e.out, e.samples, e.histogram = e.out[:0], 0, 0
	if version == 2 {
		for n := range t.symbols.len() {
			e.out = appendBytes(e.out, 4, t.symbols.get(uint32(n)))
		}
	}
	first, head := e.series, len(e.out)
	for e.series < len(t.series) && (e.series == first || len(e.out)-head < maxRequest) {
		s := &t.series[e.series]
		e.series++
		if version == 2 {
			e.seriesV2(t, s)
			e.out = appendBytes(e.out, 5, e.message)
		} else {
			e.seriesV1(t, s)
			e.out = appendBytes(e.out, 1, e.message)
		}
	}
	if version == 1 {
		e.metadataV1(t, first)
	}
	return e.out
}

func appendBytes(dst []byte, num protowire.Number, b []byte) []byte {
	dst = protowire.AppendVarint(dst, uint64(num)<<3|uint64(protowire.BytesType))
	dst = protowire.AppendVarint(dst, uint64(len(b)))
	return append(dst, b...)
}

func appendNumber(dst []byte, num protowire.Number, v uint64) []byte {
	if v == 0 {
		return dst
	}
	return protowire.AppendVarint(append(dst, byte(num<<3)|byte(protowire.VarintType)), v)
}

// appendDouble writes zero, too: otherwise minus zero would be lost.
func appendDouble(dst []byte, num protowire.Number, v float64) []byte {
	return protowire.AppendFixed64(append(dst, byte(num<<3)|byte(protowire.Fixed64Type)), math.Float64bits(v))
}

// seriesV2 writes an io.prometheus.write.v2.TimeSeries.
func (e *encoder) seriesV2(t *translation, s *series) {
	e.message = e.refs(e.message[:0], 1, t.pairs[s.labels:s.end])
	t.ordered(s, func(v sample) {
		if v.histogram != none {
			e.histogram++
			e.message = appendBytes(e.message, 3, e.nativeV(t, &v, 17))
			return
		}
		e.samples++
		p := appendDouble(e.part[:0], 1, v.value)
		p = appendNumber(appendNumber(p, 2, uint64(v.at)), 3, uint64(v.start))
		e.message = appendBytes(e.message, 2, p)
		e.part = p
	})
	for k := s.firstSeen; k != none; k = t.exemplars[k].next {
		x := &t.exemplars[k]
		p := e.refs(e.part[:0], 1, t.pairs[x.labels:x.end])
		p = appendNumber(appendDouble(p, 2, x.value), 3, uint64(x.at))
		e.message = appendBytes(e.message, 4, p)
		e.part = p
	}
	m := &t.families[s.family]
	p := appendNumber(e.part[:0], 1, uint64(m.kind))
	p = appendNumber(appendNumber(p, 3, uint64(m.help)), 4, uint64(m.unit))
	e.message = appendBytes(e.message, 5, p)
	e.part = p
}

// refs writes packed symbols.
func (e *encoder) refs(dst []byte, num protowire.Number, refs []uint32) []byte {
	if len(refs) == 0 {
		return dst
	}
	size := 0
	for _, r := range refs {
		size += protowire.SizeVarint(uint64(r))
	}
	dst = protowire.AppendVarint(append(dst, byte(num<<3)|byte(protowire.BytesType)), uint64(size))
	for _, r := range refs {
		dst = protowire.AppendVarint(dst, uint64(r))
	}
	return dst
}

// seriesV1 writes a prometheus.TimeSeries.
func (e *encoder) seriesV1(t *translation, s *series) {
	e.message = e.labels(e.message[:0], t, t.pairs[s.labels:s.end])
	t.ordered(s, func(v sample) {
		if v.histogram != none {
			e.histogram++
			e.message = appendBytes(e.message, 4, e.nativeV(t, &v, 0))
			return
		}
		e.samples++
		e.part = appendNumber(appendDouble(e.part[:0], 1, v.value), 2, uint64(v.at))
		e.message = appendBytes(e.message, 2, e.part)
	})
	for k := s.firstSeen; k != none; k = t.exemplars[k].next {
		x := &t.exemplars[k]
		p := e.labels(nil, t, t.pairs[x.labels:x.end])
		p = appendNumber(appendDouble(p, 2, x.value), 3, uint64(x.at))
		e.message = appendBytes(e.message, 3, p)
	}
}

// labels writes pairs of symbols as Label messages in field 1.
func (e *encoder) labels(dst []byte, t *translation, pairs []uint32) []byte {
	for i := 0; i < len(pairs); i += 2 {
		p := appendBytes(e.part[:0], 1, t.symbols.get(pairs[i]))
		p = appendBytes(p, 2, t.symbols.get(pairs[i+1]))
		dst = appendBytes(dst, 1, p)
		e.part = p
	}
	return dst
}

// metadataV1 writes a MetricMetadata for every metric of the series from first on.
func (e *encoder) metadataV1(t *translation, first int) {
	last := ^uint32(0)
	for i := first; i < e.series; i++ {
		if f := t.series[i].family; f != last {
			m := &t.families[f]
			p := appendNumber(e.part[:0], 1, uint64(m.kind))
			p = appendBytes(p, 2, t.symbols.get(m.name))
			p = appendBytes(p, 4, t.symbols.get(m.help))
			p = appendBytes(p, 5, t.symbols.get(m.unit))
			e.out = appendBytes(e.out, 3, p)
			e.part, last = p, f
		}
	}
}

// nativeV writes a Histogram, which is the same in both versions except for the start timestamp: num is
// its field, 0 for none.
func (e *encoder) nativeV(t *translation, v *sample, num protowire.Number) []byte {
	h := &t.native[v.histogram]
	p := append(e.part[:0], 1<<3|byte(protowire.VarintType)) // in a oneof: zero is written, too
	p = protowire.AppendVarint(p, h.count)
	p = appendDouble(p, 3, h.sum)
	p = appendNumber(p, 4, protowire.EncodeZigZag(int64(h.schema)))
	p = appendDouble(p, 5, h.threshold)
	p = protowire.AppendVarint(append(p, 6<<3|byte(protowire.VarintType)), h.zeros)
	p = h.negative.append(p, 8)
	p = h.positive.append(p, 11)
	p = appendNumber(p, 15, uint64(v.at))
	if num != 0 && v.start != 0 {
		p = protowire.AppendVarint(protowire.AppendTag(p, num, protowire.VarintType), uint64(v.start))
	}
	e.part = p
	return p
}

// append writes spans in field num and deltas in the next one.
func (b *sparse) append(dst []byte, num protowire.Number) []byte {
	for _, s := range b.spans {
		offset := protowire.EncodeZigZag(int64(s.offset))
		size := 1 + protowire.SizeVarint(uint64(s.length))
		if offset != 0 {
			size += 1 + protowire.SizeVarint(offset)
		}
		dst = protowire.AppendVarint(protowire.AppendTag(dst, num, protowire.BytesType), uint64(size))
		dst = appendNumber(dst, 1, offset)
		dst = appendNumber(dst, 2, uint64(s.length))
	}
	if len(b.deltas) == 0 {
		return dst
	}
	size := 0
	for _, d := range b.deltas {
		size += protowire.SizeVarint(protowire.EncodeZigZag(d))
	}
	dst = protowire.AppendVarint(protowire.AppendTag(dst, num+1, protowire.BytesType), uint64(size))
	for _, d := range b.deltas {
		dst = protowire.AppendVarint(dst, protowire.EncodeZigZag(d))
	}
	return dst
}
