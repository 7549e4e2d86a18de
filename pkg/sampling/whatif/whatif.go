// Package whatif compares two sets of sampling policies on the data in the hub's streams: which traces
// of a range each of them would keep.
//
//	c := whatif.New(running, proposed, whatif.Range{…}, maxBytes)
//	c.Add(seq, frame) // the range and its surroundings, by replay.Plan
//	result := c.Finish()
//
// It has no side effects, and sends nothing. Every trace is decided as in a replay (package sampler).
// Besides the samplers' state it remembers only the traces about which one of the two has not decided
// yet.
package whatif

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/sampler"
)

// Rules are policies, with the versions that follow them.
type Rules struct {
	Base     *policy.Set
	Versions []policy.Version // by the sequence of TRACES from which each is in force
}

// Range is what is compared.
type Range struct {
	// In reports whether a trace whose first span has this arrival and sequence is in the range.
	In func(first int64, seq uint64) bool
	// How traces are spread over partitions, and which instances may share them, by the sequence of TRACES.
	Spread  partition.Spread
	Domains domain.Versions
}

// Tally counts traces, their spans, and their bytes on the wire.
type Tally struct{ Traces, Spans, Bytes int64 }

func (t *Tally) add(more Tally) {
	t.Traces += more.Traces
	t.Spans += more.Spans
	t.Bytes += more.Bytes
}

// Line is what a policy keeps, or what is kept of a service.
type Line struct {
	Name              string
	All               Tally // of a service: everything
	Running, Proposed Tally
}

// Lost is what the running policies keep and the proposed ones would not.
type Lost struct {
	Policy   string // that kept it
	Traces   int64
	Examples []Example
}

// Example is one lost trace.
type Example struct {
	Instance string
	TraceID  otlpwire.TraceID
}

const (
	maxExamples = 3    // of the traces of a policy
	maxServices = 1000 // that are listed separately
)

// Result is the comparison.
type Result struct {
	Total    Line
	Policies []Line // by name
	Services []Line // by spans, the largest first
	Lost     []Lost // by policy
	Gained   int64  // traces that the proposed policies would keep and the running ones did not
	// Late is what late spans bring back: traces, which count elsewhere, too. Their spans count nowhere: they would have to be
	// read again.
	Late Line
}

// Comparison runs two sets of policies side by side, and a third one that keeps everything.
type Comparison struct {
	all, running, proposed *sampler.Samplers
	result                 Result
	policies, services     map[string]*Line
	lost                   map[string]*Lost
	open                   map[trace]verdict // decided by one of the two
	buf                    []byte
	named                  map[string]bool // the services that the current trace has been counted for
}

type trace struct {
	domain string
	id     otlpwire.TraceID
}

type verdict struct {
	running, kept bool // by the running policies; kept
	by            string
}

// New returns a comparison of the traces of a range.
func New(running, proposed Rules, of Range, maxBytes int) *Comparison {
	c := &Comparison{policies: map[string]*Line{}, services: map[string]*Line{}, lost: map[string]*Lost{}, open: map[trace]verdict{}, named: map[string]bool{}}
	open := func(r Rules) *sampler.Samplers {
		r.Base.Partitions = of.Spread.N
		s := sampler.NewSamplers(r.Base, of.Spread, maxBytes, 0, of.In)
		s.Use(r.Versions, of.Domains)
		return s
	}
	c.running, c.proposed = open(running), open(proposed)
	c.all = open(Rules{Base: policy.KeepAll(max(running.Base.Wait, proposed.Base.Wait))})
	return c
}

// Add adds a frame of message seq of TRACES.
func (c *Comparison) Add(seq uint64, f envelope.Frame) error {
	for side, s := range []*sampler.Samplers{c.all, c.running, c.proposed} {
		out, err := s.Add(seq, f)
		if err != nil {
			return err
		}
		c.note(side, s, out)
	}
	return nil
}

// The sides.
const (
	sideAll = iota
	sideRunning
	sideProposed
)

func (c *Comparison) note(side int, s *sampler.Samplers, out sampler.Output) {
	if p := out.Panicked; p != nil {
		panic(fmt.Sprintf("%v\n%s", p.Value, p.Stack)) // nobody else depends on this process
	}
	for i := range out.Exports {
		e := &out.Exports[i]
		s.Release(e.Seq)
		one := Tally{Spans: int64(e.Spans), Bytes: int64(e.Size())}
		if !e.Further {
			clear(c.named)
			if !e.Late {
				one.Traces = 1
			}
		}
		c.tally(&c.result.Total, side).add(one)
		if side != sideAll {
			c.tally(line(c.policies, e.Policy), side).add(one)
		}
		c.byService(side, e)
	}
	if side == sideAll {
		return
	}
	for _, d := range out.Rescues {
		s.Rescued(d) // nothing is read again
	}
	for i, d := range out.Decisions {
		if d.Late == envelope.Rescued {
			c.rescue(side, d)
			continue
		}
		c.compare(trace{d.Domain, d.TraceID}, d.Instance, verdict{side == sideRunning, d.Kept, out.By[i]})
	}
}

