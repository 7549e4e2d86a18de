package prometheus

import (
	"encoding/binary"
	"math"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// otlpHistogram is a point of an explicit or exponential histogram. Its slices are reused.
type otlpHistogram struct {
	count  uint64
	sum    float64
	summed bool

	bounds []float64 // explicit
	counts []uint64  // explicit, not cumulative

	exponential        bool
	scale              int32
	zeros              uint64
	threshold          float64 // of the zero bucket; 0 if not given
	positive, negative buckets
}

// buckets are those of one side of an exponential histogram: the i-th has the index
// offset + i.
type buckets struct {
	offset int32
	counts []uint64
}

func (h *otlpHistogram) reset() {
	*h = otlpHistogram{bounds: h.bounds[:0], counts: h.counts[:0], positive: buckets{counts: h.positive.counts[:0]}, negative: buckets{counts: h.negative.counts[:0]}}
}

// total reads the fields that both kinds have.
func (h *otlpHistogram) total(f otlpwire.Field) {
	switch f.Tag {
	case 4<<3 | otlpwire.Fixed64:
		h.count = f.Bits
	case 5<<3 | otlpwire.Fixed64:
		h.sum, h.summed = f.Double(), true
	}
}

// histogramPoint makes t.histogram cumulative, and checks the cardinality.
func (t *translation) histogramPoint(m *otlpwire.Metric, names familyNames, pt point) (point, error) {
	h := &t.histogram
	if len(h.counts) > maxBuckets+1 || len(h.bounds) > maxBuckets || len(h.positive.counts) > maxBuckets || len(h.negative.counts) > maxBuckets {
		return pt, errBuckets
	}
	err := t.memory.admit(t, names.plain, pt, h.bounds)
	h.exponential = m.Kind == otlpwire.ExponentialHistogram
	if !h.exponential {
		h.bounds = append(h.bounds[:0], t.memory.ends(t.shape(names.plain), pt.ended, h.bounds)...)
	}
	if err == nil && m.Temporality == otlpwire.Delta {
		pt, err = t.sumHistogram(names.plain, pt)
	}
	return pt, err
}

// finite removes infinite bounds: there is nothing above positive infinity, and the last bucket has no
// bound anyway.
func (h *otlpHistogram) finite() {
	n := len(h.bounds)
	if n > 0 && math.IsInf(h.bounds[n-1], 1) {
		h.bounds = h.bounds[:n-1]
		if len(h.counts) == n+1 { // some leave out the last one, which is empty
			h.counts[n-1] += h.counts[n]
			h.counts = h.counts[:n]
		}
	}
	if len(h.bounds) > 0 && math.IsInf(h.bounds[0], -1) {
		h.bounds = h.bounds[1:]
		if len(h.counts) > 1 {
			h.counts[1] += h.counts[0]
			h.counts = h.counts[1:]
		}
	}
}

// explicit adds a point of a histogram with bounds: a series for each bucket, one for the count and, if
// the point has it, one for the sum.
func (t *translation) explicit(m *otlpwire.Metric, p []byte, names familyNames) error {
	h := &t.histogram
	h.reset()
	pt, err := t.read(p, m.Kind, func(f otlpwire.Field) { h.readExplicit(f) })
	h.finite()
	if err == nil {
		err = h.bounded()
	}
	if err == nil {
		pt, err = t.histogramPoint(m, names, pt)
	}
	if err != nil {
		return err
	}
	if t.meets(t.at(names.count, label{}, false), pt) {
		return errCollides
	}
	t.one(names.count, label{}, pt, float64(h.count))
	if h.summed || pt.ended {
		t.one(names.sum, label{}, pt, h.sum)
	}
	t.bucketSeries(h, names.bucket, pt)
	return nil
}

// readExplicit reads the fields that only histograms with bounds have, and those of all.
func (h *otlpHistogram) readExplicit(f otlpwire.Field) {
	switch f.Tag {
	case 6<<3 | otlpwire.Bytes:
		for b := f.Bytes; len(b) >= 8; b = b[8:] {
			h.counts = append(h.counts, binary.LittleEndian.Uint64(b))
		}
	case 6<<3 | otlpwire.Fixed64:
		h.counts = append(h.counts, f.Bits)
	case 7<<3 | otlpwire.Bytes:
		for b := f.Bytes; len(b) >= 8; b = b[8:] {
			h.bounds = append(h.bounds, math.Float64frombits(binary.LittleEndian.Uint64(b)))
		}
	case 7<<3 | otlpwire.Fixed64:
		h.bounds = append(h.bounds, f.Double())
	default:
		h.total(f)
	}
}

// bounded reports what is wrong with the buckets of a histogram with bounds.
func (h *otlpHistogram) bounded() error {
	if len(h.counts) > 0 && len(h.counts) != len(h.bounds)+1 {
		return errCounts
	}
	if !slices.IsSorted(h.bounds) {
		return errBounds
	}
	return nil
}

// bucketSeries adds the series of the buckets, each with the exemplars that are not above its bound.
func (t *translation) bucketSeries(h *otlpHistogram, name uint32, pt point) {
	slices.SortStableFunc(t.refs, func(a, b exemplarRef) int {
		if a.value < b.value {
			return -1
		} else if a.value > b.value {
			return 1
		}
		return 0
	})
	le := t.symbols.addString(leLabel)
	t.le(h.bounds)
	total, refs := uint64(0), t.refs
	for i := 0; i < len(h.bounds) && (i < len(h.counts) || pt.ended); i++ {
		if i < len(h.counts) {
			total += h.counts[i]
		}
		s := t.one(name, label{name: le, value: t.les[i]}, pt, float64(total))
		for ; len(refs) > 0 && !(refs[0].value > h.bounds[i]); refs = refs[1:] {
			t.attach(s, refs[0].entry)
		}
	}
	s := t.one(name, label{name: le, value: t.symbols.addString("+Inf")}, pt, float64(h.count))
	for ; len(refs) > 0; refs = refs[1:] {
		t.attach(s, refs[0].entry)
	}
}

// le fills t.les from bounds, which are usually those of the previous point.
func (t *translation) le(bounds []float64) {
	if len(t.les) == len(bounds) && slices.Equal(t.bounds, bounds) {
		return
	}
	t.bounds, t.les = append(t.bounds[:0], bounds...), t.les[:0]
	for _, b := range bounds {
		t.les = append(t.les, t.decimal(b))
	}
}

// The schemas of native histograms that are exponential.
const (
	minSchema = -4
	maxSchema = 8
)

// zeroThreshold is the zero threshold that Prometheus gives histograms from OTLP. It is used for those
// whose own threshold is zero.
const zeroThreshold = 1e-128

// native is a native histogram.
type native struct {
	count, zeros       uint64
	sum, threshold     float64
	schema             int32
	positive, negative sparse
}

// sparse are the buckets of one side: those listed by spans, each as its difference from the previous
// one.
type sparse struct {
	spans  []span
	deltas []int64
}

// span is a run of length buckets, offset after the previous span; the offset of the first is its index.
type span struct {
	offset int32
	length uint32
}

// exponential adds a point of an exponential histogram, as a native one.
func (t *translation) exponential(m *otlpwire.Metric, p []byte, names familyNames) error {
	h := &t.histogram
	h.reset()
	pt, err := t.read(p, m.Kind, func(f otlpwire.Field) { h.readExponential(f) })
	if err == nil {
		err = h.representable(pt.ended)
	}
	if err == nil {
		pt, err = t.histogramPoint(m, names, pt)
	}
	if err != nil {
		return err
	}
	n := h.native(pt.ended)
	s := t.at(names.plain, label{}, true)
	if t.meets(s, pt) {
		return errCollides
	}
	t.put(s, pt, 0, int32(len(t.native)))
	t.native = append(t.native, n)
	for _, k := range t.refs {
		t.attach(s, k.entry)
	}
	return nil
}

// readExponential reads the fields that only exponential histograms have, and those of all.
func (h *otlpHistogram) readExponential(f otlpwire.Field) {
	switch f.Tag {
	case 6<<3 | otlpwire.Varint:
		h.scale = f.Sint32()
	case 7<<3 | otlpwire.Fixed64:
		h.zeros = f.Bits
	case 8<<3 | otlpwire.Bytes:
		h.positive.read(f.Bytes)
	case 9<<3 | otlpwire.Bytes:
		h.negative.read(f.Bytes)
	case 14<<3 | otlpwire.Fixed64:
		h.threshold = f.Double()
	default:
		h.total(f)
	}
}

// representable reports why Prometheus has no native histogram like an exponential one. Of a series
// that has ended the buckets do not count.
func (h *otlpHistogram) representable(ended bool) error {
	switch {
	case !(h.threshold >= 0) || math.IsInf(h.threshold, 1):
		return errThreshold
	case h.scale < minSchema:
		return errScale
	case !ended && !h.counted():
		return errCounted
	}
	return nil
}

// native returns an exponential histogram as a native one, that of a series that has ended as the mark
// of that.
func (h *otlpHistogram) native(ended bool) native {
	n := native{count: h.count, zeros: h.zeros, schema: min(h.scale, maxSchema), threshold: h.threshold}
	if n.threshold == 0 {
		n.threshold = zeroThreshold
	}
	down := uint(h.scale - n.schema)
	n.positive, n.negative = h.positive.sparse(down), h.negative.sparse(down)
	if ended {
		n.count, n.sum = stale, staleNaN
	} else if h.summed {
		n.sum = h.sum
	}
	return n
}

// counted reports whether the buckets of an exponential histogram add up to its count, as Prometheus
// requires; if its sum is NaN they may add up to less. Releases differ in their answer to other
// histograms, and some answer 500.
func (h *otlpHistogram) counted() bool {
	total := float64(h.zeros)
	for _, side := range [][]uint64{h.positive.counts, h.negative.counts} {
		for _, c := range side {
			total += float64(c)
		}
	}
	if math.IsNaN(h.sum) {
		return total <= float64(h.count)
	}
	return total == float64(h.count) && total < math.MaxInt64
}

// read reads a Buckets message; the numbers of a repeated one are concatenated.
func (b *buckets) read(msg []byte) {
	for i := 0; i < len(msg); {
		var f otlpwire.Field
		switch f, i = otlpwire.NextField(msg, i); f.Tag {
		case 1<<3 | otlpwire.Varint:
			b.offset = f.Sint32()
		case 2<<3 | otlpwire.Varint:
			b.counts = append(b.counts, f.Bits)
		case 2<<3 | otlpwire.Bytes:
			for p := f.Bytes; len(p) > 0; {
				v, n := protowire.ConsumeVarint(p)
				if n < 0 {
					return
				}
				b.counts = append(b.counts, v)
				p = p[n:]
			}
		}
	}
}

// maxGap is how many empty buckets a span may contain: for more a new span is shorter.
const maxGap = 2

// sparse returns the buckets as a native histogram has them, 2^down of them in one. The
// bucket 0 of OpenTelemetry begins at 1, that of Prometheus ends there.
func (b *buckets) sparse(down uint) (out sparse) {
	index := func(i int) int32 { return (b.offset+int32(i))>>down + 1 }
	before, last := int64(0), int32(0)
	put := func(count uint64) {
		out.spans[len(out.spans)-1].length++
		out.deltas = append(out.deltas, int64(count)-before)
		before = int64(count)
	}
	for i := 0; i < len(b.counts); {
		at, count := index(i), uint64(0)
		for ; i < len(b.counts) && index(i) == at; i++ {
			count += b.counts[i]
		}
		if count == 0 {
			continue
		}
		gap := at - last - 1
		switch {
		case len(out.spans) == 0:
			out.spans = append(out.spans, span{offset: at})
		case gap > maxGap:
			out.spans = append(out.spans, span{offset: gap})
		default:
			for range gap {
				put(0)
			}
		}
		put(count)
		last = at
	}
	return out
}
