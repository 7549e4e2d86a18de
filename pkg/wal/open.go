package wal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/penstock/penstock/pkg/disk"
)

// Report is what was found when a log was opened.
type Report struct {
	Records int
	Bytes   int64 // of the files, read
	// Damage names every place that is not as it was written.
	Damage []Damage
	// Missing are the sequences known to be gone, but for those of records that were
	// released, those that an earlier report has named, and those in a file that could
	// not be mended: readers tell of them.
	Missing []Range
	// Torn is the youngest file when its end was no whole record: a write that was cut
	// off, or damage in the last record. TornBytes is how much of it that was.
	Torn      string
	TornBytes int64
}

// Damage is one place in a log's files.
type Damage struct {
	File   string
	Offset int64
	What   string
}

func (d Damage) String() string {
	return fmt.Sprintf("%s at byte %d: %s", filepath.Base(d.File), d.Offset, d.What)
}

// Range is a row of sequences.
type Range struct{ From, To uint64 }

// Open reads every record of a log, mends its files where they are damaged, and takes
// more. Where the disk does not write, the log is opened all the same and says so
// ([Log.Err]); an error is what a person has to mend.
func Open(cfg Config) (*Log, Report, error) {
	l := &Log{cfg: cfg, sync: disk.SyncData, read: disk.ReadAround, patience: readPatience}
	if err := disk.MakeDir(cfg.Dir); err != nil {
		return nil, Report{}, err
	}
	entries, err := os.ReadDir(cfg.Dir) // sorted, so by sequence
	if err != nil {
		return nil, Report{}, err
	}
	var bases []uint64
	for _, e := range entries {
		if base, ok := baseOf(e.Name()); ok {
			bases = append(bases, base)
		} else if _, ok := baseOf(strings.TrimSuffix(e.Name(), ".tmp")); ok { // the process ended while it mended
			_ = os.Remove(filepath.Join(cfg.Dir, e.Name()))
		}
	}
	x := &examination{log: l}
	for i, base := range bases {
		if err := x.segment(base, i == len(bases)-1); err != nil {
			return nil, x.report, err
		}
	}
	l.mu.first, l.mu.last, l.mu.next = x.first, x.last, max(x.last+1, cfg.Next, 1)
	if len(l.mu.segments) == 0 {
		l.mu.first, l.mu.last = l.mu.next, l.mu.next-1
	}
	if l.Err() == nil {
		if err := l.openTail(); err != nil {
			_ = l.fail(err)
		}
	}
	return l, x.report, nil
}

// openTail opens the youngest segment for appending.
func (l *Log) openTail() error {
	n := len(l.mu.segments)
	if n == 0 {
		return nil
	}
	f, err := os.OpenFile(l.mu.segments[n-1].path, os.O_RDWR, 0)
	if err == nil && l.cfg.Sync { // the process before may have ended before it did
		err = disk.SyncDir(l.cfg.Dir)
	}
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.tail.file, l.tail.ready = f, info.Size() // zeros behind the end, as was seen
	return nil
}

// examination goes through the segments of a log, the oldest first.
type examination struct {
	log    *Log
	report Report
	first  uint64 // where the log begins, by its oldest record; 0 before that
	last   uint64 // of the records so far
	buf    []byte // a segment, file and all
}

// segment reads one file and mends it.
func (x *examination) segment(base uint64, youngest bool) error {
	l := x.log
	s := &suspect{segment: segment{path: filepath.Join(l.cfg.Dir, segmentName(base)), base: base}, youngest: youngest}
	s.mend = youngest && l.cfg.Distrust
	if err := x.load(s); err != nil {
		return fmt.Errorf("log %s: %w", l.cfg.Dir, err)
	}
	before, told := x.last, len(x.report.Missing)
	x.records(s)
	empty := s.last == 0
	if empty {
		s.last = base - 1
	}
	if err := x.mend(s, empty, before); err != nil {
		_ = l.fail(fmt.Errorf("mend %s: %w", s.path, err))
		x.report.Missing = x.report.Missing[:told] // a reader tells
		s.end = max(int64(len(x.buf)), segmentHead)
	} else if empty {
		return nil
	}
	l.mu.segments = append(l.mu.segments, s.segment)
	l.mu.total += s.bytes()
	return nil
}

// suspect is the segment that is examined.
type suspect struct {
	segment
	youngest bool
	mend     bool // the file is written again
	damaged  bool // it is not as it was written: it is put aside and mended
}

