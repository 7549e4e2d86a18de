package disk

import (
	"errors"
	"os"

	"golang.org/x/sys/windows"
)

// Limits says what this system does not support for a spool; empty for nothing.
const Limits = "Windows does not sync the names in a directory: after a power cut a new file may be missing; it has no boot id by which a power cut could be detected: after every start the spool uses new message ids, and the hub may store a message twice"

// unreadable are the errors for a place that a disk cannot read.
var unreadable = []error{windows.ERROR_CRC, windows.ERROR_IO_DEVICE, windows.ERROR_SECTOR_NOT_FOUND, windows.ERROR_READ_FAULT}

// lock locks a file for this process.
func lock(f *os.File) error {
	err := windows.LockFileEx(windows.Handle(f.Fd()), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, new(windows.Overlapped))
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) {
		return ErrOwned
	}
	return err
}

// SyncData returns when a file is on the disk.
func SyncData(f *os.File) error { return f.Sync() }

// Free returns the bytes that this process may still write to a directory's disk.
func Free(dir string) (int64, error) {
	path, err := windows.UTF16PtrFromString(dir)
	if err != nil {
		return 0, err
	}
	var free uint64
	err = windows.GetDiskFreeSpaceEx(path, &free, nil, nil)
	return int64(free), err
}

// Inode distinguishes a directory from a copy of it: its index on the volume.
func Inode(dir string) (uint64, error) {
	path, err := windows.UTF16PtrFromString(dir)
	if err != nil {
		return 0, err
	}
	h, err := windows.CreateFile(path, 0, windows.FILE_SHARE_READ|windows.FILE_SHARE_WRITE, nil, windows.OPEN_EXISTING, windows.FILE_FLAG_BACKUP_SEMANTICS, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer func() { _ = windows.CloseHandle(h) }()
	var info windows.ByHandleFileInformation
	if err := windows.GetFileInformationByHandle(h, &info); err != nil {
		return 0, err
	}
	return uint64(info.FileIndexHigh)<<32 | uint64(info.FileIndexLow), nil
}

// NoSpace reports whether an error says that the disk, or the user's quota, is full.
func NoSpace(err error) bool {
	return errors.Is(err, windows.ERROR_DISK_FULL) || errors.Is(err, windows.ERROR_HANDLE_DISK_FULL) || errors.Is(err, windows.ERROR_DISK_QUOTA_EXCEEDED)
}

// ReadOnly reports whether an error says that nothing can be written here: the directory does not exist, or
// its disk is read-only.
func ReadOnly(err error) bool {
	return errors.Is(err, windows.ERROR_WRITE_PROTECT) || errors.Is(err, windows.ERROR_DIRECTORY) || errors.Is(err, errNoDirectory)
}

// syncDir does nothing: a directory's handle cannot be flushed.
func syncDir(*os.File) error { return nil }

// keepOwner does nothing: a new file has the rights of its directory.
func keepOwner(string, os.FileInfo) {}
