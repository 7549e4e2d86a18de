package remotewrite

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/prometheus/otlptranslator"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

var (
	errTemporality = errors.New("the aggregation temporality is neither cumulative nor delta")
	errCounts      = errors.New("the number of bucket counts is not that of the bounds and one more")
	errBounds      = errors.New("the bounds are not in order")
	errBuckets     = fmt.Errorf("more than %d buckets or quantiles", maxBuckets)
	errFinite      = errors.New("a delta that is no finite number")
	errScale       = errors.New("the scale of the exponential histogram is below -4, which native histograms do not have")
	errOld         = errors.New("a delta that is older than the one before it in its series")
)

// stale is the NaN that Prometheus reads as "the series has ended here".
const stale = 0x7ff0000000000002

var staleNaN = math.Float64frombits(stale)

// noRecordedValue is bit 0 of a data point's flags.
const noRecordedValue = 1

// none ends the lists of samples and exemplars.
const none = -1

// series are samples, or histograms, under one set of labels.
type series struct {
	hash                 uint64 // of the labels, the same in every request of this process
	labels, end          uint32 // where its pairs of symbols are
	family               uint32 // number of its metric
	count                int32  // of samples
	first, last          int32
	firstSeen, lastSeen  int32 // exemplars
	histograms, unsorted bool
}

type sample struct {
	value     float64
	at, start int64 // milliseconds
	histogram int32 // none: a number
	next      int32
}

type exemplar struct {
	labels, end uint32
	value       float64
	at          int64 // milliseconds
	next        int32
}

// metadata is what Prometheus knows of a metric.
type metadata struct {
	name, help, unit uint32
	kind             uint8 // as in Prometheus's MetricType
}

// The types of metrics, as remote_write numbers them in both versions.
const (
	typeUnknown = iota
	typeCounter
	typeGauge
	typeHistogram
	_ // gauge histogram
	typeSummary
)

// translation turns one OTLP request after the other into series. It is the pure part:
// now is an argument, no connection. What it remembers from one request to the next (deltas, known
// series, when target_info was written) changes with commit only, so that a request that
// fails is the same when it is tried again.
type translation struct {
	cfg      *Config
	instance string
	now      uint64 // nanoseconds
	names    *names
	memory   *memory

	// Of the request.
	symbols   symbols
	nameLabel uint32
	index     table
	series    []series
	pairs     []uint32 // names and values of labels
	samples   []sample
	native    []native
	exemplars []exemplar
	families  []metadata
	refused   fault.Refusals
	point     int  // number of the next one in the payload
	large     bool // more than one request's worth of memory: nothing of it counts
	targeted  bool // target_info is among the series
	plain     bool // without target_info

	// Of the resource, scope and metric at hand.
	resource    []label // with what the scope adds, in order
	job, host   uint32
	target      []label
	first, last uint64 // times of the resource's points
	family      uint32

	// Of the point at hand.
	attributes []attribute
	labels     []label // merged, in order
	moment     uint64  // its time
	nameAt     int     // where the name goes among them
	extra      uint32  // the name of the extra label at hand
	extraAt    int     // where it goes
	own        []label
	marks      []mark
	scratch    []byte
	id         []byte
	bounds     []float64 // of the histogram before
	les        []uint32  // its le labels
	quantiles  []float64 // of the summary at hand
	values     []float64
	sort       []sample
	histogram  otlpHistogram
}

// mark is an exemplar of the point at hand.
type mark struct {
	value float64
	entry int32
}

func newTranslation(cfg *Config) *translation {
	return &translation{cfg: cfg, names: newNames(otlptranslator.TranslationStrategyOption(cfg.Strategy)), memory: newMemory(cfg)}
}

// reset forgets the request before, and what it would have changed.
func (t *translation) reset(instance string, now time.Time) {
	t.instance, t.now = instance, uint64(now.UnixNano())
	t.symbols.reset()
	t.nameLabel = t.symbols.addString(nameLabel)
	t.index.reset()
	t.series, t.pairs, t.samples, t.native, t.exemplars = t.series[:0], t.pairs[:0], t.samples[:0], t.native[:0], t.exemplars[:0]
	t.families, t.refused, t.point = t.families[:0], t.refused[:0], 0
	t.large, t.targeted, t.plain = false, false, false
	t.bounds = t.bounds[:0]
	t.memory.reset()
}

// commit keeps what the request has changed: it has been stored.
func (t *translation) commit() { t.memory.commit() }

