package otlpwire

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/penstock/penstock/pkg/otlpwire/badinput"
)

// decoded returns an empty generated message for a payload of sig. TracesData
// and its kin have the shape of the export requests.
func decoded(sig Signal) proto.Message {
	return [...]proto.Message{&tracepb.TracesData{}, &metricspb.MetricsData{}, &logspb.LogsData{}}[sig]
}

func decode(t testing.TB, sig Signal, payload []byte) proto.Message {
	t.Helper()
	m := decoded(sig)
	if err := proto.Unmarshal(payload, m); err != nil {
		t.Fatalf("generated decoder: %v", err)
	}
	return m
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func str(key, val string) *commonpb.KeyValue {
	return &commonpb.KeyValue{Key: key, Value: strVal(val)}
}

func strVal(val string) *commonpb.AnyValue {
	return &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: val}}
}

func res(attrs ...*commonpb.KeyValue) *resourcepb.Resource {
	return &resourcepb.Resource{Attributes: attrs, DroppedAttributesCount: 3}
}

func tid(n byte) []byte { return append(bytes.Repeat([]byte{0xab}, 15), n) }
func sid(n byte) []byte { return append(bytes.Repeat([]byte{0xcd}, 7), n) }

// sample is a payload with several resources, scopes, values of every kind and
// every type of metric.
func sample(sig Signal) proto.Message {
	all := &commonpb.AnyValue{Value: &commonpb.AnyValue_KvlistValue{KvlistValue: &commonpb.KeyValueList{Values: []*commonpb.KeyValue{
		{Key: "b", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_BoolValue{BoolValue: true}}},
		{Key: "i", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: -9007199254740993}}},
		{Key: "d", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_DoubleValue{DoubleValue: math.Inf(-1)}}},
		{Key: "x", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_BytesValue{BytesValue: []byte{0, 255}}}},
		{Key: "none", Value: &commonpb.AnyValue{}},
		{Key: "a", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_ArrayValue{ArrayValue: &commonpb.ArrayValue{Values: []*commonpb.AnyValue{strVal("é\n\"\\\x01"), strVal("")}}}}},
	}}}}
	attrs := []*commonpb.KeyValue{str("k", "v"), {Key: "all", Value: all}}
	scope := &commonpb.InstrumentationScope{Name: "lib", Version: "1", Attributes: []*commonpb.KeyValue{str("s", "t")}}
	switch sig {
	case Traces:
		mk := func(trace, id byte) *tracepb.Span {
			return &tracepb.Span{
				TraceId: tid(trace), SpanId: sid(id), ParentSpanId: sid(9), Name: "op", Kind: tracepb.Span_SPAN_KIND_SERVER,
				TraceState: "a=b", StartTimeUnixNano: 1, EndTimeUnixNano: math.MaxUint64, Attributes: attrs, Flags: 0x101,
				Events: []*tracepb.Span_Event{{Name: "e", TimeUnixNano: 5, Attributes: attrs}},
				Links:  []*tracepb.Span_Link{{TraceId: tid(7), SpanId: sid(7), Flags: 1}},
				Status: &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR, Message: "no"},
			}
		}
		return &tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{
			{Resource: res(str("instance.id", "forged"), str("service.name", "shop")), SchemaUrl: "u1", ScopeSpans: []*tracepb.ScopeSpans{
				{Scope: scope, SchemaUrl: "u2", Spans: []*tracepb.Span{mk(1, 1), mk(2, 2), mk(1, 3)}},
				{Spans: []*tracepb.Span{mk(2, 4)}},
			}},
			{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{mk(3, 5), mk(1, 6)}}}},
		}}
	case Metrics:
		num := []*metricspb.NumberDataPoint{
			{Attributes: attrs, TimeUnixNano: 9, Value: &metricspb.NumberDataPoint_AsInt{AsInt: -1}, Exemplars: []*metricspb.Exemplar{{TraceId: tid(1), SpanId: sid(1), Value: &metricspb.Exemplar_AsDouble{AsDouble: 1.5}, FilteredAttributes: attrs}}},
			{TimeUnixNano: 10, Value: &metricspb.NumberDataPoint_AsDouble{AsDouble: math.NaN()}, Flags: 1},
		}
		return &metricspb.MetricsData{ResourceMetrics: []*metricspb.ResourceMetrics{{Resource: res(), ScopeMetrics: []*metricspb.ScopeMetrics{{Scope: scope, Metrics: []*metricspb.Metric{
			{Name: "g", Unit: "s", Metadata: attrs, Data: &metricspb.Metric_Gauge{Gauge: &metricspb.Gauge{DataPoints: num}}},
			{Name: "s", Data: &metricspb.Metric_Sum{Sum: &metricspb.Sum{DataPoints: num, IsMonotonic: true, AggregationTemporality: 2}}},
			{Name: "h", Data: &metricspb.Metric_Histogram{Histogram: &metricspb.Histogram{DataPoints: []*metricspb.HistogramDataPoint{{Count: 3, Sum: proto.Float64(4), BucketCounts: []uint64{1, 2}, ExplicitBounds: []float64{0.5}, Min: proto.Float64(0), Max: proto.Float64(1)}}}}},
			{Name: "e", Data: &metricspb.Metric_ExponentialHistogram{ExponentialHistogram: &metricspb.ExponentialHistogram{DataPoints: []*metricspb.ExponentialHistogramDataPoint{{Scale: -3, Positive: &metricspb.ExponentialHistogramDataPoint_Buckets{Offset: -2, BucketCounts: []uint64{1, 300}}}}}}},
			{Name: "q", Data: &metricspb.Metric_Summary{Summary: &metricspb.Summary{DataPoints: []*metricspb.SummaryDataPoint{{QuantileValues: []*metricspb.SummaryDataPoint_ValueAtQuantile{{Quantile: 0.5, Value: 2}}}}}}},
		}}}}}}
	}
	return &logspb.LogsData{ResourceLogs: []*logspb.ResourceLogs{{Resource: res(str("customer.id", "c")), ScopeLogs: []*logspb.ScopeLogs{{Scope: scope, LogRecords: []*logspb.LogRecord{
		{TimeUnixNano: 1, ObservedTimeUnixNano: 2, SeverityNumber: 9, SeverityText: "INFO", Body: all, Attributes: attrs, TraceId: tid(1), SpanId: sid(1), EventName: "ev", Flags: 1},
		{Body: strVal("plain")},
	}}}}}}
}

