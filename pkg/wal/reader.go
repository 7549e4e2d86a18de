package wal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"
)

// Record is a record that a [Reader] has read.
type Record struct {
	Seq    uint64
	Behind uint64 // number of records after it in the log when it was read
	Body   []byte // valid until the next call of Next
	// Missing, if not 0, is how many records up to Seq cannot be read, because their file was
	// damaged after the log was opened. Body is nil then.
	Missing uint64
}

// Size is how many bytes the record takes in the log.
func (r Record) Size() int64 { return int64(recordHead + len(r.Body)) }

// Reader reads a log in order. Records that are released before they were read are skipped. A
// Reader is for one goroutine.
type Reader struct {
	// Pause is how long a reader that has read everything waits after the first new record for more
	// records, so that it is not woken for each of them.
	Pause time.Duration

	log  *Log
	next uint64   // sequence
	file *os.File // nil: none chosen yet
	seg  segment  // its state when last checked
	at   int64    // offset in the file at which buf ends
	buf  []byte   // read and not returned yet, a part of chunk
	kept *Record  // returned by the next call

	chunk []byte // reused buffer
}

// chunkBytes is how much is read at a time.
const chunkBytes = 256 << 10

// Read returns a reader that begins at a sequence, or at the first one after it.
func (l *Log) Read(from uint64) *Reader { return &Reader{log: l, next: max(from, 1)} }

// Close ends reading.
func (r *Reader) Close() {
	if r.file != nil {
		_ = r.file.Close()
		r.file = nil
	}
}

// Next returns the next record; it waits for one until ctx ends.
func (r *Reader) Next(ctx context.Context) (Record, error) {
	if k := r.kept; k != nil {
		r.kept = nil
		return *k, nil
	}
	for {
		if r.left() <= 0 {
			missing, err := r.advance(ctx)
			if err != nil || missing.Missing > 0 {
				return missing, err
			}
			continue
		}
		rec, more, ok := parseRecord(r.buf, 0)
		switch {
		case ok && rec.seq < r.next:
			r.buf = r.buf[rec.size():]
		case ok:
			r.buf = r.buf[rec.size():]
			return r.found(rec), nil
		case more > 0 && int64(more) <= r.left():
			if err := r.load(int64(max(more, chunkBytes))); err != nil {
				return Record{}, err
			}
		default:
			if err := r.load(r.left()); err != nil {
				return Record{}, err
			}
			if len(r.buf) > 0 {
				r.buf = r.buf[find(r.buf, 1, r.next-1):]
			}
		}
	}
}

// left is how many bytes of the segment have not been returned.
func (r *Reader) left() int64 { return r.seg.end - r.at + int64(len(r.buf)) }

// found returns a record; if records are missing before it, it first returns their number.
func (r *Reader) found(rec record) Record {
	first, last := r.log.bounds()
	next := max(r.next, first) // released records are not missing
	out := Record{Seq: rec.seq, Behind: max(last, rec.seq) - rec.seq, Body: rec.body}
	r.next = rec.seq + 1
	if from := rec.seq - rec.gap; from > next {
		r.kept = &out
		return Record{Seq: from - 1, Behind: out.Behind + 1, Missing: from - next}
	}
	return out
}

func (l *Log) bounds() (first, last uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.first, l.mu.last
}

// load continues reading, so that buf has size bytes, or the rest of the segment. Places that the
// disk has failed to read for readPatience are zeros, which are not a record.
func (r *Reader) load(size int64) error {
	begin := r.at - int64(len(r.buf))
	size = min(size, r.seg.end-begin)
	if int64(cap(r.chunk)) < size {
		r.chunk = make([]byte, size)
	}
	buf := r.chunk[:size]
	bad, err := r.log.read(r.file, buf, begin)
	if err == nil && (len(bad) > 0 || !r.seg.badSince.IsZero()) {
		err = r.unreadable(begin, size, bad)
	}
	if err != nil {
		return fmt.Errorf("read log %s: %w", r.log.cfg.Dir, err)
	}
	r.at, r.buf = begin+size, buf
	return nil
}

