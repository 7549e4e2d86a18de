package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"

	"github.com/prometheus/otlptranslator"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/storage/remote/otlptranslator/prometheusremotewrite"
	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/pmetric"

	"github.com/penstock/penstock/pkg/backend/prometheus"
	"github.com/penstock/penstock/pkg/fault"
)

// series is one of either side: its samples by kind and time, and what goes with them.
type series struct {
	samples   map[int64]string
	exemplars []string
	metadata  string
}

// book holds series by their labels.
type book map[string]*series

func (b book) of(ls labels.Labels, kind string) *series {
	key := kind + ls.String()
	if b[key] == nil {
		b[key] = &series{samples: map[int64]string{}}
	}
	return b[key]
}

// add notes a sample; of one millisecond the last counts.
func (b book) add(ls labels.Labels, m metadata.Metadata, start, at int64, v float64, h *histogram.Histogram, es []exemplar.Exemplar) {
	kind, text := "number ", fmt.Sprintf("%x", math.Float64bits(v))
	if h != nil {
		kind = "histogram "
		h = h.Copy().Compact(0)
		text = fmt.Sprintf("schema %d zero %g:%d count %d sum %x %v%v %v%v hint %d", h.Schema, h.ZeroThreshold, h.ZeroCount, h.Count, math.Float64bits(h.Sum), h.PositiveSpans, h.PositiveBuckets, h.NegativeSpans, h.NegativeBuckets, h.CounterResetHint)
	}
	s := b.of(ls, kind)
	s.samples[at] = fmt.Sprintf("start %d value %s", start, text)
	s.metadata = fmt.Sprintf("%s %q %q", m.Type, m.Unit, m.Help)
	for _, e := range es {
		s.exemplars = append(s.exemplars, fmt.Sprintf("%s %x @%d", e.Labels, math.Float64bits(e.Value), e.Ts))
	}
}

func (s *series) String() string {
	if s == nil {
		return "absent"
	}
	var out []string
	for _, at := range slices.Sorted(maps.Keys(s.samples)) {
		out = append(out, fmt.Sprintf("@%d %s", at, s.samples[at]))
	}
	slices.Sort(s.exemplars)
	return strings.Join(append(append(out, s.exemplars...), s.metadata), "\n    ")
}

// appender takes what Prometheus makes of a request.
type appender struct{ book }

func (a appender) Append(_ storage.SeriesRef, ls labels.Labels, st, t int64, v float64, h *histogram.Histogram, _ *histogram.FloatHistogram, o storage.AOptions) (storage.SeriesRef, error) {
	if scale := ls.Get(scaleKey); h != nil && scale != "" {
		fine, err := strconv.Atoi(scale)
		if err != nil {
			return 0, err
		}
		h.Schema = int32(fine)
		if err := h.ReduceResolution(histogram.ExponentialSchemaMax); err != nil {
			return 0, err
		}
	}
	if zero := ls.Get(zeroKey); h != nil && zero != "" {
		wide, err := strconv.ParseFloat(zero, 64)
		if err != nil {
			return 0, err
		}
		h.ZeroThreshold = wide
	}
	a.add(ls, o.Metadata, st, t, v, h, o.Exemplars)
	return 1, nil
}
func (appender) Commit() error   { return nil }
func (appender) Rollback() error { return nil }

// variant is one way to translate and to send.
type variant struct {
	strategy otlptranslator.TranslationStrategyOption
	protocol string
	scope    bool
}

func variants() (all []variant) {
	for _, s := range []otlptranslator.TranslationStrategyOption{
		otlptranslator.UnderscoreEscapingWithSuffixes, otlptranslator.UnderscoreEscapingWithoutSuffixes,
		otlptranslator.NoUTF8EscapingWithSuffixes, otlptranslator.NoTranslation,
	} {
		for _, p := range []string{"2.0", "1.0"} {
			all = append(all, variant{s, p, false}, variant{s, p, true})
		}
	}
	return all
}

// perRequest is about how many metrics a generated request has.
const perRequest = 25

// compareMetrics sends at least n metrics both ways and writes what differs to out.
func compareMetrics(n int, seed uint64, out io.Writer) (compared, differing int, err error) {
	rng := rand.New(rand.NewPCG(seed, 1))
	all := variants()
	for i := 0; compared < n; i++ {
		v := all[i%len(all)]
		md := generate(rng, perRequest)
		want := theirs(md, v)
		got, err := ours(md, v)
		if err != nil {
			return compared, differing, err
		}
		if v.protocol == "1.0" {
			want.forget()
		}
		want.meant()
		got.meant()
		compared += md.MetricCount()
		for _, key := range slices.Sorted(maps.Keys(union(want, got))) {
			if w, g := want[key].String(), got[key].String(); w != g {
				if differing++; differing <= 20 {
					fmt.Fprintf(out, "%s %s, scope labels %v: %s\n  Prometheus\n    %s\n  penstock\n    %s\n", v.strategy, v.protocol, v.scope, key, w, g)
				}
			}
		}
	}
	return compared, differing, nil
}

