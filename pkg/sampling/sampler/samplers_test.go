package sampler

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// payloads are 400 messages of two instances, a second of stream time each, with
// traces over several of them.
func payloads() (frames []envelope.Frame) {
	rng := rand.New(rand.NewPCG(3, 3))
	for i := range 400 {
		var spans []*tracepb.Span
		for range 12 {
			id := []byte(fmt.Sprintf("%016d", (i-rng.IntN(6))*12+rng.IntN(12)+100_000))
			spans = append(spans, &tracepb.Span{TraceId: id, SpanId: []byte(fmt.Sprintf("%08d", i*100+len(spans)+1)), Name: "x"})
		}
		payload, _ := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: spans}}}}})
		frames = append(frames, envelope.Frame{Instance: fmt.Sprint("as-", i%2), Arrival: int64(i+1) * 1e9, Seq: uint64(i + 1), Payload: payload})
	}
	return frames
}

var someKept = []byte(`
decision_wait: 10s
policies:
  - {name: few, type: rate_limiting, rate_limiting: {spans_per_second: 4}}
  - {name: share, type: probabilistic, probabilistic: {sampling_percentage: 10}}
`)

// verdicts notes decisions and exports, and settles the exports.
type verdicts struct {
	decided map[string]bool
	spans   int
}

func (v *verdicts) note(out Output, release func(uint64)) {
	for _, d := range out.Decisions {
		v.decided[fmt.Sprintf("%s/%s", d.Instance, d.TraceID[:])] = d.Kept
	}
	for i := range out.Exports {
		v.spans += out.Exports[i].Spans
		release(out.Exports[i].Seq)
	}
}

// TestSamplersDecideAsPartitionsDo gives whole payloads to the samplers of four
// partitions, and each partition's spans to one of its own: the budgets that they
// share give the same verdicts.
func TestSamplersDecideAsPartitionsDo(t *testing.T) {
	const n = 4
	set, err := policy.Parse("p", someKept)
	if err != nil {
		t.Fatal(err)
	}
	set.Partitions = n
	together, apart := verdicts{decided: map[string]bool{}}, verdicts{decided: map[string]bool{}}
	all := NewSamplers(set, partition.Spread{N: n}, 1<<20, 0, nil)
	var each [n]*Sampler
	for p := range each {
		each[p] = New(set, 1<<20, 0)
	}
	var split otlpwire.Splitter
	for _, f := range payloads() {
		out, err := all.Add(f.Seq, f)
		if err != nil {
			t.Fatal(err)
		}
		together.note(out, all.Release)
		if floor := all.Floor(); floor > f.Seq || floor+30 < f.Seq {
			t.Fatalf("floor %d at %d", floor, f.Seq)
		}
		if err := split.Split(f.Payload, func(item []byte) int {
			id, _ := otlpwire.SpanTrace(item)
			return partition.Spread{N: n}.Of(f.Instance, id)
		}, func(p int, piece []byte) {
			one := f
			one.Payload = slices.Clone(piece)
			out, err := each[p].Add(f.Seq, one)
			if err != nil {
				t.Fatal(err)
			}
			apart.note(out, each[p].Release)
		}); err != nil {
			t.Fatal(err)
		}
	}
	together.note(all.Finish(), all.Release)
	for _, s := range each {
		apart.note(s.Finish(), s.Release)
	}
	if traces, bytes := all.Held(); traces != 0 || bytes != 0 || all.Floor() != 400 {
		t.Errorf("at the end %d traces, %d bytes, floor %d", traces, bytes, all.Floor())
	}
	kept := 0
	for id, k := range together.decided {
		if apart.decided[id] != k {
			t.Errorf("%s: %v together, %v apart", id, k, apart.decided[id])
		}
		if k {
			kept++
		}
	}
	if len(together.decided) != len(apart.decided) || together.spans != apart.spans || kept < 100 || kept > len(together.decided)-100 {
		t.Errorf("%d and %d traces, %d and %d spans, %d kept", len(together.decided), len(apart.decided), together.spans, apart.spans, kept)
	}
}

