// Package policy decides about whole traces by the collector's tail_sampling
// policies. A configuration of the collector's processor is accepted unchanged; an unsupported setting is
// refused by name, never ignored.
//
// # Promises
//
//   - The verdict is a function of the trace, the configuration and the budgets at the trace's
//     stream time: no clock, no randomness.
//   - probabilistic keeps the same traces as the collector with the same salt.
//   - A policy that panics has no answer about that trace; the others have theirs.
//
// # Not here
//
// When a trace is decided: package sampler. The clock is the instance's stream.
package policy

import (
	"bytes"
	"hash/fnv"
	"math"
	"math/big"
	"regexp"
	"slices"
	"time"

	"go.opentelemetry.io/collector/pdata/ptrace"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Outcome is a policy's verdict. Of several the highest counts. An inverted match is a plain yes or no,
// as in the collector since v0.156.
type Outcome uint8

// The verdicts. Failed means no answer: an expression could not be evaluated, or the policy panicked. Then the other
// policies decide; not and and pass it on, and composite ends with it.
const (
	Failed Outcome = iota
	NotSampled
	Sampled
	Dropped
)

// Trace is the input of policies.
type Trace struct {
	ID      otlpwire.TraceID
	Spans   int
	Payload []byte        // all its spans
	Due     int64         // when its window closed, in Unix nanoseconds of stream time
	Load    envelope.Load // what its instance sent in all partitions while the trace arrived

	start, end uint64
	statuses   uint8 // bit n: a span has status n
	sampled    bool  // a span has the W3C flag
	read       bool

	decoded ptrace.Traces // for ottl_condition
	decodes bool

	answers    *answers // of the attribute policies of the current set
	partitions int      // number of partitions that share the budgets
	// chance is the probability with which the current policy wants a trace like this, over all IDs.
	// Policies that do not depend on the ID leave it at settled.
	chance   float64
	panicked *Panicked // by the policies that were asked; nil: none
}

// Reset makes t another trace, and keeps its memory for reuse.
func (t *Trace) Reset(id otlpwire.TraceID, spans int, payload []byte, due int64) {
	*t = Trace{ID: id, Spans: spans, Payload: payload, Due: due, answers: t.answers}
}

// Special values of chance.
const (
	settled = -1 // the policy's answer is certain
	unknown = -2 // it depends on what other traces have taken from a budget
)

// summarise reads the spans once for all policies. If that panics, they are read again, to find the attribute policies
// that are the cause. If there are none, it panics for every policy that asks: what has been read is not all.
func (t *Trace) summarise() {
	if t.read {
		return
	}
	if fault.Guard(t.readSpans) != nil {
		t.answers = t.answers.guarded()
		_ = t.readSpans()
	}
	t.read = true
}

// readSpans does the reading; there is no error.
func (t *Trace) readSpans() error {
	t.start = math.MaxUint64
	look := t.answers
	clear(look.found)
	var sp otlpwire.Span
	for r := range otlpwire.Resources(t.Payload) {
		if look.any() {
			otlpwire.EachResourceAttribute(r.Resource(), look.see)
			look.evaluate()
		}
		for sc := range r.Scopes() {
			for item := range sc.Items() {
				sp.Parse(item)
				t.start, t.end = min(t.start, sp.Start), max(t.end, sp.End)
				if sp.Status >= 0 && sp.Status < 8 {
					t.statuses |= 1 << sp.Status
				}
				t.sampled = t.sampled || sp.Flags&1 != 0
				if look.any() {
					sp.EachAttribute(look.see)
					look.evaluate()
				}
			}
		}
	}
	return nil
}

// duration is from the earliest start to the latest end, never negative.
func (t *Trace) duration() time.Duration {
	t.summarise()
	if t.end <= t.start {
		return 0
	}
	return time.Duration(min(t.end-t.start, math.MaxInt64))
}

// Set is a parsed configuration. It is immutable and safe for concurrent use.
type Set struct {
	// Wait is how long after its first span a trace is decided.
	Wait time.Duration
	// WaitAfterRoot is how long after its root span a trace is decided at the latest; 0 for no such
	// bound.
	WaitAfterRoot time.Duration
	// MaxTraceBytes is how large a trace may become, on the wire, before it is dropped; 0 for no separate
	// bound.
	MaxTraceBytes int
	// Kept and Dropped are how many decisions are remembered for late spans; 0
	// means the default.
	Kept, Dropped int

	Settings

	drops      []named // decided first
	policies   []named
	growing    []named // of policies, those that have a say about late spans
	firstMatch bool    // the first policy that wants the trace decides
	limiters   int
	wanted     wanted
}

// Settings are those of the sinks, beside the collector's configuration.
type Settings struct {
	// Partitions is the number of partitions over which the traces of an instance are spread, each with a
	// share of the budgets; 0 means 1.
	Partitions int `json:"-"`
	// MaxKept bounds the spans a second that are kept of one instance, whatever policy wants them; 0 for
	// no bound.
	MaxKept int64 `json:"max_kept,omitempty"`
	// SourceLag is for how long a trace waits for the spans of another source; 0 means the default.
	SourceLag time.Duration `json:"source_lag,omitempty"`
	// Late is how far late spans bring traces back.
	Late Late `json:"late,omitzero"`
}

// Version is a set with the sequence from which it is in force.
type Version struct {
	Number uint64
	From   uint64 // the sequence of SPANS from which it is in force
	*Set
}

// OverShare is the name of the deciding policy when [Set.MaxKept] is used up.
const OverShare = "instance_share"

// Verdict is the decision about a trace.
type Verdict struct {
	Keep bool
	By   string           // the policy that decided; empty when none wanted the trace
	Took []envelope.Spend // from the budgets
	// Threshold is for the trace state of a kept trace ([otlpwire.Annotation]): 0 if the policies are
	// certain to keep a trace like it.
	Threshold uint64
	Panicked  *Panicked // nil: no policy did
}

type named struct {
	name string
	eval evaluator
}

// evaluator is one policy.
type evaluator interface {
	evaluate(t *Trace, b *Budgets) Outcome
}

// begin prepares a trace for a decision.
func (s *Set) begin(t *Trace) {
	t.partitions, t.panicked = max(s.Partitions, 1), nil
	if t.answers == nil || t.answers.wanted != &s.wanted {
		t.answers = newAnswers(&s.wanted)
	}
}

// Decide evaluates all policies on a trace.
func (s *Set) Decide(t *Trace, b *Budgets) Verdict {
	b.taken = nil
	s.begin(t)
	v := s.decide(t, b)
	if v.Keep && s.MaxKept > 0 && !b.spend(limiter{s.limiters, s.MaxKept, s.MaxKept}, t, int64(t.Spans), envelope.Load{}) {
		v = Verdict{By: OverShare}
	}
	v.Took, v.Panicked = b.taken, t.panicked
	return v
}

func (s *Set) decide(t *Trace, b *Budgets) Verdict {
	if highest, by, _ := t.ask(s.drops, b, Dropped); highest == Dropped {
		return Verdict{By: by}
	}
	until := Dropped // which is none of theirs
	if s.firstMatch {
		until = Sampled
	}
	highest, by, chance := t.ask(s.policies, b, until)
	if highest != Sampled {
		return Verdict{By: by}
	}
	return Verdict{Keep: true, By: by, Threshold: threshold(chance)}
}

// either is how likely a trace is wanted by those policies that come to chance, or by one
// more that says of itself how likely it is, and whether it wants this trace.
func either(chance, more float64, wants bool) float64 {
	switch {
	case wants && more == settled:
		return 1
	case wants && more == unknown && chance < 1:
		return unknown
	case more > 0 && chance != unknown:
		return max(chance, more) // one hash for all: the larger share holds the smaller
	}
	return chance
}

// threshold is what the trace state says of a trace that was kept with a chance.
func threshold(chance float64) uint64 {
	switch {
	case chance >= 1:
		return 0
	case chance > 0:
		return otlpwire.Unknown - uint64(chance*float64(otlpwire.Unknown))
	}
	return otlpwire.Unknown
}

// function is a policy of [Set.With].
type function func(*Trace) Outcome

func (f function) evaluate(t *Trace, _ *Budgets) Outcome { return f(t) }

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

// latency is latency, in whole milliseconds. The lower threshold is exclusive, the
// upper one inclusive (contrib #49595).
type latency struct{ over, upTo int64 } // milliseconds; upTo 0 for no bound

func (l latency) evaluate(t *Trace, _ *Budgets) Outcome {
	ms := t.duration().Milliseconds()
	return verdict(ms > l.over && (l.upTo == 0 || ms <= l.upTo))
}

// probabilistic is probabilistic: FNV-1a of salt and trace ID below a threshold.
type probabilistic struct {
	salt      string
	threshold uint64
	chance    float64
}

// defaultSalt is the collector's, so that both keep the same traces.
const defaultSalt = "default-hash-seed"

func newProbabilistic(salt string, percentage float64) probabilistic {
	if salt == "" {
		salt = defaultSalt
	}
	all := new(big.Float).SetUint64(math.MaxUint64)
	threshold, _ := all.Mul(all, big.NewFloat(percentage/100)).Uint64()
	return probabilistic{salt, threshold, percentage / 100}
}

func (p probabilistic) evaluate(t *Trace, _ *Budgets) Outcome {
	h := fnv.New64a()
	_, _ = h.Write([]byte(p.salt))
	_, _ = h.Write(t.ID[:])
	t.chance = p.chance
	return verdict(h.Sum64() <= p.threshold)
}

// rateLimiting is rate_limiting, in spans.
type rateLimiting struct{ limiter }

func (r rateLimiting) evaluate(t *Trace, b *Budgets) Outcome {
	return verdict(b.spend(r.limiter, t, int64(t.Spans), t.Load))
}

// bytesLimiting is bytes_limiting, in bytes on the wire.
type bytesLimiting struct{ limiter }

func (l bytesLimiting) evaluate(t *Trace, b *Budgets) Outcome {
	load := t.Load // in spans, assumed to be as large as those of this trace
	for i := range load {
		load[i] *= int64(len(t.Payload) / max(t.Spans, 1))
	}
	return verdict(b.spend(l.limiter, t, int64(len(t.Payload)), load))
}

// spanCount is span_count.
type spanCount struct{ atLeast, atMost int }

func (s spanCount) evaluate(t *Trace, _ *Budgets) Outcome {
	return verdict(t.Spans >= s.atLeast && (s.atMost == 0 || t.Spans <= s.atMost))
}

// traceFlags is trace_flags: a span has the sampled flag of W3C Trace Context.
type traceFlags struct{}

func (traceFlags) evaluate(t *Trace, _ *Budgets) Outcome {
	t.summarise()
	return verdict(t.sampled)
}

// traceState is trace_state: a span's trace state has the key with one of the
// values.
type traceState struct {
	key    string
	values []string
}

func (s traceState) evaluate(t *Trace, _ *Budgets) Outcome {
	var sp otlpwire.Span
	for item := range otlpwire.Items(t.Payload) {
		if sp.Parse(item); len(sp.TraceState) == 0 {
			continue
		}
		for member := range bytes.SplitSeq(sp.TraceState, []byte(",")) {
			key, val, _ := bytes.Cut(bytes.Trim(member, " \t"), []byte("="))
			if string(key) == s.key && slices.Contains(s.values, string(val)) {
				return Sampled
			}
		}
	}
	return NotSampled
}

// attribute is string_attribute, numeric_attribute and boolean_attribute, on resource and span
// attributes. One pass finds the attributes of all such policies.
type attribute struct {
	matcher int // its index in wanted
	invert  bool
}

func (a attribute) evaluate(t *Trace, _ *Budgets) Outcome {
	t.summarise()
	found := t.answers.found[a.matcher]
	if !found && t.answers.failed != nil && t.answers.failed[a.matcher] != nil {
		panic(t.answers.failed[a.matcher])
	}
	return verdict(found != a.invert)
}

// wanted is the attributes that a set's policies look for.
type wanted struct {
	keys     map[string]int // index in want, by key
	lengths  uint64         // bit n: a key has n bytes, modulo 64
	want     [][]want
	matchers int
}

// want is the conditions of policies on one key.
type want struct {
	matcher int
	match   func(otlpwire.Value) bool
}

// add adds a matcher and returns its index.
func (w *wanted) add(key string, match func(otlpwire.Value) bool) int {
	if w.keys == nil {
		w.keys = map[string]int{}
	}
	k, known := w.keys[key]
	if !known {
		k = len(w.want)
		w.keys[key] = k
		w.lengths |= 1 << (len(key) % 64)
		w.want = append(w.want, nil)
	}
	w.want[k] = append(w.want[k], want{w.matchers, match})
	w.matchers++
	return w.matchers - 1
}

// answers gathers the values of one resource, scope or span at a time, and which matchers have found
// one. Of a repeated key the first value counts, as in the collector.
type answers struct {
	*wanted
	found  []bool                  // by matcher
	failed []error                 // by matcher, the panics that were caught; nil: none are
	values [][]byte                // by key
	seen   []int                   // keys that have a value
	see    func(key, value []byte) // adds a value
}

func newAnswers(w *wanted) *answers {
	a := &answers{wanted: w, found: make([]bool, w.matchers), values: make([][]byte, len(w.want))}
	a.see = func(key, value []byte) {
		if w.lengths&(1<<(len(key)%64)) == 0 {
			return
		}
		if k, ok := w.keys[string(key)]; ok {
			if a.values[k] == nil {
				a.values[k] = value
				a.seen = append(a.seen, k)
			}
		}
	}
	return a
}

func (a *answers) any() bool { return a.matchers > 0 }

// evaluate matches the current values.
func (a *answers) evaluate() {
	for _, k := range a.seen {
		for _, q := range a.want[k] {
			a.found[q.matcher] = a.found[q.matcher] || q.match(otlpwire.ParseValue(a.values[k]))
		}
		a.values[k] = nil
	}
	a.seen = a.seen[:0]
}

// matchString matches strings that are not empty.
func matchString(match func([]byte) bool) func(otlpwire.Value) bool {
	return func(v otlpwire.Value) bool { return v.Kind == otlpwire.String && len(v.Str) > 0 && match(v.Str) }
}

// matchInt matches integers from low to high.
func matchInt(low, high int64) func(otlpwire.Value) bool {
	return func(v otlpwire.Value) bool { return v.Kind == otlpwire.Int && v.Int() >= low && v.Int() <= high }
}

func matchBool(want bool) func(otlpwire.Value) bool {
	return func(v otlpwire.Value) bool { return v.Kind == otlpwire.Bool && v.Bool() == want }
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
	chance := float64(settled)
	for _, p := range a {
		t.chance = settled
		if o := p.evaluate(t, b); o != Sampled {
			t.chance = settled
			return o
		}
		switch {
		case t.chance == settled || chance == unknown:
		case t.chance == unknown || chance == settled:
			chance = t.chance
		default:
			chance = min(chance, t.chance)
		}
	}
	t.chance = chance
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

// not is not: the opposite of its sub-policy; a failure stays a failure.
type not struct{ evaluator }

func (n not) evaluate(t *Trace, b *Budgets) Outcome {
	o := n.evaluator.evaluate(t, b)
	if t.chance >= 0 {
		t.chance = 1 - t.chance
	}
	switch o {
	case Sampled:
		return NotSampled
	case NotSampled:
		return Sampled
	}
	return o
}

// composite is composite: the first sub-policy that wants the trace decides, and keeps it while its own
// budget lasts.
type composite []share

type share struct {
	evaluator
	limiter limiter
}

func (c composite) evaluate(t *Trace, b *Budgets) Outcome {
	for _, s := range c {
		switch o := s.evaluator.evaluate(t, b); o {
		case Sampled:
			return verdict(b.spend(s.limiter, t, int64(t.Spans), t.Load))
		case Failed:
			return o
		}
	}
	return NotSampled
}
