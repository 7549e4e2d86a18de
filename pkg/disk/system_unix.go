//go:build unix

package disk

import (
	"errors"
	"os"
	"syscall"
)

// flock locks a file for this process.
func flock(f *os.File) error {
	err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return ErrOwned
	}
	return err
}

// Free returns the bytes that this process may still write to a directory's disk.
func Free(dir string) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * int64(st.Bsize), nil //nolint:unconvert // other types on other systems
}

// Inode distinguishes a directory from a copy of it.
func Inode(dir string) (uint64, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(dir, &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}

// NoSpace reports whether an error says that the disk, or the user's quota, is full.
func NoSpace(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// ReadOnly reports whether an error says that nothing can be written here: the directory does not exist, or
// its disk is read-only.
func ReadOnly(err error) bool {
	return errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.EROFS)
}

func syncDir(dir *os.File) error { return dir.Sync() }

// keepOwner gives a file the owner of another one, if permitted.
func keepOwner(path string, of os.FileInfo) {
	if st, is := of.Sys().(*syscall.Stat_t); is {
		_ = os.Chown(path, int(st.Uid), int(st.Gid))
	}
}
