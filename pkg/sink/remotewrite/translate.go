package remotewrite

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/prometheus/otlptranslator"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/sink/attr"
)

var (
	namer  = otlptranslator.NewMetricNamer("", otlptranslator.UnderscoreEscapingWithSuffixes)
	labels = otlptranslator.LabelNamer{PreserveMultipleUnderscores: true}

	errDelta       = errors.New("delta temporality is not supported: set the SDK's temporality preference to cumulative")
	errExponential = errors.New("exponential histograms are not supported yet: use explicit buckets")
)

// stale is the NaN that Prometheus reads as "the series has ended here".
var stale = math.Float64frombits(0x7ff0000000000002)

// noRecordedValue is bit 0 of a data point's flags.
const noRecordedValue = 1

type label struct{ name, value string }

type sample struct {
	value float64
	at    int64 // milliseconds
}

type series struct {
	labels  []label
	samples []sample
}

// translation turns one OTLP request into series, in the order of first sight.
type translation struct {
	promote  []string
	instance string
	byLabels map[string]*series
	order    []*series
	resource []label // of the resource at hand
}

func newTranslation(promote []string, instance string) *translation {
	return &translation{promote: promote, instance: instance, byLabels: make(map[string]*series)}
}

func (t *translation) add(req *metricspb.MetricsData) error {
	for _, rm := range req.GetResourceMetrics() {
		if err := t.setResource(rm.GetResource()); err != nil {
			return err
		}
		for _, sm := range rm.GetScopeMetrics() {
			for _, m := range sm.GetMetrics() {
				if err := t.metric(m); err != nil {
					return fmt.Errorf("metric %q: %w", m.GetName(), err)
				}
			}
		}
	}
	return nil
}

// setResource prepares the labels that every series of a resource has.
func (t *translation) setResource(r *resourcepb.Resource) error {
	attrs := map[string]string{}
	for _, kv := range r.GetAttributes() {
		attrs[kv.GetKey()] = attr.Text(kv.GetValue())
	}
	attrs["instance.id"] = t.instance // as the subject says
	t.resource = t.resource[:0]
	for _, name := range t.promote {
		if v := attrs[name]; v != "" {
			l, err := labels.Build(name)
			if err != nil {
				return fmt.Errorf("label %q: %w", name, err)
			}
			t.resource = append(t.resource, label{l, v})
		}
	}
	if job := attrs["service.name"]; job != "" {
		if ns := attrs["service.namespace"]; ns != "" {
			job = ns + "/" + job
		}
		t.resource = append(t.resource, label{"job", job})
	}
	if inst := attrs["service.instance.id"]; inst != "" {
		t.resource = append(t.resource, label{"instance", inst})
	}
	return nil
}

func (t *translation) metric(m *metricspb.Metric) error {
	om := otlptranslator.Metric{Name: m.GetName(), Unit: m.GetUnit()}
	var add func(name string) error
	switch d := m.GetData().(type) {
	case *metricspb.Metric_Gauge:
		om.Type = otlptranslator.MetricTypeGauge
		add = func(name string) error { return t.numbers(name, d.Gauge.GetDataPoints()) }
	case *metricspb.Metric_Sum:
		if om.Type = otlptranslator.MetricTypeNonMonotonicCounter; d.Sum.GetIsMonotonic() {
			om.Type = otlptranslator.MetricTypeMonotonicCounter
		}
		if isDelta(d.Sum.GetAggregationTemporality()) {
			return errDelta
		}
		add = func(name string) error { return t.numbers(name, d.Sum.GetDataPoints()) }
	case *metricspb.Metric_Histogram:
		om.Type = otlptranslator.MetricTypeHistogram
		if isDelta(d.Histogram.GetAggregationTemporality()) {
			return errDelta
		}
		add = func(name string) error { return t.histograms(name, d.Histogram.GetDataPoints()) }
	case *metricspb.Metric_Summary:
		om.Type = otlptranslator.MetricTypeSummary
		add = func(name string) error { return t.summaries(name, d.Summary.GetDataPoints()) }
	case *metricspb.Metric_ExponentialHistogram:
		return errExponential
	default:
		return nil // no data points
	}
	name, err := namer.Build(om)
	if err != nil {
		return err
	}
	return add(name)
}

func isDelta(t metricspb.AggregationTemporality) bool {
	return t == metricspb.AggregationTemporality_AGGREGATION_TEMPORALITY_DELTA
}

func (t *translation) numbers(name string, points []*metricspb.NumberDataPoint) error {
	for _, p := range points {
		v := p.GetAsDouble()
		if i, ok := p.GetValue().(*metricspb.NumberDataPoint_AsInt); ok {
			v = float64(i.AsInt)
		}
		if p.GetFlags()&noRecordedValue != 0 {
			v = stale
		}
		if err := t.sample(name, p.GetAttributes(), p.GetTimeUnixNano(), v); err != nil {
			return err
		}
	}
	return nil
}

