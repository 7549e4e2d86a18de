package prometheus

import (
	"errors"
	"fmt"
	"math"
	"slices"
)

// identity identifies a series over all requests of a process: two hashes of 64 bits.
type identity struct{ first, second uint64 }

// memory is what a translation remembers from one request to the next, because one request alone does
// not determine what has to be written:
//
//   - deltas, the sum of each series with delta temporality. Prometheus stores running totals;
//     without the sum every delta would look like a counter that has restarted.
//   - lasts, the time of each stream's last delta. Messages are delivered at least once, and a
//     delta that is in the sum already must not be added a second time.
//   - shapes, the buckets or quantiles of each series. A point that ends a series need not name
//     them, but every one of their series has to end.
//   - targets and doubts, when target_info was last written, and when it was refused: it is not
//     repeated with every request.
//   - guards, the known series of each instance: only new ones count against the limits.
//
// What a request changes in deltas, lasts and targets is staged, and committed only when the backend
// has stored the request. A request that fails is translated again for the next attempt; if its deltas
// were in the sums by then, they would be left out as repetitions, or counted twice. When a request
// with deltas is refused, it is not known which of them the backend has stored; their sums are dropped
// (forget), because a sum that begins at zero again is a counter reset, which Prometheus handles, and
// a wrong sum would remain wrong for good.
//
// Everything in it is bounded, and lost when another sink takes over: docs/backends.md describes what
// that means for deltas.
//
// Newer entries are in young, older ones in old: when young is full it becomes old, and the previous
// old is discarded.
type memory struct {
	deltas  generations[delta]
	lasts   generations[uint64]    // the time of a stream's last delta, in nanoseconds
	shapes  generations[[]float64] // bounds of histograms, quantiles of summaries
	targets generations[int64]
	doubts  generations[int64] // target_info that may have been refused: until when it is left out, in milliseconds
	guards  map[string]*guard
	cfg     *Config

	staged  map[identity]delta
	counted map[identity]uint64 // of lasts
	written map[identity]int64
	shape   []float64 // the last one that was recorded: most series share it
}

type generations[T any] struct {
	young, old map[identity]T
	most       int // entries in each
}

func newGenerations[T any](most int) generations[T] {
	return generations[T]{young: make(map[identity]T), most: most}
}

func (g *generations[T]) get(id identity) (v T, ok bool) {
	if v, ok = g.young[id]; !ok {
		v, ok = g.old[id]
	}
	return v, ok
}

func (g *generations[T]) drop(id identity) {
	delete(g.young, id)
	delete(g.old, id)
}

func (g *generations[T]) set(id identity, v T) {
	if _, have := g.young[id]; !have && len(g.young) >= g.most {
		g.old, g.young = g.young, make(map[identity]T)
	}
	g.young[id] = v
}

// maxTargets is about how many resources are remembered to have a target_info.
const maxTargets = 1 << 16

// maxShapes is for about how many histograms and summaries the shape is remembered, and maxShape how
// many buckets or quantiles such a shape may have.
const (
	maxShapes = 1 << 14
	maxShape  = 256
)

func newMemory(cfg *Config) *memory {
	series := max(cfg.Limits.DeltaSeries/2, 1)
	return &memory{
		cfg: cfg, deltas: newGenerations[delta](series), lasts: newGenerations[uint64](series),
		shapes: newGenerations[[]float64](maxShapes / 2), targets: newGenerations[int64](maxTargets / 2), doubts: newGenerations[int64](maxTargets / 2),
		guards: make(map[string]*guard), staged: make(map[identity]delta), counted: make(map[identity]uint64), written: make(map[identity]int64),
	}
}

// reset discards the staged changes of the previous request.
func (m *memory) reset() {
	clear(m.staged)
	clear(m.counted)
	clear(m.written)
}

// forget drops the sums of the series whose deltas were refused: it is not known which of these the
// backend has.
func (m *memory) forget() {
	for id := range m.staged {
		m.deltas.drop(id)
	}
	m.reset()
}

func (m *memory) commit() {
	for id, d := range m.staged {
		m.deltas.set(id, d)
	}
	for id, at := range m.counted {
		m.lasts.set(id, at)
	}
	for id, at := range m.written {
		m.targets.set(id, at)
		m.doubts.drop(id)
	}
	m.reset()
}

// ends returns the bounds or quantiles of a series that ends, which its last point need not have; for
// other points it remembers them.
func (m *memory) ends(id identity, ended bool, shape []float64) []float64 {
	switch known, _ := m.shapes.get(id); {
	case ended && len(shape) == 0:
		return known
	case !ended && len(shape) > 0 && len(shape) <= maxShape && !slices.Equal(known, shape):
		if !slices.Equal(m.shape, shape) {
			m.shape = slices.Clone(shape)
		}
		m.shapes.set(id, m.shape)
	}
	return shape
}