// TestChosenTracesComeWhole: a range keeps the traces that begin in it, with their spans
// behind it, and the budgets are as if all were meant. The next owner agrees.
func TestChosenTracesComeWhole(t *testing.T) {
	set, err := policy.Parse("p", someKept)
	if err != nil {
		t.Fatal(err)
	}
	set.Partitions = 2
	from, to := int64(100e9), int64(200e9)
	first := map[string]int64{}
	wanted := verdicts{decided: map[string]bool{}} // those of all, by where they begin
	every := NewSamplers(set, partition.Spread{N: 2}, 1<<20, 0, func(at int64, _ uint64) bool { return true })
	got := verdicts{decided: map[string]bool{}}
	some := NewSamplers(set, partition.Spread{N: 2}, 1<<20, 0, func(at int64, _ uint64) bool { return from <= at && at < to })
	unchosen, sampledOut, duplicates := 0, 0, 0
	var recorded []byte
	step := func(out Output) {
		unchosen += notAsked(out)
		sampledOut += out.SampledOut
		duplicates += out.Duplicates
		for _, d := range out.Decisions {
			recorded = envelope.AppendDecision(recorded, d)
		}
		got.note(out, some.Release)
	}
	for _, f := range payloads() {
		for item := range otlpwire.Items(f.Payload) {
			id, _ := otlpwire.SpanTrace(item)
			k := fmt.Sprintf("%s/%s", f.Instance, id[:])
			if _, seen := first[k]; !seen {
				first[k] = f.Arrival
			}
		}
		a, err := every.Add(f.Seq, f)
		if err != nil {
			t.Fatal(err)
		}
		wanted.note(a, every.Release)
		b, err := some.Add(f.Seq, f)
		if err != nil {
			t.Fatal(err)
		}
		step(b)
	}
	wanted.note(every.Finish(), every.Release)
	step(some.Finish())
	kept := 0
	for id, k := range wanted.decided {
		in := from <= first[id] && first[id] < to
		if want := k && in; got.decided[id] != want {
			t.Errorf("%s, begins at %d: kept %v, want %v", id, first[id], got.decided[id], want)
		}
		if k && in {
			kept++
		}
	}
	if kept < 50 || unchosen == 0 || got.spans+unchosen+sampledOut+duplicates != 400*12 {
		t.Errorf("%d kept, %d spans, %d not chosen, %d sampled out, %d twice", kept, got.spans, unchosen, sampledOut, duplicates)
	}
	// Whoever takes over sends nothing late of a trace that was not chosen.
	next := NewSamplers(set, partition.Spread{N: 2}, 1<<20, 0, nil)
	if err := next.Remember(recorded); err != nil {
		t.Fatal(err)
	}
	for _, f := range payloads() {
		if f.Seq > 90 && f.Seq < 210 {
			continue
		}
		f.Seq += 1000
		out, err := next.Add(f.Seq, f)
		if err != nil || len(out.Exports) > 0 || len(out.Decisions) > 0 {
			t.Fatalf("%d: %d exports, %d decisions, %v", f.Seq, len(out.Exports), len(out.Decisions), err)
		}
	}
}

// TestLittleRoomLosesNothing runs the samplers of four partitions in room for a part of
// what waits, as a lane does: back to the floor when there is room again, and at the end
// until nothing was passed over. The decisions are those of as much room as they like.
func TestLittleRoomLosesNothing(t *testing.T) {
	const n = 4
	set, err := policy.Parse("p", someKept)
	if err != nil {
		t.Fatal(err)
	}
	set.Partitions = n
	frames := payloads()
	decide := func(room int) (map[string]bool, int) {
		all := map[string]bool{}
		var recorded [][]byte
		rounds := 0
		for floor := uint64(0); ; rounds++ {
			if rounds > 1000 {
				t.Fatalf("no end, floor %d", floor)
			}
			s := NewSamplers(set, partition.Spread{N: n}, room, floor, nil)
			for _, m := range recorded {
				if err := s.Remember(m); err != nil {
					t.Fatal(err)
				}
			}
			again := false
			step := func(out Output) {
				body := envelope.AppendDecision(nil, envelope.Decision{}) // what was before has been sent
				for _, d := range out.Decisions {
					k := fmt.Sprintf("%s/%s", d.Instance, d.TraceID[:])
					if before, twice := all[k]; twice && before != d.Kept {
						t.Fatalf("%s: %v, then %v", k, before, d.Kept)
					}
					all[k] = d.Kept
					body = envelope.AppendDecision(body, d)
				}
				for i := range out.Exports {
					s.Release(out.Exports[i].Seq)
				}
				recorded = append(recorded, body)
				again = out.Rewind
			}
			for _, f := range frames {
				if f.Seq <= floor {
					continue
				}
				out, err := s.Add(f.Seq, f)
				if err != nil {
					t.Fatal(err)
				}
				if step(out); again {
					break
				}
			}
			if !again {
				step(s.Finish())
			}
			if floor = s.Floor(); !again {
				return all, rounds
			}
		}
	}
	want, _ := decide(1 << 30)
	got, rounds := decide(60_000)
	if rounds == 0 {
		t.Error("there was room for all: nothing is proven")
	}
	missing := 0
	for k, kept := range want {
		if have, decided := got[k]; !decided || have != kept {
			missing++
		}
	}
	if missing > 0 || len(got) != len(want) {
		t.Errorf("%d of %d traces decided after %d rounds, %d otherwise", len(got), len(want), rounds, missing)
	}
}

// notAsked returns how many spans are of traces that were not asked for.
func notAsked(out Output) (n int) {
	for _, e := range out.Ended {
		if e.How == NotAsked {
			n += e.Spans
		}
	}
	return n
}
