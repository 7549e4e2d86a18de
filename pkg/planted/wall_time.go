//go:build bug_wall_time

package planted

func init() { WallTime = true }
