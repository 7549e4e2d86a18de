package otlpwire

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/otlpwire/badinput"
)

// flat is one item as the generated decoder sees it: with its resource, scope
// and schema URLs, and for a data point its metric.
type flat struct {
	resource string
	text     string
}

// flatten lists the items of a payload by the generated decoder, without unknown
// fields. It is the oracle for everything that rearranges items.
func flatten(t testing.TB, sig Signal, payload []byte) (items []flat) {
	t.Helper()
	m := decoded(sig)
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(payload, m); err != nil {
		t.Fatalf("%v: generated decoder: %v", sig, err)
	}
	add := func(resource, scope proto.Message, urls string, item ...proto.Message) {
		f := flat{resource: string(marshal(t, resource)), text: urls + string(marshal(t, scope))}
		for _, it := range item {
			f.text += "|" + string(marshal(t, it))
		}
		items = append(items, f)
	}
	switch m := m.(type) {
	case *tracepb.TracesData:
		for _, r := range m.ResourceSpans {
			for _, s := range r.ScopeSpans {
				for _, it := range s.Spans {
					add(r.Resource, s.Scope, r.SchemaUrl+s.SchemaUrl, it)
				}
			}
		}
	case *logspb.LogsData:
		for _, r := range m.ResourceLogs {
			for _, s := range r.ScopeLogs {
				for _, it := range s.LogRecords {
					add(r.Resource, s.Scope, r.SchemaUrl+s.SchemaUrl, it)
				}
			}
		}
	case *metricspb.MetricsData:
		for _, r := range m.ResourceMetrics {
			for _, s := range r.ScopeMetrics {
				for _, it := range s.Metrics {
					for _, point := range pointsOf(it) {
						add(r.Resource, s.Scope, r.SchemaUrl+s.SchemaUrl, it, point)
					}
				}
			}
		}
	}
	return items
}

// pointsOf takes the points out of a metric.
func pointsOf(m *metricspb.Metric) (points []proto.Message) {
	switch d := m.Data.(type) {
	case *metricspb.Metric_Gauge:
		points, d.Gauge.DataPoints = messages(d.Gauge.DataPoints), nil
	case *metricspb.Metric_Sum:
		points, d.Sum.DataPoints = messages(d.Sum.DataPoints), nil
	case *metricspb.Metric_Histogram:
		points, d.Histogram.DataPoints = messages(d.Histogram.DataPoints), nil
	case *metricspb.Metric_ExponentialHistogram:
		points, d.ExponentialHistogram.DataPoints = messages(d.ExponentialHistogram.DataPoints), nil
	case *metricspb.Metric_Summary:
		points, d.Summary.DataPoints = messages(d.Summary.DataPoints), nil
	}
	return points
}

func messages[M proto.Message](in []M) (out []proto.Message) {
	for _, m := range in {
		out = append(out, m)
	}
	return out
}

// scanned is Scan with its promises checked. ok is false when it refuses.
func scanned(t testing.TB, sig Signal, p []byte) (rep Report, ok bool) {
	t.Helper()
	before := bytes.Clone(p)
	rep, err := Scan(sig, p, DefaultLimits)
	if !bytes.Equal(before, p) {
		t.Fatalf("%v: Scan has written to %x", sig, before)
	}
	if err != nil {
		return rep, false
	}
	if n := Count(sig, p); n != rep.Items {
		t.Fatalf("%v: Scan counts %d items, Count %d in %x", sig, rep.Items, n, p)
	}
	if rep.BadStrings == 0 {
		if n := len(flatten(t, sig, p)); n != rep.Items {
			t.Fatalf("%v: Scan counts %d items, the decoder %d in %x", sig, rep.Items, n, p)
		}
	}
	return rep, true
}