// forget takes away what remote_write 1.0 cannot carry with a sample.
func (b book) forget() {
	for _, s := range b {
		s.metadata = ""
		for at, text := range s.samples {
			_, value, _ := strings.Cut(text, " value ")
			s.samples[at] = "start 0 value " + value
		}
	}
}

func union(a, b book) map[string]bool {
	keys := map[string]bool{}
	for k := range a {
		keys[k] = true
	}
	for k := range b {
		keys[k] = true
	}
	return keys
}

// theirs returns what Prometheus makes of a request. A metric that it cannot translate
// is absent.
func theirs(md pmetric.Metrics, v variant) book {
	b := book{}
	c := prometheusremotewrite.NewPrometheusConverter(appender{b})
	_, _ = c.FromMetrics(context.Background(), prepared(md), prometheusremotewrite.Settings{
		AddMetricSuffixes: v.strategy.ShouldAddSuffixes(), AllowUTF8: !v.strategy.ShouldEscape(),
		PromoteResourceAttributes: prometheusremotewrite.NewPromoteResourceAttributes(config.OTLPConfig{PromoteResourceAttributes: prometheus.DefaultConfig().Labels}),
		ExternalLabels:            external, PromoteScopeMetadata: v.scope,
		LabelNameUnderscoreSanitization: true, LabelNamePreserveMultipleUnderscores: true,
	})
	return b
}

// scaleKey is an attribute of exponential histograms that are finer than native ones can
// be, and says how fine; zeroKey says how wide the zero bucket is.
const (
	scaleKey = "scale"
	zeroKey  = "zero"
)

// tellShape gives a point those attributes.
func tellShape(p pmetric.ExponentialHistogramDataPoint) {
	if p.Scale() > histogram.ExponentialSchemaMax {
		p.Attributes().PutInt(scaleKey, int64(p.Scale()))
	}
	if p.ZeroThreshold() > 0 {
		p.Attributes().PutStr(zeroKey, strconv.FormatFloat(p.ZeroThreshold(), 'g', -1, 64))
	}
}

// prepared returns a copy from which Prometheus makes what penstock makes of the original (see
// differences.go). No histogram is finer than a native one: the translation would make them coarser, and
// puts a bucket behind an empty one in the wrong place then. The appender makes them coarser instead, with
// Histogram.ReduceResolution, which Prometheus uses everywhere else.
func prepared(md pmetric.Metrics) pmetric.Metrics {
	out := pmetric.NewMetrics()
	md.CopyTo(out)
	for _, rm := range out.ResourceMetrics().All() {
		for _, sm := range rm.ScopeMetrics().All() {
			for _, m := range sm.Metrics().All() {
				prepare(m)
			}
		}
	}
	return out
}

func prepare(m pmetric.Metric) {
	switch m.Type() {
	case pmetric.MetricTypeExponentialHistogram:
		for _, p := range m.ExponentialHistogram().DataPoints().All() {
			p.SetScale(min(p.Scale(), histogram.ExponentialSchemaMax))
		}
	case pmetric.MetricTypeHistogram:
		for _, p := range m.Histogram().DataPoints().All() {
			export(p.Attributes(), "le")
			if p.Flags().NoRecordedValue() && !p.HasSum() {
				p.SetSum(0)
			}
		}
	case pmetric.MetricTypeSummary:
		for _, p := range m.Summary().DataPoints().All() {
			export(p.Attributes(), "quantile")
		}
	}
}

// export renames an attribute that a label of the series takes the place of.
func export(attributes pcommon.Map, key string) {
	if v, ok := attributes.Get(key); ok {
		own := pcommon.NewValueEmpty()
		v.CopyTo(own)
		attributes.Remove(key)
		own.CopyTo(attributes.PutEmpty("exported_" + key))
	}
}

var external = map[string]string{"cluster": "eu-1", "code": "only where there is none"}

// ours returns what penstock sends for a request.
func ours(md pmetric.Metrics, v variant) (book, error) {
	payload, err := (&pmetric.ProtoMarshaler{}).MarshalMetrics(md)
	if err != nil {
		return nil, err
	}
	r := newReceiver()
	defer r.Close()
	cfg := prometheus.DefaultConfig()
	cfg.URL, cfg.Protocol, cfg.Strategy, cfg.ScopeLabels, cfg.External = r.URL, v.protocol, string(v.strategy), v.scope, external
	w, err := prometheus.New(cfg)
	if err != nil {
		return nil, err
	}
	var refused fault.Parts // their metrics are absent
	if err := w.Write(context.Background(), "as-1", payload); err != nil && !errors.As(err, &refused) {
		return nil, err
	}
	return r.book, r.err
}