var sampleItems = [...]int{Traces: 6, Metrics: 7, Logs: 2}

// TestSchemaMatchesGeneratedDescriptors compares the hand-written schema with
// the descriptors of go.opentelemetry.io/proto/otlp, so that a new field of a
// newer OTLP shows.
func TestSchemaMatchesGeneratedDescriptors(t *testing.T) {
	seen := map[*message]bool{}
	var compare func(m *message, d protoreflect.MessageDescriptor)
	compare = func(m *message, d protoreflect.MessageDescriptor) {
		if seen[m] {
			return
		}
		seen[m] = true
		if string(d.FullName()) != m.name {
			t.Errorf("message %s: generated name %s", m.name, d.FullName())
		}
		for i := range d.Fields().Len() {
			fd := d.Fields().Get(i)
			f := m.lookup(int(fd.Number()))
			if f == nil {
				t.Errorf("%s: field %d %s is missing", m.name, fd.Number(), fd.Name())
				continue
			}
			if f.name != fd.JSONName() || f.repeated != fd.IsList() || f.oneof != (fd.ContainingOneof() != nil && !fd.HasOptionalKeyword()) {
				t.Errorf("%s.%s: name, cardinality or oneof differ from %v", m.name, f.name, fd)
			}
			if (f.kind == kindMessage) != (fd.Kind() == protoreflect.MessageKind) || !sameKind(f.kind, fd.Kind()) {
				t.Errorf("%s.%s: kind %d, generated %v", m.name, f.name, f.kind, fd.Kind())
			}
			if f.msg != nil {
				compare(f.msg, fd.Message())
			}
		}
	}
	for _, sig := range Signals {
		compare(requests[sig].fields[0].msg, decoded(sig).ProtoReflect().Descriptor().Fields().Get(0).Message())
	}
}

