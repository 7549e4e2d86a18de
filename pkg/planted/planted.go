// Package planted holds bugs on purpose, one behind each build tag: they show that
// `make chaos` finds what it must find (docs/testing.md). Without a tag all are
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
)
