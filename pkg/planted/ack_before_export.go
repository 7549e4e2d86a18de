//go:build bug_ack_before_export

package planted

func init() { AckBeforeExport = true }