func sameKind(k kind, d protoreflect.Kind) bool {
	return map[kind]protoreflect.Kind{
		kindMessage: protoreflect.MessageKind, kindString: protoreflect.StringKind, kindBytes: protoreflect.BytesKind,
		kindTraceID: protoreflect.BytesKind, kindSpanID: protoreflect.BytesKind, kindBool: protoreflect.BoolKind,
		kindEnum: protoreflect.EnumKind, kindUint32: protoreflect.Uint32Kind, kindInt64: protoreflect.Int64Kind,
		kindUint64: protoreflect.Uint64Kind, kindSint32: protoreflect.Sint32Kind, kindInt32: protoreflect.Int32Kind, kindFixed32: protoreflect.Fixed32Kind,
		kindFixed64: protoreflect.Fixed64Kind, kindSfixed64: protoreflect.Sfixed64Kind, kindDouble: protoreflect.DoubleKind,
	}[k] == d
}

func TestScanCounts(t *testing.T) {
	for _, sig := range Signals {
		p := marshal(t, sample(sig))
		rep, err := Scan(sig, p, DefaultLimits)
		if err != nil || rep != (Report{Items: sampleItems[sig]}) {
			t.Errorf("%v: got %+v, %v; want %d sound items", sig, rep, err, sampleItems[sig])
		}
		if n := Count(sig, p); n != sampleItems[sig] {
			t.Errorf("%v: Count = %d, want %d", sig, n, sampleItems[sig])
		}
		if n := testing.AllocsPerRun(20, func() { _, _ = Scan(sig, p, DefaultLimits) }); n != 0 {
			t.Errorf("%v: Scan allocates %v times", sig, n)
		}
	}
}

// TestScanTruncatedAndFlipped cuts and flips a valid request at every byte: the
// scanner must not panic and must not accept what the decoder refuses.
func TestScanTruncatedAndFlipped(t *testing.T) {
	for _, sig := range Signals {
		p := marshal(t, sample(sig))
		for i := range p {
			scanned(t, sig, p[:i])
			for bit := range 8 {
				flipped := bytes.Clone(p)
				flipped[i] ^= 1 << bit
				scanned(t, sig, flipped)
			}
		}
	}
}

// TestPlainAttributes changes every byte of attributes to every value: what the short
// way passes over, the long way must find whole and in valid UTF-8, of the same length.
func TestPlainAttributes(t *testing.T) {
	text := func(key, val string) []byte {
		return marshal(t, &commonpb.KeyValue{Key: key, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: val}}})
	}
	number := func(key string, val int64) []byte {
		return marshal(t, &commonpb.KeyValue{Key: key, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: val}}})
	}
	var row []byte
	all := [][]byte{
		text("http.route", "/api/orders"), text("k", "v"), text("Straße", "café"), text("k", strings.Repeat("long ", 40)), text("k", strings.Repeat("ü", 100)),
		number("status", 200), {0x0a, 0, 0x12, 2, 0x18, 1}, number("negative", -1),
		marshal(t, &commonpb.KeyValue{Key: "ok", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_BoolValue{BoolValue: true}}}),
		marshal(t, &commonpb.KeyValue{Key: "ratio", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_DoubleValue{DoubleValue: 0.1}}}),
	}
	for _, kv := range all {
		field := protowire.AppendBytes([]byte{9<<3 | 2}, kv)
		row = append(row, field...)
		short := 0
		for i := 1; i < len(field); i++ { // the tag is the caller's
			for b := range 256 {
				changed := bytes.Clone(field)
				changed[i] = byte(b)
				for _, p := range [][]byte{changed, append(changed, field...), changed[:i]} {
					end, n := plainAttributes(p, 0)
					short += n
					for at := 0; n > 0; n-- {
						_, _, value, next := nextField(p, at)
						if next < 0 || next > end {
							t.Fatalf("%x: passed over to %d, and what begins at %d ends at %d", p, end, at, next)
						}
						if rep, err := scan(keyValue, p[value:next], DefaultLimits, false); err != nil || !rep.Sound() {
							t.Fatalf("%x: passed over, but %+v, %v", p, rep, err)
						}
						if at = next; n == 1 && at != end {
							t.Fatalf("%x: passed over to %d, want %d", p, end, at)
						}
					}
				}
			}
		}
		if short == 0 {
			t.Errorf("%x goes the long way", field)
		}
	}
	if end, n := plainAttributes(row, 0); n != len(all) || end != len(row) {
		t.Errorf("a row of %d attributes in %d bytes: passed over %d in %d", len(all), len(row), n, end)
	}
	for _, p := range [][]byte{
		{9<<3 | 2, 6, 0x0a, 0, 0x12, 0x81, 0, 0x0a},       // a string without a length, and nothing behind it
		{9<<3 | 0x82, 0, 6, 0x0a, 0, 0x12, 2, 0x18, 1, 0}, // a tag of two bytes
	} {
		if _, n := plainAttributes(p, 0); n != 0 {
			t.Errorf("%x: passed over", p)
		}
	}
}

