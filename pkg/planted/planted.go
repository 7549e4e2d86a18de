// Package planted holds bugs on purpose, one behind each build tag: they show that
// `make chaos` and `make chaos-edge` find what they must find (docs/testing.md). Without a tag all are
// off.
package planted

var (
	// AckBeforeExport lets the floor pass a trace when it is decided.
	AckBeforeExport bool // -tags bug_ack_before_export
	// PinKept lets a sink that stops keep its pins.
	PinKept bool // -tags bug_pin_kept
	// DecisionNotLogged sends kept traces without a record of the decision.
	DecisionNotLogged bool // -tags bug_decision_not_logged
	// WallTime closes windows by the sink's clock.
	WallTime bool // -tags bug_wall_time
	// FloorTooHigh lets the floor pass the oldest message that something is owed of.
	FloorTooHigh bool // -tags bug_floor_too_high
	// KeeperTooFar lets the keeper remove one message more than all lanes have finished.
	KeeperTooFar bool // -tags bug_keeper_too_far
	// LaneIgnored makes the keeper believe that the lanes of Loki have finished everything.
	LaneIgnored bool // -tags bug_lane_ignored
	// AnswerBeforeSpool tells senders success when their request is in memory.
	AnswerBeforeSpool bool // -tags bug_answer_before_spool
	// ForwardUnacked lets the spool go of what was sent, not of what was acknowledged.
	ForwardUnacked bool // -tags bug_forward_unacked
	// ForwardSwapped sends a message behind the next one, now and then.
	ForwardSwapped bool // -tags bug_forward_swapped
)
