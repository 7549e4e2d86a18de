package disk

import (
	"errors"
	"os"
	"syscall"
)

// Limits says what this system does not support for a spool; empty for nothing.
const Limits = ""

// unreadable are the errors for a place that a disk cannot read.
var unreadable = []error{syscall.EIO, syscall.EUCLEAN, syscall.EBADMSG}

func lock(f *os.File) error { return flock(f) }

// SyncData returns when data and size of a file are on the disk.
func SyncData(f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var syncErr error
	if err := conn.Control(func(fd uintptr) {
		for {
			if syncErr = syscall.Fdatasync(int(fd)); !errors.Is(syncErr, syscall.EINTR) {
				return
			}
		}
	}); err != nil {
		return err
	}
	return os.NewSyscallError("fdatasync", syncErr)
}
