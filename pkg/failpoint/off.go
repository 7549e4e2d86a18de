//go:build !failpoints

package failpoint

// The bugs, with their names in PENSTOCK_FAILPOINTS.
const (
	AckBeforeExport   = false // ack_before_export: the floor passes a trace when it is decided
	PinKept           = false // pin_kept: a sink that stops keeps its pins
	DecisionNotLogged = false // decision_not_logged: kept traces are sent without a record of the decision
	WallTime          = false // wall_time: windows close by the sink's clock
	DomainsIgnored    = false // domains_ignored: each instance is a domain by itself
	OneClock          = false // one_clock: all sources of an instance have one clock
	RescueNotRecorded = false // rescue_not_recorded: late spans are sent with what was not kept, without a record of that
	FloorTooHigh      = false // floor_too_high: the floor passes the oldest message that is owed
	KeeperTooFar      = false // keeper_too_far: the keeper removes one message more than all lanes have finished
	LaneIgnored       = false // lane_ignored: the keeper assumes that the lanes of Loki have finished everything
	AnswerBeforeSpool = false // answer_before_spool: success is returned when a request is only in memory
	ForwardUnacked    = false // forward_unacked: the spool drops what was sent, not what was acknowledged
	AsideForgotten    = false // aside_forgotten: what comes of an instance that is set aside is not stored, and the floor passes it
	BackTooSoon       = false // back_too_soon: an instance that was set aside is back in its lane while data of it is left
	ForwardSwapped    = false // forward_swapped: occasionally a message is sent after the next one
)

// Clock is by how much an edge's clock is wrong: PENSTOCK_CLOCK, such as -40s.
const Clock = 0

// Point is a place at which the process can be killed.
func Point(string) {}

// During is a Point within the operation that follows.
func During(string) {}
