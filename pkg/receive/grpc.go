package receive

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zlib"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/gzip" // every OTLP server must accept gzip
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/penstock/penstock/pkg/failpoint"
	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
)

const (
	maxConcurrentStreams = 100      // per connection
	maxHeaderBytes       = 16 << 10 // of metadata

	// readAhead is how many bytes of a request a client may send before we read it.
	readAhead = 256 << 10

	// Collectors ping every 10 s by default; grpc-go's own minimum of 5 min
	// would answer them with GOAWAY too_many_pings.
	minPing        = 5 * time.Second
	idleConnection = 15 * time.Minute

	handshakeTimeout = 5 * time.Second // of TLS and HTTP/2 together
)

func (r *Receiver) newGRPC(tlsConfig *tls.Config) *grpc.Server {
	opts := []grpc.ServerOption{
		grpc.ForceServerCodecV2(otlpgrpc.Codec{}),
		grpc.MaxConcurrentStreams(maxConcurrentStreams),
		grpc.StaticStreamWindowSize(readAhead), // otherwise it grows to 16 MiB
		grpc.StaticConnWindowSize(4 * readAhead),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.ConnectionTimeout(min(handshakeTimeout, r.cfg.RequestTimeout)),
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
		// As a stream of one message: the handler runs before the message is read.
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
	if p, known := peer.FromContext(stream.Context()); known {
		began(p.Addr)
		defer answered(p.Addr)
	}
	out, ref := r.guarded(sig, nil, func(held *holding) (outcome, *refusal) { return r.exportGRPC(held, sig, stream) })
	if ref == nil {
		failpoint.During("after-answer")
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

func (r *Receiver) exportGRPC(held *holding, sig otlpwire.Signal, stream grpc.ServerStream) (outcome, *refusal) {
	md, _ := metadata.FromIncomingContext(stream.Context())
	one := func(name string) string {
		if vals := md.Get(name); len(vals) == 1 {
			return vals[0]
		}
		return ""
	}
	auth, state := one("authorization"), tlsState(stream.Context())
	if ref := r.begin(auth, state); ref != nil {
		return outcome{}, ref
	}
	msg, ref := openMessage(stream.Context())
	if ref != nil {
		return outcome{}, ref
	}
	// Bytes that arrive, or may arrive, before we read are in grpc's buffers, and count until they
	// are read.
	ahead := min(readAhead, msg.left)
	if ref := held.admit(ahead); ref != nil {
		return outcome{}, ref
	}
	buf := r.buffer()
	defer r.recycle(buf)
	ref = r.readBody(held, msg, msg.encoding, int64(msg.left), buf)
	held.release(ahead)
	if ref == nil {
		ref = msg.end()
	}
	if ref != nil {
		return outcome{}, ref
	}
	sender, ref := r.arrived(held, auth, state, len(*buf))
	if ref != nil {
		return outcome{}, ref
	}
	return r.take(stream.Context(), sig, sender, r.origin(one), request{payload: *buf, size: len(*buf)})
}

// tlsState returns how a request's connection is encrypted; nil for plain text.
func tlsState(ctx context.Context) *tls.ConnectionState {
	if p, known := peer.FromContext(ctx); known {
		if info, is := p.AuthInfo.(credentials.TLSInfo); is {
			return &info.State
		}
	}
	return nil
}

// message is the one message of a gRPC request, read from the stream piece by piece
// and decompressed by [Receiver.readBody], as a body of HTTP is. RecvMsg of grpc-go
// would read and decompress all of it before its size is known (docs/adr/0006).
type message struct {
	stream   wire
	encoding string
	left     int // bytes not read yet
}

// wire is the stream of grpc-go's transport. Its type is internal to grpc-go, its methods are
// exported; TestGRPCIsAdmittedBeforeItIsRead fails if they change.
type wire interface {
	ReadMessageHeader([]byte) error
	Read(int) (mem.BufferSlice, error)
	RecvCompress() string
}

// openMessage reads the prefix of a message: whether it is compressed, and its
// length (gRPC over HTTP/2, section on requests).
func openMessage(ctx context.Context) (*message, *refusal) {
	stream, ok := grpc.ServerTransportStreamFromContext(ctx).(wire)
	if !ok {
		panic("BUG: a gRPC stream that cannot be read piece by piece")
	}
	m := &message{stream: stream}
	var prefix [5]byte
	if err := stream.ReadMessageHeader(prefix[:]); err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("no message in an export")
		}
		return nil, bodyError(err)
	}
	if prefix[0] > 1 {
		return nil, bodyError(fmt.Errorf("message prefix begins with %d, want 0 or 1", prefix[0]))
	}
	if prefix[0] == 1 {
		if m.encoding = stream.RecvCompress(); m.encoding == "" {
			return nil, bodyError(errors.New("a compressed message without grpc-encoding"))
		}
	}
	m.left = int(binary.BigEndian.Uint32(prefix[1:]))
	return m, nil
}

func (m *message) Read(p []byte) (int, error) {
	if m.left == 0 {
		return 0, io.EOF
	}
	n := min(len(p), m.left, readAhead/2) // the transport requests from the client as much as we request from it
	data, err := m.stream.Read(n)
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, err
	}
	data.CopyTo(p)
	data.Free()
	m.left -= n
	return n, nil
}

func (m *message) Close() error { return nil }

// end reads the end of the request: an export is one message.
func (m *message) end() *refusal {
	var prefix [5]byte
	if m.left > 0 {
		return bodyError(errors.New("unexpected data after the compressed data"))
	}
	switch err := m.stream.ReadMessageHeader(prefix[:]); {
	case err == nil:
		return bodyError(errors.New("more than one message in an export"))
	case !errors.Is(err, io.EOF):
		return bodyError(err)
	}
	return nil
}

func init() {
	for _, c := range []compressor{
		{"zstd", func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1)) }},
		{"snappy", func(w io.Writer) (io.WriteCloser, error) {
			return s2.NewWriter(w, s2.WriterSnappyCompat(), s2.WriterConcurrency(1)), nil
		}},
		{"deflate", func(w io.Writer) (io.WriteCloser, error) { return zlib.NewWriter(w), nil }},
	} {
		encoding.RegisterCompressor(c)
	}
}

// compressor lets gRPC clients use other encodings than gzip: the collector has zstd and snappy,
// gRPC for C, Python and others deflate. Answers use the encoding of the request.
type compressor struct {
	name  string
	write func(io.Writer) (io.WriteCloser, error)
}

func (c compressor) Name() string { return c.name }

func (c compressor) Compress(w io.Writer) (io.WriteCloser, error) { return c.write(w) }

// Decompress is for clients in this process; requests are read by [message].
func (c compressor) Decompress(src io.Reader) (io.Reader, error) {
	return openBody(src, c.name, math.MaxInt64)
}