// add translates an OTLP request, whose bytes must be sound.
func (t *translation) add(payload []byte) {
	for r := range otlpwire.Resources(payload) {
		t.setResource(r.Resource())
		t.first, t.last = math.MaxUint64, 0
		own := t.resource
		for s := range r.Scopes() {
			t.resource = own
			err := t.setScope(s.Scope(), s)
			for item := range s.Items() {
				if t.large = t.large || len(t.pairs) > maxPairs || len(t.symbols.text) > maxText; t.large {
					return
				}
				var m otlpwire.Metric
				if m.Parse(item); err != nil {
					t.refuseAll(&m, err)
				} else {
					t.metric(&m)
				}
			}
		}
		if t.resource = own; t.first != math.MaxUint64 && t.cfg.TargetInfo && !t.plain {
			t.targetInfo()
		}
	}
}

// What a translation may hold, in labels and in bytes of texts: payloads of a megabyte can be
// made that would take a thousand times as much. With more it is cut in halves.
const (
	maxPairs = 8 << 20
	maxText  = 64 << 20
)

// maxBuckets is how many buckets, bounds or quantiles a point may have: each is a series, or
// as good as one.
const maxBuckets = 4096

// refuseAll refuses the points of a metric.
func (t *translation) refuseAll(m *otlpwire.Metric, err error) {
	for range m.Points() {
		t.refuse(ledger.DeadUnsupported, err)
		t.point++
	}
}

// refuse says that the point at hand is not sent.
func (t *translation) refuse(reason string, err error) { t.refused.Add(reason, err, t.point) }

// setResource prepares the labels that every series of a resource has.
func (t *translation) setResource(resource []byte) {
	t.resource, t.target, t.job, t.host = t.resource[:0], t.target[:0], 0, 0
	t.attributes = t.attributes[:0]
	var namespace, service []byte // nil: absent, which is not the same as empty
	otlpwire.EachResourceAttribute(resource, func(key, value []byte) {
		switch string(key) {
		case "service.namespace":
			namespace = append([]byte{}, t.text(value)...)
		case "service.name":
			service = append([]byte{}, t.text(value)...)
		case "service.instance.id":
			t.host = t.symbols.add(t.text(value))
		}
		t.attributes = append(t.attributes, attribute{key, value})
	})
	if service != nil {
		if namespace != nil {
			service = append(append(namespace, '/'), service...)
		}
		t.job = t.symbols.add(service)
	}
	for _, a := range t.attributes {
		if !slices.Contains(t.cfg.Labels, string(a.key)) {
			continue
		}
		name, err := t.names.labelName(a.key)
		if err != nil {
			continue // no label can have it
		}
		t.resource = set(t.resource, label{name: t.symbols.addString(name), value: t.symbols.add(t.text(a.value))})
	}
	if slices.Contains(t.cfg.Labels, instanceID) { // as the subject says, whatever stands there
		name, _ := t.names.labelName([]byte(instanceID)) // a name it can have
		t.resource = set(t.resource, label{name: t.symbols.addString(name), value: t.symbols.addString(t.instance)})
	}
	if t.job != 0 {
		t.resource = set(t.resource, label{name: t.symbols.addString(jobLabel), value: t.job})
	}
	if t.host != 0 {
		t.resource = set(t.resource, label{name: t.symbols.addString(instanceLabel), value: t.host})
	}
	t.resource = t.external(t.resource)
	t.resource = t.order(t.resource)
	if !t.cfg.TargetInfo {
		return
	}
	others := slices.DeleteFunc(t.attributes, func(a attribute) bool {
		if slices.Contains(identifying, string(a.key)) {
			return true
		}
		_, err := t.names.labelName(a.key)
		return err != nil
	})
	if len(others) == 0 || len(others) > maxTarget || t.job == 0 && t.host == 0 {
		return
	}
	var err error
	if t.target, err = t.addAttributes(t.target, others, ""); err != nil {
		t.target = t.target[:0]
		return
	}
	if t.job != 0 {
		t.target = set(t.target, label{name: t.symbols.addString(jobLabel), value: t.job})
	}
	if t.host != 0 {
		t.target = set(t.target, label{name: t.symbols.addString(instanceLabel), value: t.host})
	}
	t.target = t.order(t.external(t.target))
}

const instanceID = "instance.id"

// maxTarget is how many attributes a resource with a target_info may have.
const maxTarget = 256

