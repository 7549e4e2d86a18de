package sampler

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	domains "github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/scripttest"
)

// TestScripts runs the stories in testdata.
func TestScripts(t *testing.T) {
	scripttest.Run(t, func(t *testing.T, s *scripttest.Script) {
		sc := &script{base: time.Unix(1_000_000, 0)}
		s.Run(t, scripttest.Commands{"policies": sc.policies, "domains": sc.domains, "add": sc.add, "idle": sc.idle, "release": sc.release, "floor": sc.floor, "readable": sc.readable, "sources": sc.sources, "rescue": sc.rescue})
	})
}

// script is the state of one script.
type script struct {
	s        *Sampler
	seq      uint64
	base     time.Time
	grouping domains.Versions
	frames   []envelope.Frame // by sequence, from 1
	rescues  []envelope.Decision
}

// policies begins with a sampler that has the policies in the body.
func (sc *script) policies(c *scripttest.Call) string {
	set, err := policy.Parse("script", []byte(c.Body))
	if err != nil {
		c.Fatalf("%v", err)
	}
	if set.Late.Traces = c.Number("late", 0); set.Late.Traces > 0 {
		set.Late.Age = time.Hour
	}
	if age := c.Duration("age"); age > 0 {
		set.Late.Age = age
	}
	sc.s, sc.grouping, sc.rescues = New(set, 1<<20, 0), nil, nil
	if room := c.Number("waiting", 0); room > 0 {
		sc.s.maxWaiting = room
	}
	return ""
}

// domains makes the list in the body the next version, from the next message on, which is also that of TRACES: lines of a name and globs.
func (sc *script) domains(c *scripttest.Call) string {
	var list domains.Config
	for line := range strings.Lines(c.Body) {
		if words := strings.Fields(line); len(words) > 1 {
			list = append(list, domains.Named{Name: words[0], Instances: words[1:]})
		}
	}
	sc.grouping = append(sc.grouping, domains.Version{Number: uint64(len(sc.grouping) + 1), From: sc.seq + 1, Set: domains.New(list)})
	sc.s.Use(nil, sc.grouping)
	return ""
}

func (sc *script) at(c *scripttest.Call) time.Time { return sc.base.Add(c.Duration("at")) }

func (sc *script) add(c *scripttest.Call) string {
	sc.seq++
	f := envelope.Frame{Instance: c.Text("instance", "i"), Source: uint32(c.Number("source", 0)), Arrival: sc.at(c).UnixNano(), Seq: uint64(c.Number("origin", 0))}
	if f.Seq == 0 && sc.grouping != nil {
		f.Seq = sc.seq
	}
	trace, lasts, failed := c.Text("trace", ""), c.Duration("ms"), c.Text("error", "") == "yes"
	for _, name := range strings.Split(c.Text("spans", ""), ",") {
		f.Payload = append(f.Payload, spanOf(trace, name, lasts, failed)...)
	}
	out, err := sc.s.Add(sc.seq, f)
	if err != nil {
		c.Fatalf("%v", err)
	}
	sc.frames, sc.rescues = append(sc.frames, f), append(sc.rescues, out.Rescues...)
	return describe(out)
}

func (sc *script) readable(c *scripttest.Call) string {
	sc.s.Readable(uint64(c.Number("from", 0)), uint64(c.Number("most", 0)))
	return ""
}

func (sc *script) sources(*scripttest.Call) string {
	all := sc.s.Sources()
	if all.Waiting == 0 {
		return fmt.Sprintf("%d\n", all.Known)
	}
	return fmt.Sprintf("%d, %d traces wait for %s\n", all.Known, all.Waiting, all.For)
}

// rescue reads what is to be read again.
func (sc *script) rescue(c *scripttest.Call) (said string) {
	r := NewRescuer(sc.rescues, sc.grouping)
	for from, upto := r.Range(); from <= upto; from++ {
		exports, err := r.Add(from, sc.frames[from-1])
		if err != nil {
			c.Fatalf("%v", err)
		}
		said += describe(Output{Exports: exports})
	}
	for _, d := range sc.rescues {
		sc.s.Rescued(d)
	}
	sc.rescues = nil
	return said
}

func (sc *script) idle(c *scripttest.Call) string {
	known := Mark{Before: []time.Time{sc.at(c)}}
	if routed := c.Text("routed", ""); routed != "" { // by partition of TRACES; those of even letters are in the first one
		known.Before = nil
		for _, seq := range strings.Split(routed, ",") {
			n, err := strconv.ParseUint(seq, 10, 64)
			if err != nil {
				c.Fatalf("%v", err)
			}
			known.Routed, known.Before = append(known.Routed, n), append(known.Before, sc.at(c))
		}
	}
	return describe(sc.s.Idle(known, sc.at(c)))
}

