package wal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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

// written returns the files of a log that holds records 1 to n, and is closed.
func written(t testing.TB, cfg Config, n uint64, size int) []string {
	t.Helper()
	l, _ := open(t, cfg)
	fill(t, l, 1, n, size)
	_ = l.Close()
	return files(t, cfg.Dir)
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
