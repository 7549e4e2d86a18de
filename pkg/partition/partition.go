// Package partition computes the partition of SPANS for a trace ([Of]), the partition of TRACES, METRICS
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

// Of returns the partition of a trace among n: xxhash64 of the instance id, a
// zero byte and the 16 bytes of the trace ID, modulo n. The instance is part of
// it, so that one customer cannot choose trace IDs to overload the partition of another's traces.
func Of(instance string, id otlpwire.TraceID, n int) int {
	var d xxhash.Digest
	d.Reset()
	_, _ = d.WriteString(instance)
	_, _ = d.Write(separator[:])
	_, _ = d.Write(id[:])
	return int(d.Sum64() % uint64(n))
}

var separator [1]byte

// OfInstance returns the partition among n in which the server stores an instance's messages, by the
// streams' subject transform: FNV-1a of 32 bits of the instance id, modulo n.
func OfInstance(instance string, n int) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(instance))
	return int(h.Sum32() % uint32(n))
}