func (sc *script) release(c *scripttest.Call) string {
	sc.s.Release(uint64(c.Number("seq", 0)))
	return ""
}

func (sc *script) floor(*scripttest.Call) string { return fmt.Sprintf("at %d\n", sc.s.Floor()) }

func describe(o Output) string {
	var b strings.Builder
	for _, e := range o.Exports {
		reason := e.Policy
		switch {
		case e.Rescued:
			reason = "rescue"
		case e.Late:
			reason = "late"
		}
		id := ""
		for item := range otlpwire.Items(e.Append(nil)) {
			trace, _ := otlpwire.SpanTrace(item)
			id = strings.TrimLeft(hex.EncodeToString(trace[:]), "0")
		}
		fmt.Fprintf(&b, "%s %s kept by=%s spans=%d seq=%d\n", e.Instance, id, reason, e.Spans, e.Seq)
	}
	for _, d := range o.Rescues {
		fmt.Fprintf(&b, "%s %s rescued by=%s from=%d upto=%d\n", d.Instance, strings.TrimLeft(hex.EncodeToString(d.TraceID[:]), "0"), d.Policy, d.From, d.Upto)
	}
	if o.SampledOut > 0 {
		fmt.Fprintf(&b, "sampled out %d\n", o.SampledOut)
	}
	if o.Duplicates > 0 {
		fmt.Fprintf(&b, "duplicates %d\n", o.Duplicates)
	}
	if o.OverLimit > 0 {
		fmt.Fprintf(&b, "over limit %d\n", o.OverLimit)
	}
	if o.TooLate > 0 {
		fmt.Fprintf(&b, "too late %d\n", o.TooLate)
	}
	if o.TooLarge > 0 {
		fmt.Fprintf(&b, "too large %d\n", o.TooLarge)
	}
	if o.Unordered > 0 {
		fmt.Fprintf(&b, "unordered %d\n", o.Unordered)
	}
	return b.String()
}

// spanOf makes a payload of one span; the same name is the same span ID. All but
// the span named root have a parent.
func spanOf(trace, name string, lasts time.Duration, failed bool) []byte {
	id, err := hex.DecodeString(fmt.Sprintf("%032s", trace))
	if err != nil {
		panic(err)
	}
	sp := &tracepb.Span{TraceId: id, SpanId: []byte(fmt.Sprintf("%8.8s", name)), Name: name, StartTimeUnixNano: 1e9, EndTimeUnixNano: 1e9 + uint64(lasts)}
	if name != "root" {
		sp.ParentSpanId = []byte("    root")
	}
	if failed {
		sp.Status = &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR}
	}
	b, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{sp}}}}}})
	if err != nil {
		panic(err)
	}
	return b
}

// TestDecisionsDoNotDependOnInterleaving feeds the same streams of five
// instances in random interleavings, cut into other messages and with
// duplicates, and wants the same kept spans every time.
func TestDecisionsDoNotDependOnInterleaving(t *testing.T) {
	for _, early := range []string{"0s", "3s"} {
		t.Run("decision_wait_after_root_received "+early, func(t *testing.T) { testInterleaving(t, early) })
	}
}

