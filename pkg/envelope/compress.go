package envelope

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// Encoding is how a body is compressed, as in the header Content-Encoding; empty for no compression.
type Encoding string

// The encodings. S2 is the default; Zstd makes messages smaller by a quarter to
// a third and takes three to five times as long (docs/adr/0003).
const (
	S2   Encoding = "s2"
	Zstd Encoding = "zstd"
)

const (
	// MaxPayload is how many bytes of payload go into one message, uncompressed. A
	// stock server refuses messages of more than 1 MiB with headers; 64 KiB are
	// for those and for frames.
	MaxPayload = 1<<20 - 64<<10

	// MaxBody is the largest size of a decompressed body, in bytes: far more than a sender that
	// keeps to MaxPayload needs.
	MaxBody = 2 * MaxPayload
)

// MaxRatio is how many times larger than its compressed form a body of more than ratioFrom bytes may
// be. Spans have identifiers that do not compress, and stay far below; a few bytes that decompress to
// very much cost the hub little and every reader a lot.
const (
	MaxRatio  = 256
	ratioFrom = 64 << 10
)

func amplified(compressed, body int) bool { return body > ratioFrom && body/MaxRatio > compressed }

// minCompress is the size below which compression is not worth a header.
const minCompress = 256

// Compress returns the compressed body, in dst's memory if that is large enough, and the encoding; or
// body itself and "" if the compressed form is not smaller, or so small that Decompress would refuse
// it.
func Compress(dst, body []byte, e Encoding) ([]byte, Encoding) {
	if len(body) < minCompress {
		return body, ""
	}
	var out []byte
	switch e {
	case Zstd:
		out = zstdEncoder().EncodeAll(body, dst[:0])
	case S2:
		out = s2.Encode(dst[:cap(dst)], body)
	default:
		return body, ""
	}
	if len(out) >= len(body) || amplified(len(out), len(body)) {
		return body, ""
	}
	return out, e
}

// The coders keep their tables and are safe for concurrent use.
var (
	zstdEncoder = sync.OnceValue(func() *zstd.Encoder {
		enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(1<<20), zstd.WithLowerEncoderMem(true))
		if err != nil {
			panic(fmt.Sprintf("BUG: zstd encoder: %v", err))
		}
		return enc
	})
	zstdDecoder = sync.OnceValue(func() *zstd.Decoder {
		dec, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(MaxBody), zstd.WithDecoderMaxWindow(1<<20), zstd.WithDecoderLowmem(true), zstd.WithDecoderConcurrency(0))
		if err != nil {
			panic(fmt.Sprintf("BUG: zstd decoder: %v", err))
		}
		return dec
	})
)

// ErrTooLarge reports a body that would grow beyond MaxBody, or by more than MaxRatio.
var ErrTooLarge = errors.New("decompressed body too large")

var errAmplified = fmt.Errorf("%w: more than %d times its compressed size", ErrTooLarge, MaxRatio)

// Decompress reverses Compress, in dst's memory if that is large enough. The result may be body itself.
func Decompress(dst, body []byte, e Encoding) ([]byte, error) {
	switch e {
	case "":
		if len(body) > MaxBody {
			return nil, ErrTooLarge
		}
		return body, nil
	case S2:
		n, err := s2.DecodedLen(body)
		if err != nil {
			return nil, fmt.Errorf("s2 body: %w", err)
		}
		if n > MaxBody {
			return nil, ErrTooLarge
		}
		if amplified(len(body), n) {
			return nil, errAmplified
		}
		out, err := s2.Decode(slices.Grow(dst[:0], n)[:n], body)
		if err != nil {
			return nil, fmt.Errorf("s2 body: %w", err)
		}
		return out, nil
	case Zstd:
		out, err := zstdDecoder().DecodeAll(body, dst[:0])
		if errors.Is(err, zstd.ErrDecoderSizeExceeded) || errors.Is(err, zstd.ErrWindowSizeExceeded) {
			return nil, ErrTooLarge
		}
		if err != nil {
			return nil, fmt.Errorf("zstd body: %w", err)
		}
		if amplified(len(body), len(out)) {
			return nil, errAmplified
		}
		return out, nil
	}
	return nil, fmt.Errorf("unknown content encoding %q", e)
}
