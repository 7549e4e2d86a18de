package main

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/sampler"
)

// edges is the corpus as three edges of an instance send it, all of them live: every trace's spans over eight seconds and
// three edges, whose ways to the hub take up to seven seconds.
type edges struct {
	frames              []envelope.Frame // in the order in which they come
	skipped             map[int]bool     // traces whose ID another one has
	compared, differing int
}

// ordered are policies whose verdict depends on more than what spans a trace has: on their order, on what bytes they take
// in a request of their own, or on other traces.
var ordered = regexp.MustCompile(`rate_limiting|bytes_limiting|composite|propagate`)

func newEdges(traces []*trace, rng *rand.Rand) (*edges, error) {
	e := &edges{skipped: map[int]bool{}}
	ways := [...]time.Duration{0, 2500 * time.Millisecond, 7 * time.Second}
	type event struct {
		comes time.Duration
		envelope.Frame
	}
	var events []event
	add := func(at time.Duration, source int, payload []byte) {
		events = append(events, event{at + ways[source], envelope.Frame{Instance: "as-1", Source: uint32(source + 1), Arrival: int64(time.Hour + at), Payload: slices.Clone(payload)}})
	}
	seen := map[otlpwire.TraceID]bool{}
	var split otlpwire.Splitter
	for i, t := range traces {
		if seen[t.id] {
			e.skipped[i] = true
			continue
		}
		seen[t.id] = true
		if i == 0 { // each source is known from the start
			for source := range ways {
				add(0, source, t.own)
			}
			e.skipped[i] = true
			continue
		}
		at, n := time.Duration(i)*20*time.Millisecond, 0
		if err := split.Split(t.own, func([]byte) int { n++; return n - 1 }, func(_ int, piece []byte) {
			add(at, rng.IntN(len(ways)), piece)
			at += time.Duration(rng.Int64N(int64(8*time.Second) / int64(t.distinct)))
		}); err != nil {
			return nil, err
		}
	}
	slices.SortStableFunc(events, func(a, b event) int { return cmp.Compare(a.comes, b.comes) })
	for i, one := range events {
		one.Seq = uint64(i + 1)
		e.frames = append(e.frames, one.Frame)
	}
	return e, nil
}

// compare decides the corpus with one configuration, and wants the traces kept that each is alone: those are compared with the collector's.
func (e *edges) compare(c *comparison, s set, own *policy.Set) error {
	if s.only != "" || s.meant != nil || ordered.MatchString(s.text) {
		return nil
	}
	e.compared++
	kept := map[otlpwire.TraceID]bool{}
	note := func(out sampler.Output) {
		for _, d := range out.Decisions {
			kept[d.TraceID] = d.Kept
		}
	}
	smp := sampler.New(own, 1<<40, 0)
	for i, f := range e.frames {
		out, err := smp.Add(uint64(i+1), f)
		if err != nil {
			return err
		}
		note(out)
	}
	note(smp.Finish())
	same := true
	for i, t := range c.traces {
		if want := t.kept(own); !e.skipped[i] && kept[t.id] != want {
			same = false
			if c.told++; c.told <= 20 {
				fmt.Fprintf(c.out, "%s\n  over three edges trace %d (%x) is kept: %v, at once: %v\n", s.text, i, binary.BigEndian.Uint64(t.id[8:]), kept[t.id], want)
			}
		}
	}
	if !same {
		e.differing++
	}
	return nil
}