func testInterleaving(t *testing.T, afterRoot string) {
	set, err := policy.Parse("p", []byte(`
decision_wait: 10s
decision_wait_after_root_received: `+afterRoot+`
policies:
  - {name: errors, type: status_code, status_code: {status_codes: [ERROR]}}
  - {name: some, type: probabilistic, probabilistic: {sampling_percentage: 30}}
  - {name: few, type: rate_limiting, rate_limiting: {spans_per_second: 4}}
`))
	if err != nil {
		t.Fatal(err)
	}
	type event struct {
		at      time.Duration
		trace   int
		name    string
		failing bool
	}
	build := rand.New(rand.NewPCG(1, 2))
	streams := map[string][]event{}
	total := 0
	for i := range 5 {
		inst := fmt.Sprintf("i%d", i)
		for n := range 60 {
			first := time.Duration(build.IntN(60_000)) * time.Millisecond
			for s := range 1 + build.IntN(5) {
				streams[inst] = append(streams[inst], event{first + time.Duration(build.IntN(14_000))*time.Millisecond, i*1000 + n + 1, []string{"root", "1", "2", "3", "4"}[s], build.IntN(30) == 0})
				total++
			}
		}
		slices.SortStableFunc(streams[inst], func(a, b event) int { return int(a.at - b.at) })
	}
	base := time.Unix(1_000_000, 0)
	run := func(seed uint64) (kept map[string]int) {
		rng := rand.New(rand.NewPCG(seed, 7))
		s := New(set, 1<<30, 0)
		kept = map[string]int{}
		seen := 0
		note := func(o Output) {
			seen += o.SampledOut + o.Duplicates
			for _, e := range o.Exports {
				seen += e.Spans
				for item := range otlpwire.Items(e.Append(nil)) {
					var sp otlpwire.Span
					sp.Parse(item)
					kept[fmt.Sprintf("%s %x %s", e.Instance, sp.TraceID, sp.Name)]++
				}
				s.Release(e.Seq)
			}
		}
		left := map[string][]event{}
		var names []string
		for inst, evs := range streams {
			left[inst] = evs
			names = append(names, inst)
		}
		slices.Sort(names)
		added := 0
		for seq := uint64(1); len(names) > 0; seq++ {
			i := rng.IntN(len(names))
			inst := names[i]
			ev := left[inst][0]
			f := envelope.Frame{Instance: inst, Arrival: base.Add(ev.at).UnixNano(), Payload: spanOf(fmt.Sprint(ev.trace), ev.name, time.Millisecond, ev.failing)}
			for range 1 + rng.IntN(2)*rng.IntN(2) { // at times the router sends it twice
				o, err := s.Add(seq, f)
				if err != nil {
					t.Fatal(err)
				}
				added++
				note(o)
			}
			if left[inst] = left[inst][1:]; len(left[inst]) == 0 {
				names = slices.Delete(names, i, i+1)
			}
		}
		note(silence(s, base, base.Add(time.Hour)))
		if traces, bytes := s.Held(); traces != 0 || bytes != 0 {
			t.Errorf("seed %d: %d traces and %d bytes are left", seed, traces, bytes)
		}
		if seen != added {
			t.Errorf("seed %d: %d spans in, %d accounted for", seed, added, seen)
		}
		for k := range kept {
			kept[k] = 1 // a late duplicate goes out twice; Tempo keeps one
		}
		return kept
	}
	want := run(0)
	if len(want) == 0 || len(want) >= total {
		t.Fatalf("%d of %d kept: the policies decide nothing", len(want), total)
	}
	for seed := range uint64(50) {
		if got := run(seed); !reflect.DeepEqual(got, want) {
			t.Fatalf("seed %d: another set is kept: %d spans, want %d", seed, len(got), len(want))
		}
	}
}