// TestScanCountsElements: the short way past attributes counts as the long one does.
func TestScanCountsElements(t *testing.T) {
	const rows, attrs = 3, 10
	sp := &tracepb.Span{TraceId: bytes.Repeat([]byte{1}, 16), SpanId: bytes.Repeat([]byte{2}, 8)}
	for range attrs {
		sp.Attributes = append(sp.Attributes, &commonpb.KeyValue{Key: "k", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: "v"}}})
	}
	ss := &tracepb.ScopeSpans{Spans: slices.Repeat([]*tracepb.Span{sp}, rows)}
	p := marshal(t, &tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{ss}}}})
	const elements = 2 + rows*(1+2*attrs)
	if _, err := Scan(Traces, p, Limits{MaxElements: elements}); err != nil {
		t.Errorf("%d elements: %v", elements, err)
	}
	if _, err := Scan(Traces, p, Limits{MaxElements: elements - 1}); !errors.Is(err, ErrMalformed) {
		t.Errorf("%d elements where %d may be: %v", elements, elements-1, err)
	}
}

func TestASCII(t *testing.T) {
	for n := range 40 {
		p := bytes.Repeat([]byte{0x7f}, n)
		if !ascii(p) {
			t.Errorf("%d bytes of ASCII are said to be none", n)
		}
		for i := range p {
			p[i] = 0x80
			if ascii(p) {
				t.Errorf("byte %d of %d is beyond ASCII and was not seen", i, n)
			}
			p[i] = 0
		}
	}
}

func TestMendRemovesInvalidItems(t *testing.T) {
	m := sample(Traces).(*tracepb.TracesData)
	spans := m.ResourceSpans[0].ScopeSpans[0].Spans
	spans[0].TraceId, spans[1].TraceId, spans[2].SpanId = nil, make([]byte, 16), []byte{1}
	p := marshal(t, m)
	rep, err := Scan(Traces, p, DefaultLimits)
	if err != nil || rep.Invalid != 3 || rep.Items != 6 {
		t.Fatalf("got %+v, %v; want 3 of 6 invalid", rep, err)
	}
	p, err = Mend(Traces, p)
	if err != nil {
		t.Fatal(err)
	}
	if rep, _ = Scan(Traces, p, DefaultLimits); rep.Invalid != 0 || rep.Items != 3 {
		t.Errorf("after Mend: %+v, want 3 sound items", rep)
	}

	logs := sample(Logs).(*logspb.LogsData)
	logs.ResourceLogs[0].ScopeLogs[0].LogRecords[0].TraceId = []byte{1}
	p = marshal(t, logs)
	if rep, _ = Scan(Logs, p, DefaultLimits); rep.Invalid != 1 {
		t.Errorf("log record with a short trace ID: %+v, want 1 invalid", rep)
	}
	p, _ = Mend(Logs, p)
	if n := Count(Logs, p); n != 1 {
		t.Errorf("after Mend: %d records, want 1", n)
	}
}

func testStamp() *Stamp {
	var s Stamp
	s.Overwrite("instance.id", "as-1")
	s.Overwrite("customer.id", "c1")
	s.Insert("service.name", "inserted")
	return &s
}

// stampDecoded does what Stamp.Append does, on objects.
func stampDecoded(r *resourcepb.Resource) *resourcepb.Resource {
	if r == nil {
		r = &resourcepb.Resource{}
	}
	attrs := []*commonpb.KeyValue{str("instance.id", "as-1"), str("customer.id", "c1")}
	named := false
	var rest []*commonpb.KeyValue
	for _, a := range r.Attributes {
		named = named || a.Key == "service.name"
		if a.Key != "instance.id" && a.Key != "customer.id" {
			rest = append(rest, a)
		}
	}
	if !named {
		attrs = append(attrs, str("service.name", "inserted"))
	}
	r.Attributes = append(attrs, rest...)
	return r
}