// sound returns p when Scan finds it sound, else what Mend makes of it, checked.
func sound(t testing.TB, sig Signal, p []byte) (out []byte, ok bool) {
	t.Helper()
	rep, ok := scanned(t, sig, p)
	if !ok || rep.Sound() {
		return p, ok
	}
	before := bytes.Clone(p)
	out, err := Mend(sig, p)
	if err != nil {
		t.Fatalf("%v: Mend of %x: %v", sig, p, err)
	}
	if !bytes.Equal(before, p) {
		t.Fatalf("%v: Mend has written to %x", sig, before)
	}
	after, ok := scanned(t, sig, out)
	if !ok || !after.Sound() || after.Items != rep.Items-rep.Invalid {
		t.Fatalf("%v: Mend of %x: %+v, before %+v", sig, p, after, rep)
	}
	if rep.BadStrings == 0 && rep.Crowded == 0 {
		// What is left is what was there, in its order.
		all := flatten(t, sig, p)
		for _, it := range flatten(t, sig, out) {
			n := slices.IndexFunc(all, func(was flat) bool { return was == it })
			if n < 0 {
				t.Fatalf("%v: Mend of %x makes %q", sig, p, it.text)
			}
			all = all[n+1:]
		}
	}
	return out, true
}

// TestBadInput runs every row of bad input through Scan, Mend and the decoder.
func TestBadInput(t *testing.T) {
	limits := DefaultLimits
	limits.MaxBytes = 32 << 20
	for _, row := range badinput.Rows() {
		sig := must(ParseSignal(row.Signal))
		body := row.Body()
		name := row.ID + " " + row.Name
		sanitised := 0
		if row.JSON {
			p, n, err := FromJSON(nil, sig, body, limits)
			if (err != nil) != row.Refused || (err != nil && len(err.Error()) > 400) {
				t.Errorf("%s: %.1000v, want refused: %v", name, err, row.Refused)
			}
			if err != nil {
				continue
			}
			body, sanitised = p, n
		}
		rep, ok := scanned(t, sig, body)
		if ok == row.Refused {
			t.Errorf("%s: accepted: %v, want refused: %v", name, ok, row.Refused)
		}
		if !ok || row.Refused {
			continue
		}
		rejected := row.Rejected
		if row.Large && rep.Invalid == 0 && rejected > 0 { // for its size, at the door
			rejected = 0
			row.Items += row.Rejected
		}
		if rep.Invalid != rejected || rep.Items-rep.Invalid != row.Items || rep.BadStrings+sanitised != row.Mended || rep.Crowded != row.Crowded {
			t.Errorf("%s: %+v and %d sanitised, want %d items, %d invalid, %d bad strings, %d crowded", name, rep, sanitised, row.Items, rejected, row.Mended, row.Crowded)
		}
		sound(t, sig, body)
	}
}

// generatorSeeds are requests of the generator's shop; generator_test.go fills them
// in, since the generator imports this package.
var generatorSeeds = map[Signal][][]byte{}

// seed starts a fuzz target from sound requests, of the tests, of the generator
// and after the OTLP project's examples, and from the rows of bad input.
func seed(f *testing.F) {
	for _, sig := range Signals {
		f.Add(uint8(sig), marshal(f, sample(sig)))
		if len(generatorSeeds[sig]) == 0 {
			f.Fatalf("BUG: no seeds of the generator for %v", sig)
		}
		for _, p := range generatorSeeds[sig] {
			f.Add(uint8(sig), p)
		}
		p, _, err := FromJSON(nil, sig, []byte(badinput.Examples()[sig.String()]), DefaultLimits)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(sig), p)
	}
	for _, row := range badinput.Rows() {
		if row.Large {
			continue
		}
		sig, body := must(ParseSignal(row.Signal)), row.Body()
		if row.JSON {
			p, _, err := FromJSON(nil, sig, body, DefaultLimits)
			if err != nil {
				continue
			}
			body = p
		}
		f.Add(uint8(sig), body)
	}
}

// fuzzSound fuzzes with what Scan accepts, mended where it must be.
func fuzzSound(f *testing.F, check func(t *testing.T, sig Signal, p []byte)) {
	seed(f)
	f.Fuzz(func(t *testing.T, s uint8, p []byte) {
		sig := Signal(s % 3)
		if p, ok := sound(t, sig, p); ok {
			check(t, sig, p)
		}
	})
}

func FuzzScan(f *testing.F) {
	fuzzSound(f, func(*testing.T, Signal, []byte) {})
}

func FuzzStamp(f *testing.F) {
	stamp := testStamp()
	fuzzSound(f, func(t *testing.T, sig Signal, p []byte) {
		out, err := stamp.Append(nil, p)
		if err != nil {
			t.Fatal(err)
		}
		if rep, ok := scanned(t, sig, out); !ok || !rep.Sound() {
			t.Fatalf("%v: stamp of %x is not sound", sig, p)
		}
		in := decode(t, sig, p)
		in.ProtoReflect().SetUnknown(nil)
		if got, want := marshal(t, decode(t, sig, out)), marshal(t, wantStamped(in)); !bytes.Equal(got, want) {
			t.Fatalf("%v: stamp of %x:\n%x\nwant\n%x", sig, p, got, want)
		}
	})
}

