//go:build bug_forward_unacked

package planted

func init() { ForwardUnacked = true }
