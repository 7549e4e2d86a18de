package main

import (
	"context"
	"math/rand/v2"
	"strings"
	"testing"

	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/pmetric"

	"github.com/penstock/penstock/pkg/backend/prometheus"
)

func TestMetrics(t *testing.T) {
	var out strings.Builder
	n, differ, err := compareMetrics(4000, 7, &out)
	if err != nil || differ > 0 || n < 4000 {
		t.Errorf("%d metrics, %d series differ, %v\n%s", n, differ, err, out.String())
	}
}

// TestComparisonSees changes a value behind the comparison's back.
func TestComparisonSees(t *testing.T) {
	md := generate(rand.New(rand.NewPCG(1, 1)), perRequest)
	v := variants()[0]
	want := theirs(md, v)
	got, err := ours(md, v)
	if err != nil {
		t.Fatal(err)
	}
	same := func() (n int) {
		for key := range union(want, got) {
			if want[key].String() != got[key].String() {
				n++
			}
		}
		return n
	}
	want.meant()
	got.meant()
	if same() != 0 {
		t.Fatal("they differ")
	}
	for key, s := range got {
		for at := range s.samples {
			s.samples[at] += "1"
			break
		}
		if same() != 1 {
			t.Errorf("a changed sample of %s is not seen", key)
		}
		delete(got, key)
		if same() != 1 {
			t.Errorf("the absence of %s is not seen", key)
		}
		break
	}
}