// FuzzSplit splits by the place of an item, in all signals, and for spans by
// trace ID, too.
func FuzzSplit(f *testing.F) {
	fuzzSound(f, func(t *testing.T, sig Signal, p []byte) {
		var keys []int // of every span, metric or log record
		checkSplit(t, sig, p, func(item []byte) int { keys = append(keys, len(keys)%3-1); return keys[len(keys)-1] }, &keys)
		if sig == Traces {
			keys = keys[:0]
			checkSplit(t, sig, p, func(item []byte) int {
				id, ok := SpanTrace(item)
				if !ok {
					t.Fatalf("no trace ID in sound %x", p)
				}
				keys = append(keys, int(id[15]%4))
				return keys[len(keys)-1]
			}, &keys)
		}
	})
}

func checkSplit(t *testing.T, sig Signal, p []byte, keyOf func([]byte) int, keys *[]int) {
	t.Helper()
	var sp Splitter
	pieces := map[int][]byte{}
	if err := sp.Split(p, keyOf, func(key int, piece []byte) { pieces[key] = append(pieces[key], piece...) }); err != nil {
		t.Fatal(err)
	}
	checkGroups(t, p, *keys, pieces)
	want := map[int][]flat{}
	for i, it := range flatten(t, sig, p) {
		if sig == Metrics {
			continue // below
		}
		want[(*keys)[i]] = append(want[(*keys)[i]], it)
	}
	if sig == Metrics { // the decoder's metrics, each with all its points
		i := 0
		for _, r := range decode(t, sig, p).(*metricspb.MetricsData).ResourceMetrics {
			for _, s := range r.ScopeMetrics {
				for _, m := range s.Metrics {
					only := &metricspb.MetricsData{ResourceMetrics: []*metricspb.ResourceMetrics{{Resource: r.Resource, SchemaUrl: r.SchemaUrl, ScopeMetrics: []*metricspb.ScopeMetrics{{Scope: s.Scope, SchemaUrl: s.SchemaUrl, Metrics: []*metricspb.Metric{m}}}}}}
					want[(*keys)[i]] = append(want[(*keys)[i]], flatten(t, sig, marshal(t, only))...)
					i++
				}
			}
		}
	}
	delete(want, -1)
	for key, piece := range pieces {
		if rep, ok := scanned(t, sig, piece); !ok || !rep.Sound() {
			t.Fatalf("%v: split of %x is not sound", sig, p)
		}
		if got := flatten(t, sig, piece); !slices.Equal(got, want[key]) {
			t.Fatalf("%v: key %d of %x:\n%q\nwant\n%q", sig, key, p, got, want[key])
		}
		delete(want, key)
	}
	for key, items := range want {
		if len(items) > 0 {
			t.Fatalf("%v: %d items of key %d are lost in %x", sig, len(items), key, p)
		}
	}
}