// damaged reports a place where a segment is not as it was written.
func (x *examination) damaged(s *suspect, at int, what string) {
	x.report.Damage = append(x.report.Damage, Damage{s.path, int64(at), what})
	s.damaged = true
}

// load reads the file and looks at its header. With the oldest segment it learns where the
// log begins.
func (x *examination) load(s *suspect) error {
	bad, err := x.read(s.path)
	if err != nil {
		return err // it may be mended
	}
	x.report.Bytes += int64(len(x.buf))
	if len(bad) > 0 {
		x.damaged(s, int(bad[0]), fmt.Sprintf("the disk does not give back this place, and %d more", len(bad)-1))
	}
	switch err := checkHead(x.buf, s.base); {
	case errors.Is(err, ErrVersion):
		return fmt.Errorf("%s: %w", segmentName(s.base), err)
	case err != nil && s.youngest && !s.damaged && zeros(x.buf): // made, and not written before a crash
	case err != nil:
		x.damaged(s, 0, err.Error())
	}
	if x.first == 0 {
		x.last = s.base - 1
		if r, _, ok := parseRecord(x.buf[x.begin():], x.last); ok && r.seq == s.base {
			x.last -= r.gap
		}
		x.first = x.last + 1
	}
	return nil
}

// begin is where the first record of the segment is due in its file.
func (x *examination) begin() int { return min(segmentHead, len(x.buf)) }

// records goes through the records of a segment: the sound ones are counted, what is
// between them is damage, or the torn end of the log.
func (x *examination) records(s *suspect) {
	s.end = segmentHead
	for at := x.begin(); at < len(x.buf); {
		r, _, ok := parseRecord(x.buf[at:], x.last)
		if !ok {
			if zeros(x.buf[at:]) {
				return
			}
			next := find(x.buf, at+1, x.last)
			if next == len(x.buf) && s.youngest {
				x.report.Torn, x.report.TornBytes = s.path, int64(len(x.buf)-at)
				s.damaged = true
			} else {
				x.damaged(s, at, "no sound record")
			}
			at = next
			continue
		}
		if from := r.seq - r.gap; from != x.last+1 {
			if from > x.last+1 {
				x.report.Missing = append(x.report.Missing, Range{x.last + 1, from - 1})
			}
			s.mend = true
		}
		at += r.size()
		s.last, x.last, s.end = r.seq, r.seq, int64(at)
		x.report.Records++
	}
}

// mend makes the file of a segment what it should be. before is the sequence that it begins
// behind.
func (x *examination) mend(s *suspect, empty bool, before uint64) error {
	switch {
	case empty:
		return x.remove(s.path, s.damaged)
	case s.mend || s.damaged:
		whole := x.whole(s.base, before)
		s.end = int64(len(whole))
		return disk.Replace(s.path, whole, func() error { return x.keep(s.path, s.damaged) })
	}
	return nil
}

// whole returns the segment as it should be: what is whole of it, each record with the
// number of those that are missing before it. before is the sequence that it begins behind.
func (x *examination) whole(base, before uint64) []byte {
	b := appendHead(make([]byte, 0, len(x.buf)+segmentHead), base)
	for at := x.begin(); at < len(x.buf); {
		r, _, ok := parseRecord(x.buf[at:], before)
		if !ok {
			at = find(x.buf, at+1, before)
			continue
		}
		b = appendRecord(b, r.seq, r.seq-1-before, r.body)
		before = r.seq
		at += r.size()
	}
	return b
}

// remove deletes a segment in which no record is. The next one begins where it is due.
func (x *examination) remove(path string, keep bool) error {
	if err := x.keep(path, keep); err != nil {
		return err
	}
	return os.Remove(path)
}

// keep puts a damaged file aside as it is.
func (x *examination) keep(path string, damaged bool) error {
	if !damaged || x.log.cfg.Keep == nil {
		return nil
	}
	return x.log.cfg.Keep(path)
}

// read reads a file into memory that is used for each. bad are the places of it that the
// disk does not give back.
func (x *examination) read(path string) (bad []int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if x.buf = x.buf[:0]; int64(cap(x.buf)) < info.Size() {
		x.buf = make([]byte, 0, info.Size())
	}
	x.buf = x.buf[:info.Size()]
	return disk.ReadAround(f, x.buf, 0)
}
