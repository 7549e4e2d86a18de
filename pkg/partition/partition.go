// Package partition says which partition a trace belongs to ([Of]) and which
// member should own a partition ([Place]). Of is a part of the bus contract
// (docs/bus.md): it never changes for a stream, for that would split traces. A
// late or wrong view of the members costs Place balance, nothing else.
//
// # Not here
//
// The partition of metrics and logs: the server computes it from the instance
// in the stream's subject transform. Who the members are, and who really owns a
// partition: package bus.
package partition

import (
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
