// Package wal is a write-ahead log: records in files, in order, with sequences that only rise.
// One process appends at its end, releases records at its start, and reads what is between as
// often as it likes.
//
//	l, report, err := wal.Open(wal.Config{Dir: dir, MaxBytes: 1 << 30, Sync: true})
//	seq, err := l.Append(head, body)        // on the disk when it returns
//	r := l.Read(seq)
//	rec, err := r.Next(ctx)                 // waits for records that are appended later
//	err = l.Release(seq)                    // deletes files whose records are all released
//
// # Promises
//
//   - With Config.Sync a record is on the disk when Append has returned its sequence.
//   - After a write or sync error nothing is appended until the log is reopened, because the
//     kernel's copy of the file may differ from the disk's. The log can be read and released.
//   - Damage on the disk is detected when the log is opened, and again when it is read, by a
//     checksum for each record. Whole records around it are read; missing ones are reported, once.
//   - A sequence is assigned only once, also when records are missing at the end, as far as
//     Config.Next covers them.
//
// # Syncs and the torn tail
//
// A record is on the disk only after a sync of its file, and in a new file also after a sync of
// the directory: without that a power cut may take the file's name, and with it every record in
// it. A sync that fails is final. The kernel may drop the error after reporting it once, and
// regard the pages that never reached the disk as clean: a second sync of the same file then
// succeeds and proves nothing, and reading the file returns data that the next power cut takes.
// That is why a failed log accepts no more records, and why Config.Distrust writes the youngest
// segment to a new file when it is reopened.
//
// A write that a crash interrupts leaves a torn tail: the youngest segment ends in something
// that is not a whole record. It is cut off; otherwise the next record would be appended
// after it, and the place would look like damage from then on. With Config.Sync such a write was
// never acknowledged, so nothing is lost; but damage to the last record looks the same, and the
// file does not show which of the two it is. It is therefore reported separately (Report.Torn),
// and a caller that knows which sequence was acknowledged last can tell. In older segments, and
// between whole records, an unreadable place is always damage: a record is appended only after
// the write before it has succeeded.
//
// A sync costs less CPU time and disk where it need not change the file's size, so the file is
// extended ahead of small records, with zeros (docs/adr/0010). Zeros at the end are therefore
// not a torn tail.
//
// # Not here
//
// The content of records. The lock of the directory: package disk.
package wal

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/disk"
)

// Config describes a log.
type Config struct {
	Dir string // of the segments; created if it does not exist
	// MaxBytes bounds the records that are not released. The files may take two more segments.
	MaxBytes int64
	// Sync makes Append wait for the disk.
	Sync bool
	// Next is the least sequence of the next record, for when records are missing at the end; 0
	// means 1.
	Next uint64
	// Distrust rewrites the youngest segment when the log is opened. After a failed sync the kernel
	// may regard pages that never reached the disk as clean: a later sync of the same file says
	// nothing about them.
	Distrust bool
	// Keep, if not nil, is called with the path of a damaged file before it is replaced or removed.
	Keep func(path string) error
}

const (
	// The size of a segment is a sixteenth of MaxBytes, within these bounds.
	minSegment = 1 << 20
	maxSegment = 8 << 20

	// ahead is how many zero bytes are written at a time after a small record.
	ahead = 256 << 10
	// small is the size of a record below which this is done: a larger record holds many requests,
	// which share its sync, and writing its bytes twice costs more.
	small = 64 << 10
)

func (c Config) segmentBytes() int64 { return min(max(c.MaxBytes/16, minSegment), maxSegment) }

// ErrFull reports that a record would not fit within Config.MaxBytes.
var ErrFull = errors.New("log is full")

// Log is an open log. Its methods are safe for concurrent use.
type Log struct {
	cfg Config

	// The functions and values named here, except in tests.
	sync     func(*os.File) error                                      // disk.SyncData
	read     func(io.ReaderAt, []byte, int64) (bad []int64, err error) // disk.ReadAround
	patience time.Duration                                             // readPatience

	// The end of the youngest segment; locked while a record is appended.
	tail struct {
		sync.Mutex
		file  *os.File // nil: the next record begins a segment
		ready int64    // up to where the file has zeros
		fresh bool     // its directory entry may not be on the disk yet
		buf   []byte
	}

	releasing sync.Mutex // held while files are deleted

	mu struct {
		sync.Mutex
		segments []segment // the oldest first
		total    int64     // bytes of their records
		first    uint64    // the oldest that is not released; last+1 if there is none
		last     uint64
		next     uint64        // the next one to assign; last+1 unless some are missing
		err      error         // why the log accepts no more records
		grown    chan struct{} // closed when the log has grown; nil when nobody waits
	}
}

// State is what a log holds.
type State struct {
	First, Last uint64 // sequences; First is Last + 1 when the log is empty
	// Bytes is the size of the records that are not released; in a segment that is released in
	// part it is estimated, as if all records had the same size.
	Bytes int64
}

// Records is the number of records, including missing ones.
func (s State) Records() uint64 { return s.Last + 1 - s.First }

// State returns what the log holds.
func (l *Log) State() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := State{First: l.mu.first, Last: l.mu.last}
	if s.First > s.Last {
		return s
	}
	s.Bytes = l.mu.total
	for _, seg := range l.mu.segments {
		if seg.base >= s.First {
			break
		}
		if seg.last < seg.base {
			continue
		}
		released := min(s.First-seg.base, seg.last+1-seg.base)
		s.Bytes -= int64(float64(seg.bytes()) * float64(released) / float64(seg.last+1-seg.base))
	}
	return s
}