// target returns when the target_info of a series was written last, in milliseconds.
func (m *memory) target(id identity) (at int64, ok bool) {
	if at, ok = m.written[id]; !ok {
		at, ok = m.targets.get(id)
	}
	return at, ok
}

func (m *memory) wroteTarget(id identity, at int64) { m.written[id] = at }

// hour is how long a refused target_info is left out.
const hour = 3600_000 // milliseconds

// doubt records that one of the target_info series of a request was refused. Each is tried alone next
// time; one that was already alone is left out for an hour.
func (m *memory) doubt(ids []identity, now int64) {
	for _, id := range ids {
		until := int64(0)
		if len(ids) == 1 {
			until = now + hour
		}
		m.doubts.set(id, until)
	}
}

// delta is the sum of all deltas of a series since it was first seen here. Several streams may
// add to it.
type delta struct {
	start, last uint64 // nanoseconds; last is that of the newest sample
	value       float64
	histogram   *otlpHistogram // nil: a number
	stream      uint64         // the stream whose shape the histogram has
}

// idle is after how long without a delta a histogram may get another shape.
const idle = 300e9 // nanoseconds

// replaced reports whether a delta that cannot be added to a sum comes from its successor: the same
// stream with another shape, or another stream that began after it. Two concurrent streams must not
// reset each other's sum again and again.
func (d *delta) replaced(stream uint64, pt point) bool {
	return d.stream == stream || max(pt.start, pt.at-min(pt.at, idle)) >= d.last
}

// next returns the sum to which a delta of a stream is added, and the time of the resulting sample:
// never before the series' newest sample, which may come from another stream. fresh says that the sum
// begins with this delta.
func (m *memory) next(id, stream identity, pt point) (d delta, at uint64, fresh bool, err error) {
	last, counting := m.counted[stream]
	known := counting
	if !known {
		last, known = m.lasts.get(stream)
	}
	switch {
	case known && pt.at < last:
		return d, 0, false, errOld
	case known && pt.at == last && !counting: // two in one request both count
		return d, 0, false, errKnown
	}
	d, staged := m.staged[id]
	ok := staged
	if !ok {
		d, ok = m.deltas.get(id)
	}
	switch {
	case !ok:
		start := pt.start
		if start == 0 {
			start = pt.at
		}
		return delta{start: start, last: pt.at, stream: stream.first}, pt.at, true, nil
	case staged:
		return d, max(d.last, pt.at), false, nil
	}
	const milli = 1e6
	return d, max(d.last/milli*milli+milli, pt.at), false, nil
}

// keep stages a sum with the time of its sample, and the time of the delta that is now in it.
func (m *memory) keep(id, stream identity, d delta, at uint64, pt point) {
	d.last = at
	m.staged[id], m.counted[stream] = d, pt.at
}

// summed is the stream of samples that are sums, so that those of one series belong together.
const summed = 1

// sum adds a delta to the sum of its series, and returns the sample to write.
func (t *translation) sum(name uint32, pt point, v float64) (float64, point, error) {
	stream := identity{t.stream, 0}
	if t.stream = summed; pt.ended {
		return v, pt, nil
	}
	switch {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return 0, pt, errFinite
	case v < 0:
		return 0, pt, errFalls
	}
	id := t.identity(name)
	d, at, _, err := t.memory.next(id, stream, pt)
	if err != nil {
		return 0, pt, err
	}
	d.value += v
	if math.IsInf(d.value, 0) {
		d = delta{start: pt.start, value: v} // like a counter that restarts
	}
	t.memory.keep(id, stream, d, at, pt)
	pt.at, pt.start = at, d.start
	return d.value, pt, nil
}

// sumHistogram adds the previous sum to t.histogram, and returns the point to write. If the two cannot
// be added, the sum restarts.
func (t *translation) sumHistogram(name uint32, pt point) (point, error) {
	stream, h := identity{t.stream, 0}, &t.histogram
	if t.stream = summed; pt.ended {
		return pt, nil
	}
	if math.IsNaN(h.sum) || math.IsInf(h.sum, 0) {
		return pt, errFinite
	}
	if h.exponential && !h.add(&otlpHistogram{exponential: true, scale: h.scale, threshold: h.threshold}) { // makes it as coarse as necessary
		return pt, errBuckets
	}
	id := t.identity(name)
	if h.exponential {
		id.second++ // in Prometheus a different series than that of one with bounds
	}
	d, at, fresh, err := t.memory.next(id, stream, pt)
	if err != nil {
		return pt, err
	}
	if before := d.histogram; !fresh && (before == nil || !h.add(before)) {
		if !d.replaced(stream.first, pt) {
			return pt, errShape
		}
		d.start, d.stream = pt.start, stream.first
	}
	d.histogram = h.clone()
	t.memory.keep(id, stream, d, at, pt)
	pt.at, pt.start = at, d.start
	return pt, nil
}