// readPatience is how long reads of a file may fail until the records in the unreadable places
// count as lost: the failure of a disk may be temporary.
const readPatience = time.Minute

// ErrUnreadable is the error of a reader of such a file; the next reader may succeed.
var ErrUnreadable = errors.New("segment unreadable (I/O error)")

// unreadable records whether a read had bad places. It returns nil when the segment has had them
// for readPatience, counted from the first: then a copy of the segment is kept, and the places
// are skipped.
func (r *Reader) unreadable(begin, size int64, bad []int64) (err error) {
	seg := &r.seg
	switch again := begin <= seg.badAt && seg.badAt < begin+size; {
	case len(bad) == 0 && !again:
		return nil
	case len(bad) == 0:
		seg.badSince = time.Time{}
	case seg.badSince.IsZero():
		seg.badSince, seg.badAt = time.Now(), bad[0]
		fallthrough
	case time.Since(seg.badSince) < r.log.patience:
		err = fmt.Errorf("%w: %s", ErrUnreadable, seg.path)
	case !seg.kept && r.log.cfg.Keep != nil:
		err = r.log.cfg.Keep(seg.path)
		seg.kept = err == nil
	}
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	for i := range r.log.mu.segments {
		if s := &r.log.mu.segments[i]; s.base == seg.base { // for the next reader
			s.badSince, s.badAt, s.kept = seg.badSince, seg.badAt, seg.kept
		}
	}
	return err
}

// advance checks the segment for new records, or opens the next one. It waits for a record that
// has not been read; if records cannot be read at all, it returns how many are missing.
func (r *Reader) advance(ctx context.Context) (Record, error) {
	seg, last, err := r.await(ctx)
	if err != nil {
		return Record{}, fmt.Errorf("read log %s: %w", r.log.cfg.Dir, err)
	}
	missing := func(upto uint64) Record {
		m := Record{Seq: upto, Behind: last - upto, Missing: upto + 1 - r.next}
		r.next = upto + 1
		return m
	}
	if seg == nil {
		return missing(last), nil
	}
	if r.file == nil || r.seg.base != seg.base {
		r.Close()
		f, err := os.Open(seg.path)
		if errors.Is(err, fs.ErrNotExist) {
			if first, _ := r.log.bounds(); first > seg.last || seg.last < r.next {
				return Record{}, nil // released in the meantime
			}
			return missing(seg.last), nil
		}
		if err != nil {
			return Record{}, fmt.Errorf("read log %s: %w", r.log.cfg.Dir, err)
		}
		r.file, r.at, r.buf = f, segmentHead, nil
	}
	r.seg = *seg
	return Record{}, nil
}

// await waits for more records, and returns the segment that has them and the last sequence; nil
// if no segment has the appended records.
func (r *Reader) await(ctx context.Context) (*segment, uint64, error) {
	l := r.log
	for waited := false; ; {
		l.mu.Lock()
		r.next = max(r.next, min(l.mu.first, l.mu.last+1))
		last, grown := l.mu.last, l.mu.grown
		if r.next <= last && (!waited || r.Pause == 0) {
			seg := r.choose()
			l.mu.Unlock()
			return seg, last, nil
		}
		if r.next > last && grown == nil {
			grown = make(chan struct{})
			l.mu.grown = grown
		}
		l.mu.Unlock()
		if waited {
			pause, cancel := context.WithTimeout(ctx, r.Pause)
			<-pause.Done()
			cancel()
			if err := ctx.Err(); err != nil {
				return nil, 0, err
			}
			waited = false
			continue
		}
		select {
		case <-grown:
			waited = true
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
}

// choose returns the open segment while it has more records, else the one after it. The log is
// locked.
func (r *Reader) choose() *segment {
	for _, seg := range r.log.mu.segments {
		if r.file == nil && seg.last >= r.next || r.file != nil && (seg.base > r.seg.base || seg.base == r.seg.base && seg.end > r.at) {
			return &seg
		}
	}
	return nil
}
