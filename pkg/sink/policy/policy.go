// Package policy decides about whole traces by the collector's tail_sampling
// policies. A configuration of the collector's processor is accepted as it is;
// what is not supported is refused by name, never ignored.
//
// # Promises
//
//   - The verdict is a function of the trace, the configuration and the budgets
//     of the trace's stream-time second: no clock, no randomness.
//   - probabilistic keeps the same traces as the collector with the same salt.
//
// # Not here
//
// When a trace is decided: package sample. The clock is the instance's stream.
package policy

import (
	"hash/fnv"
	"math"
	"math/big"
	"regexp"
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// Outcome is a policy's or the whole set's verdict. The order is the
// precedence: of several verdicts the highest counts (tail_sampling v0.164).
type Outcome uint8

// The verdicts. The inverted ones come of invert_match only.
const (
	NotSampled Outcome = iota
	InvertSampled
	Sampled
	InvertNotSampled
	Dropped
)

// Trace is what policies see.
type Trace struct {
	ID      otlpwire.TraceID
	Spans   int
	Payload []byte // all its spans
	First   int64  // arrival of the first span, in Unix nanoseconds of stream time

	start, end uint64
	statuses   uint8 // bit n: a span has status n
	read       bool
}

// summarise reads the spans once for all policies.
func (t *Trace) summarise() {
	if t.read {
		return
	}
	t.read = true
	t.start = math.MaxUint64
	var sp otlpwire.Span
	for item := range otlpwire.Items(t.Payload) {
		sp.Parse(item)
		t.start, t.end = min(t.start, sp.Start), max(t.end, sp.End)
		if sp.Status >= 0 && sp.Status < 8 {
			t.statuses |= 1 << sp.Status
		}
	}
}

// duration is from the earliest start to the latest end, never negative.
func (t *Trace) duration() time.Duration {
	t.summarise()
	if t.end <= t.start {
		return 0
	}
	return time.Duration(min(t.end-t.start, math.MaxInt64))
}

// Budgets holds what rate limits have spent, of one instance. The zero Budgets
// is ready. Traces must be decided in the order of First.
type Budgets struct {
	second int64
	spent  []int // spans, by limiter
}

func (b *Budgets) spend(limiter int, second int64, spans, perSecond int) bool {
	if second != b.second {
		b.second = second
		clear(b.spent)
	}
	for len(b.spent) <= limiter {
		b.spent = append(b.spent, 0)
	}
	if b.spent[limiter]+spans > perSecond {
		return false
	}
	b.spent[limiter] += spans
	return true
}

// Set is a parsed configuration. It is immutable and safe for concurrent use.
type Set struct {
	// Wait is how long after its first span a trace is decided.
	Wait time.Duration
	// Kept and Dropped are how many decisions are remembered for late spans; 0
	// means the default.
	Kept, Dropped int

	drops    []named // decided first
	policies []named
}

type named struct {
	name string
	eval evaluator
}

// evaluator is one policy.
type evaluator interface {
	evaluate(t *Trace, b *Budgets) Outcome
}

// Decide returns whether the trace is kept, and the name of the policy that
// decided, "" when none wanted it.
func (s *Set) Decide(t *Trace, b *Budgets) (keep bool, by string) {
	for _, p := range s.drops {
		if p.eval.evaluate(t, b) == Dropped {
			return false, p.name
		}
	}
	highest := NotSampled
	for _, p := range s.policies {
		if o := p.eval.evaluate(t, b); o > highest {
			highest, by = o, p.name
		}
	}
	return highest == Sampled || highest == InvertSampled, by
}

// always is always_sample.
type always struct{}

func (always) evaluate(*Trace, *Budgets) Outcome { return Sampled }

func verdict(yes bool) Outcome {
	if yes {
		return Sampled
	}
	return NotSampled
}

// statusCode is status_code: any span has one of the codes.
type statusCode uint8

func (s statusCode) evaluate(t *Trace, _ *Budgets) Outcome {
	t.summarise()
	return verdict(t.statuses&uint8(s) != 0)
}

// latency is latency. Without an upper threshold the lower one is inclusive,
// with one it is exclusive and the upper inclusive, as in the collector.
type latency struct{ over, upTo int64 } // milliseconds

func (l latency) evaluate(t *Trace, _ *Budgets) Outcome {
	ms := t.duration().Milliseconds()
	if l.upTo == 0 {
		return verdict(ms >= l.over)
	}
	return verdict(ms > l.over && ms <= l.upTo)
}

// probabilistic is probabilistic: FNV-1a of salt and trace ID below a threshold.
type probabilistic struct {
	salt      string
	threshold uint64
}

// defaultSalt is the collector's, so that both keep the same traces.
const defaultSalt = "default-hash-seed"

func newProbabilistic(salt string, percentage float64) probabilistic {
	if salt == "" {
		salt = defaultSalt
	}
	all := new(big.Float).SetUint64(math.MaxUint64)
	threshold, _ := all.Mul(all, big.NewFloat(percentage/100)).Uint64()
	return probabilistic{salt, threshold}
}

func (p probabilistic) evaluate(t *Trace, _ *Budgets) Outcome {
	h := fnv.New64a()
	_, _ = h.Write([]byte(p.salt))
	_, _ = h.Write(t.ID[:])
	return verdict(h.Sum64() <= p.threshold)
}

// rateLimiting is rate_limiting, per instance and second of stream time. The
// collector's token bucket carries unused budget over; a budget that starts
// anew each second does not depend on where reading began.
type rateLimiting struct{ limiter, spansPerSecond int }

func (r rateLimiting) evaluate(t *Trace, b *Budgets) Outcome {
	return verdict(b.spend(r.limiter, t.First/int64(time.Second), t.Spans, r.spansPerSecond))
}

// stringAttribute is string_attribute, on resource, scope and span attributes.
type stringAttribute struct {
	key    string
	match  func(value []byte) bool
	invert bool
}

func (s stringAttribute) evaluate(t *Trace, _ *Budgets) Outcome {
	found := s.find(t.Payload)
	switch {
	case !s.invert:
		return verdict(found)
	case found:
		return InvertNotSampled
	}
	return InvertSampled
}

func (s stringAttribute) find(payload []byte) bool {
	var sp otlpwire.Span
	for r := range otlpwire.Resources(payload) {
		if s.matches(otlpwire.ResourceAttribute(r.Resource(), s.key)) {
			return true
		}
		for sc := range r.Scopes() {
			if s.matches(otlpwire.ScopeAttribute(sc.Scope(), s.key)) {
				return true
			}
			for item := range sc.Items() {
				if sp.Parse(item); s.matches(sp.Attribute(s.key)) {
					return true
				}
			}
		}
	}
	return false
}

func (s stringAttribute) matches(v otlpwire.Value, ok bool) bool {
	return ok && v.Kind == otlpwire.String && len(v.Str) > 0 && s.match(v.Str)
}

func matchExact(values []string) func([]byte) bool {
	return func(v []byte) bool { return slices.Contains(values, string(v)) }
}

func matchAny(patterns []*regexp.Regexp) func([]byte) bool {
	return func(v []byte) bool {
		return slices.ContainsFunc(patterns, func(p *regexp.Regexp) bool { return p.Match(v) })
	}
}

// and is and: all sub-policies want the trace.
type and []evaluator

func (a and) evaluate(t *Trace, b *Budgets) Outcome {
	for _, p := range a {
		if o := p.evaluate(t, b); o != Sampled && o != InvertSampled {
			return NotSampled
		}
	}
	return Sampled
}

// drop is drop: a trace that all sub-policies want is dropped, whatever the
// other policies say.
type drop struct{ and }

func (d drop) evaluate(t *Trace, b *Budgets) Outcome {
	if d.and.evaluate(t, b) == Sampled {
		return Dropped
	}
	return NotSampled
}
