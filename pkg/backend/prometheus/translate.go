package prometheus

import (
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"strconv"
	"time"

	"github.com/prometheus/otlptranslator"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

var (
	errTemporality = errors.New("the aggregation temporality is neither cumulative nor delta")
	errCounts      = errors.New("the number of bucket counts is not one more than the number of bounds")
	errBounds      = errors.New("the bounds are not in order")
	errBuckets     = fmt.Errorf("more than %d buckets or quantiles", maxBuckets)
	errFinite      = errors.New("the delta is not a finite number")
	errCounted     = errors.New("the buckets of the exponential histogram do not add up to its count")
	errThreshold   = errors.New("the zero threshold of the exponential histogram is not a finite number, or below zero")
	errScale       = errors.New("the scale of the exponential histogram is below -4, which native histograms do not have")
	errOld         = errors.New("the delta is older than the previous one of its stream")
	errNew         = fmt.Errorf("its time is more than %d minutes ahead of its arrival", ahead)
	errUpDown      = errors.New("the deltas of a sum that may fall cannot be added up, because its value before the first one is unknown, and lost at every restart; set the instrument's temporality to cumulative")
	errFalls       = errors.New("negative delta of a monotonic sum")
	errCollides    = errors.New("another stream of the same request has the same labels at the same time: the attributes in which the two differ are not labels (for scopes see prometheus.scope_labels, for resources prometheus.resource_labels)")
	errShape       = errors.New("the delta has other buckets than a concurrent stream with the same labels: the attributes in which the two differ are not labels")
	errKnown       = errors.New("already counted")
)

// stale is the NaN that means in Prometheus that the series ends here.
const stale = 0x7ff0000000000002

var staleNaN = math.Float64frombits(stale)

// noRecordedValue is bit 0 of a data point's flags.
const noRecordedValue = 1

// metadata is Prometheus's metadata of a metric.
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

// translation turns OTLP requests into series, one after the other. It has no side effects: the time is
// an argument, and it has no connection. Its memory of deltas and target_info changes only with
// commit, so that a request that fails is the same when it is retried.
type translation struct {
	cfg      *Config
	instance string
	now      uint64 // nanoseconds: when the payload arrived
	names    *names
	memory   *memory

	// Of the current request.
	symbols   symbols
	nameLabel uint32
	index     table
	series    []series
	pairs     []uint32 // names and values of labels
	samples   []sample
	native    []native
	exemplars []exemplar
	families  []metadata
	refused   fault.Rejections
	known     int             // points that are contained in what is or was sent, without their own sample
	places    map[place]int32 // samples of series that are not sorted by time
	point     int             // number of the next one in the payload
	large     bool            // too much memory for one request: the result is not used
	alone     bool            // the one target_info among the series may be refused
	plain     bool            // without target_info

	// Of the current resource, scope and metric.
	resource    []label // with those of the scope, sorted
	job, host   uint32
	about       []byte // the Resource message
	target      []label
	first, last uint64 // times of the resource's points
	family      uint32
	reserved    uint32    // the name of the label that its series need themselves: le, quantile
	streams     [3]uint64 // hashes of the resource, scope and metric

	// Of the current point.
	attributes []attribute
	chosen     []attribute // of the resource, for labels
	labels     []label     // merged, in order
	moment     uint64      // its time
	stream     uint64      // a hash of its OTLP identity: resource, scope, metric and attributes
	replaces   bool        // it has replaced another point of its stream in the same millisecond
	collides   bool        // it has the same place as a point of another stream
	nameAt     int         // where the name goes among them
	extra      uint32      // the name of the current extra label
	extraAt    int         // where it goes
	own        []label
	refs       []exemplarRef
	scratch    []byte
	id         []byte
	bounds     []float64 // of the previous histogram
	les        []uint32  // its le labels
	quantiles  []float64 // of the current summary
	values     []float64
	sort       []sample
	histogram  otlpHistogram
	incoming   otlpExemplar
}

// exemplarRef is an exemplar of the current point.
type exemplarRef struct {
	value float64
	entry int32
}

func newTranslation(cfg *Config) *translation {
	return &translation{cfg: cfg, names: newNames(otlptranslator.TranslationStrategyOption(cfg.Strategy)), memory: newMemory(cfg), places: make(map[place]int32)}
}

// reset discards the previous request and its staged changes. now is when the payload arrived.
func (t *translation) reset(instance string, now time.Time) {
	if cap(t.pairs) > 2*maxPairs || cap(t.symbols.text) > maxText {
		t.pairs, t.symbols.text = nil, nil // from one huge payload: not kept
	}
	t.instance, t.now = instance, uint64(now.UnixNano())
	t.symbols.reset()
	t.nameLabel = t.symbols.addString(nameLabel)
	t.index.reset()
	t.series, t.pairs, t.samples, t.native, t.exemplars = t.series[:0], t.pairs[:0], t.samples[:0], t.native[:0], t.exemplars[:0]
	t.families, t.refused, t.point, t.known = t.families[:0], t.refused[:0], 0, 0
	if len(t.places) > 1<<12 {
		t.places = make(map[place]int32) // from one huge payload: not kept
	}
	clear(t.places)
	t.large, t.alone, t.plain = false, false, false
	t.bounds = t.bounds[:0]
	t.memory.reset()
}

// commit applies the staged changes of a request that has been stored.
func (t *translation) commit() { t.memory.commit() }

// add translates an OTLP request, which must be valid.
func (t *translation) add(payload []byte) {
	for r := range otlpwire.Resources(payload) {
		t.setResource(r.Resource())
		t.first, t.last = math.MaxUint64, 0
		own := t.resource
		for s := range r.Scopes() {
			t.resource = own
			t.streams[1] = streamOfScope(s.Scope())
			err := t.setScope(s.Scope(), s)
			for item := range s.Items() {
				if t.large {
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

// Bounds of a translation, in labels and in bytes of texts: a payload of a megabyte can be constructed
// that would take a thousand times as much. A larger one is halved.
const (
	maxPairs = 8 << 20
	maxText  = 64 << 20
)

// maxBuckets is how many buckets, bounds or quantiles a point may have: each is a series, or costs as
// much as one.
const maxBuckets = 4096

// refuseAll refuses the points of a metric.
func (t *translation) refuseAll(m *otlpwire.Metric, err error) {
	for range m.Points() {
		t.refuse(ledger.DeadUnsupported, err)
		t.point++
	}
}

// refuse records that the current point is not sent.
func (t *translation) refuse(reason string, err error) { t.refused.Add(reason, err, t.point) }

// metric adds the points of a metric.
func (t *translation) metric(m *otlpwire.Metric) {
	if m.Kind == otlpwire.NoMetric {
		return
	}
	var f family
	err := supported(m)
	if err == nil {
		f, t.id = t.names.family(m, t.id)
		err = f.err
	}
	if err != nil {
		t.refuseAll(m, fmt.Errorf("metric %q: %w", m.Name, err))
		return
	}
	names := t.begin(m, f)
	for p := range m.Points() {
		if t.large = t.large || len(t.pairs) > maxPairs || len(t.symbols.text) > maxText; t.large {
			return
		}
		t.replaces, t.collides = false, false
		t.outcome(m, t.addPoint(m, p, names))
		t.point++
	}
}

// supported reports why Prometheus has no metric like m.
func supported(m *otlpwire.Metric) error {
	if m.Kind == otlpwire.Gauge || m.Kind == otlpwire.Summary {
		return nil
	}
	if m.Temporality != otlpwire.Cumulative && m.Temporality != otlpwire.Delta {
		return errTemporality
	}
	if m.Kind == otlpwire.Sum && m.Temporality == otlpwire.Delta && !m.Monotonic {
		return errUpDown
	}
	return nil
}

// begin makes the metric that of the points that follow, and returns the names of its series.
func (t *translation) begin(m *otlpwire.Metric, f family) familyNames {
	t.family = uint32(len(t.families))
	t.families = append(t.families, metadata{
		name: t.symbols.addString(f.name), help: t.symbols.add(m.Description), unit: t.symbols.addString(f.unit), kind: prometheusType(m),
	})
	names := familyNames{t.families[t.family].name, 0, 0, 0}
	t.streams[2], t.reserved = streamOfMetric(m), 0
	switch m.Kind {
	case otlpwire.Histogram:
		names.bucket, t.reserved = t.suffixed(f.name, "_bucket"), t.symbols.addString(leLabel)
		names.sum, names.count = t.suffixed(f.name, "_sum"), t.suffixed(f.name, "_count")
	case otlpwire.Summary:
		t.reserved = t.symbols.addString(quantileLabel)
		names.sum, names.count = t.suffixed(f.name, "_sum"), t.suffixed(f.name, "_count")
	}
	return names
}

// addPoint adds a point, or says why not.
func (t *translation) addPoint(m *otlpwire.Metric, p []byte, names familyNames) error {
	switch m.Kind {
	case otlpwire.Gauge, otlpwire.Sum:
		return t.number(m, p, names)
	case otlpwire.Histogram:
		return t.explicit(m, p, names)
	case otlpwire.ExponentialHistogram:
		return t.exponential(m, p, names)
	case otlpwire.Summary:
		return t.summary(p, names)
	}
	return nil
}

// outcome records the outcome of the current point.
func (t *translation) outcome(m *otlpwire.Metric, err error) {
	if err == nil && t.collides {
		err = errCollides
	}
	reason := ledger.DeadUnsupported
	switch {
	case err == nil:
		if t.replaces {
			t.known++
		}
		t.first, t.last = min(t.first, t.moment), max(t.last, t.moment)
		return
	case errors.Is(err, errKnown):
		t.known++
		return
	case errors.Is(err, errOld):
		reason = ledger.DeadOutOfOrder
	case errors.Is(err, errNew):
		reason = ledger.DeadTooNew
	case errors.Is(err, errCardinality):
		reason = ledger.DeadCardinality
	}
	t.refuse(reason, fmt.Errorf("metric %q: %w", m.Name, err))
}

// familyNames are the symbols of the names of a metric's series.
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

// point is the part that all kinds of points have.
type point struct {
	at, start uint64 // nanoseconds
	ended     bool
}

// layout says in which fields a point has the common parts, by tag; start and time are the same in all.
type layout struct{ attributes, exemplars, flags int }

var layouts = [...]layout{
	otlpwire.Gauge:                {7<<3 | otlpwire.Bytes, none, 8<<3 | otlpwire.Varint}, // gauges have no exemplars in Prometheus
	otlpwire.Sum:                  {7<<3 | otlpwire.Bytes, 5<<3 | otlpwire.Bytes, 8<<3 | otlpwire.Varint},
	otlpwire.Histogram:            {9<<3 | otlpwire.Bytes, 8<<3 | otlpwire.Bytes, 10<<3 | otlpwire.Varint},
	otlpwire.ExponentialHistogram: {1<<3 | otlpwire.Bytes, 11<<3 | otlpwire.Bytes, 10<<3 | otlpwire.Varint},
	otlpwire.Summary:              {7<<3 | otlpwire.Bytes, none, 8<<3 | otlpwire.Varint},
}

// read reads the common parts of a point, and passes the other fields to own; then it builds the
// labels.
func (t *translation) read(p []byte, kind otlpwire.MetricKind, own func(otlpwire.Field)) (pt point, err error) {
	l := &layouts[kind]
	t.attributes, t.refs, t.stream = t.attributes[:0], t.refs[:0], 0
	for i := 0; i < len(p); {
		var f otlpwire.Field
		switch f, i = otlpwire.NextField(p, i); f.Tag {
		case l.attributes:
			key, value := otlpwire.Attribute(f.Bytes)
			t.attributes = append(t.attributes, attribute{key, value})
			t.stream += maphash.Bytes(seed, f.Bytes) // in any order
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
	if t.moment = pt.at; t.ahead(pt.at) {
		return pt, errNew
	}
	t.stream = mix(mix(mix(t.streams[0], t.streams[1]), t.streams[2]), t.stream)
	t.own = t.order(t.own)
	t.giveWay()
	t.merge(t.own, t.resource)
	t.place()
	return pt, nil
}

// ahead reports whether a time is so far ahead of the payload's arrival that a backend which stores it
// would refuse what others send after it.
func (t *translation) ahead(at uint64) bool { return at > t.now+ahead*minuteNanos }

// meets reports whether a series has a point of another stream at the place of the current one.
func (t *translation) meets(n int, pt point) bool {
	k := t.taken(n, int64(pt.at)/1e6)
	return k != none && t.samples[k].stream != t.stream
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
	if err == nil && m.Kind == otlpwire.Sum && m.Temporality == otlpwire.Delta {
		v, pt, err = t.sum(names.plain, pt, v)
	}
	if err != nil {
		return err
	}
	if t.meets(t.at(names.plain, label{}, false), pt) {
		return errCollides
	}
	s := t.one(names.plain, label{}, pt, v)
	for _, k := range t.refs {
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
		t.quantiles = append(t.quantiles[:0], t.memory.ends(t.shape(names.plain), pt.ended, t.quantiles)...)
		for len(t.values) < len(t.quantiles) {
			t.values = append(t.values, 0)
		}
	}
	if err != nil {
		return err
	}
	if t.meets(t.at(names.count, label{}, false), pt) {
		return errCollides
	}
	t.one(names.count, label{}, pt, float64(count))
	t.one(names.sum, label{}, pt, sum)
	quantile := t.symbols.addString(quantileLabel)
	for i, q := range t.quantiles {
		t.one(names.plain, label{name: quantile, value: t.decimal(q)}, pt, t.values[i])
	}
	return nil
}

// one adds a sample to the series with an extra label and returns that series.
func (t *translation) one(name uint32, extra label, pt point, v float64) (n int) {
	if pt.ended {
		v = staleNaN
	}
	n = t.at(name, extra, false)
	t.put(n, pt, v, none)
	return n
}

// decimal formats a number for le and quantile.
func (t *translation) decimal(v float64) uint32 {
	t.scratch = strconv.AppendFloat(t.scratch[:0], v, 'f', -1, 64)
	return t.symbols.add(t.scratch)
}
