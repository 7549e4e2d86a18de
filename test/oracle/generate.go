package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/pmetric"
)

// What names, units and attributes are made of: what SDKs send, and what they should not.
var (
	metricNames = []string{
		"http.server.request.duration", "appserver.http.requests", "process.cpu.time", "jvm.memory.used", "queue_age", "a", "requests_total", "total", "ratio",
		"9lives", "9", "with space", "über.maß", "日本語", "a__b", "a..b", "_hidden", "x.", ".x", "colon:name", "seconds", "bytes.bytes", "UPPER.Case", "slash/es", "per_second", "memory.used.bytes", "info", "a-b-c",
	}
	units = []string{
		"", "1", "s", "ms", "By", "KiBy", "MiBy", "%", "{request}", "{request}/s", "By/s", "1/s", "Cel", "Hz", "d", "h", "min", "m/s", "km/h", "V", "foo", "foo/bar", "bytes", " s ", "{}", "/s", "s/", "ratio", "total", "ns/{op}", "a b", "ü",
	}
	keys = []string{
		"http.method", "http.status_code", "code", "status_group", "le", "quantile", "a.b", "a_b", "a-b", "9lives", "_private", "ünïcode", "UPPER", "Zone", "zone", "with space", "job.name", "long.key.with.many.parts", "a__b", "x", "net.peer.name", "error",
	}
	resourceKeys = []string{
		"host.name", "os.type", "process.pid", "k8s.pod.name", "cloud.region", "telemetry.sdk.name", "service.version", "a.b", "a_b", "9resource", "_res", "le", "host_name", "Über", "code",
	}
	texts = []string{"GET", "POST", "200", "", " ", "ü", "a;b", "x\ny", `"quoted"`, "日本", "<html>&", "a long text with many words in it, which nobody reads to the end of it"}
)

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func chance(r *rand.Rand, of int) bool { return r.IntN(of) == 0 }

// value sets any kind of value.
func value(r *rand.Rand, v pcommon.Value, depth int) {
	switch n := r.IntN(14); {
	case n < 6:
		v.SetStr(pick(r, texts))
	case n == 6:
		v.SetBool(chance(r, 2))
	case n == 7:
		v.SetInt(pick(r, []int64{0, -1, 42, math.MaxInt64, math.MinInt64, int64(r.Uint64())}))
	case n == 8:
		v.SetDouble(pick(r, []float64{0, math.Copysign(0, -1), 0.1, 1e21, 1e-7, 123456789, -1.5, 1e100, math.Inf(1), math.Inf(-1), math.NaN(), 5e-324, r.NormFloat64()}))
	case n == 9:
		v.SetEmptyBytes().FromRaw([]byte{0, 1, 2, 255})
	case n == 10 && depth < 3:
		s := v.SetEmptySlice()
		for range r.IntN(3) {
			finite(r, s.AppendEmpty(), depth+1)
		}
	case n == 11 && depth < 3:
		m := v.SetEmptyMap()
		for range r.IntN(3) {
			finite(r, m.PutEmpty(pick(r, keys)), depth+1)
		}
	case n == 12:
		// empty
	default:
		v.SetStr(fmt.Sprint(r.IntN(1000)))
	}
}

// finite is value without numbers that JSON does not have, which pdata cannot write.
func finite(r *rand.Rand, v pcommon.Value, depth int) {
	for value(r, v, depth); v.Type() == pcommon.ValueTypeDouble && (math.IsNaN(v.Double()) || math.IsInf(v.Double(), 0)); {
		value(r, v, depth)
	}
}

func attributes(r *rand.Rand, m pcommon.Map, from []string, most int) {
	for range r.IntN(most + 1) {
		value(r, m.PutEmpty(pick(r, from)), 0)
	}
}

