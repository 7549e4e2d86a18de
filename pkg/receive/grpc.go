package receive

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
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
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/planted"
)

const (
	maxConcurrentStreams = 100      // per connection
	maxHeaderBytes       = 16 << 10 // of metadata

	// readAhead is what a client may send of a request before it is read. It counts
	// as in flight from then on, the rest of a larger request when it has been read.
	readAhead = 256 << 10

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
		grpc.StatsHandler(encodings{}),
		grpc.StaticStreamWindowSize(readAhead), // otherwise it grows to 16 MiB
		grpc.StaticConnWindowSize(4 * readAhead),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.ConnectionTimeout(10 * time.Second),
		// A stream that is opened and never finished ends with its deadline.
		grpc.InTapHandle(func(stream context.Context, _ *tap.Info) (context.Context, error) {
			ctx, cancel := context.WithTimeout(stream, r.cfg.RequestTimeout)
			context.AfterFunc(stream, cancel)
			return ctx, nil
		}),
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
		// As a stream of one message: the handler runs before the message is read,
		// so that a sender is known first, and words what is wrong with it.
		srv.RegisterService(&grpc.ServiceDesc{
			ServiceName: otlpgrpc.Service(sig),
			HandlerType: (*any)(nil),
			Streams: []grpc.StreamDesc{{StreamName: "Export", ClientStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
				return r.export(sig, stream)
			}}},
		}, r)
	}
	return srv
}

// export answers one gRPC request.
func (r *Receiver) export(sig otlpwire.Signal, stream grpc.ServerStream) error {
	out, ref := r.exportGRPC(sig, stream)
	if ref == nil {
		planted.During("after-answer")
		return stream.SendMsg(appendResponse(nil, out))
	}
	r.refused(sig, ref)
	st := status.New(ref.code, ref.text)
	if ref.retry > 0 {
		if with, err := st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(ref.retry)}); err == nil {
			st = with
		}
	}
	return st.Err()
}

func (r *Receiver) exportGRPC(sig otlpwire.Signal, stream grpc.ServerStream) (outcome, *refusal) {
	md, _ := metadata.FromIncomingContext(stream.Context())
	one := func(name string) string {
		if vals := md.Get(name); len(vals) == 1 {
			return vals[0]
		}
		return ""
	}
	sender, ref := r.identify(one("authorization"))
	if ref != nil {
		return outcome{}, ref
	}
	held := min(readAhead, int(r.cfg.MaxRequest))
	if window := windowOf(stream.Context()); window > 0 {
		if ref := r.admit(window); ref != nil {
			return outcome{}, ref
		}
		defer r.release(window)
	}
	if ref := r.admit(held); ref != nil {
		return outcome{}, ref
	}
	defer func() { r.release(held) }()
	var raw mem.BufferSlice
	if err := stream.RecvMsg(&raw); err != nil {
		return outcome{}, unread(err)
	}
	defer func() { raw.Free() }()
	if more := raw.Len() - held; more <= 0 {
		r.release(-more)
		held += more
	} else if ref := r.admit(more); ref != nil {
		return outcome{}, ref
	} else {
		held += more
	}
	var more mem.BufferSlice
	if err := stream.RecvMsg(&more); !errors.Is(err, io.EOF) {
		more.Free()
		if err == nil {
			err = errors.New("more than one message in an export")
		}
		return outcome{}, unread(err)
	}
	// A request of one HTTP/2 frame (16 KiB) is worked on where it was read; a
	// larger one is joined in a buffer of the pool that the frames came from, and
	// they go back.
	joined := raw.MaterializeToBuffer(mem.DefaultBufferPool())
	defer joined.Free()
	if len(raw) > 1 {
		raw.Free()
		raw = nil
	}
	return r.take(stream.Context(), sig, sender, r.origin(one), joined.ReadOnlyData())
}

// unread is the answer to a request that grpc could not read. INTERNAL, by which
// it means a broken frame, would read as a fault of ours; where it has answered
// already, this is for the ledger.
func unread(err error) *refusal {
	if errors.Is(err, io.EOF) {
		err = errors.New("no message in an export")
	}
	st := status.Convert(err)
	code, reason := st.Code(), ledger.RefusedMalformed
	switch code {
	case codes.ResourceExhausted:
		reason = ledger.RefusedTooLarge
	case codes.DeadlineExceeded, codes.Canceled:
		reason = ledger.RefusedTimeout
	case codes.Internal, codes.Unknown:
		code = codes.InvalidArgument
	}
	return refuse(code, 400, reason, "%s", st.Message())
}

// encodings notes what a request's header says of its compression; the decompressor
// itself is not told whose request it reads.
type encodings struct{}

type windowKey struct{}

func (encodings) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, windowKey{}, new(int))
}

func (encodings) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if h, ok := s.(*stats.InHeader); ok && h.Compression == "zstd" {
		if window, ok := ctx.Value(windowKey{}).(*int); ok {
			*window = maxZstdWindow
		}
	}
}

func (encodings) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (encodings) HandleConn(context.Context, stats.ConnStats)                       {}

// windowOf returns what the decompressor of a request may hold, in bytes.
func windowOf(ctx context.Context) int {
	if window, ok := ctx.Value(windowKey{}).(*int); ok {
		return *window
	}
	return 0
}

func init() { encoding.RegisterCompressor(zstdCompressor{}) }

// zstdCompressor lets gRPC clients send zstd, as the collector does.
type zstdCompressor struct{}

func (zstdCompressor) Name() string { return "zstd" }

func (zstdCompressor) Compress(w io.Writer) (io.WriteCloser, error) {
	return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
}

// Decompress returns a reader that goes back to the pool at its end. One that is
// not read to its end is left to the garbage collector.
func (zstdCompressor) Decompress(src io.Reader) (io.Reader, error) {
	z, err := openZstd(src)
	if err != nil {
		return nil, err
	}
	return &untilEOF{z}, nil
}

type untilEOF struct{ z *zstdBody }

func (u *untilEOF) Read(p []byte) (int, error) {
	if u.z == nil {
		return 0, io.EOF
	}
	n, err := u.z.Read(p)
	if err == io.EOF {
		u.z.close()
		u.z = nil
	}
	return n, err
}
