//go:build !failpoints

package failpoint

// The bugs, by what they are called in PENSTOCK_FAILPOINTS.
const (
	AckBeforeExport   = false // ack_before_export: the floor passes a trace when it is decided
	PinKept           = false // pin_kept: a sink that stops keeps its pins
	DecisionNotLogged = false // decision_not_logged: kept traces are sent without a record of the decision
	WallTime          = false // wall_time: windows close by the sink's clock
	FloorTooHigh      = false // floor_too_high: the floor passes the oldest message that something is owed of
	KeeperTooFar      = false // keeper_too_far: the keeper removes one message more than all lanes have finished
	LaneIgnored       = false // lane_ignored: the keeper believes that the lanes of Loki have finished everything
	AnswerBeforeSpool = false // answer_before_spool: senders are told success when their request is in memory
	ForwardUnacked    = false // forward_unacked: the spool drops what was sent, not what was acknowledged
	ForwardSwapped    = false // forward_swapped: now and then a message is sent after the next one
)

// Point is a place at which the process can be killed.
func Point(string) {}

// During is a Point within what comes next.
func During(string) {}