// Err returns why the log accepts no more records; nil while it does.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.err
}

// fail makes the log read-only, and returns the reason.
func (l *Log) fail(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.err == nil {
		l.mu.err = fmt.Errorf("log %s accepts no records until it is reopened: %w", l.cfg.Dir, err)
	}
	return l.mu.err
}

// Append stores a record whose body is all parts, and returns its sequence.
func (l *Log) Append(parts ...[]byte) (seq uint64, err error) {
	t := &l.tail
	t.Lock()
	defer t.Unlock()
	size := int64(recordHead)
	for _, p := range parts {
		size += int64(len(p))
	}
	if err := l.Err(); err != nil {
		return 0, err
	}
	if size > recordHead+maxRecord {
		return 0, fmt.Errorf("append to log %s: record has %d bytes, more than the %d that can be read", l.cfg.Dir, size, maxRecord)
	}
	if l.State().Bytes+size > l.cfg.MaxBytes {
		return 0, ErrFull
	}
	at, seq, gap := l.end()
	if t.file != nil && at > segmentHead && at+size > l.cfg.segmentBytes() {
		if err := l.seal(at); err != nil {
			return 0, l.fail(err)
		}
	}
	t.buf = t.buf[:0]
	if t.file == nil {
		if err := l.begin(seq); err != nil {
			return 0, l.fail(err)
		}
		at, t.buf = 0, appendHead(t.buf, seq)
	}
	t.buf = appendRecord(t.buf, seq, gap, parts...)
	if err := l.write(at); err != nil {
		// Cut off what was written of it, if possible, so that no torn tail is found later.
		_ = t.file.Truncate(at)
		return 0, l.fail(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	young := &l.mu.segments[len(l.mu.segments)-1]
	young.last, young.end = seq, at+int64(len(t.buf))
	l.mu.total += size
	if l.mu.first > l.mu.last { // the log was empty: sequences missing before this record are owed to nobody
		l.mu.first = seq
	}
	l.mu.last, l.mu.next = seq, seq+1
	if l.mu.grown != nil {
		close(l.mu.grown)
		l.mu.grown = nil
	}
	return seq, nil
}

// end returns where the youngest segment ends, the next sequence, and how many sequences before
// it are missing.
func (l *Log) end() (at int64, seq, gap uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.mu.segments); n > 0 {
		at = l.mu.segments[n-1].end
	}
	return at, l.mu.next, l.mu.next - 1 - l.mu.last
}

// begin creates a segment.
func (l *Log) begin(base uint64) error {
	path := filepath.Join(l.cfg.Dir, segmentName(base))
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	l.tail.file, l.tail.ready, l.tail.fresh = f, 0, true
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.segments = append(l.mu.segments, segment{path: path, base: base, last: base - 1, end: segmentHead})
	return nil
}

// seal ends the youngest segment, and cuts off the zeros at its end.
func (l *Log) seal(end int64) error {
	t := &l.tail
	if t.ready > end {
		_ = t.file.Truncate(end)
	}
	err := t.file.Close()
	t.file = nil
	return err
}

// nothing is the zeros with which a file is extended.
var nothing [ahead]byte

// write writes the buffer at an offset of the youngest segment and, with Config.Sync, waits for
// the disk.
func (l *Log) write(at int64) error {
	t := &l.tail
	if _, err := t.file.WriteAt(t.buf, at); err != nil {
		return err
	}
	if !l.cfg.Sync {
		t.fresh = false
		return nil
	}
	if end := at + int64(len(t.buf)); end > t.ready {
		if t.ready = end; len(t.buf) < small {
			if _, err := t.file.WriteAt(nothing[:], end); err != nil {
				return err
			}
			t.ready += ahead
		}
	}
	if err := l.sync(t.file); err != nil {
		return err
	}
	if t.fresh {
		if err := disk.SyncDir(l.cfg.Dir); err != nil {
			return err
		}
		t.fresh = false
	}
	return nil
}

// Release gives up all records up to a sequence. A file is deleted when all its records are
// released; the youngest one stays, unless the log accepts no more records.
func (l *Log) Release(upto uint64) error {
	l.releasing.Lock()
	defer l.releasing.Unlock()
	for path := l.released(upto); path != ""; path = l.released(upto) {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("release of log %s: %w", l.cfg.Dir, err)
		}
		l.mu.Lock()
		l.mu.total -= l.mu.segments[0].bytes()
		l.mu.segments = l.mu.segments[1:]
		l.mu.Unlock()
	}
	return nil
}

// released returns the file of the oldest segment if it may be deleted.
func (l *Log) released(upto uint64) (path string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.first = max(l.mu.first, min(upto, l.mu.last)+1)
	if n := len(l.mu.segments); n == 0 || max(l.mu.segments[0].last, l.mu.segments[0].base) >= l.mu.first || (n == 1 && l.mu.err == nil) {
		return ""
	}
	return l.mu.segments[0].path
}

// Close ends appending; readers may continue.
func (l *Log) Close() error {
	l.tail.Lock()
	defer l.tail.Unlock()
	_ = l.fail(os.ErrClosed)
	if l.tail.file == nil {
		return nil
	}
	err := l.tail.file.Close()
	l.tail.file = nil
	return err
}
