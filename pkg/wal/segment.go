package wal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// A segment is a file <base>.seg: a header, records, and zeros up to where the file has been
// extended for more. base is the sequence of its first record, in 20 digits.
//
//	header  magic(8) version(4) checksum(4) base(8)
//	record  length(4) checksum(4) sequence(8) gap(8) body
//
// in little endian. Checksums are CRC-32C: the header's covers the header's other fields, a
// record's covers everything in the record but itself. With base in the header and the sequence
// in the record, a file under another name, or a record at another place, is detected. gap is how
// many records before this one are known to be missing; the record before has sequence - gap - 1.
const (
	magic       = "penstock"
	version     = 1
	segmentHead = 24
	recordHead  = 24
	maxRecord   = 32 << 20 // of a body; a larger length is not a valid record

	suffix = ".seg"
)

var (
	le    = binary.LittleEndian
	table = crc32.MakeTable(crc32.Castagnoli)
)

// segment is one file, as the log knows it.
type segment struct {
	path string
	base uint64
	last uint64 // sequence of the last record; base - 1 for none
	end  int64  // of the last record, in bytes

	badSince time.Time // since when badAt cannot be read; zero if it can
	badAt    int64
	kept     bool // Config.Keep was called because of that
}

// bytes is the size of its records.
func (s segment) bytes() int64 { return s.end - segmentHead }

func segmentName(base uint64) string { return fmt.Sprintf("%020d%s", base, suffix) }

// baseOf reads the name of a segment.
func baseOf(path string) (base uint64, ok bool) {
	name, ok := strings.CutSuffix(filepath.Base(path), suffix)
	base, err := strconv.ParseUint(name, 10, 64)
	return base, ok && err == nil && len(name) == 20 && base > 0
}

func appendHead(b []byte, base uint64) []byte {
	at := len(b)
	b = append(b, magic...)
	b = le.AppendUint32(b, version)
	b = le.AppendUint32(b, 0)
	b = le.AppendUint64(b, base)
	le.PutUint32(b[at+12:], headSum(b[at:]))
	return b
}

func headSum(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:12], table), table, b[16:segmentHead])
}

// ErrVersion reports files that another version of this package has written.
var ErrVersion = errors.New("written by another version")

// checkHead reports what is wrong with the header of a segment.
func checkHead(b []byte, base uint64) error {
	switch {
	case len(b) < segmentHead || string(b[:8]) != magic || headSum(b) != le.Uint32(b[12:]):
		return errors.New("not a segment header")
	case le.Uint32(b[8:]) != version:
		return fmt.Errorf("%w: format %d, this is format %d", ErrVersion, le.Uint32(b[8:]), version)
	case le.Uint64(b[16:]) != base:
		return fmt.Errorf("header names %d as the first record", le.Uint64(b[16:]))
	}
	return nil
}

// record is a parsed record. Its body is a part of the buffer that it was parsed from.
type record struct {
	seq, gap uint64
	body     []byte
}

func (r record) size() int { return recordHead + len(r.body) }

// appendRecord appends a record whose body is the concatenation of parts.
func appendRecord(b []byte, seq, gap uint64, parts ...[]byte) []byte {
	at, size := len(b), 0
	for _, p := range parts {
		size += len(p)
	}
	b = le.AppendUint32(b, uint32(size))
	b = le.AppendUint32(b, 0)
	b = le.AppendUint64(b, seq)
	b = le.AppendUint64(b, gap)
	for _, p := range parts {
		b = append(b, p...)
	}
	le.PutUint32(b[at+4:], recordSum(b[at:]))
	return b
}

func recordSum(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:4], table), table, b[8:])
}

// parseRecord reads the record at the beginning of b; ok is whether its checksum matches and its
// sequence is greater than after. If ok is false, more is how many bytes b must have for a
// complete record; 0 when b cannot be the beginning of one.
func parseRecord(b []byte, after uint64) (r record, more int, ok bool) {
	if len(b) < recordHead {
		return r, recordHead, false
	}
	size := int64(le.Uint32(b))
	r.seq, r.gap = le.Uint64(b[8:]), le.Uint64(b[16:])
	if size > maxRecord || r.seq <= after || r.gap >= r.seq {
		return r, 0, false
	}
	if int64(len(b)) < recordHead+size {
		return r, recordHead + int(size), false
	}
	b = b[:recordHead+size]
	if recordSum(b) != le.Uint32(b[4:]) {
		return r, 0, false
	}
	r.body = b[recordHead:]
	return r, 0, true
}

// farthest is how far a sequence may be from the previous one for find to consider it a record.
const farthest = 1 << 32

// find returns where the next record begins in b, from at on; len(b) if there is none.
func find(b []byte, at int, after uint64) int {
	for ; at+recordHead <= len(b); at++ {
		if seq := le.Uint64(b[at+8:]); seq <= after || seq-after > farthest {
			continue
		}
		if _, _, ok := parseRecord(b[at:], after); ok {
			return at
		}
	}
	return len(b)
}

// zeros reports whether b has only zero bytes.
func zeros(b []byte) bool {
	for len(b) >= 8 {
		if le.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
