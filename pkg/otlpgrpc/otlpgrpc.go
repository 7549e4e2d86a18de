// Package otlpgrpc names the three OTLP/gRPC services and carries their messages
// as bytes, for servers and clients that do not decode them.
package otlpgrpc

import (
	"fmt"

	"google.golang.org/grpc/mem"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// Service returns the full name of the service for a signal.
func Service(sig otlpwire.Signal) string {
	return [...]string{
		otlpwire.Traces:  "opentelemetry.proto.collector.trace.v1.TraceService",
		otlpwire.Metrics: "opentelemetry.proto.collector.metrics.v1.MetricsService",
		otlpwire.Logs:    "opentelemetry.proto.collector.logs.v1.LogsService",
	}[sig]
}

// Method returns the path of a signal's only method.
func Method(sig otlpwire.Signal) string { return "/" + Service(sig) + "/Export" }

// Codec is a grpc CodecV2 for messages that are already encoded. It sends a
// []byte and receives into a *[]byte, which is a copy, or a *mem.BufferSlice,
// which the receiver must free.
type Codec struct{}

// Name is the name of the codec that it replaces.
func (Codec) Name() string { return "proto" }

// Marshal keeps the slice until it is sent.
func (Codec) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.([]byte)
	if !ok {
		return nil, fmt.Errorf("BUG: a message to be sent is a %T", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

// Unmarshal fills v.
func (Codec) Unmarshal(msg mem.BufferSlice, v any) error {
	switch v := v.(type) {
	case *mem.BufferSlice:
		msg.Ref()
		*v = msg
	case *[]byte:
		*v = msg.Materialize()
	default:
		return fmt.Errorf("BUG: a message is received into a %T", v)
	}
	return nil
}
