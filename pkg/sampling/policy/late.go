package policy

import "time"

// Late is how far late spans may turn "not kept" into kept. The zero Late leaves every decision as it is.
type Late struct {
	// Traces bounds how many traces of a domain a partition brings back, a minute of stream time.
	Traces int `json:"traces"`
	// Age is how long after its decision a trace may be brought back, in stream time.
	Age time.Duration `json:"age"`
}

// WantsLate decides about spans that came after their trace was not kept: whether a policy without a budget wants
// them by themselves, and no drop policy does. Policies that could change their mind when they see the other spans, such as
// not, or an upper bound, have no say.
func (s *Set) WantsLate(t *Trace) Verdict {
	t.partitions = max(s.Partitions, 1)
	if t.answers == nil || t.answers.wanted != &s.wanted {
		t.answers = newAnswers(&s.wanted)
	}
	for _, p := range s.drops {
		if p.eval.evaluate(t, new(Budgets)) == Dropped { // also if that would be a matter of its budget
			return Verdict{By: p.name}
		}
	}
	for _, p := range s.policies {
		if !grows(p.eval) {
			continue
		}
		t.chance = settled
		if p.eval.evaluate(t, nil) == Sampled {
			return Verdict{Keep: true, By: p.name, Threshold: threshold(either(0, t.chance, true))}
		}
	}
	return Verdict{}
}

// grows reports whether a policy that wants some spans of a trace wants the whole trace, too, whatever else it has.
func grows(p evaluator) bool {
	switch p := p.(type) {
	case always, statusCode, probabilistic, traceFlags, traceState:
		return true
	case ottlCondition:
		return !p.strict // it could fail on another span
	case latency:
		return p.upTo == 0
	case spanCount:
		return p.atMost == 0
	case attribute:
		return !p.invert
	case and:
		for _, sub := range p {
			if !grows(sub) {
				return false
			}
		}
		return true
	}
	return false // budgets, and not
}