func wantStamped(m proto.Message) proto.Message {
	switch m := m.(type) {
	case *tracepb.TracesData:
		for _, r := range m.ResourceSpans {
			r.Resource = stampDecoded(r.Resource)
		}
	case *metricspb.MetricsData:
		for _, r := range m.ResourceMetrics {
			r.Resource = stampDecoded(r.Resource)
		}
	case *logspb.LogsData:
		for _, r := range m.ResourceLogs {
			r.Resource = stampDecoded(r.Resource)
		}
	}
	return m
}

func TestStampEveryResource(t *testing.T) {
	stamp := testStamp()
	for _, sig := range Signals {
		in := sample(sig)
		p := marshal(t, in)
		out, err := stamp.Append(nil, p)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := decode(t, sig, out), wantStamped(in); !proto.Equal(got, want) {
			t.Errorf("%v: got %v\nwant %v", sig, got, want)
		}
		again, _ := stamp.Append(nil, out)
		if !bytes.Equal(out, again) {
			t.Errorf("%v: stamping twice changes the bytes", sig)
		}
		buf := make([]byte, 0, 2*len(out))
		if n := testing.AllocsPerRun(20, func() { _, _ = stamp.Append(buf, p) }); n != 0 {
			t.Errorf("%v: Append allocates %v times", sig, n)
		}
	}
}

// TestStampOddResources covers a resource that stands after its scopes, is
// repeated, carries the key twice and with another type.
func TestStampOddResources(t *testing.T) {
	first := marshal(t, res(str("instance.id", "x"), str("a", "1"), str("instance.id", "y")))
	second := marshal(t, res(&commonpb.KeyValue{Key: "instance.id", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: 7}}}, str("b", "2")))
	var body []byte
	body = protowire.AppendBytes(protowire.AppendTag(body, 2, protowire.BytesType), nil)
	for _, r := range [][]byte{first, second, nil} {
		body = protowire.AppendBytes(protowire.AppendTag(body, 1, protowire.BytesType), r)
	}
	p := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), body)
	p = append(p, 0x0a, 0x00) // and an empty one
	out, err := testStamp().Append(nil, p)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := decode(t, Traces, out), wantStamped(decode(t, Traces, p)); !proto.Equal(got, want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
}

func TestSplitByTrace(t *testing.T) {
	in := sample(Traces).(*tracepb.TracesData)
	p := marshal(t, in)
	keyOf := func(item []byte) int { id, _ := SpanTrace(item); return int(id[15]) }
	byKey := map[int][]byte{}
	var s Splitter
	if err := s.Split(p, keyOf, func(k int, b []byte) { byKey[k] = append(byKey[k], b...) }); err != nil {
		t.Fatal(err)
	}
	for key, b := range byKey {
		want := proto.Clone(in).(*tracepb.TracesData)
		want.ResourceSpans = filter(want.ResourceSpans, func(r *tracepb.ResourceSpans) bool {
			r.ScopeSpans = filter(r.ScopeSpans, func(sc *tracepb.ScopeSpans) bool {
				sc.Spans = filter(sc.Spans, func(sp *tracepb.Span) bool { return int(sp.TraceId[15]) == key })
				return len(sc.Spans) > 0
			})
			return len(r.ScopeSpans) > 0
		})
		if got := decode(t, Traces, b); !proto.Equal(got, want) {
			t.Errorf("key %d: got %v\nwant %v", key, got, want)
		}
	}
	if len(byKey) != 3 {
		t.Errorf("%d keys, want 3", len(byKey))
	}
	run := func() { _ = s.Split(p, keyOf, func(int, []byte) {}) }
	if n := testing.AllocsPerRun(20, run); n > 0 {
		t.Errorf("Split allocates %v times in steady state", n)
	}
}

func filter[T any](in []T, keep func(T) bool) (out []T) {
	for _, v := range in {
		if keep(v) {
			out = append(out, v)
		}
	}
	return out
}