// generate returns a request of about n metrics, with identity as an edge stamps it.
func generate(r *rand.Rand, n int) pmetric.Metrics {
	md := pmetric.NewMetrics()
	now := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC).Add(time.Duration(r.IntN(1e9)))
	number := 0
	for range 1 + r.IntN(3) {
		rm := md.ResourceMetrics().AppendEmpty()
		as := rm.Resource().Attributes()
		for _, k := range []string{"service.name", "service.namespace", "service.instance.id"} {
			if !chance(r, 4) {
				as.PutStr(k, pick(r, []string{"shop", "cart", "", "as/1", "pod-7"}))
			}
		}
		as.PutStr("instance.id", "as-1")
		for _, k := range []string{"instance.name", "customer.id", "deployment.environment"} {
			if !chance(r, 4) {
				as.PutStr(k, k+" of "+pick(r, []string{"Berlin", "Rom", "Çorum"}))
			}
		}
		attributes(r, as, resourceKeys, 6)
		for range 1 + r.IntN(2) {
			sm := rm.ScopeMetrics().AppendEmpty()
			if !chance(r, 3) {
				sm.Scope().SetName(pick(r, []string{"io.opentelemetry.http", "x"}))
				sm.Scope().SetVersion(pick(r, []string{"", "1.2.3"}))
				sm.SetSchemaUrl(pick(r, []string{"", "https://opentelemetry.io/schemas/1.27.0"}))
				attributes(r, sm.Scope().Attributes(), keys[:6], 3)
			}
			for range max(1, n/4) {
				number++
				metric(r, sm.Metrics().AppendEmpty(), now, number)
			}
		}
	}
	return md
}

// metric fills in a metric whose series are its own: of several in a millisecond one side
// keeps the last.
func metric(r *rand.Rand, m pmetric.Metric, now time.Time, number int) {
	m.SetName(pick(r, metricNames))
	m.SetUnit(pick(r, units))
	m.SetDescription(pick(r, []string{"", "Time it takes.", "ü\n"}))
	points := 1 + r.IntN(4)
	each := func(do func(as pcommon.Map, start, at pcommon.Timestamp, flags pmetric.DataPointFlags)) {
		for i := range points {
			as := pcommon.NewMap()
			as.PutInt("number", int64(number))
			same := chance(r, 3) // as the series of the point before
			if !same {
				as.PutInt("point", int64(i))
				attributes(r, as, keys, 5)
			}
			at := now.Add(time.Duration(i)*time.Second + time.Duration(r.IntN(400))*time.Second)
			start := pcommon.Timestamp(0)
			if !chance(r, 3) {
				start = pcommon.NewTimestampFromTime(now.Add(-time.Hour))
			}
			flags := pmetric.DefaultDataPointFlags
			if chance(r, 10) {
				flags = flags.WithNoRecordedValue(true)
			}
			do(as, start, pcommon.NewTimestampFromTime(at), flags)
		}
	}
	switch r.IntN(5) {
	case 0:
		g := m.SetEmptyGauge()
		each(func(as pcommon.Map, start, at pcommon.Timestamp, flags pmetric.DataPointFlags) {
			p := g.DataPoints().AppendEmpty()
			as.CopyTo(p.Attributes())
			p.SetStartTimestamp(start)
			p.SetTimestamp(at)
			p.SetFlags(flags)
			numberValue(r, p)
		})
	case 1:
		s := m.SetEmptySum()
		s.SetIsMonotonic(chance(r, 2))
		s.SetAggregationTemporality(pmetric.AggregationTemporalityCumulative)
		each(func(as pcommon.Map, start, at pcommon.Timestamp, flags pmetric.DataPointFlags) {
			p := s.DataPoints().AppendEmpty()
			as.CopyTo(p.Attributes())
			p.SetStartTimestamp(start)
			p.SetTimestamp(at)
			p.SetFlags(flags)
			numberValue(r, p)
			exemplars(r, p.Exemplars(), now, nil)
		})
	case 2:
		h := m.SetEmptyHistogram()
		h.SetAggregationTemporality(pmetric.AggregationTemporalityCumulative)
		bounds := pick(r, [][]float64{nil, {0}, {0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10}, {-1, 0, 1e-9, 1e21, 1e300}, {1, 2, 3}})
		each(func(as pcommon.Map, start, at pcommon.Timestamp, flags pmetric.DataPointFlags) {
			p := h.DataPoints().AppendEmpty()
			as.CopyTo(p.Attributes())
			p.SetStartTimestamp(start)
			p.SetTimestamp(at)
			p.SetFlags(flags)
			total := uint64(0)
			if !chance(r, 8) || flags.NoRecordedValue() {
				p.ExplicitBounds().FromRaw(bounds)
				for range len(bounds) + 1 {
					c := uint64(r.IntN(1000))
					p.BucketCounts().Append(c)
					total += c
				}
			}
			p.SetCount(total)
			if !chance(r, 3) {
				p.SetSum(r.NormFloat64() * 1000)
			}
			if chance(r, 2) {
				p.SetMin(0.001)
				p.SetMax(12)
			}
			exemplars(r, p.Exemplars(), now, bounds)
		})
	case 3:
		h := m.SetEmptyExponentialHistogram()
		h.SetAggregationTemporality(pmetric.AggregationTemporalityCumulative)
		each(func(as pcommon.Map, start, at pcommon.Timestamp, flags pmetric.DataPointFlags) {
			p := h.DataPoints().AppendEmpty()
			as.CopyTo(p.Attributes())
			p.SetStartTimestamp(start)
			p.SetTimestamp(at)
			p.SetFlags(flags)
			p.SetScale(int32(r.IntN(25)) - 4)
			p.SetZeroCount(uint64(r.IntN(5)))
			p.SetZeroThreshold(pick(r, []float64{0, 1e-6}))
			tellShape(p)
			total := p.ZeroCount()
			for _, b := range []pmetric.ExponentialHistogramDataPointBuckets{p.Positive(), p.Negative()} {
				b.SetOffset(int32(r.IntN(2000)) - 1000)
				for range r.IntN(40) {
					c := uint64(0)
					if chance(r, 3) {
						c = uint64(r.IntN(100))
					}
					b.BucketCounts().Append(c)
					total += c
				}
			}
			p.SetCount(total)
			if !chance(r, 3) {
				p.SetSum(r.NormFloat64() * 1000)
			}
			exemplars(r, p.Exemplars(), now, nil)
		})
	case 4:
		s := m.SetEmptySummary()
		each(func(as pcommon.Map, start, at pcommon.Timestamp, flags pmetric.DataPointFlags) {
			p := s.DataPoints().AppendEmpty()
			as.CopyTo(p.Attributes())
			p.SetStartTimestamp(start)
			p.SetTimestamp(at)
			p.SetFlags(flags)
			p.SetCount(r.Uint64N(1000))
			p.SetSum(r.NormFloat64())
			quantiles := r.IntN(6)
			if flags.NoRecordedValue() {
				quantiles = max(quantiles, 1)
			}
			for _, q := range []float64{0, 0.5, 0.9, 0.99, 1}[:quantiles] {
				v := p.QuantileValues().AppendEmpty()
				v.SetQuantile(q)
				v.SetValue(r.NormFloat64())
			}
		})
	}
}

