package wal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// body is what record n holds: of size bytes, and like no other.
func body(n uint64, size int) []byte {
	return append(fmt.Appendf(nil, "record %d ", n), bytes.Repeat([]byte{byte(n)*2 + 1}, size)...)
}

func open(t testing.TB, cfg Config) (*Log, Report) {
	t.Helper()
	l, report, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l, report
}

func fill(t testing.TB, l *Log, from, to uint64, size int) {
	t.Helper()
	for n := from; n <= to; n++ {
		b := body(n, size)
		seq, err := l.Append(b[:4], b[4:])
		if err != nil || seq != n {
			t.Fatalf("appended record %d as %d: %v", n, seq, err)
		}
	}
}

// read returns the sequences that the log gives from one on, and how many it says are
// missing. It wants every body to be right.
func read(t testing.TB, l *Log, from uint64, size int) (seqs []uint64, missing uint64) {
	t.Helper()
	r := l.Read(from)
	defer r.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for last := l.State().Last; from <= last; {
		rec, err := r.Next(ctx)
		if err != nil {
			t.Fatalf("after %v: %v", seqs, err)
		}
		if rec.Missing > 0 {
			missing += rec.Missing
		} else {
			if !bytes.Equal(rec.Body, body(rec.Seq, size)) {
				t.Fatalf("record %d is %.40q", rec.Seq, rec.Body)
			}
			if rec.Behind != last-rec.Seq {
				t.Fatalf("record %d of %d has %d behind it", rec.Seq, last, rec.Behind)
			}
			seqs = append(seqs, rec.Seq)
		}
		from = rec.Seq + 1
	}
	return seqs, missing
}

func row(from, to uint64) (all []uint64) {
	for ; from <= to; from++ {
		all = append(all, from)
	}
	return all
}

func files(t testing.TB, dir string) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, "*"+suffix))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestKeepsWhatWasAppended appends, opens anew and reads, with small records and with
// large ones, in one segment and in many.
func TestKeepsWhatWasAppended(t *testing.T) {
	for _, size := range []int{0, 10, 5000, 200 << 10, 3 << 20} {
		for _, sync := range []bool{true, false} {
			cfg := Config{Dir: t.TempDir(), MaxBytes: 64 << 20, Sync: sync}
			for round := uint64(0); round < 3; round++ {
				l, report := open(t, cfg)
				if len(report.Damage)+len(report.Missing) > 0 || report.Torn != "" || report.Records != int(round*6) {
					t.Fatalf("size %d, round %d: %+v", size, round, report)
				}
				fill(t, l, round*6+1, round*6+6, size)
				for _, from := range []uint64{1, round*6 + 3} {
					if got, missing := read(t, l, from, size); !slices.Equal(got, row(from, round*6+6)) || missing > 0 {
						t.Fatalf("size %d, round %d: read %v, missing %d", size, round, got, missing)
					}
				}
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				if _, err := l.Append(nil); !errors.Is(err, os.ErrClosed) {
					t.Errorf("appended to a closed log: %v", err)
				}
			}
		}
	}
}

// TestReadersFollow reads while records are appended and released.
func TestReadersFollow(t *testing.T) {
	const n = 3000
	l, _ := open(t, Config{Dir: t.TempDir(), MaxBytes: 16 << 20})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			r := l.Read(1)
			r.Pause = time.Duration(i) * time.Millisecond
			defer r.Close()
			for want := uint64(1); want <= n; want++ {
				rec, err := r.Next(t.Context())
				if err != nil || rec.Missing > 0 {
					t.Errorf("reader %d: %+v %v", i, rec, err)
					return
				}
				if i == 0 {
					if rec.Seq != want {
						t.Errorf("read %d, want %d", rec.Seq, want)
						return
					}
					if err := l.Release(min(rec.Seq, n-1)); err != nil { // the last is for all
						t.Error(err)
					}
				}
				if !bytes.Equal(rec.Body, body(rec.Seq, 2000)) || rec.Seq < want {
					t.Errorf("reader %d: record %d, after %d, is %.40q", i, rec.Seq, want-1, rec.Body)
					return
				}
				want = rec.Seq // others may miss what the first has released
			}
		})
	}
	fill(t, l, 1, n, 2000)
	wg.Wait()
	if err := l.Release(n); err != nil {
		t.Fatal(err)
	}
	if s := l.State(); s.First != n+1 || s.Last != n || s.Bytes != 0 {
		t.Errorf("state %+v", s)
	}
	if all := files(t, l.cfg.Dir); len(all) != 1 {
		t.Errorf("all is released, and there is %v", all)
	}
}

