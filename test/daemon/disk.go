package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
)

// Disk is a tmpfs that a test can fill. It needs root.
type Disk struct{ Dir string }

// NewDisk mounts one of a size, such as 64m, on dir, which it makes.
func NewDisk(dir, size string) (*Disk, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return &Disk{dir}, syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size)
}

// Fill takes the rest of the disk until free.
func (d *Disk) Fill() (free func() error, err error) {
	path := filepath.Join(d.Dir, "stranger")
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	for buf := make([]byte, 64<<10); err == nil; _, err = f.Write(buf) {
	}
	if !errors.Is(err, syscall.ENOSPC) {
		return nil, errors.Join(err, f.Close())
	}
	return func() error { return errors.Join(f.Close(), os.Remove(path)) }, nil
}

// Close unmounts it, also while files are open.
func (d *Disk) Close() { _ = syscall.Unmount(d.Dir, syscall.MNT_DETACH) }
