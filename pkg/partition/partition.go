// Package partition says which partition of SPANS a trace belongs to ([Of]), in which
// one of TRACES, METRICS and LOGS an instance is ([OfInstance]), and which member
// should own a partition ([Place]). The first two are a part of the bus contract
// (docs/bus.md): they never change for a stream, for that would split traces. A
// late or wrong view of the members costs Place balance, nothing else.
//
// # Not here
//
// Who the members are, and who really owns a partition: package bus.
package partition

import (
	"hash/fnv"

	"github.com/cespare/xxhash/v2"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// Of returns the partition of a trace among n: xxhash64 of the instance id, a
// zero byte and the 16 bytes of the trace ID, modulo n. The instance is part of
// it, so that one customer's choice of trace IDs cannot load the partition of
// another's traces at will.
func Of(instance string, id otlpwire.TraceID, n int) int {
	var d xxhash.Digest
	d.Reset()
	_, _ = d.WriteString(instance)
	_, _ = d.Write(separator[:])
	_, _ = d.Write(id[:])
	return int(d.Sum64() % uint64(n))
}

var separator [1]byte

// OfInstance returns the partition among n in which the server stores what an instance
// sends, by the streams' subject transform: FNV-1a of 32 bits of the instance id, modulo n.
func OfInstance(instance string, n int) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(instance))
	return int(h.Sum32() % uint32(n))
}
