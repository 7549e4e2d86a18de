package wal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestTornWrites cuts the file behind the last whole record, at every byte.
func TestTornWrites(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), MaxBytes: 16 << 20}
	path := written(t, cfg, 3, 10)[0]
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	kept, size := 0, 0
	cfg.Keep = func(path string) error {
		if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, whole[:size]) {
			t.Errorf("kept is not what was found, of %d bytes: %v", size, err)
		}
		kept++
		return nil
	}
	for size = range whole {
		if err := os.WriteFile(path, whole[:size], 0o600); err != nil {
			t.Fatal(err)
		}
		l, report := open(t, cfg)
		n := uint64(report.Records)
		if got, missing := read(t, l, 1, 10); !slices.Equal(got, row(1, n)) || missing > 0 || n > 2 {
			t.Fatalf("%d bytes: read %v, missing %d; %+v", size, got, missing, report)
		}
		fill(t, l, n+1, n+2, 10)
		_ = l.Close()
		if _, again := open(t, cfg); again.Records != int(n)+2 || len(again.Damage)+len(again.Missing) > 0 || again.Torn != "" {
			t.Fatalf("%d bytes, opened again: %+v", size, again)
		}
		for _, p := range files(t, cfg.Dir) {
			_ = os.Remove(p)
		}
	}
	if kept == 0 {
		t.Error("no torn file was kept")
	}
}

// TestHeaders sets every bit of a segment's header: the records are there all the same.
func TestHeaders(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), MaxBytes: 16 << 20}
	path := written(t, cfg, 3, 10)[0]
	for bit := range segmentHead * 8 {
		edit(t, path, func(b []byte) []byte { b[bit/8] ^= 1 << (bit % 8); return b })
		l, report := open(t, cfg)
		if got, _ := read(t, l, 1, 10); !slices.Equal(got, row(1, 3)) || len(report.Damage) != 1 {
			t.Errorf("bit %d: %v %+v", bit, got, report)
		}
		_ = l.Close()
	}
	// A segment under another's name has none of its records.
	if err := os.Rename(path, filepath.Join(cfg.Dir, segmentName(4))); err != nil {
		t.Fatal(err)
	}
	if _, report := open(t, cfg); report.Records != 0 || len(report.Damage) == 0 {
		t.Errorf("%+v", report)
	}
}

// TestLengths sets every bit of a record's head while the log is open: a length that
// leads beyond the end is damage, and no wait for more.
func TestLengths(t *testing.T) {
	l, _ := open(t, Config{Dir: t.TempDir(), MaxBytes: 16 << 20})
	fill(t, l, 1, 3, 10)
	path := files(t, l.cfg.Dir)[0]
	second := segmentHead + recordHead + len(body(1, 10))
	for bit := range recordHead * 8 {
		flip := func(b []byte) []byte { b[second+bit/8] ^= 1 << (bit % 8); return b }
		edit(t, path, flip)
		if got, missing := read(t, l, 1, 10); !slices.Equal(got, []uint64{1, 3}) || missing != 1 {
			t.Errorf("bit %d: read %v, missing %d", bit, got, missing)
		}
		edit(t, path, flip)
	}
	edit(t, path, func(b []byte) []byte { return b[:len(b)-1] })
	if got, missing := read(t, l, 1, 10); !slices.Equal(got, []uint64{1, 2}) || missing != 1 {
		t.Errorf("the end is gone: read %v, missing %d", got, missing)
	}
	fill(t, l, 4, 4, 10)
	if got, missing := read(t, l, 1, 10); !slices.Equal(got, []uint64{1, 2, 4}) || missing != 1 {
		t.Errorf("and it goes on: read %v, missing %d", got, missing)
	}
}