// TestDeltas makes deltas of cumulative sums and histograms and wants the cumulative ones back.
func TestDeltas(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	r := newReceiver()
	defer r.Close()
	plain := newReceiver()
	defer plain.Close()
	writer := func(url string) *prometheus.Writer {
		cfg := prometheus.DefaultConfig()
		cfg.URL, cfg.TargetInfo = url, false
		w, err := prometheus.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	deltas, cumulative := writer(r.URL), writer(plain.URL)
	total := newTotals()
	for step := range 50 {
		d, c := total.step(rng, step)
		for w, md := range map[*prometheus.Writer]pmetric.Metrics{deltas: d, cumulative: c} {
			payload, err := (&pmetric.ProtoMarshaler{}).MarshalMetrics(md)
			if err != nil {
				t.Fatal(err)
			}
			if err := w.Write(context.Background(), "as-1", payload); err != nil {
				t.Fatal(err)
			}
		}
	}
	if r.err != nil || plain.err != nil {
		t.Fatal(r.err, plain.err)
	}
	if len(r.book) != 8 {
		t.Fatalf("%d series", len(r.book))
	}
	for key := range union(r.book, plain.book) {
		if got, want := r.book[key].String(), plain.book[key].String(); got != want {
			t.Errorf("%s\n  deltas\n    %s\n  cumulative\n    %s", key, got, want)
		}
	}
}

// totals are the cumulative values that deltas are made of.
type totals struct {
	sum     int64
	bounds  []float64
	buckets []uint64
	hsum    float64
	scale   int32
	first   int32 // index of the first bucket
	exp     []uint64
	zeros   uint64
}

func newTotals() *totals {
	return &totals{bounds: []float64{0.1, 1, 10}, buckets: make([]uint64, 4), scale: 3, first: -8, exp: make([]uint64, 24)}
}

// step returns the deltas of one step and what they add up to. Sums are whole numbers, so
// that the order of addition does not show.
func (s *totals) step(r *rand.Rand, step int) (delta, cumulative pmetric.Metrics) {
	delta, cumulative = pmetric.NewMetrics(), pmetric.NewMetrics()
	const start = 1_700_000_000_000_000_000
	at, before := pcommon.Timestamp(start+int64(step+1)*1e9), pcommon.Timestamp(start+int64(step)*1e9)
	dm := delta.ResourceMetrics().AppendEmpty().ScopeMetrics().AppendEmpty().Metrics()
	cm := cumulative.ResourceMetrics().AppendEmpty().ScopeMetrics().AppendEmpty().Metrics()

	add := r.Int64N(100)
	s.sum += add
	for ms, v := range map[pmetric.MetricSlice]int64{dm: add, cm: s.sum} {
		m := ms.AppendEmpty()
		m.SetName("n")
		sum := m.SetEmptySum()
		sum.SetIsMonotonic(true)
		p := sum.DataPoints().AppendEmpty()
		p.SetIntValue(v)
		p.SetTimestamp(at)
		if sum.SetAggregationTemporality(pmetric.AggregationTemporalityCumulative); ms == dm {
			sum.SetAggregationTemporality(pmetric.AggregationTemporalityDelta)
			p.SetStartTimestamp(before)
		} else {
			p.SetStartTimestamp(start)
		}
	}

	own, count := make([]uint64, 4), uint64(0)
	for i := range own {
		own[i] = r.Uint64N(9)
		s.buckets[i] += own[i]
		count += own[i]
	}
	hsum := float64(r.IntN(100))
	s.hsum += hsum
	total := uint64(0)
	for _, c := range s.buckets {
		total += c
	}
	for ms, v := range map[pmetric.MetricSlice]struct {
		counts []uint64
		sum    float64
		count  uint64
	}{dm: {own, hsum, count}, cm: {s.buckets, s.hsum, total}} {
		m := ms.AppendEmpty()
		m.SetName("h")
		h := m.SetEmptyHistogram()
		p := h.DataPoints().AppendEmpty()
		p.ExplicitBounds().FromRaw(s.bounds)
		p.BucketCounts().FromRaw(v.counts)
		p.SetSum(v.sum)
		p.SetCount(v.count)
		p.SetTimestamp(at)
		if h.SetAggregationTemporality(pmetric.AggregationTemporalityCumulative); ms == dm {
			h.SetAggregationTemporality(pmetric.AggregationTemporalityDelta)
			p.SetStartTimestamp(before)
		} else {
			p.SetStartTimestamp(start)
		}
	}

	// An exponential delta has a few buckets somewhere, and coarser ones now and then.
	scale := s.scale
	if r.IntN(20) == 0 && s.scale > 0 {
		scale = s.scale - 1
	}
	down := uint(s.scale - scale)
	if down > 0 { // the sum becomes as coarse
		first, last := s.first>>down, (s.first+int32(len(s.exp))-1)>>down
		merged := make([]uint64, last-first+1)
		for i, c := range s.exp {
			merged[(s.first+int32(i))>>down-first] += c
		}
		s.scale, s.first, s.exp = scale, first, merged
	}
	offset := s.first + r.Int32N(int32(len(s.exp)))
	few := make([]uint64, r.IntN(int(s.first)+len(s.exp)-int(offset))+1)
	n := r.Uint64N(3)
	s.zeros += n
	zeros := n
	for i := range few {
		few[i] = r.Uint64N(5)
		s.exp[offset-s.first+int32(i)] += few[i]
		n += few[i]
	}
	all := s.zeros
	for _, c := range s.exp {
		all += c
	}
	for ms, v := range map[pmetric.MetricSlice]struct {
		offset       int32
		counts       []uint64
		zeros, count uint64
	}{dm: {offset, few, zeros, n}, cm: {s.first, s.exp, s.zeros, all}} {
		m := ms.AppendEmpty()
		m.SetName("e")
		h := m.SetEmptyExponentialHistogram()
		p := h.DataPoints().AppendEmpty()
		p.SetScale(scale)
		p.Positive().SetOffset(v.offset)
		p.Positive().BucketCounts().FromRaw(v.counts)
		p.SetZeroCount(v.zeros)
		p.SetCount(v.count)
		p.SetTimestamp(at)
		if h.SetAggregationTemporality(pmetric.AggregationTemporalityCumulative); ms == dm {
			h.SetAggregationTemporality(pmetric.AggregationTemporalityDelta)
			p.SetStartTimestamp(before)
		} else {
			p.SetStartTimestamp(start)
		}
	}
	return delta, cumulative
}
