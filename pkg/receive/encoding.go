package receive

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zlib"
	"github.com/klauspost/compress/zstd"
)

// errEncoding is what openBody returns for an encoding that it does not know.
var errEncoding = errors.New("use gzip, zstd, deflate, snappy or none")

// openBody returns src decoded, by the names of HTTP's Content-Encoding and gRPC's grpc-encoding.
// A body that declares a decoded length above limit is refused before it is read.
func openBody(src io.Reader, encoding string, limit int64) (body, error) {
	switch encoding {
	case "", "identity":
		return plainBody{src}, nil
	case "gzip", "x-gzip": // RFC 9110, section 8.4.1.3: the same
		return openGzip(src)
	case "zstd":
		return openZstd(src)
	case "deflate", "zlib":
		return openDeflate(src)
	case "snappy", "x-snappy-framed":
		return openSnappy(src, limit)
	}
	return nil, fmt.Errorf("content encoding %.40q is not supported; %w", encoding, errEncoding)
}

// windowOf returns the bytes that the decompressor of an encoding holds, besides what it
// returns.
func windowOf(encoding string) int {
	switch encoding {
	case "gzip", "x-gzip":
		return flateWindow
	case "zstd":
		return maxZstdWindow
	case "deflate", "zlib":
		return 2 * flateWindow // there may be one of each
	case "snappy", "x-snappy-framed":
		return 3 * maxSnappyChunk
	}
	return 0
}

// cut turns an end of file within a body into an error that says so.
func cut(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// plainBody is an uncompressed body.
type plainBody struct{ io.Reader }

func (plainBody) close() {}

// maxMembers is how many members one gzip body may have: the number of blocks of 64 KiB, the unit of
// tools that compress in parallel, in four requests of the recommended size. A body of more and
// smaller members only serves to waste CPU time.
const maxMembers = 4096

// flateWindow is the memory of an inflater and its input.
const flateWindow = 64 << 10

// gzipBody is a sequence of gzip members (RFC 1952, section 2.2), with the zeros that gzip allows
// after the last one.
type gzipBody struct {
	gzip.Reader
	in      bufio.Reader
	members int
}

var gzips = sync.Pool{New: func() any { return new(gzipBody) }}

func openGzip(src io.Reader) (body, error) {
	g := gzips.Get().(*gzipBody)
	g.in.Reset(src)
	g.members = 0
	if err := g.member(); err != nil {
		g.close()
		return nil, err
	}
	return g, nil
}

// member begins the next member.
func (g *gzipBody) member() error {
	if g.members++; g.members > maxMembers {
		return fmt.Errorf("more than %d gzip members", maxMembers)
	}
	if err := g.Reset(&g.in); err != nil {
		return cut(err)
	}
	g.Multistream(false)
	return nil
}

func (g *gzipBody) Read(p []byte) (int, error) {
	n, err := g.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		err = g.next()
	}
	return n, err
}

// next continues after the end of a member. io.EOF: there is nothing more.
func (g *gzipBody) next() error {
	const first = 0x1f // byte of a member
	c, err := g.in.ReadByte()
	if err == nil && c == first {
		_ = g.in.UnreadByte()
		return g.member()
	}
	for ; err == nil; c, err = g.in.ReadByte() {
		if c != 0 {
			return errors.New("what follows the last gzip member is neither another one nor zeros")
		}
	}
	return err
}

func (g *gzipBody) close() {
	g.in.Reset(nil)
	gzips.Put(g)
}

// deflateBody is what HTTP calls deflate: a zlib stream, or, from senders that take the name
// literally, raw deflate data.
type deflateBody struct {
	in        bufio.Reader
	data      io.Reader // one of the following
	zlib, raw io.ReadCloser
}

var deflates = sync.Pool{New: func() any { return new(deflateBody) }}

func openDeflate(src io.Reader) (body, error) {
	d := deflates.Get().(*deflateBody)
	d.in.Reset(src)
	if err := d.open(); err != nil {
		d.close()
		return nil, cut(err)
	}
	return d, nil
}