func numberValue(r *rand.Rand, p pmetric.NumberDataPoint) {
	switch r.IntN(8) {
	case 0:
		p.SetDoubleValue(pick(r, []float64{0, math.NaN(), math.Inf(1), math.Inf(-1), math.Copysign(0, -1), math.MaxFloat64}))
	case 1: // none
	case 2, 3, 4:
		p.SetIntValue(pick(r, []int64{0, 1, -5, math.MaxInt64, math.MinInt64, r.Int64()}))
	default:
		p.SetDoubleValue(r.NormFloat64())
	}
}

// exemplars adds some, in the order of the buckets that they fall into.
func exemplars(r *rand.Rand, es pmetric.ExemplarSlice, now time.Time, bounds []float64) {
	if !chance(r, 3) {
		return
	}
	v := -2.0
	for range r.IntN(4) {
		e := es.AppendEmpty()
		e.SetTimestamp(pcommon.NewTimestampFromTime(now.Add(-time.Duration(r.IntN(1e9)))))
		v += r.Float64() * 3
		if chance(r, 4) && len(bounds) > 0 && bounds[len(bounds)-1] > v {
			v = bounds[len(bounds)-1] // on a bound it belongs below
		}
		if chance(r, 3) && v < 1e15 {
			v = math.Ceil(v)
			e.SetIntValue(int64(v))
		} else {
			e.SetDoubleValue(v)
		}
		if !chance(r, 3) {
			e.SetTraceID([16]byte{1, byte(r.IntN(255)), 15: 9})
			e.SetSpanID([8]byte{7, byte(r.IntN(255))})
		}
		attributes(r, e.FilteredAttributes(), keys, 3)
	}
}
