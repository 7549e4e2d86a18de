// Package tempo is a Tempo for tests: OTLP/gRPC in, every span kept in memory.
// It enforces what Tempo's distributor enforces:
//
//   - a push with one trace ID that is not 16 bytes, or one span ID that is not
//     8 bytes or is zero, is refused whole with INVALID_ARGUMENT;
//   - attribute values longer than 2048 bytes are truncated;
//   - a push larger than rate and burst together is RESOURCE_EXHAUSTED with
//     RetryInfo, for ever.
package tempo

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/test/backend/tenants"
)

// Span is one span as it arrived.
type Span struct {
	Resource *resourcepb.Resource
	Span     *tracepb.Span
	Came     time.Time // when the push was taken
}

// Attribute returns a string attribute of the span's resource.
func (s Span) Attribute(key string) string {
	for _, kv := range s.Resource.GetAttributes() {
		if kv.GetKey() == key {
			return kv.GetValue().GetStringValue()
		}
	}
	return ""
}

// Server is a running Tempo.
type Server struct {
	tenants.Script[error]
	collectorpb.UnimplementedTraceServiceServer
	Addr string

	mu struct {
		sync.Mutex
		spans  []Span
		pushes [][]string // instance ids of every push
		fail   error
		slow   time.Duration
	}
}

const (
	maxAttribute = 2048
	maxPush      = 30_000_000
)

// Start serves on loopback until the test ends.
func Start(t testing.TB) *Server {
	t.Helper()
	s, stop, err := Serve()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return s
}

// Serve serves on loopback until stop.
func Serve() (s *Server, stop func(), err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	s = &Server{Addr: ln.Addr().String()}
	srv := grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
	collectorpb.RegisterTraceServiceServer(srv, s)
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	return s, func() { srv.Stop(); <-done }, nil
}

// Fail makes every push fail with err until it is called with nil.
func (s *Server) Fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.fail = err
}

// Slow makes every push take so long.
func (s *Server) Slow(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.slow = d
}

// Spans returns what has arrived, in the order of arrival.
func (s *Server) Spans() []Span {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Span(nil), s.mu.spans...)
}

// Pushes returns the instance ids in every accepted push.
func (s *Server) Pushes() [][]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([][]string(nil), s.mu.pushes...)
}

// Export implements the OTLP service.
func (s *Server) Export(ctx context.Context, req *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	tenant := ""
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("x-scope-orgid")) > 0 {
		tenant = md.Get("x-scope-orgid")[0]
	}
	s.mu.Lock()
	slow := s.mu.slow
	s.mu.Unlock()
	if !s.Wait(ctx, tenant, slow) {
		return nil, ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.fail != nil {
		return nil, s.mu.fail
	}
	if err := s.Answer(tenant); err != nil {
		return nil, err
	}
	size, now := 0, time.Now()
	var spans []Span
	var instances []string
	for _, rs := range req.GetResourceSpans() {
		truncate(rs.GetResource().GetAttributes())
		for _, ss := range rs.GetScopeSpans() {
			for _, sp := range ss.GetSpans() {
				if len(sp.GetTraceId()) != 16 {
					return nil, status.Error(codes.InvalidArgument, "trace ids must be 128 bit")
				}
				if len(sp.GetSpanId()) != 8 || allZero(sp.GetSpanId()) {
					return nil, status.Error(codes.InvalidArgument, "span ids must be 64 bit and not zero")
				}
				truncate(sp.GetAttributes())
				spans = append(spans, Span{rs.GetResource(), sp, now})
				instances = append(instances, spans[len(spans)-1].Attribute("instance.id"))
				size += 100
			}
		}
	}
	if size > maxPush {
		return nil, status.Errorf(codes.ResourceExhausted, "RATE_LIMITED: batch size (%d bytes) exceeds ingestion limit", size)
	}
	s.mu.spans = append(s.mu.spans, spans...)
	s.mu.pushes = append(s.mu.pushes, instances)
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

func truncate(attrs []*commonpb.KeyValue) {
	for _, kv := range attrs {
		if v, ok := kv.GetValue().GetValue().(*commonpb.AnyValue_StringValue); ok && len(v.StringValue) > maxAttribute {
			v.StringValue = v.StringValue[:maxAttribute]
		}
	}
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