func (d *deflateBody) open() (err error) {
	head, err := d.in.Peek(2)
	if len(head) < 2 {
		return err
	}
	switch {
	case !isZlib(head) && d.raw == nil:
		d.raw = flate.NewReader(&d.in)
	case !isZlib(head):
		err = d.raw.(flate.Resetter).Reset(&d.in, nil)
	case d.zlib == nil:
		d.zlib, err = zlib.NewReader(&d.in)
	default:
		err = d.zlib.(zlib.Resetter).Reset(&d.in, nil)
	}
	if d.data = d.raw; isZlib(head) {
		d.data = d.zlib
	}
	return err
}

// isZlib reports whether data that begin with head are a zlib stream (RFC 1950, section 2.2).
// Raw deflate data can begin in this way only if they are padded with bits other than zero.
func isZlib(head []byte) bool {
	return head[0]&0x0f == 8 && head[0]>>4 <= 7 && binary.BigEndian.Uint16(head)%31 == 0
}

func (d *deflateBody) Read(p []byte) (int, error) {
	n, err := d.data.Read(p)
	if errors.Is(err, io.EOF) {
		if _, err = d.in.ReadByte(); err == nil {
			err = errors.New("unexpected data after the deflate data")
		}
	}
	return n, err
}

func (d *deflateBody) close() {
	d.in.Reset(nil)
	deflates.Put(d)
}

// snappyMagic begins a snappy stream: its first chunk.
const snappyMagic = "\xff\x06\x00\x00sNaPpY"

// snappyStream is snappy's framing format: chunks of up to 64 KiB each.
type snappyStream struct {
	*s2.Reader
	in bufio.Reader
}

// snappyBlock is a block that is not decoded while it is read: decoding needs all of it, see
// [Receiver.decodeBlock].
type snappyBlock struct{ *snappyStream }

const maxSnappyChunk = 64 << 10

var snappies = sync.Pool{New: func() any {
	return &snappyStream{Reader: s2.NewReader(nil, s2.ReaderMaxBlockSize(maxSnappyChunk))}
}}

// openSnappy accepts both of snappy's formats, as the collector does: the name means the block
// format, but was long used for the framing format, which gRPC clients also send.
func openSnappy(src io.Reader, limit int64) (body, error) {
	s := snappies.Get().(*snappyStream)
	s.in.Reset(src)
	head, err := s.in.Peek(len(snappyMagic))
	if bytes.Equal(head, []byte(snappyMagic)) {
		s.Reader.Reset(&s.in)
		return s, nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		var size uint64
		if size, err = blockSize(head); err == nil {
			if size <= uint64(limit) {
				return &snappyBlock{s}, nil
			}
			err = &http.MaxBytesError{Limit: limit}
		}
	}
	s.close()
	return nil, err
}

// blockSize reads the length at the beginning of a block.
func blockSize(head []byte) (uint64, error) {
	size, n := binary.Uvarint(head)
	switch {
	case n == 0:
		return 0, io.ErrUnexpectedEOF
	case n < 0:
		return 0, errors.New("snappy: a block without a length")
	}
	return size, nil
}

func (s *snappyStream) close() {
	s.in.Reset(nil)
	s.Reader.Reset(nil)
	snappies.Put(s)
}

// Read returns the encoded block.
func (b *snappyBlock) Read(p []byte) (int, error) { return b.in.Read(p) }

// zstdBody allocates the window that a frame declares, within a bound. It has no goroutine to stop.
type zstdBody struct{ *zstd.Decoder }

const maxZstdWindow = 8 << 20 // what the zstd specification asks decoders to support

var zstds = sync.Pool{New: func() any {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxRequestBytes), zstd.WithDecoderMaxWindow(maxZstdWindow), zstd.WithDecoderLowmem(true))
	if err != nil {
		panic("BUG: zstd decoder: " + err.Error())
	}
	return &zstdBody{dec}
}}

func openZstd(src io.Reader) (body, error) {
	z := zstds.Get().(*zstdBody)
	if err := z.Reset(src); err != nil {
		z.close()
		return nil, err
	}
	return z, nil
}

func (z *zstdBody) close() {
	_ = z.Reset(nil)
	zstds.Put(z)
}
