package disk

import (
	"errors"
	"os"
	"syscall"
)

// Limits is what this system cannot do for a spool; empty where it can do all.
const Limits = ""

// unreadable are what a disk says of a place that it cannot give back.
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
