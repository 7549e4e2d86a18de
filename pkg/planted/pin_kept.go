//go:build bug_pin_kept

package planted

func init() { PinKept = true }