// clone copies a histogram.
func (h *otlpHistogram) clone() *otlpHistogram {
	c := *h
	c.bounds, c.counts = slices.Clone(h.bounds), slices.Clone(h.counts)
	c.positive.counts, c.negative.counts = slices.Clone(h.positive.counts), slices.Clone(h.negative.counts)
	return &c
}

// maxSum is the most buckets that a side of a sum of exponential histograms may have, the bound of SDKs.
// With more its resolution is halved.
const maxSum = 160

// add adds before to h, and reports whether that is possible: not with different bounds or of another
// kind, and not if an exponential one would have too many buckets.
func (h *otlpHistogram) add(before *otlpHistogram) bool {
	if h.exponential && before.exponential {
		h, before = h.sameZero(before)
	}
	scale := min(h.scale, before.scale)
	wide := func() bool {
		return width(h, before, scale, positive) > maxSum || width(h, before, scale, negative) > maxSum
	}
	if h.exponential != before.exponential || !h.exponential && (!slices.Equal(before.bounds, h.bounds) || len(before.counts) != len(h.counts)) {
		return false
	}
	for scale > minSchema && wide() {
		scale--
	}
	if wide() {
		return false
	}
	h.count += before.count
	h.sum += before.sum
	h.summed = h.summed || before.summed
	h.zeros += before.zeros
	if !h.exponential {
		for i, c := range before.counts {
			h.counts[i] += c
		}
		return true
	}
	for _, side := range []func(*otlpHistogram) *buckets{positive, negative} {
		*side(h) = union(*side(h), uint(h.scale-scale), *side(before), uint(before.scale-scale))
	}
	h.scale = scale
	return true
}

// sameZero gives two exponential histograms the wider of their zero buckets, and returns them; before
// is copied if it changes.
func (h *otlpHistogram) sameZero(before *otlpHistogram) (*otlpHistogram, *otlpHistogram) {
	if h.threshold == before.threshold {
		return h, before
	}
	before = before.clone()
	for h.threshold != before.threshold {
		wide := max(h.threshold, before.threshold)
		h.widen(wide)
		before.widen(wide)
	}
	return h, before
}

// widen extends the zero bucket up to a threshold, and to the end of the bucket in which that is.
func (h *otlpHistogram) widen(threshold float64) {
	h.threshold = max(h.threshold, threshold)
	for _, b := range []*buckets{&h.positive, &h.negative} {
		for len(b.counts) > 0 && h.bound(b.offset) < h.threshold {
			if b.counts[0] > 0 {
				h.zeros += b.counts[0]
				h.threshold = min(max(h.threshold, h.bound(b.offset+1)), math.MaxFloat64)
			}
			b.offset, b.counts = b.offset+1, b.counts[1:]
		}
	}
}

// bound is the lower bound of the bucket with an index.
func (h *otlpHistogram) bound(index int32) float64 {
	return math.Exp2(math.Ldexp(float64(index), -int(h.scale)))
}

func positive(h *otlpHistogram) *buckets { return &h.positive }
func negative(h *otlpHistogram) *buckets { return &h.negative }

// reach returns the first and the last index of the buckets if 2^down of them are merged into one.
func (b *buckets) reach(down uint) (first, last int32, some bool) {
	if len(b.counts) == 0 {
		return 0, 0, false
	}
	return b.offset >> down, (b.offset + int32(len(b.counts)-1)) >> down, true
}

// width returns how many buckets a side of two histograms has together at a scale.
func width(a, b *otlpHistogram, scale int32, side func(*otlpHistogram) *buckets) int {
	first, last, some := side(a).reach(uint(a.scale - scale))
	other, end, more := side(b).reach(uint(b.scale - scale))
	switch {
	case some && more:
		first, last = min(first, other), max(last, end)
	case more:
		first, last = other, end
	case !some:
		return 0
	}
	return int(int64(last)-int64(first)) + 1
}

func union(a buckets, downA uint, b buckets, downB uint) buckets {
	first, last, some := a.reach(downA)
	other, end, more := b.reach(downB)
	switch {
	case some && more:
		first, last = min(first, other), max(last, end)
	case more:
		first, last = other, end
	case !some:
		return buckets{}
	}
	out := buckets{offset: first, counts: make([]uint64, last-first+1)}
	for i, c := range a.counts {
		out.counts[(a.offset+int32(i))>>downA-first] += c
	}
	for i, c := range b.counts {
		out.counts[(b.offset+int32(i))>>downB-first] += c
	}
	return out
}

