// Package disk has what files need that must survive a crash: a directory with one
// owner, a file that is replaced as a whole or not at all, a directory's names on the
// disk, and reading around what a disk has lost.
//
// # Not here
//
// What is in the files: package wal, and who keeps a state of its own. What differs
// between systems is in a file for each; what one cannot do is said by [Limits].
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

// ErrOwned reports that a directory has an owner.
var ErrOwned = errors.New("another process is using this directory")

// Lock is the ownership of a directory. It ends with the process, however that ends.
type Lock struct{ file *os.File }

// Own makes the directory, where it is not there, and takes it for this process.
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
			return nil, fmt.Errorf("lock %s: %w; give each process one of its own", dir, err)
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return &Lock{f}, nil
}

// Gone reports whether the directory is not there any more: what is written goes
// into files that nobody can open again.
func (l *Lock) Gone() bool {
	mine, err := l.file.Stat()
	if err != nil {
		return true
	}
	there, err := os.Stat(l.file.Name())
	return err != nil || !os.SameFile(mine, there)
}

// Free gives the directory up.
func (l *Lock) Free() { _ = l.file.Close() }

// suffix is that of a file that is being written.
const suffix = ".tmp"

// WriteSynced replaces a file as a whole or not at all, and returns when it is on the
// disk, name and all.
func WriteSynced(path string, body []byte) error { return Replace(path, body, nil) }

// Replace is WriteSynced with a last word: before is called when the new content is on the
// disk and the file is still the old one. nil for nothing.
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

// Rewrite is WriteSynced on a file that is not ours alone: it keeps its mode and, as far as
// we may, its owner, and a symbolic link stays one. A file that is not there is made for
// its owner alone.
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

// Keep gives a file a second name, in a directory that is made when it is not there. What
// is at the first one may then be replaced. Where files have one name only, it is a copy.
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

// ReadAround reads all of b from offset at on. What the disk does not give back, also
// when it is asked twice, is zeros; bad are the offsets of those places. Zeros is also what
// is behind the end. Bad places are passed over in steps that begin with a block and grow.
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

// errNoDirectory is a file where a directory is wanted.
var errNoDirectory = syscall.ENOTDIR

// MakeDir makes a directory, where it is not there, for its owner alone, and those above
// it. Their names are on the disk then, as far as the directories above may be opened.
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
