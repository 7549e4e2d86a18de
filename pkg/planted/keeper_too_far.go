//go:build bug_keeper_too_far

package planted

func init() { KeeperTooFar = true }
