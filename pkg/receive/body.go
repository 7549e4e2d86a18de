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
// length, -1 if unknown. The capacity of buf is held afterwards, also when it refuses.
func (r *Receiver) readBody(held *holding, src io.ReadCloser, encoding string, size int64, buf *[]byte) *refusal {
	limit := int64(r.cfg.MaxRequest)
	if size > limit {
		return tooLarge(limit)
	}
	// Before anything is read: the first bytes may take long to arrive.
	window := windowOf(encoding)
	if ref := held.admit(window); ref != nil {
		return ref
	}
	defer held.release(window)
	b, err := openBody(http.MaxBytesReader(nil, src, limit), encoding, limit)
	if err != nil {
		return bodyError(err)
	}
	ref := r.fill(held, b, buf)
	b.close() // not if it has panicked: then it is not used again
	if _, is := b.(*snappyBlock); is && ref == nil {
		return r.decodeBlock(held, buf)
	}
	return ref
}

// fill reads b to its end into buf, and admits the bytes by which buf grows before it grows.
func (r *Receiver) fill(held *holding, src io.Reader, buf *[]byte) *refusal {
	limit := int(r.cfg.MaxRequest)
	b := (*buf)[:0]
	defer func() { *buf = b }()
	if ref := held.admit(cap(b)); ref != nil {
		return ref
	}
	for {
		if len(b) == cap(b) {
			before, grow := cap(b), max(32<<10, min(cap(b), limit+1-cap(b)))
			if ref := held.admit(grow); ref != nil {
				return ref
			}
			b = slices.Grow(b, grow)
			held.add(cap(b) - before - grow) // the allocator rounds up
		}
		n, err := src.Read(b[len(b):min(cap(b), limit+1)])
		if b = b[:len(b)+n]; len(b) > limit {
			return tooLarge(int64(limit))
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return bodyError(err)
		}
	}
}

// decodeBlock replaces the snappy block in buf by its decoded content.
func (r *Receiver) decodeBlock(held *holding, buf *[]byte) *refusal {
	const most = 22 // times as long: three bytes encode at most 64
	n, err := s2.DecodedLen(*buf)
	if err == nil && n > most*len(*buf) {
		err = fmt.Errorf("snappy: %d bytes cannot decode to %d", len(*buf), n)
	}
	if err != nil {
		return bodyError(err)
	}
	decoded := r.buffer()
	defer r.recycle(decoded)
	if ref := held.admit(max(n, cap(*decoded))); ref != nil {
		return ref
	}
	if cap(*decoded) < n {
		*decoded = make([]byte, n)
	}
	out, err := s2.Decode((*decoded)[:cap(*decoded)], *buf)
	if err != nil {
		return bodyError(err)
	}
	*buf, *decoded = out, *buf
	held.release(cap(*decoded))
	return nil
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
