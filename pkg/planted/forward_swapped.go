//go:build bug_forward_swapped

package planted

func init() { ForwardSwapped = true }