// checkGroups holds what is kept of groups against what Split has emitted.
func checkGroups(t *testing.T, p []byte, keys []int, pieces map[int][]byte) {
	t.Helper()
	var sp Splitter
	i := -1
	kept := map[int][]byte{}
	heads := map[*Heads]bool{}
	err := sp.Groups(p, func([]byte) int { i++; return keys[i] }, func(key int, g Group) {
		f := g.Fragment(nil)
		before := len(kept[key])
		kept[key] = f.Append(kept[key])
		if n := len(kept[key]) - before; n != f.Size() {
			t.Fatalf("fragment of %x: %d bytes, Size says %d", p, n, f.Size())
		}
		heads[f.Heads] = true
		items := 0
		for range g.Items() {
			items++
		}
		none := g.Fragment(make([]bool, items))
		if none.Held() != 0 || cap(none.items) != 0 || none.Heads != f.Heads {
			t.Fatalf("fragment of nothing in %x: %d bytes", p, none.Held())
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	resources := 0
	for range Resources(p) {
		resources++
	}
	if len(heads) > resources {
		t.Fatalf("%d heads of %d resources in %x", len(heads), resources, p)
	}
	for key, piece := range pieces {
		if !bytes.Equal(kept[key], piece) {
			t.Fatalf("key %d of %x:\n%x\nSplit says\n%x", key, p, kept[key], piece)
		}
	}
}

func FuzzHalve(f *testing.F) {
	fuzzSound(f, func(t *testing.T, sig Signal, p []byte) {
		n := Count(sig, p)
		first, second, ok := Halve(sig, p)
		if ok != (n > 1) {
			t.Fatalf("%v: %d items, halved: %v", sig, n, ok)
		}
		if !ok {
			return
		}
		if Count(sig, first) != n/2 {
			t.Fatalf("%v: half of %d is %d", sig, n, Count(sig, first))
		}
		got := append(flatten(t, sig, first), flatten(t, sig, second)...)
		if want := flatten(t, sig, p); !slices.Equal(got, want) {
			t.Fatalf("%v: halves of %x:\n%q\nwant\n%q", sig, p, got, want)
		}
	})
}

func FuzzCut(f *testing.F) {
	fuzzSound(f, func(t *testing.T, sig Signal, p []byte) {
		for _, limit := range []int{len(p), len(p)/2 + 1, 100} {
			var got []flat
			items := 0
			large, err := Cut(sig, p, limit, func(piece []byte, n int) error {
				if rep, ok := scanned(t, sig, piece); len(piece) > limit || !ok || !rep.Sound() || rep.Items != n || n == 0 {
					t.Fatalf("%v: cut %x at %d: a piece of %d bytes, %d items: %+v", sig, p, limit, len(piece), n, rep)
				}
				got, items = append(got, flatten(t, sig, piece)...), items+n
				return nil
			})
			want := flatten(t, sig, p)
			if err != nil || items+large != len(want) {
				t.Fatalf("%v: cut %x at %d: %d items and %d too large of %d, %v", sig, p, limit, items, large, len(want), err)
			}
			for _, it := range got { // in order, some left out
				n := slices.Index(want, it)
				if n < 0 {
					t.Fatalf("%v: cut %x at %d: makes\n%q\nof\n%q", sig, p, limit, it, want)
				}
				want = want[n+1:]
			}
		}
	})
}

func FuzzRead(f *testing.F) {
	fuzzSound(f, func(t *testing.T, sig Signal, p []byte) {
		if sig != Traces {
			return
		}
		m := decode(t, Traces, p).(*tracepb.TracesData)
		r := 0
		for res := range Resources(p) {
			want := m.ResourceSpans[r]
			r++
			checkAttributes(t, want.Resource.GetAttributes(), func(key string) (Value, bool) { return ResourceAttribute(res.Resource(), key) })
			s := 0
			for sc := range res.Scopes() {
				want := want.ScopeSpans[s]
				s++
				checkAttributes(t, want.Scope.GetAttributes(), func(key string) (Value, bool) { return ScopeAttribute(sc.Scope(), key) })
				n := 0
				for item := range sc.Items() {
					checkSpan(t, item, want.Spans[n])
					n++
				}
				if n != len(want.Spans) {
					t.Fatalf("%d spans, want %d", n, len(want.Spans))
				}
			}
			if s != len(want.ScopeSpans) {
				t.Fatalf("%d scopes, want %d", s, len(want.ScopeSpans))
			}
		}
		if r != len(m.ResourceSpans) {
			t.Fatalf("%d resources, want %d", r, len(m.ResourceSpans))
		}
	})
}

func checkSpan(t *testing.T, item []byte, want *tracepb.Span) {
	t.Helper()
	var sp Span
	sp.Parse(item)
	root := !kindSpanID.validID(want.ParentSpanId)
	if !bytes.Equal(sp.TraceID[:], want.TraceId) || !bytes.Equal(sp.SpanID[:], want.SpanId) || sp.Root != root || sp.Kind != int32(want.Kind) ||
		sp.Status != int32(want.Status.GetCode()) || sp.Flags != want.Flags || sp.Start != want.StartTimeUnixNano || sp.End != want.EndTimeUnixNano ||
		string(sp.TraceState) != want.TraceState || string(sp.Name) != want.Name {
		t.Fatalf("got %+v\nwant %v", sp, want)
	}
	if id, ok := SpanTrace(item); !ok || id != sp.TraceID {
		t.Fatalf("SpanTrace %x, %v; want %x", id, ok, sp.TraceID)
	}
	checkAttributes(t, want.Attributes, sp.Attribute)
	n := 0
	for ev := range sp.Events() {
		checkAttributes(t, want.Events[n].Attributes, func(key string) (Value, bool) { return EventAttribute(ev, key) })
		n++
	}
	if n != len(want.Events) {
		t.Fatalf("%d events, want %d", n, len(want.Events))
	}
}

func checkAttributes(t *testing.T, want []*commonpb.KeyValue, find func(key string) (Value, bool)) {
	t.Helper()
	last := map[string]*commonpb.AnyValue{}
	for _, kv := range want {
		last[kv.Key] = kv.Value
	}
	for key, want := range last {
		got, ok := find(key)
		if text := valueText(got); !ok || text != anyText(want) {
			t.Fatalf("attribute %q: %v %s, want %s", key, ok, text, anyText(want))
		}
	}
	if _, in := last["no such key"]; !in {
		if _, ok := find("no such key"); ok {
			t.Fatal("found a key that is not there")
		}
	}
}

func valueText(v Value) string {
	switch v.Kind {
	case String:
		return fmt.Sprintf("%q", v.Str)
	case Bool:
		return fmt.Sprint(v.Bool())
	case Int:
		return fmt.Sprint("int ", v.Int())
	case Double:
		return fmt.Sprint("double ", v.Double())
	case Array, Map, Binary, Other:
		return "other"
	}
	return "none"
}

func anyText(v *commonpb.AnyValue) string {
	switch v := v.GetValue().(type) {
	case *commonpb.AnyValue_StringValue:
		return fmt.Sprintf("%q", v.StringValue)
	case *commonpb.AnyValue_BoolValue:
		return fmt.Sprint(v.BoolValue)
	case *commonpb.AnyValue_IntValue:
		return fmt.Sprint("int ", v.IntValue)
	case *commonpb.AnyValue_DoubleValue:
		return fmt.Sprint("double ", v.DoubleValue)
	case nil:
		return "none"
	}
	return "other"
}

// FuzzJSON checks that what comes out of the JSON reader is a request, and that
// the writer's text says the same.
func FuzzJSON(f *testing.F) {
	for _, sig := range Signals {
		f.Add(uint8(sig), AppendJSON(nil, sig, marshal(f, sample(sig))))
		f.Add(uint8(sig), []byte(badinput.Examples()[sig.String()]))
		for _, p := range generatorSeeds[sig] {
			f.Add(uint8(sig), AppendJSON(nil, sig, p))
		}
	}
	for _, row := range badinput.Rows() {
		if row.JSON && !row.Large {
			f.Add(uint8(must(ParseSignal(row.Signal))), row.Body())
		}
	}
	f.Fuzz(func(t *testing.T, s uint8, text []byte) {
		sig := Signal(s % 3)
		before := bytes.Clone(text)
		p, _, err := FromJSON(nil, sig, text, DefaultLimits)
		if !bytes.Equal(before, text) {
			t.Fatalf("FromJSON has written to %q", before)
		}
		if err != nil {
			return
		}
		rep, ok := scanned(t, sig, p)
		if !ok || rep.BadStrings > 0 {
			t.Fatalf("%v: the scanner refuses what came of %q: %+v", sig, text, rep)
		}
		checkJSON(t, sig, p)
	})
}

// FuzzJSONWrite takes the way round: sound bytes to text and back.
func FuzzJSONWrite(f *testing.F) {
	fuzzSound(f, func(t *testing.T, sig Signal, p []byte) { checkJSON(t, sig, p) })
}

func checkJSON(t *testing.T, sig Signal, p []byte) {
	t.Helper()
	text := AppendJSON(nil, sig, p)
	back, sanitised, err := FromJSON(nil, sig, text, Limits{MaxElements: 1 << 20})
	if err != nil || sanitised > 0 {
		t.Fatalf("%v: own JSON of %x: %v, %d strings sanitised\n%s", sig, p, err, sanitised, text)
	}
	got, want := decoded(sig), decoded(sig)
	known := proto.UnmarshalOptions{DiscardUnknown: true}
	if err := errors.Join(known.Unmarshal(back, got), known.Unmarshal(p, want)); err != nil || !proto.Equal(got, want) {
		t.Fatalf("%v: %x as JSON\n%s\ncomes back as\n%v\nwant\n%v (%v)", sig, p, text, got, want, err)
	}
}
