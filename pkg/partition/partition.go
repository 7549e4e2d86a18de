// Package partition computes the partition of SPANS for a trace ([Spread]), the partition of TRACES, METRICS
// and LOGS for an instance ([OfInstance]), and which member should own a partition ([Place]). The first two
// are part of the bus contract (docs/bus.md): they never change for a stream, because that would split
// traces. A late or wrong view of the members only makes the result of Place unbalanced.
//
// # Not here
//
// The members, and the actual ownership of partitions: package bus.
package partition

import (
	"hash/fnv"

	"github.com/cespare/xxhash/v2"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// Spread is how traces are spread over the N partitions of SPANS: by trace ID, so that all spans of a trace meet,
// from whichever instances they come; where SPANS was created by an earlier version, by instance and trace ID.
type Spread struct {
	N          int
	ByInstance bool
}

// Of returns the partition of a trace: xxhash64 of the 16 bytes of its ID, modulo N; ByInstance, of the instance
// id, a zero byte and those.
func (s Spread) Of(instance string, id otlpwire.TraceID) int {
	var d xxhash.Digest
	d.Reset()
	if s.ByInstance {
		_, _ = d.WriteString(instance)
		_, _ = d.Write(separator[:])
	}
	_, _ = d.Write(id[:])
	return int(d.Sum64() % uint64(s.N))
}

var separator [1]byte

// OfInstance returns the partition among n in which the server stores an instance's messages, by the
// streams' subject transform: FNV-1a of 32 bits of the instance id, modulo n.
func OfInstance(instance string, n int) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(instance))
	return int(h.Sum32() % uint32(n))
}