func TestHalve(t *testing.T) {
	for _, sig := range Signals {
		p := marshal(t, sample(sig))
		a, b, ok := Halve(sig, p)
		if !ok {
			t.Fatalf("%v: cannot halve", sig)
		}
		if na, nb := Count(sig, a), Count(sig, b); na == 0 || nb == 0 || na+nb != sampleItems[sig] {
			t.Errorf("%v: halves of %d and %d, want a sum of %d", sig, na, nb, sampleItems[sig])
		}
	}
	if _, _, ok := Halve(Traces, badinput.Request(nil)); ok {
		t.Error("halved a single span")
	}
}

func TestReadSpan(t *testing.T) {
	var got []Span
	for r := range Resources(marshal(t, sample(Traces))) {
		if v, ok := ResourceAttribute(r.Resource(), "service.name"); ok != (r.Resource() != nil) || (ok && string(v.Str) != "shop") {
			t.Errorf("service.name = %+v, %v", v, ok)
		}
		for sc := range r.Scopes() {
			for item := range sc.Items() {
				var sp Span
				sp.Parse(item)
				got = append(got, sp)
				if v, ok := sp.Attribute("k"); !ok || string(v.Str) != "v" {
					t.Errorf("span attribute k = %+v, %v", v, ok)
				}
				if _, ok := sp.Attribute("absent"); ok {
					t.Error("found an attribute that is not there")
				}
			}
		}
	}
	if len(got) != 6 {
		t.Fatalf("%d spans, want 6", len(got))
	}
	sp := got[0]
	if sp.TraceID != TraceID(tid(1)) || sp.SpanID != SpanID(sid(1)) || sp.Root || sp.Kind != 2 || sp.Status != 2 || sp.Flags != 0x101 ||
		sp.Start != 1 || sp.End != math.MaxUint64 || string(sp.TraceState) != "a=b" || string(sp.Name) != "op" {
		t.Errorf("got %+v", sp)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestHoldsIsWhatAppendWrites: what a stamp has been written into holds it; what a
// decoder could take for something else does not.
func TestHoldsIsWhatAppendWrites(t *testing.T) {
	var s Stamp
	s.Overwrite("instance.id", "as-1")
	attr := func(key, val string) []byte { return AppendStringAttribute(nil, 1, key, val) }
	field := func(num protowire.Number, content ...[]byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, num, protowire.BytesType), bytes.Join(content, nil))
	}
	scope := field(2, field(2, field(5, []byte("name"))))
	mine := attr("instance.id", "as-1")
	twoKeys := field(1, field(1, []byte("x")), field(1, []byte("instance.id")), field(2, field(1, []byte("as-2"))))
	twoValues := field(1, field(1, []byte("instance.id")), field(2, field(1, []byte("as-1"))), field(2, field(1, []byte("as-2"))))
	for name, tc := range map[string]struct {
		payload []byte
		want    bool
	}{
		"stamped":               {field(1, field(1, mine, attr("a", "b")), scope), true},
		"behind others":         {field(1, field(1, attr("a", "b"), mine), scope), true},
		"two resources":         {append(field(1, field(1, mine)), field(1, field(1, mine), scope)...), true},
		"none":                  {nil, true},
		"without":               {field(1, field(1, attr("a", "b")), scope), false},
		"another's":             {field(1, field(1, attr("instance.id", "as-2")), scope), false},
		"twice":                 {field(1, field(1, mine, mine), scope), false},
		"another's, too":        {field(1, field(1, mine, attr("instance.id", "as-2")), scope), false},
		"no resource":           {field(1, scope), false},
		"a resource in two":     {field(1, field(1, mine), field(1, attr("a", "b")), scope), false},
		"a key of two":          {field(1, field(1, mine, twoKeys), scope), false},
		"a value of two":        {field(1, field(1, twoValues), scope), false},
		"one of two without":    {append(field(1, field(1, mine)), field(1, field(1, attr("a", "b")))...), false},
		"a field of no request": {append(field(1, field(1, mine), scope), field(9, []byte("x"))...), false},
		"cut short":             {field(1, field(1, mine), scope)[:12], false},
	} {
		if got := s.Holds(tc.payload); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
		if out, err := s.Append(nil, tc.payload); err == nil && !s.Holds(out) {
			t.Errorf("%s: not held after Append", name)
		}
	}
}
