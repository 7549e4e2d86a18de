package disk

import (
	"os"
	"syscall"
)

// Limits is what this system cannot do for a spool; empty where it can do all.
const Limits = "macOS has no boot id to tell a power cut by: after every start the spool gives out new message ids, and the hub may store a message twice"

// unreadable are what a disk says of a place that it cannot give back.
var unreadable = []error{syscall.EIO, syscall.EBADMSG}

func lock(f *os.File) error { return flock(f) }

// SyncData returns when a file is on the disk (F_FULLFSYNC).
func SyncData(f *os.File) error { return f.Sync() }