func line(of map[string]*Line, name string) *Line {
	if of[name] == nil {
		of[name] = &Line{Name: name}
	}
	return of[name]
}

func (c *Comparison) tally(l *Line, side int) *Tally {
	return []*Tally{&l.All, &l.Running, &l.Proposed}[side]
}

// byService counts an export's spans by service.name; a trace counts for every service
// that has spans in it.
func (c *Comparison) byService(side int, e *sampler.Export) {
	c.buf = e.Append(c.buf[:0])
	for r := range otlpwire.Resources(c.buf) {
		name := "(none)"
		if v, ok := otlpwire.ResourceAttribute(r.Resource(), "service.name"); ok && v.Kind == otlpwire.String {
			name = string(v.Str)
		}
		if len(c.services) >= maxServices && c.services[name] == nil {
			name = "(others)"
		}
		t := c.tally(line(c.services, name), side)
		for sc := range r.Scopes() {
			for item := range sc.Items() {
				t.Spans++
				t.Bytes += int64(len(item))
			}
		}
		if !c.named[name] && !e.Late {
			c.named[name] = true
			t.Traces++
		}
	}
}

// compare records a decision about a trace whose root is of that instance, and finishes the trace once both have decided.
func (c *Comparison) compare(t trace, instance string, v verdict) {
	other, both := c.open[t]
	if !both || other.running == v.running {
		c.open[t] = v
		return
	}
	delete(c.open, t)
	running, proposed := v, other
	if other.running {
		running, proposed = other, v
	}
	switch {
	case running.kept && !proposed.kept:
		c.lose(running.by, Example{instance, t.id})
	case proposed.kept && !running.kept:
		c.result.Gained++
	}
}

// lose counts a trace that the running policies keep and the proposed ones do not.
func (c *Comparison) lose(by string, one Example) {
	l := c.lost[by]
	if l == nil {
		l = &Lost{Policy: by}
		c.lost[by] = l
	}
	if l.Traces++; len(l.Examples) < maxExamples {
		l.Examples = append(l.Examples, one)
	}
}

// rescue records that late spans have brought a trace back for one of the two, which may have been compared already.
func (c *Comparison) rescue(side int, d envelope.Decision) {
	for _, l := range []*Line{&c.result.Late, &c.result.Total, line(c.policies, d.Policy)} {
		c.tally(l, side).Traces++
	}
	t, running := trace{d.Domain, d.TraceID}, side == sideRunning
	if v, open := c.open[t]; open && v.running == running {
		c.open[t] = verdict{running, true, d.Policy}
		return
	}
	other := c.running
	if running {
		other = c.proposed
	}
	switch by, kept, known := other.Kept(d); {
	case !known: // it has been forgotten
	case running && kept:
		c.result.Gained--
	case running:
		c.lose(d.Policy, Example{d.Instance, t.id})
	case !kept:
		c.result.Gained++
	case c.lost[by] != nil:
		c.lost[by].Traces--
		c.lost[by].Examples = slices.DeleteFunc(c.lost[by].Examples, func(e Example) bool { return e.TraceID == t.id })
	}
}

// Settle decides all remaining traces: nothing more of the instances seen so far will be added, and the
// next message may have a lower sequence.
func (c *Comparison) Settle() {
	for side, s := range []*sampler.Samplers{c.all, c.running, c.proposed} {
		c.note(side, s, s.Finish())
	}
}

// Finish settles, and returns the result.
func (c *Comparison) Finish() Result {
	c.Settle()
	r := c.result
	for _, l := range c.policies {
		r.Policies = append(r.Policies, *l)
	}
	for _, l := range c.services {
		r.Services = append(r.Services, *l)
	}
	slices.SortFunc(r.Policies, func(a, b Line) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(r.Services, func(a, b Line) int {
		return cmp.Or(cmp.Compare(b.All.Spans, a.All.Spans), cmp.Compare(a.Name, b.Name))
	})
	maps.DeleteFunc(c.lost, func(_ string, l *Lost) bool { return l.Traces == 0 })
	for _, name := range slices.Sorted(maps.Keys(c.lost)) {
		r.Lost = append(r.Lost, *c.lost[name])
	}
	return r
}

// Full reports whether the samplers have passed over traces because of their memory bound: then the
// comparison is not valid.
func (c *Comparison) Full() bool {
	return c.all.Passed() || c.running.Passed() || c.proposed.Passed()
}
