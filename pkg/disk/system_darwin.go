package disk

import (
	"os"
	"syscall"
)

// Limits says what this system does not support for a spool; empty for nothing.
const Limits = "macOS has no boot id by which a power cut could be detected: after every start the spool uses new message ids, and the hub may store a message twice"

// unreadable are the errors for a place that a disk cannot read.
var unreadable = []error{syscall.EIO, syscall.EBADMSG}

func lock(f *os.File) error { return flock(f) }

// SyncData returns when a file is on the disk (F_FULLFSYNC).
func SyncData(f *os.File) error { return f.Sync() }