// external adds the external labels that ls does not have.
func (t *translation) external(ls []label) []label {
	for name, value := range t.cfg.External {
		n := t.symbols.addString(name)
		if !slices.ContainsFunc(ls, func(l label) bool { return l.name == n && l.value != 0 }) {
			ls = set(ls, label{name: n, value: t.symbols.addString(value), weak: true})
		}
	}
	return ls
}

// setScope adds the labels of a scope, where they are wanted.
func (t *translation) setScope(scope, around []byte) error {
	if !t.cfg.ScopeLabels {
		return nil
	}
	var name, version, schema []byte
	var as []attribute
	for i := 0; i < len(scope); {
		var f otlpwire.Field
		switch f, i = otlpwire.NextField(scope, i); f.Tag {
		case 1<<3 | otlpwire.Bytes:
			name = f.Bytes
		case 2<<3 | otlpwire.Bytes:
			version = f.Bytes
		case 3<<3 | otlpwire.Bytes:
			key, value := otlpwire.Attribute(f.Bytes)
			as = append(as, attribute{key, value})
		}
	}
	if len(name) == 0 {
		return nil
	}
	for i := 0; i < len(around); {
		var f otlpwire.Field
		if f, i = otlpwire.NextField(around, i); f.Tag == 3<<3|otlpwire.Bytes {
			schema = f.Bytes
		}
	}
	own, err := t.addAttributes(nil, as, "otel_scope_")
	if err != nil {
		return fmt.Errorf("scope attributes: %w", err)
	}
	own = set(own, label{name: t.symbols.addString("otel_scope_name"), value: t.symbols.add(name)})
	own = set(own, label{name: t.symbols.addString("otel_scope_version"), value: t.symbols.add(version)})
	own = set(own, label{name: t.symbols.addString("otel_scope_schema_url"), value: t.symbols.add(schema)})
	t.resource = slices.Clone(t.resource) // the next scope begins with what the resource has
	for _, l := range own {
		t.resource = set(t.resource, l)
	}
	t.resource = t.order(t.resource)
	return nil
}

// metric adds the points of a metric.
func (t *translation) metric(m *otlpwire.Metric) {
	if m.Kind == otlpwire.NoMetric {
		return
	}
	if m.Kind != otlpwire.Gauge && m.Kind != otlpwire.Summary && m.Temporality != otlpwire.Cumulative && m.Temporality != otlpwire.Delta {
		t.refuseAll(m, fmt.Errorf("metric %q: %w", m.Name, errTemporality))
		return
	}
	var f family
	if f, t.id = t.names.family(m, t.id); f.err != nil {
		t.refuseAll(m, fmt.Errorf("metric %q: %w", m.Name, f.err))
		return
	}
	t.family = uint32(len(t.families))
	t.families = append(t.families, metadata{
		name: t.symbols.addString(f.name), help: t.symbols.add(m.Description), unit: t.symbols.addString(f.unit), kind: prometheusType(m),
	})
	names := familyNames{t.families[t.family].name, 0, 0, 0}
	switch m.Kind {
	case otlpwire.Histogram:
		names.bucket = t.suffixed(f.name, "_bucket")
		fallthrough
	case otlpwire.Summary:
		names.sum, names.count = t.suffixed(f.name, "_sum"), t.suffixed(f.name, "_count")
	}
	for p := range m.Points() {
		var (
			reason = ledger.DeadUnsupported
			err    error
		)
		switch m.Kind {
		case otlpwire.Gauge, otlpwire.Sum:
			err = t.number(m, p, names)
		case otlpwire.Histogram:
			err = t.explicit(m, p, names)
		case otlpwire.ExponentialHistogram:
			err = t.exponential(m, p, names)
		case otlpwire.Summary:
			err = t.summary(p, names)
		}
		if err == nil {
			t.first, t.last = min(t.first, t.moment), max(t.last, t.moment)
		} else {
			if errors.Is(err, errOld) {
				reason = ledger.DeadOutOfOrder
			} else if errors.Is(err, errCardinality) {
				reason = ledger.DeadCardinality
			}
			t.refuse(reason, fmt.Errorf("metric %q: %w", m.Name, err))
		}
		t.point++
	}
}

// familyNames are the symbols of the names that a metric's series have.
type familyNames struct{ plain, bucket, sum, count uint32 }

func (t *translation) suffixed(name, suffix string) uint32 {
	t.scratch = append(append(t.scratch[:0], name...), suffix...)
	return t.symbols.add(t.scratch)
}