// damages are what disks do. Each returns how many records are gone at the most.
var damages = map[string]func(t *testing.T, dir string, rnd *rand.Rand) int{
	"bit": func(t *testing.T, dir string, rnd *rand.Rand) int {
		edit(t, pick(t, dir, rnd), func(b []byte) []byte { b[rnd.IntN(len(b))] ^= 1 << rnd.IntN(8); return b })
		return 1
	},
	"zeros": func(t *testing.T, dir string, rnd *rand.Rand) int {
		edit(t, pick(t, dir, rnd), func(b []byte) []byte { at := rnd.IntN(len(b)); clear(b[at:min(at+4096, len(b))]); return b })
		return 6 // of more than 1000 bytes
	},
	"garbage": func(t *testing.T, dir string, rnd *rand.Rand) int {
		edit(t, pick(t, dir, rnd), func(b []byte) []byte {
			at := rnd.IntN(len(b))
			for i := at; i < min(at+3000, len(b)); i++ {
				b[i] = byte(rnd.Uint32())
			}
			return b
		})
		return 4
	},
	"cut": func(t *testing.T, dir string, rnd *rand.Rand) int {
		lost := 0
		edit(t, pick(t, dir, rnd), func(b []byte) []byte {
			keep := rnd.IntN(len(b))
			lost = (len(b)-keep)/1000 + 1
			return b[:keep]
		})
		return lost
	},
	"all zeros": func(t *testing.T, dir string, rnd *rand.Rand) int {
		lost := 0
		edit(t, pick(t, dir, rnd), func(b []byte) []byte { clear(b); lost = len(b) / 1000; return b })
		return lost
	},
	"file gone": func(t *testing.T, dir string, rnd *rand.Rand) int {
		path := pick(t, dir, rnd)
		info, err := os.Stat(path)
		if err == nil {
			err = os.Remove(path)
		}
		if err != nil {
			t.Fatal(err)
		}
		return int(info.Size() / 1000)
	},
}

func pick(t *testing.T, dir string, rnd *rand.Rand) string {
	all := files(t, dir)
	return all[rnd.IntN(len(all))]
}

func edit(t *testing.T, path string, do func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, do(b), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestDamage damages a log in all ways, once while it is open and once while it is
// closed: what is whole is read in order, what is not is counted, once.
func TestDamage(t *testing.T) {
	const records, size = 3000, 1000
	pristine := t.TempDir()
	written(t, Config{Dir: pristine, MaxBytes: 16 << 20}, records, size)
	for name, damage := range damages {
		for seed := range uint64(12) {
			t.Run(fmt.Sprintf("%s/%d", name, seed), func(t *testing.T) {
				for _, isOpen := range []bool{true, false} {
					dir := filepath.Join(t.TempDir(), "log")
					if err := os.CopyFS(dir, os.DirFS(pristine)); err != nil {
						t.Fatal(err)
					}
					kept := 0
					cfg := Config{Dir: dir, MaxBytes: 16 << 20, Next: records + 1, Keep: func(string) error { kept++; return nil }}
					rnd := rand.New(rand.NewPCG(seed, 1))
					if isOpen {
						l, _ := open(t, cfg)
						most := damage(t, dir, rnd)
						got, missing := read(t, l, 1, size)
						if len(got)+int(missing) != records || int(missing) > most || !slices.IsSorted(got) {
							t.Errorf("while open: %d read, %d missing of %d, at most %d", len(got), missing, records, most)
						}
						continue
					}
					most := damage(t, dir, rnd)
					l, report := open(t, cfg)
					got, missing := read(t, l, 1, size)
					lost := records - len(got)
					told := int(l.State().First - 1 + records - l.State().Last) // at either end
					for _, m := range report.Missing {
						told += int(m.To + 1 - m.From)
					}
					if lost != told || lost > most || missing > 0 || !slices.IsSorted(got) {
						t.Errorf("%d read of %d, at most %d gone; %d told, %d missing still: %+v", len(got), records, most, told, missing, report)
					}
					all := files(t, dir)
					if report.Torn != "" && report.Torn != all[len(all)-1] {
						t.Errorf("%s is torn, and it is not the youngest", report.Torn)
					}
					if atEnd := l.State().Last < records; kept == 0 && lost > 0 && name != "file gone" && !atEnd && name != "cut" {
						t.Error("the damaged file was not kept")
					}
					fill(t, l, records+1, records+2, size)
					_ = l.Close()
					cfg.Next = 0
					l, report = open(t, cfg)
					if len(report.Damage)+len(report.Missing) > 0 || report.Torn != "" || l.State().Last != records+2 {
						t.Errorf("opened again: %+v, %+v", report, l.State())
					}
					again, missing := read(t, l, 1, size)
					if !slices.Equal(again, append(got, records+1, records+2)) || missing > 0 {
						t.Errorf("opened again: %d read, %d missing", len(again), missing)
					}
				}
			})
		}
	}
}

// TestADiskThatDoesNotTakeTheMending: the log is read as it is, and says what is missing.
func TestADiskThatDoesNotTakeTheMending(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), MaxBytes: 16 << 20}
	edit(t, written(t, cfg, 10, 100)[0], func(b []byte) []byte { b[segmentHead+3*(recordHead+len(body(1, 100)))] ^= 1; return b })
	cfg.Keep = func(string) error { return errors.New("no space left on device") }
	l, _ := open(t, cfg)
	if _, err := l.Append(nil); err == nil || !strings.Contains(err.Error(), "no space") {
		t.Errorf("appended: %v", err)
	}
	if got, missing := read(t, l, 1, 100); !slices.Equal(got, []uint64{1, 2, 3, 5, 6, 7, 8, 9, 10}) || missing != 1 {
		t.Errorf("read %v, missing %d", got, missing)
	}
}