func TestFloorStaysBelowWhatIsOwed(t *testing.T) {
	set := policy.KeepAll(10 * time.Second)
	s := New(set, 1<<20, 0)
	base := time.Unix(1000, 0)
	add := func(seq uint64, trace string, at time.Duration) Output {
		o, err := s.Add(seq, envelope.Frame{Instance: "i", Arrival: base.Add(at).UnixNano(), Payload: spanOf(trace, fmt.Sprint(seq), 0, false)})
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	add(5, "1", 0)
	add(6, "2", time.Second)
	add(7, "1", 2*time.Second)
	if s.Floor() != 4 {
		t.Errorf("floor %d, want 4", s.Floor())
	}
	o := add(8, "3", 10500*time.Millisecond) // trace 1 is decided
	if len(o.Exports) != 1 || o.Exports[0].Spans != 2 || s.Floor() != 4 {
		t.Errorf("decided but not delivered: %+v, floor %d, want 4", o, s.Floor())
	}
	s.Release(5)
	if s.Floor() != 5 {
		t.Errorf("floor %d after the delivery of trace 1, want 5", s.Floor())
	}
	o = add(9, "1", 11*time.Second) // late for trace 1
	if len(o.Exports) != 1 || o.Exports[0].Seq != 9 || !o.Exports[0].Late {
		t.Errorf("late span: %+v", o)
	}
	s.Release(9)
	for _, e := range silence(s, base, base.Add(time.Minute)).Exports {
		s.Release(e.Seq)
	}
	if s.Floor() != 9 {
		t.Errorf("floor %d when nothing is owed, want 9", s.Floor())
	}
}

// TestPoliciesSwitchAtASequence: a trace is judged by the version that is in force
// where it begins, also when the version becomes known later, or to the next owner.
func TestPoliciesSwitchAtASequence(t *testing.T) {
	parse := func(text string) *policy.Set {
		set, err := policy.Parse("p", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return set
	}
	versions := []policy.Version{
		{Number: 1, From: 3, Set: parse("decision_wait: 20s\npolicies: [{name: errors, type: status_code, status_code: {status_codes: [ERROR]}}]")},
		{Number: 2, From: 5, Set: parse("decision_wait: 5s\npolicies: [{name: some, type: rate_limiting, rate_limiting: {spans_per_second: 1, burst_capacity: 1}}]")},
	}
	base := time.Unix(1000, 0)
	for name, at := range map[string]int{"known before": 0, "known after": 6, "known in between": 4} {
		s := New(policy.KeepAll(10*time.Second), 1<<20, 0)
		var got []string
		note := func(o Output) {
			for i, d := range o.Decisions {
				got = append(got, fmt.Sprintf("%d %v %s", d.TraceID[15], d.Kept, o.By[i]))
			}
		}
		for seq := 1; seq <= 7; seq++ {
			if seq-1 == at {
				s.Use(versions, nil)
			}
			if seq == 7 {
				break
			}
			o, err := s.Add(uint64(seq), envelope.Frame{Instance: "i", Arrival: base.UnixNano(), Seq: uint64(seq), Payload: spanOf(fmt.Sprintf("%x", seq), "x", 0, seq == 4)})
			if err != nil {
				t.Fatal(err)
			}
			note(o)
		}
		note(silence(s, base, base.Add(time.Minute)))
		want := []string{"5 true some", "6 false ", "1 true keep-all", "2 true keep-all", "3 false ", "4 true errors"}
		if !slices.Equal(got, want) {
			t.Errorf("%s:\n got %q\nwant %q", name, got, want)
		}
	}
}

// TestTracesShareTheirResource: a frame of many traces under a large resource is
// held once, not once a trace, until each is sent.
func TestTracesShareTheirResource(t *testing.T) {
	const traces, head = 2000, 400 << 10
	set, err := policy.Parse("p", []byte("decision_wait: 1s\npolicies: [{name: all, type: always_sample}]"))
	if err != nil {
		t.Fatal(err)
	}
	m := &tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{SchemaUrl: strings.Repeat("x", head), ScopeSpans: []*tracepb.ScopeSpans{{}}}}}
	for n := range traces {
		m.ResourceSpans[0].ScopeSpans[0].Spans = append(m.ResourceSpans[0].ScopeSpans[0].Spans,
			&tracepb.Span{TraceId: binary.BigEndian.AppendUint64(make([]byte, 8), uint64(n+1)), SpanId: []byte("aaaaaaaa")})
	}
	payload, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	s := New(set, 1<<30, 0)
	base := time.Unix(1_000_000, 0)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	if _, err := s.Add(1, envelope.Frame{Instance: "i", Arrival: base.UnixNano(), Payload: payload}); err != nil {
		t.Fatal(err)
	}
	if n, bytes := s.Held(); n != traces || bytes < head || bytes > len(payload)+1000+traces*(traceBytes+pieceBytes+spanBytes+16) {
		t.Errorf("%d traces in %d bytes, want %d in about the %d of the frame and what a trace takes besides", n, bytes, traces, len(payload))
	}
	out := silence(s, base, base.Add(time.Minute))
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); len(out.Exports) != traces || grown > 20*int64(len(payload)) {
		t.Errorf("%d exports, the heap has grown by %d for %d bytes", len(out.Exports), grown, len(payload))
	}
	one := out.Exports[7].Append(nil)
	if n := otlpwire.Count(otlpwire.Traces, one); n != 1 || len(one) != out.Exports[7].Size() || len(one) < head {
		t.Errorf("an export of %d spans, %d bytes, Size %d", n, len(one), out.Exports[7].Size())
	}
	if n, bytes := s.Held(); n != 0 || bytes != 0 {
		t.Errorf("%d traces and %d bytes are left", n, bytes)
	}
}

// TestSilenceIsOfAPartition: the clock of a silent instance goes on with what its own
// partition of TRACES has left behind, and stands while nothing is known of that.
func TestSilenceIsOfAPartition(t *testing.T) {
	s := New(policy.KeepAll(10*time.Second), 1<<20, 0)
	base := time.Unix(1_000_000, 0)
	names := make([]string, 3) // by partition
	for i := 0; slices.Contains(names, ""); i++ {
		name := fmt.Sprint("i", i)
		names[partition.OfInstance(name, 3)] = name
	}
	for p, name := range names {
		if _, err := s.Add(uint64(p+1), envelope.Frame{Instance: name, Arrival: base.UnixNano(), Seq: uint64(p + 1), Payload: spanOf("1", "x", 0, false)}); err != nil {
			t.Fatal(err)
		}
	}
	never := -time.Hour
	for i, step := range []struct {
		now    int
		before [3]time.Duration
		want   string
	}{
		{0, [3]time.Duration{0, 0, never}, ""},
		{11, [3]time.Duration{11 * time.Second, 0, never}, ""}, // a second of grace
		{12, [3]time.Duration{12 * time.Second, 5 * time.Second, never}, names[0]},
		{5000, [3]time.Duration{5000 * time.Second, 11 * time.Second, never}, ""},
		{5001, [3]time.Duration{5001 * time.Second, 12 * time.Second, never}, names[1]},
		{5002, [3]time.Duration{5002 * time.Second, 12 * time.Second, 5002 * time.Second}, ""}, // from here on
		{5014, [3]time.Duration{5002 * time.Second, 12 * time.Second, 5014 * time.Second}, names[2]},
	} {
		before := make([]time.Time, 3)
		for p, at := range step.before {
			if at != never {
				before[p] = base.Add(at)
			}
		}
		got := ""
		for _, e := range s.Idle(Mark{Before: before}, base.Add(time.Duration(step.now)*time.Second)).Exports {
			got += e.Instance
		}
		if got != step.want {
			t.Errorf("step %d: decided %q, want %q", i, got, step.want)
		}
	}
}