func prometheusType(m *otlpwire.Metric) uint8 {
	switch m.Kind {
	case otlpwire.Gauge:
		return typeGauge
	case otlpwire.Sum:
		if m.Monotonic {
			return typeCounter
		}
		return typeGauge
	case otlpwire.Histogram, otlpwire.ExponentialHistogram:
		return typeHistogram
	case otlpwire.Summary:
		return typeSummary
	}
	return typeUnknown
}

// point is what all kinds have.
type point struct {
	at, start uint64 // nanoseconds
	ended     bool
}

// layout says which fields of a point hold what all kinds have, by tag; start and time are
// the same in all.
type layout struct{ attributes, exemplars, flags int }

var layouts = [...]layout{
	otlpwire.Gauge:                {7<<3 | otlpwire.Bytes, none, 8<<3 | otlpwire.Varint}, // a gauge has no exemplars in Prometheus
	otlpwire.Sum:                  {7<<3 | otlpwire.Bytes, 5<<3 | otlpwire.Bytes, 8<<3 | otlpwire.Varint},
	otlpwire.Histogram:            {9<<3 | otlpwire.Bytes, 8<<3 | otlpwire.Bytes, 10<<3 | otlpwire.Varint},
	otlpwire.ExponentialHistogram: {1<<3 | otlpwire.Bytes, 11<<3 | otlpwire.Bytes, 10<<3 | otlpwire.Varint},
	otlpwire.Summary:              {7<<3 | otlpwire.Bytes, none, 8<<3 | otlpwire.Varint},
}

// read reads what all kinds of points have, and hands own the other fields; then it makes the
// labels.
func (t *translation) read(p []byte, kind otlpwire.MetricKind, own func(otlpwire.Field)) (pt point, err error) {
	l := &layouts[kind]
	t.attributes, t.marks = t.attributes[:0], t.marks[:0]
	for i := 0; i < len(p); {
		var f otlpwire.Field
		switch f, i = otlpwire.NextField(p, i); f.Tag {
		case l.attributes:
			key, value := otlpwire.Attribute(f.Bytes)
			t.attributes = append(t.attributes, attribute{key, value})
		case 2<<3 | otlpwire.Fixed64:
			pt.start = f.Bits
		case 3<<3 | otlpwire.Fixed64:
			pt.at = f.Bits
		case l.exemplars:
			t.exemplar(f.Bytes)
		case l.flags:
			pt.ended = f.Bits&noRecordedValue != 0
		default:
			own(f)
		}
	}
	if t.own, err = t.addAttributes(t.own[:0], t.attributes, ""); err != nil {
		return pt, fmt.Errorf("attributes: %w", err)
	}
	t.moment = pt.at
	t.own = t.order(t.own)
	t.merge(t.own, t.resource)
	t.place()
	return pt, nil
}

// number adds a point of a gauge or sum.
func (t *translation) number(m *otlpwire.Metric, p []byte, names familyNames) error {
	var v float64
	pt, err := t.read(p, m.Kind, func(f otlpwire.Field) {
		switch f.Tag {
		case 4<<3 | otlpwire.Fixed64:
			v = f.Double()
		case 6<<3 | otlpwire.Fixed64:
			v = float64(int64(f.Bits))
		}
	})
	if err == nil {
		err = t.memory.admit(t, names.plain, pt, nil)
	}
	if err == nil && !pt.ended && m.Kind == otlpwire.Sum && m.Temporality == otlpwire.Delta {
		v, pt.start, err = t.memory.sum(t.identity(names.plain), pt, v)
	}
	if err != nil {
		return err
	}
	s := t.one(names.plain, label{}, pt, v)
	for _, k := range t.marks {
		t.attach(s, k.entry)
	}
	return nil
}

// summary adds a point of a summary.
func (t *translation) summary(p []byte, names familyNames) error {
	var (
		sum   float64
		count uint64
	)
	t.quantiles, t.values = t.quantiles[:0], t.values[:0]
	pt, err := t.read(p, otlpwire.Summary, func(f otlpwire.Field) {
		switch f.Tag {
		case 4<<3 | otlpwire.Fixed64:
			count = f.Bits
		case 5<<3 | otlpwire.Fixed64:
			sum = f.Double()
		case 6<<3 | otlpwire.Bytes:
			var q, v float64
			for j := 0; j < len(f.Bytes); {
				var g otlpwire.Field
				switch g, j = otlpwire.NextField(f.Bytes, j); g.Tag {
				case 1<<3 | otlpwire.Fixed64:
					q = g.Double()
				case 2<<3 | otlpwire.Fixed64:
					v = g.Double()
				}
			}
			t.quantiles, t.values = append(t.quantiles, q), append(t.values, v)
		}
	})
	if err == nil && len(t.quantiles) > maxBuckets {
		err = errBuckets
	}
	if err == nil {
		err = t.memory.admit(t, names.plain, pt, t.quantiles)
	}
	if err != nil {
		return err
	}
	t.one(names.sum, label{}, pt, sum)
	t.one(names.count, label{}, pt, float64(count))
	quantile := t.symbols.addString(quantileLabel)
	for i, q := range t.quantiles {
		t.one(names.plain, label{name: quantile, value: t.decimal(q)}, pt, t.values[i])
	}
	return nil
}