// TestADiskThatIsAwayForAMoment: what cannot be read is not given up at once, and kept when
// it is.
func TestADiskThatIsAwayForAMoment(t *testing.T) {
	kept := 0
	l, _ := open(t, Config{Dir: t.TempDir(), MaxBytes: 16 << 20, Keep: func(string) error { kept++; return nil }})
	fill(t, l, 1, 5, 10)
	whole := l.read
	away := func(_ io.ReaderAt, b []byte, at int64) ([]int64, error) { clear(b); return []int64{at}, nil }
	l.read = away
	for range 3 {
		r := l.Read(1)
		if rec, err := r.Next(t.Context()); !errors.Is(err, ErrUnreadable) {
			t.Errorf("%+v %v", rec, err)
		}
		r.Close()
	}
	l.read = whole
	if got, missing := read(t, l, 1, 10); !slices.Equal(got, row(1, 5)) || missing > 0 || kept > 0 {
		t.Errorf("read %v, missing %d, kept %d", got, missing, kept)
	}
	l.patience = 0
	for i := range 2 { // a moment once more is not long, however long ago the last was
		l.read = away
		if rec, err := l.Read(1).Next(t.Context()); !errors.Is(err, ErrUnreadable) {
			t.Errorf("time %d: %+v %v", i, rec, err)
		}
		l.read = whole
		if got, missing := read(t, l, 1, 10); !slices.Equal(got, row(1, 5)) || missing > 0 {
			t.Errorf("time %d: read %v, missing %d", i, got, missing)
		}
	}
	l.read = away
	if _, err := l.Read(1).Next(t.Context()); !errors.Is(err, ErrUnreadable) || kept > 0 {
		t.Errorf("kept %d: %v", kept, err)
	}
	if got, missing := read(t, l, 1, 10); len(got) > 0 || missing != 5 || kept != 1 {
		t.Errorf("read %v, missing %d, kept %d", got, missing, kept)
	}
}

// TestBadSectors: what is read of their file before them, or of another of them, is no sign
// that the disk gives back what it did not.
func TestBadSectors(t *testing.T) {
	const n, size = 30, 20 << 10
	l, _ := open(t, Config{Dir: t.TempDir(), MaxBytes: 16 << 20})
	fill(t, l, 1, n, size)
	whole := l.read
	l.read = func(f io.ReaderAt, b []byte, at int64) (bad []int64, err error) {
		bad, err = whole(f, b, at)
		for _, sector := range []int64{300 << 10, 570 << 10} { // not in one chunk
			if at <= sector && sector < at+int64(len(b)) {
				b[sector-at] ^= 1
				bad = append(bad, sector)
			}
		}
		return bad, err
	}
	try := func() (err error) {
		r := l.Read(1)
		defer r.Close()
		for seq := uint64(0); seq < n && err == nil; {
			var rec Record
			rec, err = r.Next(t.Context())
			seq = rec.Seq
		}
		return err
	}
	for range 3 {
		if err := try(); !errors.Is(err, ErrUnreadable) {
			t.Fatal(err)
		}
	}
	l.patience = 0
	if got, missing := read(t, l, 1, size); len(got) != n-2 || missing != 2 {
		t.Errorf("read %v, missing %d", got, missing)
	}
}

// TestFilesThatCannotBeOpened are left alone: somebody may mend that.
func TestFilesThatCannotBeOpened(t *testing.T) {
	for name, youngest := range map[string]bool{segmentName(1): false, segmentName(9): true} {
		cfg := Config{Dir: t.TempDir(), MaxBytes: 16 << 20, Next: 5}
		l, _ := open(t, cfg)
		fill(t, l, 5, 6, 10)
		_ = l.Close()
		path := filepath.Join(cfg.Dir, name)
		if err := os.Mkdir(path, 0o700); err != nil { // what is no file cannot be read
			t.Fatal(err)
		}
		if _, _, err := Open(cfg); err == nil {
			t.Errorf("youngest %v: opened", youngest)
		}
		if len(files(t, cfg.Dir)) != 2 {
			t.Errorf("youngest %v: left is %v", youngest, files(t, cfg.Dir))
		}
	}
}