// TestNextEndsWithItsContext: also while it gathers.
func TestNextEndsWithItsContext(t *testing.T) {
	l, _ := open(t, Config{Dir: t.TempDir(), MaxBytes: 16 << 20})
	ctx, cancel := context.WithCancel(t.Context())
	r := l.Read(1)
	r.Pause = time.Hour
	time.AfterFunc(10*time.Millisecond, func() { fill(t, l, 1, 1, 1); time.AfterFunc(10*time.Millisecond, cancel) })
	if _, err := r.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestFull: what does not fit is not taken, until something is released.
func TestFull(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), MaxBytes: 8 << 20}
	l, _ := open(t, cfg)
	n := uint64(0)
	for {
		_, err := l.Append(body(n+1, 100<<10))
		if errors.Is(err, ErrFull) {
			break
		}
		if n++; err != nil || n > 100 {
			t.Fatal(n, err)
		}
	}
	if s := l.State(); s.Bytes > cfg.MaxBytes || s.Bytes < cfg.MaxBytes-101<<10 || s.Records() != n {
		t.Errorf("full with %+v after %d", s, n)
	}
	if err := l.Release(3); err != nil {
		t.Fatal(err)
	}
	fill(t, l, n+1, n+2, 100<<10)
	if got, _ := read(t, l, 1, 100<<10); !slices.Equal(got, row(4, n+2)) {
		t.Errorf("read %v", got)
	}
	// Opened anew with a smaller bound it keeps what it has; what was released within a
	// segment is there once more.
	_ = l.Close()
	cfg.MaxBytes = 1 << 20
	l, _ = open(t, cfg)
	if got, _ := read(t, l, 4, 100<<10); !slices.Equal(got, row(4, n+2)) {
		t.Errorf("read %v", got)
	}
	if _, err := l.Append(nil); !errors.Is(err, ErrFull) {
		t.Error(err)
	}
}

// TestRelease lets go of one record after the other: what is not released stays, and the
// size follows.
func TestRelease(t *testing.T) {
	const n, size = 110, 40 << 10 // 25 a segment, small ones
	l, _ := open(t, Config{Dir: t.TempDir(), MaxBytes: 16 << 20, Sync: true})
	fill(t, l, 1, n, size)
	all := files(t, l.cfg.Dir)
	if len(all) < 5 {
		t.Fatalf("%v: the test wants several segments", all)
	}
	for _, path := range all[:len(all)-1] {
		if b, err := os.ReadFile(path); err != nil || zeros(b[len(b)-10:]) {
			t.Errorf("%s keeps what was made ready and is not needed: %v", path, err)
		}
	}
	whole := l.State().Bytes
	for seq := uint64(1); seq < n; seq++ {
		if err := l.Release(seq); err != nil {
			t.Fatal(err)
		}
		if got, missing := read(t, l, 1, size); !slices.Equal(got, row(seq+1, n)) || missing > 0 {
			t.Fatalf("after the release of %d: %v, missing %d", seq, got, missing)
		}
		s := l.State()
		if want := whole * int64(n-seq) / n; s.Bytes < want-1000 || s.Bytes > want+1000 || s.Records() != n-seq {
			t.Fatalf("after the release of %d: %+v, want %d bytes", seq, s, want)
		}
	}
	if now := files(t, l.cfg.Dir); len(now) != 1 {
		t.Errorf("one record is left, in %v", now)
	}
}

// TestSyncComesBeforeSuccess: no record is there before the disk has it.
func TestSyncComesBeforeSuccess(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), MaxBytes: 16 << 20, Sync: true}
	l, _ := open(t, cfg)
	synced := 0
	l.sync = func(f *os.File) error {
		if info, err := f.Stat(); err != nil || info.Size() < int64(segmentHead+(synced+1)*len(body(1, 10))) {
			t.Errorf("synced before it was written: %v %v", info.Size(), err)
		}
		if got, _ := read(t, l, 1, 10); len(got) != synced {
			t.Errorf("%v can be read before it is synced", got)
		}
		synced++
		return nil
	}
	fill(t, l, 1, 5, 10)
	if synced != 5 {
		t.Errorf("%d syncs of 5 records", synced)
	}
	l.sync = func(*os.File) error { return errors.New("input/output error") }
	if _, err := l.Append(body(6, 10)); err == nil {
		t.Error("success, and it is not on the disk")
	}
	_ = l.Close()
	l, report := open(t, cfg)
	if report.Records != 5 || report.Torn != "" {
		t.Errorf("what was refused is not cut off: %+v", report)
	}
	if _, err := l.Append(make([]byte, maxRecord+1)); err == nil || l.Err() != nil {
		t.Errorf("a record that cannot be read: %v, %v", err, l.Err())
	}
	fill(t, l, 6, 7, 10)
}

// TestAKnownGapAtTheStart: the oldest record that is left knows that some before it are
// missing, and they are not told again.
func TestAKnownGapAtTheStart(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), MaxBytes: 16 << 20}
	l, _ := open(t, cfg)
	fill(t, l, 1, 1, 800<<10)
	_ = l.Close()
	cfg.Next = 5
	l, _ = open(t, cfg)
	fill(t, l, 5, 5, 800<<10)
	if err := l.Release(1); err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	l, report := open(t, cfg)
	if s := l.State(); len(files(t, cfg.Dir)) != 1 || s.First != 2 || len(report.Missing)+len(report.Damage) > 0 {
		t.Errorf("%+v %+v", s, report)
	}
	if got, missing := read(t, l, 2, 800<<10); !slices.Equal(got, []uint64{5}) || missing > 0 {
		t.Errorf("read %v, missing %d", got, missing)
	}
	if err := l.Release(5); err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	cfg.Next = 9
	l, _ = open(t, cfg)
	if err := l.Release(5); err != nil {
		t.Fatal(err)
	}
	fill(t, l, 9, 9, 10)
	if s := l.State(); s.First != 9 || s.Records() != 1 {
		t.Errorf("one record is owed: %+v", s)
	}
}