// TestUnblock: when nothing more can come, what has been held for its wait by the reader's clock is
// decided, and nothing younger; what comes later follows.
func TestUnblock(t *testing.T) {
	s := New(policy.KeepAll(10*time.Second), 1<<20, 0)
	base := time.Unix(1_000_000, 0)
	at := func(seconds int) time.Time { return base.Add(time.Duration(seconds) * time.Second) }
	add := func(seq uint64, trace string, arrival time.Time) (late int) {
		t.Helper()
		out, err := s.Add(seq, envelope.Frame{Instance: "i", Arrival: arrival.UnixNano(), Seq: seq, Payload: spanOf(trace, fmt.Sprint("span", seq), 0, false)})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range out.Exports {
			if e.Late {
				late++
			}
		}
		return late
	}
	decided := func(out Output) int { return len(out.Decisions) }
	s.Idle(Mark{Before: []time.Time{base}}, base)
	add(1, "1", base)
	s.Idle(Mark{Before: []time.Time{base}}, at(8)) // routers stand: their moment does not move
	add(2, "2", at(8))
	for i, step := range []struct{ now, decided int }{{10, 0}, {12, 1}, {17, 0}, {20, 1}, {21, 0}} {
		if n := decided(s.Unblock(at(step.now))); n != step.decided {
			t.Errorf("step %d: %d are decided, want %d", i, n, step.decided)
		}
	}
	if traces, _ := s.Held(); traces != 0 {
		t.Errorf("%d are held", traces)
	}
	if late := add(3, "1", at(9)); late != 1 {
		t.Errorf("%d late spans, want the one that came behind the decision", late)
	}
}

// silence lets nothing come between two moments.
func silence(s *Sampler, from, to time.Time) Output {
	out := s.Idle(Mark{Before: []time.Time{from}}, from)
	out.merge(s.Idle(Mark{Before: []time.Time{to}}, to))
	return out
}

// TestSpansOfOneID: two spans that share an ID and a kind and differ in anything else are
// two, whichever comes first; the same bytes once more are none (otel-ebpf-instrumentation
// #2592).
func TestSpansOfOneID(t *testing.T) {
	policies, err := policy.Parse("p", []byte("policies: [{name: errors, type: status_code, status_code: {status_codes: [ERROR]}}]"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"same-id-ok-first.json", "same-id-error-first.json"} {
		text, err := os.ReadFile("testdata/" + file)
		if err != nil {
			t.Fatal(err)
		}
		payload, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, text, otlpwire.DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		other := bytes.Replace(text, []byte(`"stringValue": "s"`), []byte(`"stringValue": "t"`), 1) // another resource
		elsewhere, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, other, otlpwire.DefaultLimits)
		if err != nil || bytes.Equal(other, text) {
			t.Fatal(err)
		}
		s := New(policies, 1<<20, 0)
		spans, duplicates := 0, 0
		note := func(o Output, err error) {
			if err != nil {
				t.Fatal(err)
			}
			duplicates += o.Duplicates
			for _, e := range o.Exports {
				spans += otlpwire.Count(otlpwire.Traces, e.Append(nil))
			}
		}
		for seq, p := range [][]byte{payload, payload, elsewhere} {
			note(s.Add(uint64(seq+1), envelope.Frame{Instance: "i", Arrival: int64(seq + 1), Seq: uint64(seq + 1), Payload: p}))
		}
		note(s.Finish(), nil)
		if spans != 6 || duplicates != 3 {
			t.Errorf("%s: %d spans kept and %d duplicates, want 6 and 3", file, spans, duplicates)
		}
	}
}