// TestNothingLeftOfASegment: it is put aside, and what comes next has a file of the right
// name, so that it is found again.
func TestNothingLeftOfASegment(t *testing.T) {
	const size = 300 << 10 // three a segment
	for _, tc := range []struct {
		what   string
		which  []int // of the segments
		cut    int   // to this many bytes
		before []uint64
	}{
		{"the youngest", []int{2}, 30, row(1, 6)},
		{"the youngest two", []int{1, 2}, 30, row(1, 3)},
		{"the middle one", []int{1}, 10, []uint64{1, 2, 3, 7, 8, 9}},
		{"all", []int{0, 1, 2}, 0, nil},
	} {
		for _, refuse := range []bool{false, true} {
			cfg := Config{Dir: t.TempDir(), MaxBytes: 16 << 20}
			all := written(t, cfg, 9, size)
			if len(all) != 3 {
				t.Fatalf("%v: the test wants three segments", all)
			}
			for _, i := range tc.which {
				edit(t, all[i], func(b []byte) []byte { return b[:tc.cut] })
			}
			cfg.Keep = func(string) error {
				if refuse {
					return errors.New("no space left on device")
				}
				return nil
			}
			l, _ := open(t, cfg)
			got, _ := read(t, l, 1, size)
			if !slices.Equal(got, tc.before) {
				t.Errorf("%s: read %v", tc.what, got)
			}
			if s := l.State(); s.Bytes < 0 || s.Bytes > 9*(size+100) {
				t.Errorf("%s: %+v", tc.what, s)
			}
			if _, err := l.Append(); refuse != (err != nil) && tc.cut > 0 {
				t.Errorf("%s: appended: %v", tc.what, err)
			}
			if refuse {
				want := 3
				if tc.cut == 0 {
					want = 2 // the youngest, empty, is one that was not written before a crash
				}
				if err := l.Release(0); err != nil || len(files(t, cfg.Dir)) != want {
					t.Errorf("%s: nothing was released, and left is %v, %v", tc.what, files(t, cfg.Dir), err)
				}
				continue
			}
			_ = l.Close()
			l, report := open(t, cfg)
			last := l.State().Last
			if report.Records != len(tc.before)+1 || len(report.Damage)+len(report.Missing) > 0 {
				t.Errorf("%s, opened again: %+v", tc.what, report)
			}
			if err := l.Release(last - 1); err != nil {
				t.Fatal(err)
			}
			_ = l.Close()
			l, _ = open(t, cfg)
			if s := l.State(); s.Last != last || s.First > last {
				t.Errorf("%s, the last record is gone: %+v", tc.what, s)
			}
		}
	}
}

// TestVersions: what another version has written is left alone.
func TestVersions(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), MaxBytes: 16 << 20}
	path := written(t, cfg, 1, 10)[0]
	edit(t, path, func(b []byte) []byte { le.PutUint32(b[8:], 2); le.PutUint32(b[12:], headSum(b)); return b })
	before, _ := os.ReadFile(path)
	if _, _, err := Open(cfg); !errors.Is(err, ErrVersion) {
		t.Error(err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("the file was changed")
	}
}

// FuzzOpen opens a log with a segment of any bytes: no panic, and what it makes of it is
// sound.
func FuzzOpen(f *testing.F) {
	b := appendHead(nil, 1)
	f.Add(appendRecord(appendRecord(b, 1, 0, []byte("a")), 3, 1, []byte("b")), true)
	f.Add(append(appendRecord(b, 7, 6), make([]byte, 100)...), false)
	f.Fuzz(func(t *testing.T, content []byte, youngest bool) {
		cfg := Config{Dir: t.TempDir(), MaxBytes: 16 << 20}
		if err := os.WriteFile(filepath.Join(cfg.Dir, segmentName(1)), content, 0o600); err != nil {
			t.Fatal(err)
		}
		if !youngest {
			next := appendRecord(appendHead(nil, 1<<40), 1<<40, 0, []byte("c"))
			if err := os.WriteFile(filepath.Join(cfg.Dir, segmentName(1<<40)), next, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		l, report, err := Open(cfg)
		if err != nil {
			return
		}
		if _, err := l.Append([]byte("d")); err != nil {
			t.Fatal(err)
		}
		_ = l.Close()
		l, again := open(t, cfg)
		if again.Records != report.Records+1 || len(again.Damage)+len(again.Missing) > 0 || again.Torn != "" {
			t.Fatalf("first %+v, then %+v", report, again)
		}
		r := l.Read(1)
		defer r.Close()
		for n := range again.Records {
			if rec, err := r.Next(t.Context()); err != nil || rec.Missing > 0 {
				t.Fatalf("record %d of %d: %+v %v", n, again.Records, rec, err)
			}
		}
	})
}
