//go:build bug_floor_too_high

package planted

func init() { FloorTooHigh = true }
