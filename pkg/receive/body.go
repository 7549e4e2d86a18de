package receive

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"

	"github.com/klauspost/compress/s2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/ledger"
)

// body is a request's body, decompressed while it is read.
type body interface {
	io.Reader
	close() // returns the decompressor to its pool
}

// readBody reads src, which has the given encoding, into buf, within the bounds. size is its
// length, -1 if unknown. It returns how many bytes of MaxInFlight it holds, also when it refuses.
func (r *Receiver) readBody(src io.ReadCloser, encoding string, size int64, buf *[]byte) (held int, ref *refusal) {
	limit := int64(r.cfg.MaxRequest)
	if size > limit {
		return 0, tooLarge(limit)
	}
	// Before anything is read: the first bytes may take long to arrive.
	window := windowOf(encoding)
	if ref := r.admit(window); ref != nil {
		return 0, ref
	}
	defer r.release(window)
	b, err := openBody(http.MaxBytesReader(nil, src, limit), encoding, limit)
	if err != nil {
		return 0, bodyError(err)
	}
	defer b.close()
	if held, ref = r.fill(b, buf); ref != nil {
		return held, ref
	}
	if _, is := b.(*snappyBlock); is {
		return r.decodeBlock(buf, held)
	}
	return held, nil
}

// fill reads b to its end into buf, and admits the bytes by which buf grows before it grows.
func (r *Receiver) fill(src io.Reader, buf *[]byte) (held int, ref *refusal) {
	limit := int(r.cfg.MaxRequest)
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
		n, err := src.Read(b[len(b):min(cap(b), limit+1)])
		if b = b[:len(b)+n]; len(b) > limit {
			return held, tooLarge(int64(limit))
		}
		if errors.Is(err, io.EOF) {
			return held, nil
		}
		if err != nil {
			return held, bodyError(err)
		}
	}
}

// decodeBlock replaces the snappy block in buf by its decoded content.
func (r *Receiver) decodeBlock(buf *[]byte, held int) (int, *refusal) {
	const most = 22 // times as long: three bytes encode at most 64
	n, err := s2.DecodedLen(*buf)
	if err == nil && n > most*len(*buf) {
		err = fmt.Errorf("snappy: %d bytes cannot decode to %d", len(*buf), n)
	}
	if err != nil {
		return held, bodyError(err)
	}
	decoded := r.buffer()
	defer r.recycle(decoded)
	size := max(n, cap(*decoded))
	if ref := r.admit(size); ref != nil {
		return held, ref
	}
	if cap(*decoded) < n {
		*decoded = make([]byte, n)
	}
	out, err := s2.Decode((*decoded)[:cap(*decoded)], *buf)
	if err != nil {
		r.release(size)
		return held, bodyError(err)
	}
	*buf, *decoded = out, *buf
	r.release(held)
	return size, nil
}

// bodyError is the answer to a body that could not be read.
func bodyError(err error) *refusal {
	if large, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return tooLarge(large.Limit)
	}
	if errors.Is(err, errEncoding) {
		return refuse(codes.InvalidArgument, http.StatusUnsupportedMediaType, ledger.RefusedMalformed, "%v", err)
	}
	if c := status.Code(err); errors.Is(err, os.ErrDeadlineExceeded) || c == codes.DeadlineExceeded || c == codes.Canceled {
		return refuse(codes.DeadlineExceeded, http.StatusRequestTimeout, ledger.RefusedTimeout, "the body did not arrive in time")
	}
	return refuse(codes.InvalidArgument, 400, ledger.RefusedMalformed, "read body: %v", err)
}

func tooLarge(limit int64) *refusal {
	return refuse(codes.ResourceExhausted, http.StatusRequestEntityTooLarge, ledger.RefusedTooLarge, "request is larger than %d bytes", limit)
}