func (t *translation) histograms(name string, points []*metricspb.HistogramDataPoint) error {
	for _, p := range points {
		counts, bounds := p.GetBucketCounts(), p.GetExplicitBounds()
		if len(counts) > 0 && len(counts) != len(bounds)+1 {
			return fmt.Errorf("%d bucket counts for %d bounds", len(counts), len(bounds))
		}
		if !slices.IsSorted(bounds) {
			return errors.New("bounds are not in order")
		}
		ended := p.GetFlags()&noRecordedValue != 0
		put := func(suffix string, v float64, extra ...label) error {
			if ended {
				v = stale
			}
			return t.sample(name+suffix, p.GetAttributes(), p.GetTimeUnixNano(), v, extra...)
		}
		var total uint64
		for i, b := range bounds {
			if len(counts) > 0 {
				total += counts[i]
			}
			if err := put("_bucket", float64(total), label{"le", number(b)}); err != nil {
				return err
			}
		}
		err := errors.Join(
			put("_bucket", float64(p.GetCount()), label{"le", "+Inf"}),
			put("_count", float64(p.GetCount())))
		if p.Sum != nil {
			err = errors.Join(err, put("_sum", p.GetSum()))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (t *translation) summaries(name string, points []*metricspb.SummaryDataPoint) error {
	for _, p := range points {
		put := func(suffix string, v float64, extra ...label) error {
			if p.GetFlags()&noRecordedValue != 0 {
				v = stale
			}
			return t.sample(name+suffix, p.GetAttributes(), p.GetTimeUnixNano(), v, extra...)
		}
		err := errors.Join(put("_count", float64(p.GetCount())), put("_sum", p.GetSum()))
		for _, q := range p.GetQuantileValues() {
			err = errors.Join(err, put("", q.GetValue(), label{"quantile", number(q.GetQuantile())}))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// sample adds one sample to the series that name, attributes, resource and
// extra labels make up. Later kinds of labels win: attributes, resource, extra.
func (t *translation) sample(name string, attrs []*commonpb.KeyValue, at uint64, v float64, extra ...label) error {
	ls := make([]label, 0, len(attrs)+len(t.resource)+len(extra)+1)
	for _, kv := range attrs {
		l, err := labels.Build(kv.GetKey())
		if err != nil {
			return fmt.Errorf("attribute %q: %w", kv.GetKey(), err)
		}
		if strings.HasPrefix(l, "__") {
			l = "key" + l // reserved for Prometheus itself
		}
		ls = mergeLabel(ls, label{l, attr.Text(kv.GetValue())})
	}
	for _, l := range append(slices.Clone(t.resource), append(extra, label{"__name__", name})...) {
		ls = slices.DeleteFunc(ls, func(have label) bool { return have.name == l.name })
		ls = append(ls, l)
	}
	ls = slices.DeleteFunc(ls, func(l label) bool { return l.value == "" })
	slices.SortFunc(ls, func(a, b label) int { return cmp.Compare(a.name, b.name) })
	var id strings.Builder
	for _, l := range ls {
		id.WriteString(l.name)
		id.WriteByte(0)
		id.WriteString(l.value)
		id.WriteByte(0)
	}
	s := t.byLabels[id.String()]
	if s == nil {
		s = &series{labels: ls}
		t.byLabels[id.String()] = s
		t.order = append(t.order, s)
	}
	s.samples = append(s.samples, sample{v, int64(at / 1e6)})
	return nil
}

// mergeLabel adds a label; two attributes whose names become the same label are
// joined with ';' in the order of their appearance.
func mergeLabel(ls []label, l label) []label {
	for i := range ls {
		if ls[i].name == l.name {
			if ls[i].value != l.value {
				ls[i].value += ";" + l.value
			}
			return ls
		}
	}
	return append(ls, l)
}

func number(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) }

// request encodes a prometheus.WriteRequest: timeseries = 1 {labels = 1 {name =
// 1, value = 2}, samples = 2 {value = 1, timestamp = 2}}. Samples of a series
// are in the order of time, one a millisecond: the last one wins.
func (t *translation) request() []byte {
	var out, ts, part []byte
	for _, s := range t.order {
		ts = ts[:0]
		for _, l := range s.labels {
			part = protowire.AppendString(protowire.AppendTag(part[:0], 1, protowire.BytesType), l.name)
			part = protowire.AppendString(protowire.AppendTag(part, 2, protowire.BytesType), l.value)
			ts = protowire.AppendBytes(protowire.AppendTag(ts, 1, protowire.BytesType), part)
		}
		slices.SortStableFunc(s.samples, func(a, b sample) int { return cmp.Compare(a.at, b.at) })
		for i, v := range s.samples {
			if i+1 < len(s.samples) && s.samples[i+1].at == v.at {
				continue
			}
			part = protowire.AppendFixed64(protowire.AppendTag(part[:0], 1, protowire.Fixed64Type), math.Float64bits(v.value))
			part = protowire.AppendVarint(protowire.AppendTag(part, 2, protowire.VarintType), uint64(v.at))
			ts = protowire.AppendBytes(protowire.AppendTag(ts, 2, protowire.BytesType), part)
		}
		out = protowire.AppendBytes(protowire.AppendTag(out, 1, protowire.BytesType), ts)
	}
	return out
}