// one adds a sample to the series with an extra label and returns it.
func (t *translation) one(name uint32, extra label, pt point, v float64) (n int) {
	if pt.ended {
		v = staleNaN
	}
	n = t.at(name, extra, false)
	t.put(n, pt, v, none)
	return n
}

// decimal returns a number as le and quantile have it.
func (t *translation) decimal(v float64) uint32 {
	t.scratch = strconv.AppendFloat(t.scratch[:0], v, 'f', -1, 64)
	return t.symbols.add(t.scratch)
}

// place finds out where the name goes among t.labels.
func (t *translation) place() {
	t.nameAt, t.extra = t.position(t.nameLabel), 0
}

// position is where a label of a name goes among t.labels.
func (t *translation) position(name uint32) int {
	i := 0
	for i < len(t.labels) && t.before(t.labels[i].name, name) {
		i++
	}
	return i
}

// at returns the series that name, t.labels and an extra label make up. The extra one takes
// the place of another of its name.
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

// put adds a sample to a series: a number or, where it is not none, a histogram.
func (t *translation) put(n int, pt point, v float64, histogram int32) {
	s := &t.series[n]
	at := int64(pt.at) / 1e6
	if s.last != none {
		switch before := &t.samples[s.last]; {
		case before.at == at: // one a millisecond: the last
			before.value, before.start, before.histogram = v, int64(pt.start)/1e6, histogram
			return
		case before.at > at:
			s.unsorted = true
		}
	}
	k := int32(len(t.samples))
	t.samples = append(t.samples, sample{value: v, at: at, start: int64(pt.start) / 1e6, histogram: histogram, next: none})
	if s.last == none {
		s.first = k
	} else {
		t.samples[s.last].next = k
	}
	s.last = k
	s.count++
}

// ordered calls visit with the samples of a series in the order of time, the last of
// those of one millisecond.
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
	slices.SortStableFunc(t.sort, func(a, b sample) int { return int(min(max(a.at-b.at, -1), 1)) })
	for i, v := range t.sort {
		if i+1 == len(t.sort) || t.sort[i+1].at != v.at {
			visit(v)
		}
	}
}

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
	if !valued {
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

// targetInterval is how often target_info is written at the most: half of the five
// minutes that PromQL looks back.
const targetInterval = 150_000 // milliseconds

// maxTargetSamples is how many samples of target_info one request may have for a resource.
const maxTargetSamples = 24

// targetInfo adds the samples of target_info for the resource at hand, from its first
// point to its last, unless it was written a short while ago.
func (t *translation) targetInfo() {
	if len(t.target) == 0 {
		return
	}
	name := t.symbols.addString("target_info")
	t.labels = append(t.labels[:0], t.target...)
	t.place()
	id := t.identity(name)
	next, end := int64(t.first)/1e6, int64(t.last)/1e6
	next = max(next, end-maxTargetSamples*targetInterval) // a point may be of 1970
	if before, ok := t.memory.target(id); ok {
		if next = max(next, before+targetInterval); next > end {
			return
		}
	}
	t.targeted = true
	t.family = uint32(len(t.families))
	t.families = append(t.families, metadata{name: name, help: t.symbols.addString("Target metadata"), kind: typeGauge})
	n := t.at(name, label{}, false)
	for ; next < end; next += targetInterval {
		t.put(n, point{at: uint64(next) * 1e6}, 1, none)
	}
	t.put(n, point{at: uint64(end) * 1e6}, 1, none)
	t.memory.wroteTarget(id, end)
}

// hashOf is a second hash of a series, of its texts.
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
	first := t.symbols.hashes[name]
	for _, l := range t.labels {
		first = (first^t.symbols.hashes[l.name])*0x9e3779b97f4a7c15 + t.symbols.hashes[l.value]
	}
	return identity{first, t.hashOf(name)}
}
