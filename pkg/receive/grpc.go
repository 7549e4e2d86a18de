package receive

import (
	"context"
	"crypto/tls"
	"io"
	"slices"
	"time"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/gzip" // every OTLP server must take gzip
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
)

const (
	maxConcurrentStreams = 100      // per connection
	maxHeaderBytes       = 16 << 10 // of metadata

	// Collectors ping every 10 s by default; grpc-go's own minimum of 5 min
	// would answer them with GOAWAY too_many_pings.
	minPing        = 5 * time.Second
	idleConnection = 15 * time.Minute
)

func (r *Receiver) newGRPC(tlsConfig *tls.Config) *grpc.Server {
	opts := []grpc.ServerOption{
		grpc.ForceServerCodecV2(otlpgrpc.Codec{}),
		grpc.MaxRecvMsgSize(int(r.cfg.MaxRequest)), // after decompression, too
		grpc.MaxConcurrentStreams(maxConcurrentStreams),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: idleConnection, MaxConnectionAge: r.cfg.GRPC.MaxConnectionAge, MaxConnectionAgeGrace: graceTimeout,
		}),
	}
	if tlsConfig != nil {
		opts = append(opts, grpc.Creds(credentials.NewTLS(tlsConfig)))
	}
	srv := grpc.NewServer(opts...)
	for _, sig := range otlpwire.Signals {
		srv.RegisterService(&grpc.ServiceDesc{
			ServiceName: otlpgrpc.Service(sig),
			HandlerType: (*any)(nil),
			Methods: []grpc.MethodDesc{{MethodName: "Export", Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
				return r.export(ctx, sig, decode)
			}}},
		}, r)
	}
	return srv
}

// export answers one gRPC request.
func (r *Receiver) export(ctx context.Context, sig otlpwire.Signal, decode func(any) error) (any, error) {
	out, ref := r.exportRaw(ctx, sig, decode)
	if ref == nil {
		return appendResponse(nil, out), nil
	}
	r.refused(sig, ref)
	st := status.New(ref.code, ref.text)
	if ref.retry > 0 {
		if with, err := st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(ref.retry)}); err == nil {
			st = with
		}
	}
	return nil, st.Err()
}

func (r *Receiver) exportRaw(ctx context.Context, sig otlpwire.Signal, decode func(any) error) (outcome, *refusal) {
	auth := ""
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		if vals := md.Get("authorization"); len(vals) == 1 {
			auth = vals[0]
		}
	}
	sender, ref := r.identify(auth)
	if ref != nil {
		return outcome{}, ref
	}
	var raw mem.BufferSlice
	if err := decode(&raw); err != nil {
		reason := ledger.RefusedMalformed
		if status.Code(err) == codes.ResourceExhausted {
			reason = ledger.RefusedTooLarge
		}
		return outcome{}, refuse(status.Code(err), 400, reason, "%s", status.Convert(err).Message())
	}
	defer raw.Free()
	if ref := r.admit(raw.Len()); ref != nil {
		return outcome{}, ref
	}
	defer r.release(raw.Len())
	// take writes to the payload, and a pooled buffer may be shared: copy.
	buf := r.buffer()
	defer r.recycle(buf)
	*buf = slices.Grow((*buf)[:0], raw.Len())[:raw.Len()]
	raw.CopyTo(*buf)
	return r.take(ctx, sig, sender, *buf)
}

func init() { encoding.RegisterCompressor(zstdCompressor{}) }

// zstdCompressor lets gRPC clients send zstd, as the collector does.
type zstdCompressor struct{}

func (zstdCompressor) Name() string { return "zstd" }

func (zstdCompressor) Compress(w io.Writer) (io.WriteCloser, error) {
	return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
}

func (zstdCompressor) Decompress(src io.Reader) (io.Reader, error) { return newZstd(src) }

const maxZstdWindow = 8 << 20 // what the zstd specification asks decoders to support

// newZstd returns a decoder that does not allocate what a frame merely claims.
// grpc and the HTTP handler read it to the end or give it up: with a
// concurrency of one it has no goroutine that would have to be closed.
func newZstd(src io.Reader) (io.Reader, error) {
	return zstd.NewReader(src, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxZstdWindow), zstd.WithDecoderLowmem(true))
}