// TestHeaders sets every bit of a segment's header: the records are there all the same.
func TestHeaders(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), MaxBytes: 16 << 20}
	l, _ := open(t, cfg)
	fill(t, l, 1, 3, 10)
	_ = l.Close()
	path := files(t, cfg.Dir)[0]
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

// TestSequencesAreNotGivenTwice: neither when nothing is left, nor when the end is gone.
func TestSequencesAreNotGivenTwice(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), MaxBytes: 16 << 20, Next: 5}
	l, _ := open(t, cfg)
	if s := l.State(); s.First != 5 || s.Last != 4 {
		t.Errorf("empty: %+v", s)
	}
	fill(t, l, 5, 6, 10)
	_ = l.Close()
	cfg.Next = 9 // 7 and 8 are gone
	l, report := open(t, cfg)
	if s := l.State(); s.Last != 6 || report.Records != 2 || len(report.Missing) > 0 {
		t.Errorf("%+v %+v", s, report)
	}
	fill(t, l, 9, 10, 10)
	if got, missing := read(t, l, 1, 10); !slices.Equal(got, []uint64{5, 6, 9, 10}) || missing > 0 {
		t.Errorf("read %v, missing %d", got, missing)
	}
	_ = l.Close()
	cfg.Next = 0
	l, report = open(t, cfg)
	if len(report.Missing)+len(report.Damage) > 0 {
		t.Errorf("what was known to be missing is told again: %+v", report)
	}
	if err := l.Release(6); err != nil {
		t.Fatal(err)
	}
	if got, missing := read(t, l, 7, 10); !slices.Equal(got, []uint64{9, 10}) || missing > 0 {
		t.Errorf("read %v, missing %d", got, missing)
	}
}

// TestWriteErrors: nothing is appended after one, what was is read and released, and a
// log that is opened anew goes on.
func TestWriteErrors(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), MaxBytes: 16 << 20, Sync: true}
	l, _ := open(t, cfg)
	fill(t, l, 1, 3, 10)
	good := l.tail.file
	readOnly, err := os.Open(good.Name())
	if err != nil {
		t.Fatal(err)
	}
	l.tail.file = readOnly
	for range 2 {
		if seq, err := l.Append(body(4, 10)); err == nil {
			t.Fatalf("appended %d to a file that cannot be written", seq)
		}
		l.tail.file = good
	}
	if got, _ := read(t, l, 1, 10); !slices.Equal(got, row(1, 3)) {
		t.Errorf("read %v", got)
	}
	_ = l.Close()
	cfg.Distrust = true
	before, _ := os.Stat(good.Name())
	l, report := open(t, cfg)
	if after, _ := os.Stat(good.Name()); os.SameFile(before, after) {
		t.Error("the file is still the one whose sync has failed")
	}
	if report.Records != 3 || len(report.Damage) > 0 {
		t.Errorf("%+v", report)
	}
	fill(t, l, 4, 5, 10)
	_ = l.fail(errors.New("again"))
	if err := l.Release(5); err != nil {
		t.Fatal(err)
	}
	if all := files(t, cfg.Dir); len(all) > 0 {
		t.Errorf("nothing is appended any more, all is released, and there is %v", all)
	}
}

// TestTornWrites cuts the file behind the last whole record, at every byte.
func TestTornWrites(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), MaxBytes: 16 << 20}
	l, _ := open(t, cfg)
	fill(t, l, 1, 3, 10)
	_ = l.Close()
	path := files(t, cfg.Dir)[0]
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
	l, _ := open(t, Config{Dir: pristine, MaxBytes: 16 << 20})
	fill(t, l, 1, records, size)
	_ = l.Close()
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
	l, _ := open(t, cfg)
	fill(t, l, 1, 10, 100)
	_ = l.Close()
	edit(t, files(t, cfg.Dir)[0], func(b []byte) []byte { b[segmentHead+3*(recordHead+len(body(1, 100)))] ^= 1; return b })
	cfg.Keep = func(string) error { return errors.New("no space left on device") }
	l, _ = open(t, cfg)
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
	away := func(_ io.ReaderAt, b []byte, _ int64) (int, error) { clear(b); return 1, nil }
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
	l.read, l.patience = away, 0
	if got, missing := read(t, l, 1, 10); len(got) > 0 || missing != 5 || kept != 1 {
		t.Errorf("read %v, missing %d, kept %d", got, missing, kept)
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
			l, _ := open(t, cfg)
			fill(t, l, 1, 9, size)
			_ = l.Close()
			all := files(t, cfg.Dir)
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
			l, _ = open(t, cfg)
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
	l, _ := open(t, cfg)
	fill(t, l, 1, 1, 10)
	_ = l.Close()
	path := files(t, cfg.Dir)[0]
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
