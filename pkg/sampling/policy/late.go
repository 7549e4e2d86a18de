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
	s.begin(t)
	v := s.wantsLate(t)
	v.Panicked = t.panicked
	return v
}

func (s *Set) wantsLate(t *Trace) Verdict {
	if highest, by, _ := t.ask(s.drops, new(Budgets), Dropped); highest == Dropped { // also if that would be a matter of its budget
		return Verdict{By: by}
	}
	highest, by, _ := t.ask(s.growing, nil, Sampled)
	if highest != Sampled {
		return Verdict{}
	}
	return Verdict{Keep: true, By: by, Threshold: threshold(either(0, t.chance, true))}
}

// grows reports whether a policy that wants some spans of a trace wants the whole trace, too, whatever else it has.
func grows(p evaluator) bool {
	switch p := p.(type) {
	case function, always, statusCode, probabilistic, traceFlags, traceState:
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
