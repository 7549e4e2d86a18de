package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
)

func TestOneOwner(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	l, err := Own(dir)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	if _, err := Own(dir); !errors.Is(err, ErrOwned) {
		t.Errorf("second owner: %v", err)
	}
	l.Free()
	if l, err = Own(dir); err != nil {
		t.Fatalf("after the first has gone: %v", err)
	}
	defer l.Free()
	if l.Gone() {
		t.Error("gone, and it is there")
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if !l.Gone() {
		t.Error("removed, and not noticed")
	}
	other, err := Own(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Free()
	if !l.Gone() {
		t.Error("made anew by another, and not noticed")
	}
}

func TestMakeDirOnAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, filepath.Join(file, "below")} {
		if err := MakeDir(path); err == nil {
			t.Errorf("%s was made a directory", path)
		}
	}
}

// TestWriteSynced: the file is the new one or the old one, and nothing else is left.
func TestWriteSynced(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, want := range []string{"one", "another"} {
		if err := WriteSynced(path, []byte(want)); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%q %v", got, err)
		}
	}
	taken := filepath.Join(dir, "taken")
	if err := os.MkdirAll(filepath.Join(taken, "by something"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteSynced(taken, nil); err == nil {
		t.Error("a directory was replaced")
	}
	if all, _ := filepath.Glob(filepath.Join(dir, "*.tmp")); len(all) > 0 {
		t.Errorf("left behind: %v", all)
	}
}

// TestRewrite: the new file has the mode of the old one, and a link is still one.
func TestRewrite(t *testing.T) {
	dir := t.TempDir()
	path, link := filepath.Join(dir, "f"), filepath.Join(dir, "link")
	if err := os.Symlink("f", link); err != nil {
		t.Skip(err)
	}
	for _, want := range []os.FileMode{0o600, 0o644} {
		if err := Rewrite(path, []byte("one")); err != nil {
			t.Fatal(err)
		}
		if err := Rewrite(link, []byte("another")); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode() != want {
			t.Errorf("%v %v, want %v", info.Mode(), err, want)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != "another" {
			t.Errorf("%q %v", got, err)
		}
		if info, err := os.Lstat(link); err != nil || info.Mode()&os.ModeSymlink == 0 {
			t.Errorf("the link is one no longer: %v, %v", info.Mode(), err)
		}
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if all, _ := filepath.Glob(filepath.Join(dir, "*")); len(all) != 2 {
		t.Errorf("left behind: %v", all)
	}
}

// TestKeep: the file is there twice, also where it can have one name only.
func TestKeep(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{path, "/proc/version"} { // the second is on another file system
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		as := filepath.Join(t.TempDir(), "new", "g")
		if err := Keep(path, as); err != nil {
			t.Error(err)
		}
		if got, err := os.ReadFile(as); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%q %v", got, err)
		}
	}
}

// badDisk gives back all but the places that are bad, those that are bad once only when
// it is asked again.
type badDisk struct {
	content []byte
	bad     map[int64]bool // by block of 512 bytes
	once    map[int64]bool
	err     error
}

func (d badDisk) ReadAt(b []byte, at int64) (n int, err error) {
	for n < len(b) {
		if at+int64(n) >= int64(len(d.content)) {
			return n, io.EOF
		}
		block := (at + int64(n)) / 512
		if d.bad[block] || d.once[block] {
			delete(d.once, block)
			return n, fmt.Errorf("read: %w", d.err)
		}
		b[n] = d.content[at+int64(n)]
		n++
	}
	return n, nil
}

// TestReadAround: of a disk with bad places everything else is read.
func TestReadAround(t *testing.T) {
	content := bytes.Repeat([]byte{1}, 3<<20)
	for _, e := range unreadable {
		d := badDisk{content, map[int64]bool{100: true, 4000: true}, map[int64]bool{10: true, 11: true, 5000: true}, e}
		const at = 300
		got := bytes.Repeat([]byte{2}, len(content)-at)
		bad, err := ReadAround(d, got, at)
		if err != nil || !slices.Equal(bad, []int64{100 * 512, 4000 * 512}) {
			t.Errorf("%v: bad at %v, %v", e, bad, err)
		}
		gone := 0
		for i, c := range got {
			block := int64(i+at) / 4096
			switch {
			case c == 1:
			case c == 0 && (block == 100*512/4096 || block == 4000*512/4096):
				gone++
			default:
				t.Fatalf("%v: byte %d is %d", e, i, c)
			}
		}
		if gone == 0 || gone > 2*4096 {
			t.Errorf("%v: %d bytes are gone", e, gone)
		}
	}
	// A disk that is dead is not asked for every block.
	all := map[int64]bool{}
	for i := range int64(3 << 20 / 512) {
		all[i] = true
	}
	if bad, err := ReadAround(badDisk{content, all, nil, syscall.EIO}, make([]byte, len(content)), 0); err != nil || len(bad) > 20 {
		t.Errorf("%d times asked, %v", len(bad), err)
	}
	got := []byte{2, 2, 2}
	if bad, err := ReadAround(badDisk{content: []byte{1}}, got, 0); err != nil || len(bad) > 0 || !bytes.Equal(got, []byte{1, 0, 0}) {
		t.Errorf("behind the end: %v %d %v", got, bad, err)
	}
	if _, err := ReadAround(badDisk{content, all, nil, syscall.EACCES}, got, 0); !errors.Is(err, syscall.EACCES) {
		t.Errorf("another error: %v", err)
	}
}
