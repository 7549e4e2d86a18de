package policy

import (
	"errors"
	"slices"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Panicked is that policies had no answer because they panicked.
type Panicked struct {
	Policies int
	Policy   string // the first one
	*fault.Panic
}

// vote is the state of asking policies, one after the other.
type vote struct {
	policies []named
	trace    *Trace
	budgets  *Budgets
	until    Outcome // that is enough
	next     int     // the policy that is asked next

	highest Outcome
	by      string
	chance  float64
}

// ask asks policies until one has an outcome that is enough, and returns the highest and whose it is. A policy that panics
// has no answer, and the next one is asked.
func (t *Trace) ask(policies []named, b *Budgets, until Outcome) (highest Outcome, by string, chance float64) {
	if len(policies) == 0 {
		return NotSampled, "", 0
	}
	v := vote{policies: policies, trace: t, budgets: b, until: until, highest: NotSampled}
	for {
		err := fault.Guard(v.more)
		if err == nil {
			return v.highest, v.by, v.chance
		}
		t.noAnswer(policies[v.next-1].name, err)
	}
}

// more asks the policies that are left; there is no error.
func (v *vote) more() error {
	for v.next < len(v.policies) && v.highest < v.until {
		p := &v.policies[v.next]
		v.next++
		v.trace.chance = settled
		o := p.eval.evaluate(v.trace, v.budgets)
		v.chance = either(v.chance, v.trace.chance, o == Sampled)
		if o > v.highest {
			v.highest, v.by = o, p.name
		}
	}
	return nil
}

// noAnswer notes that a policy panicked.
func (t *Trace) noAnswer(policy string, err error) {
	if t.panicked == nil {
		p, _ := errors.AsType[*fault.Panic](err)
		if matcher, is := p.Value.(*fault.Panic); is {
			p = matcher
		}
		t.panicked = &Panicked{Policy: policy, Panic: p}
	}
	t.panicked.Policies++
}

// guarded returns answers without content, like a, that catch the panics of matchers. One that panics at a value may
// find another.
func (a *answers) guarded() *answers {
	w := *a.wanted
	failed := make([]error, w.matchers)
	w.want = slices.Clone(w.want)
	for k := range w.want {
		w.want[k] = slices.Clone(w.want[k])
		for i, q := range w.want[k] {
			w.want[k][i].match = func(v otlpwire.Value) (yes bool) {
				if err := fault.Guard(func() error { yes = q.match(v); return nil }); err != nil {
					failed[q.matcher] = err
				}
				return yes
			}
		}
	}
	another := newAnswers(&w)
	another.failed = failed
	return another
}