var errCardinality = errors.New("too many new series")

// guard counts the new series of one instance, by the time of its own points.
type guard struct {
	minute, hour, first int64 // of the points
	fresh               int   // new series in this minute
	young, old          map[uint64]struct{}
	values              map[uint64]map[uint64]struct{} // of the labels of points, by name, in this hour
}

const (
	minuteNanos = 60e9
	hourMinutes = 60
	dayNanos    = 24 * 3600e9 // older points do not say when an instance began
	ahead       = 10          // minutes by which a point may be ahead of its arrival

	// learning is for how many minutes an instance that is new to this sink may have ten times as many
	// new series: after a take-over all of them are new.
	learning = 5

	// maxLabels is how many names the labels of an instance's points may have in an hour.
	maxLabels = 1024
)

// admit refuses the current point if its series is new and there are too many. shape are its bounds or
// quantiles, each of which is a series.
func (m *memory) admit(t *translation, name uint32, pt point, shape []float64) error {
	limits := &m.cfg.Limits
	if limits.NewSeries == 0 {
		return nil
	}
	g := m.guards[t.instance]
	if g == nil {
		g = &guard{young: make(map[uint64]struct{}), values: make(map[uint64]map[uint64]struct{}), first: int64(min(max(pt.at, t.now-dayNanos), t.now) / minuteNanos)}
		m.guards[t.instance] = g
	}
	g.reach(int64(pt.at / minuteNanos))
	hash := t.seriesHash(name, shape)
	if g.knows(hash) {
		return nil
	}
	if err := g.roomFor(t, limits); err != nil {
		return err
	}
	g.enter(t, hash, 1+len(shape))
	return nil
}

// seriesHash is a hash of the series of the current point.
func (t *translation) seriesHash(name uint32, shape []float64) uint64 {
	hash := t.symbols.hashes[name]
	for _, b := range shape {
		hash = (hash ^ math.Float64bits(b)) * 0x9e3779b97f4a7c15
	}
	for _, l := range t.labels {
		hash = (hash^t.symbols.hashes[l.name])*0x9e3779b97f4a7c15 + t.symbols.hashes[l.value]
	}
	return hash
}

// reach goes on to a minute, if it is later.
func (g *guard) reach(minute int64) {
	if minute <= g.minute {
		return
	}
	g.minute, g.fresh = minute, 0
	if hour := minute / hourMinutes; hour > g.hour {
		g.hour, g.old, g.young = hour, g.young, make(map[uint64]struct{})
		clear(g.values)
	}
}

// knows reports whether a series has come in this hour or the one before.
func (g *guard) knows(hash uint64) bool {
	if _, known := g.young[hash]; known {
		return true
	}
	if _, known := g.old[hash]; known {
		g.young[hash] = struct{}{}
		return true
	}
	return false
}

// roomFor reports why the new series of the current point is one too many.
func (g *guard) roomFor(t *translation, limits *Limits) error {
	most, values := limits.NewSeries, limits.LabelValues
	if g.minute < g.first+learning {
		most *= 10
	}
	if g.fresh >= most {
		return fmt.Errorf("%w of instance %s: more than %d in a minute (prometheus.limits.new_series_per_minute): remove attributes whose value changes with every request", errCardinality, t.instance, most)
	}
	for _, l := range t.own {
		if len(g.values) >= maxLabels && g.values[t.symbols.hashes[l.name]] == nil {
			return fmt.Errorf("%w of instance %s: more than %d label names in an hour", errCardinality, t.instance, maxLabels)
		}
		if v := g.values[t.symbols.hashes[l.name]]; values > 0 && len(v) >= values {
			if _, known := v[t.symbols.hashes[l.value]]; !known {
				return fmt.Errorf("%w of instance %s: label %s has more than %d values in an hour (prometheus.limits.label_values)", errCardinality, t.instance, t.symbols.get(l.name), values)
			}
		}
	}
	return nil
}

// enter takes in the current point, which is so many new series.
func (g *guard) enter(t *translation, hash uint64, series int) {
	for _, l := range t.own {
		v := g.values[t.symbols.hashes[l.name]]
		if v == nil {
			v = make(map[uint64]struct{})
			g.values[t.symbols.hashes[l.name]] = v
		}
		v[t.symbols.hashes[l.value]] = struct{}{}
	}
	g.fresh += series
	g.young[hash] = struct{}{}
}
