package sampler

import (
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Export is spans of one instance to be sent to the backend: all that a trace has of it, or late spans of
// one that was kept.
type Export struct {
	Instance string
	Spans    int
	Seq      uint64 // the lowest sequence of its spans; owed until Release
	Policy   string // that kept it
	Late     bool   // spans that came after the decision
	Rescued  bool   // spans that were not kept at first: owed with their rescue, not by Release
	Further  bool   // of a trace that the export before has spans of, too, of another instance
	// Threshold is what the decision adds to the spans' trace state.
	Threshold uint64
	// Parts are its spans by message.
	Parts []Part

	pieces []otlpwire.Fragment
}

// Size returns the bytes that Append appends.
func (e *Export) Size() (n int) {
	for i := range e.pieces {
		n += e.pieces[i].Size()
	}
	return n
}

// Append appends the spans as a payload. They share resources with other exports
// until then.
func (e *Export) Append(dst []byte) []byte {
	for i := range e.pieces {
		dst = e.pieces[i].Append(dst)
	}
	return dst
}

// Part is how many spans of a trace a message had.
type Part struct {
	Seq   uint64
	Spans int
}

// Ended is spans that are finished without an export.
type Ended struct {
	Part
	Instance string
	How      How
}

// How spans are finished without an export.
type How uint8

// The reasons.
const (
	NotKept  How = iota // their trace is not kept
	Repeated            // the same spans are held, or were handled
	Sent                // a previous owner has sent them
	NotAsked            // their trace was not asked for
)

// Output is the result of a step.
type Output struct {
	// Ended are the spans that are finished by this step, or, with NotKept and NotAsked, once Decisions are recorded.
	Ended      []Ended
	Exports    []Export
	Decisions  []envelope.Decision // to be recorded before anything is exported or released
	Sources    []envelope.Sources  // to be recorded with Decisions
	By         []string            // for every decision the policy that made it, "" for none
	SampledOut int                 // spans of traces that were not kept
	Duplicates int                 // spans that were already held
	TooLarge   int                 // traces dropped because of their size
	// Rescues are traces whose earlier spans are to be read again, once Decisions are recorded: for a [Rescuer], and
	// then [Sampler.Rescued].
	Rescues   []envelope.Decision
	Rescued   int       // traces that late spans have turned to kept
	TooLate   int       // traces that they would have, but the earlier spans are too far back
	OverLimit int       // or so many are rescued already
	Unordered int       // frames of a domain that did not wait longer for the routers of its other instances
	NoAnswer  *NoAnswer // policies that panicked; nil: none did
	// Full: there is no room for new traces.
	Full bool
	// Rewind: there is room again. Traces above the floor have been passed over: what is decided must be
	// recorded and exported, and then a new sampler begins at the floor.
	Rewind bool
	// Panicked, if not nil: the step has panicked, and there is nothing else of it but Rewind.
	Panicked *Panicked
}
