package receive

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"os"
	"slices"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/ledger"
)

// body is a request's body, decompressed while it is read.
type body interface {
	io.Reader
	window() int   // bytes that the decompressor holds besides what it returns
	finish() error // what is wrong with what follows the end
	close()        // gives the decompressor back
}

// readBody reads src, compressed as the encoding says, into buf, within the bounds.
// size is what is known of its length, -1 for nothing. It returns how many bytes it
// holds of MaxInFlight, also when it refuses.
func (r *Receiver) readBody(src io.ReadCloser, encoding string, size int64, buf *[]byte) (held int, ref *refusal) {
	limit := int(r.cfg.MaxRequest)
	if size > int64(limit) {
		return 0, tooLarge(int64(limit))
	}
	body, ref := openBody(http.MaxBytesReader(nil, src, int64(limit)), encoding)
	if ref != nil {
		return 0, ref
	}
	defer body.close()
	if ref := r.admit(body.window()); ref != nil {
		return 0, ref
	}
	defer r.release(body.window())
	b := (*buf)[:0]
	defer func() { *buf = b }()
	if ref := r.admit(cap(b)); ref != nil {
		return 0, ref
	}
	held = cap(b)
	for {
		if len(b) == cap(b) {
			grow := max(32<<10, min(cap(b), limit+1-cap(b)))
			if ref := r.admit(grow); ref != nil {
				return held, ref
			}
			held += grow
			b = slices.Grow(b, grow)
			if extra := cap(b) - held; extra > 0 { // the allocator rounds up
				r.inFlight.Add(int64(extra))
				held += extra
			}
		}
		n, err := body.Read(b[len(b):min(cap(b), limit+1)])
		if b = b[:len(b)+n]; len(b) > limit {
			return held, tooLarge(int64(limit))
		}
		if errors.Is(err, io.EOF) {
			if err = body.finish(); err == nil {
				return held, nil
			}
		}
		if err != nil {
			return held, bodyError(err)
		}
	}
}

// openBody returns src as its encoding says.
func openBody(src io.Reader, encoding string) (body, *refusal) {
	var (
		b   body
		err error
	)
	switch encoding {
	case "", "identity":
		return plainBody{src}, nil
	case "gzip":
		b, err = openGzip(src)
	case "zstd":
		b, err = openZstd(src)
	default:
		return nil, refuse(codes.InvalidArgument, http.StatusUnsupportedMediaType, ledger.RefusedMalformed, "content encoding %.40q is not supported; use gzip, zstd or none", encoding)
	}
	if err != nil {
		return nil, bodyError(err)
	}
	return b, nil
}

// bodyError is the answer to a body that could not be read.
func bodyError(err error) *refusal {
	if large, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return tooLarge(large.Limit)
	}
	if c := status.Code(err); errors.Is(err, os.ErrDeadlineExceeded) || c == codes.DeadlineExceeded || c == codes.Canceled {
		return refuse(codes.DeadlineExceeded, http.StatusRequestTimeout, ledger.RefusedTimeout, "the body did not arrive in time")
	}
	return refuse(codes.InvalidArgument, 400, ledger.RefusedMalformed, "read body: %v", err)
}

func tooLarge(limit int64) *refusal {
	return refuse(codes.ResourceExhausted, http.StatusRequestEntityTooLarge, ledger.RefusedTooLarge, "request is larger than %d bytes", limit)
}

// plainBody is one that is not compressed.
type plainBody struct{ io.Reader }

func (plainBody) window() int   { return 0 }
func (plainBody) finish() error { return nil }
func (plainBody) close()        {}

// gzipBody is one gzip member; ten thousand empty ones are an attack.
type gzipBody struct {
	gzip.Reader
	in bufio.Reader
}

var gzips = sync.Pool{New: func() any { return new(gzipBody) }}

func openGzip(src io.Reader) (*gzipBody, error) {
	g := gzips.Get().(*gzipBody)
	g.in.Reset(src)
	if err := g.Reset(&g.in); err != nil {
		g.close()
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	g.Multistream(false)
	return g, nil
}

func (g *gzipBody) window() int { return 64 << 10 }

func (g *gzipBody) finish() error {
	switch _, err := g.in.ReadByte(); {
	case err == nil:
		return errors.New("something follows the first gzip member")
	case !errors.Is(err, io.EOF):
		return err
	}
	return nil
}

func (g *gzipBody) close() {
	g.in.Reset(nil)
	gzips.Put(g)
}

// zstdBody allocates the window that a frame claims, within a bound. It has no
// goroutine that would have to be ended.
type zstdBody struct{ *zstd.Decoder }

const maxZstdWindow = 8 << 20 // what the zstd specification asks decoders to support

func (*zstdBody) window() int { return maxZstdWindow }

var zstds = sync.Pool{New: func() any {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxZstdWindow), zstd.WithDecoderLowmem(true))
	if err != nil {
		panic("BUG: zstd decoder: " + err.Error())
	}
	return &zstdBody{dec}
}}

func openZstd(src io.Reader) (*zstdBody, error) {
	z := zstds.Get().(*zstdBody)
	if err := z.Reset(src); err != nil {
		z.close()
		return nil, err
	}
	return z, nil
}

func (z *zstdBody) finish() error { return nil } // it reads frames to the end

func (z *zstdBody) close() {
	_ = z.Reset(nil)
	zstds.Put(z)
}
