package receive

import (
	"bufio"
	"errors"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// body is a request's body, decompressed while it is read.
type body interface {
	io.Reader
	window() int   // bytes that the decompressor holds besides what it returns
	finish() error // what is wrong with what follows the end
	close()        // gives the decompressor back
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
