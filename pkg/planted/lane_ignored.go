//go:build bug_lane_ignored

package planted

func init() { LaneIgnored = true }
