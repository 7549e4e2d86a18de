// Package disk has what is needed for files that must survive a crash: a directory with one owner, atomic
// replacement of a file, syncing the names in a directory, and reading around unreadable places.
//
// # Not here
//
// The content of the files: package wal, and the packages with their own state. Differences between systems
// are in one file for each system; [Limits] says what a system does not support.
package disk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// ErrOwned reports that a directory has an owner already.
var ErrOwned = errors.New("another process is using this directory")

// Lock is the ownership of a directory. It ends with the process, however the process ends.
type Lock struct{ file *os.File }

// Own creates the directory if necessary, and makes this process its owner.
func Own(dir string) (*Lock, error) {
	if err := MakeDir(dir); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "LOCK"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if err := lock(f); err != nil {
		_ = f.Close()
		if errors.Is(err, ErrOwned) {
			return nil, fmt.Errorf("lock %s: %w; give each process its own directory", dir, err)
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return &Lock{f}, nil
}

// Gone reports whether the directory has been removed: then writes go into files that cannot be opened
// again.
func (l *Lock) Gone() bool {
	mine, err := l.file.Stat()
	if err != nil {
		return true
	}
	there, err := os.Stat(l.file.Name())
	return err != nil || !os.SameFile(mine, there)
}

// Free releases the directory.
func (l *Lock) Free() { _ = l.file.Close() }

// suffix is the suffix of a file that is being written.
const suffix = ".tmp"

// WriteSynced replaces a file atomically, and returns when its content and its name are on the disk.
func WriteSynced(path string, body []byte) error { return Replace(path, body, nil) }

// Replace is WriteSynced that calls before, if not nil, when the new content is on the disk and the file is
// still the old one.
func Replace(path string, body []byte, before func() error) error {
	tmp := path + suffix
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(body)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil && before != nil {
		err = before()
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// Rewrite is WriteSynced for a file that others use, too: it keeps the mode and, if permitted, the
// owner, and a symbolic link stays one. A new file is accessible only to its owner.
func Rewrite(path string, body []byte) error {
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	}
	old, err := os.Stat(path)
	if err != nil {
		return WriteSynced(path, body)
	}
	return Replace(path, body, func() error {
		keepOwner(path+suffix, old)
		return os.Chmod(path+suffix, old.Mode().Perm())
	})
}

// Keep gives a file a second name, in a directory that is created if necessary, so that the first name can
// be reused. Where hard links are not supported, it makes a copy.
func Keep(path, as string) error {
	if err := MakeDir(filepath.Dir(as)); err != nil {
		return err
	}
	err := os.Link(path, as)
	if err == nil {
		return SyncDir(filepath.Dir(as))
	}
	body, readErr := os.ReadFile(path)
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	return WriteSynced(as, body)
}

// ReadAround reads all of b from offset at on. Places that cannot be read in two attempts are
// zeros; bad has their offsets. Beyond the end of the file there are zeros, too. Bad places are
// skipped in steps that begin with a block and grow.
func ReadAround(f io.ReaderAt, b []byte, at int64) (bad []int64, err error) {
	const block, farthest = 4 << 10, 1 << 20
	step := int64(block)
	for again := false; len(b) > 0; {
		n, err := f.ReadAt(b, at)
		if n > 0 {
			b, at, again, step = b[n:], at+int64(n), false, block
		}
		switch {
		case err == nil || len(b) == 0:
		case errors.Is(err, io.EOF):
			clear(b)
			return bad, nil
		case !slices.ContainsFunc(unreadable, func(e error) bool { return errors.Is(err, e) }):
			return bad, err
		case !again:
			again = true
		default:
			n := min(at/step*step+step-at, int64(len(b)))
			clear(b[:n])
			bad = append(bad, at)
			b, at, again, step = b[n:], at+n, false, min(2*step, farthest)
		}
	}
	return bad, nil
}

// errNoDirectory is a file where a directory is expected.
var errNoDirectory = syscall.ENOTDIR

// MakeDir creates a directory and its parents, if they do not exist, accessible only to their owner. Their
// names are on the disk afterwards, as far as the directories above them may be opened.
func MakeDir(path string) error {
	info, err := os.Stat(path)
	if err == nil && !info.IsDir() {
		return &os.PathError{Op: "mkdir", Path: path, Err: errNoDirectory}
	}
	if err == nil || !errors.Is(err, os.ErrNotExist) {
		return err
	}
	above := filepath.Dir(path)
	if err := MakeDir(above); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := SyncDir(above); err != nil && !errors.Is(err, os.ErrPermission) {
		return err
	}
	return nil
}

// SyncDir returns when the names in a directory are on the disk.
func SyncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(syncDir(dir), dir.Close())
}
