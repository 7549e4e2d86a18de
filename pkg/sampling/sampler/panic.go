package sampler

import (
	"errors"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// Panicked is that a step of [Samplers] has panicked. They hold nothing any more, and their floor is 0: what they had is not to
// be relied on. A reader begins again at its floor, with new ones, and without what is to blame.
type Panicked struct {
	About
	*fault.Panic
}

// About is what a step of a sampler is about: the spans of an instance in a message that are added or decided. Its sequence is 0
// if it is about none.
type About struct {
	Seq      uint64
	Instance string
}

// guard does something with the samplers.
func (a *Samplers) guard(about About, do func() error) error {
	if a.parts == nil {
		return nil
	}
	a.held.about = about
	err := fault.Guard(do)
	p, is := errors.AsType[*fault.Panic](err)
	if !is {
		return err
	}
	a.panicked = &Panicked{a.held.about, p}
	a.parts, a.held, a.last = nil, new(held), 0
	return nil
}

// told returns the output of a step that was guarded.
func (a *Samplers) told(out Output) Output {
	if a.parts != nil {
		return out
	}
	out = Output{Rewind: true, Panicked: a.panicked}
	a.panicked = nil
	return out
}

// Broken reports whether the samplers have panicked.
func (a *Samplers) Broken() bool { return a.parts == nil }

// NoAnswer is that policies had no answer about traces because they panicked.
type NoAnswer struct {
	Policies int // all of them; the rest is about the first one
	TraceID  otlpwire.TraceID
	Instance string
	Policy   string
	*fault.Panic
}

func (o *Output) noAnswer(one NoAnswer) {
	if o.NoAnswer != nil {
		o.NoAnswer.Policies += one.Policies
		return
	}
	o.NoAnswer = &one
}

// asked notes that policies have panicked over a trace, if they have.
func (o *Output) asked(id otlpwire.TraceID, in *instance, p *policy.Panicked) {
	if p != nil {
		o.noAnswer(NoAnswer{p.Policies, id, in.name, p.Policy, p.Panic})
	}
}
