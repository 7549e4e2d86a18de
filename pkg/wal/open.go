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
	Bytes   int64 // size of the files that were read
	// Damage lists every place that differs from what was written.
	Damage []Damage
	// Missing are the sequences that are known to be lost, except those of records that were
	// released, those in earlier reports, and those in a file that could not be repaired: readers
	// report these.
	Missing []Range
	// Torn is the youngest file if its end was not a whole record: an interrupted write, or damage
	// to the last record. TornBytes is the size of that end.
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

// Range is an interval of sequences, both ends included.
type Range struct{ From, To uint64 }

// Open reads every record of a log, repairs damaged files, and makes the log ready for more
// records. If the disk cannot be written, the log is opened nevertheless, read-only, and
// [Log.Err] says why; an error of Open is one that an operator has to fix.
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
		} else if _, ok := baseOf(strings.TrimSuffix(e.Name(), ".tmp")); ok { // the process ended during a repair
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
	if err == nil && l.cfg.Sync { // the previous process may have ended before it did this
		err = disk.SyncDir(l.cfg.Dir)
	}
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.tail.file, l.tail.ready = f, info.Size() // zeros after the end, as the examination found
	return nil
}

// examination goes through the segments of a log, the oldest first.
type examination struct {
	log    *Log
	report Report
	first  uint64 // first sequence of the log, known with its oldest record; 0 until then
	last   uint64 // sequence of the last record so far
	buf    []byte // a whole segment file
}

// segment reads one file and repairs it.
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
		_ = l.fail(fmt.Errorf("repair %s: %w", s.path, err))
		x.report.Missing = x.report.Missing[:told] // a reader reports it
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
		return err // an operator may be able to fix it
	}
	x.report.Bytes += int64(len(x.buf))
	if len(bad) > 0 {
		x.damaged(s, int(bad[0]), fmt.Sprintf("cannot be read from the disk, and %d more places", len(bad)-1))
	}
	switch err := checkHead(x.buf, s.base); {
	case errors.Is(err, ErrVersion):
		return fmt.Errorf("%s: %w", segmentName(s.base), err)
	case err != nil && s.youngest && !s.damaged && zeros(x.buf): // created, and not written before a crash
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
				x.damaged(s, at, "no valid record")
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

// whole returns the repaired segment: its whole records, each with the number of records that are
// missing before it. before is the last sequence before the segment.
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

// remove deletes a segment without records.
func (x *examination) remove(path string, keep bool) error {
	if err := x.keep(path, keep); err != nil {
		return err
	}
	return os.Remove(path)
}

// keep saves an unchanged copy of a damaged file.
func (x *examination) keep(path string, damaged bool) error {
	if !damaged || x.log.cfg.Keep == nil {
		return nil
	}
	return x.log.cfg.Keep(path)
}

// read reads a file into a buffer that is reused. bad are the offsets that cannot be read.
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
