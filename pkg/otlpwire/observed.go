package otlpwire

import "google.golang.org/protobuf/encoding/protowire"

// The times of a LogRecord.
const (
	recordTime     = 1
	recordObserved = 11
)

// Observed sets the observed time of those records of a logs payload that have no time at all, so
// that a backend does not assign another time at every attempt. It returns the payload itself if
// all records have a time.
func Observed(payload []byte, at uint64) []byte {
	for item := range Items(payload) {
		if !timed(item) {
			return observe(make([]byte, 0, len(payload)+64), payload, at, 0)
		}
	}
	return payload
}

func timed(record []byte) bool {
	for i := 0; i < len(record); {
		var f Field
		f, i = NextField(record, i)
		if (f.Tag == Tag(recordTime, Fixed64) || f.Tag == Tag(recordObserved, Fixed64)) && f.Bits != 0 {
			return true
		}
	}
	return false
}

// observe copies a message of the path request, ResourceLogs, ScopeLogs, LogRecord.
func observe(dst, b []byte, at uint64, depth int) []byte {
	if depth == 3 {
		if dst = append(dst, b...); !timed(b) {
			dst = protowire.AppendFixed64(protowire.AppendTag(dst, recordObserved, protowire.Fixed64Type), at)
		}
		return dst
	}
	down := [...]int{1, 2, 2}[depth]
	for i := 0; i < len(b); {
		f, next := NextField(b, i)
		if f.Tag != Tag(down, Bytes) {
			dst = append(dst, b[i:next]...)
		} else {
			dst = protowire.AppendTag(dst, FieldNumber(down), protowire.BytesType)
			start := len(dst)
			dst = insertLength(observe(dst, f.Bytes, at, depth+1), start)
		}
		i = next
	}
	return dst
}
