package receive

import (
	"bytes"
	"encoding/binary"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zlib"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
)

func zl(b []byte) []byte { return packed(b, zlib.NewWriter(nil)) }

func rawDeflate(b []byte) []byte {
	w, _ := flate.NewWriter(nil, flate.BestSpeed)
	return packed(b, w)
}

// framed is snappy's framing format, as senders in Go write it.
func framed(b []byte) []byte { return packed(b, s2.NewWriter(nil, s2.WriterSnappyCompat())) }

func packed(b []byte, w interface {
	io.WriteCloser
	Reset(io.Writer)
},
) []byte {
	var buf bytes.Buffer
	w.Reset(&buf)
	_, _ = w.Write(b)
	_ = w.Close()
	return buf.Bytes()
}

// members cuts b into gzip members.
func members(b []byte, n int) (out []byte) {
	for i := range n {
		out = append(out, gz(b[i*len(b)/n:(i+1)*len(b)/n])...)
	}
	return out
}

func join(parts ...[]byte) []byte { return slices.Concat(parts...) }

// long is a request of more than a decoder's window.
func long(t *testing.T) (p []byte) {
	for len(p) < 200<<10 {
		p = append(p, good(t)...)
	}
	return p
}

// TestEncodingsAreTaken sends every encoding over HTTP and gRPC: the same comes through
// as without one, and what is broken in it is refused.
func TestEncodingsAreTaken(t *testing.T) {
	d := open(t, false, nil)
	zeros := make([]byte, 1000)
	for _, p := range [][]byte{good(t), long(t)} {
		d.taken = nil
		if res, out := d.do(t, req{body: p}); res.StatusCode != 200 {
			t.Fatalf("%s %s", res.Status, out)
		}
		want := d.items()
		for _, tc := range []struct {
			name, enc string
			body      []byte
			ok        bool
		}{
			{"one member", "gzip", gz(p), true},
			{"its other name", "x-gzip", gz(p), true},
			{"in capitals", "X-GZIP", gz(p), true},
			{"two members", "gzip", members(p, 2), true},
			{"forty members", "x-gzip", members(p, 40), true},
			{"empty last member", "gzip", join(gz(p), gz(nil)), true},
			{"empty first member", "gzip", join(gz(nil), gz(p)), true},
			{"a zero", "gzip", join(gz(p), zeros[:1]), true},
			{"zero padding", "gzip", join(members(p, 3), zeros), true},
			{"much zero padding", "gzip", join(gz(p), make([]byte, 100<<10)), true},
			{"something in the padding", "gzip", join(gz(p), zeros, []byte{1}), false},
			{"a member behind the padding", "gzip", join(gz(p), zeros, gz(nil)), false},
			{"something behind", "gzip", join(gz(p), []byte("x")), false},
			{"a member that is cut short", "gzip", join(gz(p), gz(p)[:15]), false},
			{"the beginning of a member", "gzip", join(gz(p), gz(p)[:1]), false},
			{"a member with a bad checksum", "gzip", join(gz(p), badSum(gz(p))), false},
			{"as many members as there may be", "gzip", join(gz(p), bytes.Repeat(gz(nil), maxMembers-1)), true},
			{"a member more", "gzip", join(gz(p), bytes.Repeat(gz(nil), maxMembers)), false},

			{"zlib", "deflate", zl(p), true},
			{"zlib by its name", "zlib", zl(p), true},
			{"deflate data alone", "deflate", rawDeflate(p), true},
			{"cut short", "deflate", zl(p)[:20], false},
			{"without its checksum", "deflate", zl(p)[:len(zl(p))-4], false},
			{"with a bad checksum", "deflate", badSum(zl(p)), false},
			{"deflate data cut short", "deflate", rawDeflate(p)[:20], false},
			{"something behind zlib", "deflate", join(zl(p), []byte("x")), false},
			{"something behind deflate data", "deflate", join(rawDeflate(p), zl(p)), false},
			{"gzip as deflate", "deflate", gz(p), false},
			{"nothing", "deflate", nil, false},

			{"block", "snappy", s2.EncodeSnappy(nil, p), true},
			{"stream", "snappy", framed(p), true},
			{"stream by its name", "x-snappy-framed", framed(p), true},
			{"two streams", "snappy", join(framed(p), framed(nil)), true},
			{"block cut short", "snappy", s2.EncodeSnappy(nil, p)[:20], false},
			{"block with something behind", "snappy", join(s2.EncodeSnappy(nil, p), []byte("x")), false},
			{"stream cut short", "snappy", framed(p)[:20], false},
			{"stream with a bad checksum", "snappy", badAt(framed(p), len(snappyMagic)+4), false},
			{"length only", "snappy", []byte{100}, false},
			{"no length", "snappy", bytes.Repeat([]byte{0xff}, 12), false},
			{"nothing", "snappy", nil, false},
		} {
			d.taken = nil
			res, out := d.do(t, req{body: tc.body, enc: tc.enc})
			if (res.StatusCode == 200) != tc.ok || !tc.ok && res.StatusCode != 400 {
				t.Errorf("%s, %s, of %d bytes: %s %q, want taken: %v", tc.enc, tc.name, len(p), res.Status, out, tc.ok)
			}
			if n := d.items(); tc.ok && n != want || !tc.ok && n != 0 {
				t.Errorf("%s, %s, of %d bytes: %d items came through, want %d if any", tc.enc, tc.name, len(p), n, want)
			}
			if enc := strings.ToLower(tc.enc); slices.Contains([]string{"gzip", "deflate", "snappy"}, enc) {
				d.taken = nil
				code, _ := d.grpcCall(t, otlpwire.Traces, frame(1, tc.body), "Grpc-Encoding", enc)
				if (code == codes.OK) != tc.ok || !tc.ok && code != codes.InvalidArgument || tc.ok && d.items() != want {
					t.Errorf("%s, %s, of %d bytes over gRPC: %v, %d items", enc, tc.name, len(p), code, d.items())
				}
			}
		}
	}
	if n := d.r.inFlight.Load(); n != 0 {
		t.Errorf("%d bytes are still in flight", n)
	}
	d.probe(t)
}

// badSum breaks the last checksum or length.
func badSum(b []byte) []byte { return badAt(b, len(b)-2) }

func badAt(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 0x55
	return b
}

// TestEncodingsAreBounded: what becomes larger than a request may be is refused, what
// claims to before anything is allocated for it.
func TestEncodingsAreBounded(t *testing.T) {
	d := open(t, false, nil)
	bomb := make([]byte, 16<<20)
	claim := func(n uint64) []byte { return append(binary.AppendUvarint(nil, n), good(t)...) }
	for _, tc := range []struct {
		name, enc string
		body      []byte
		want      int
	}{
		{"members that are small each", "gzip", bytes.Repeat(gz(bomb[:100<<10]), 100), 413},
		{"zlib", "deflate", zl(bomb), 413},
		{"deflate data", "deflate", rawDeflate(bomb), 413},
		{"stream", "snappy", framed(bomb), 413},
		{"block", "snappy", s2.EncodeSnappy(nil, bomb), 413},
		{"a byte above the limit", "snappy", s2.EncodeSnappy(nil, bomb[:1<<20+1]), 413},
		{"block that claims 4 GiB", "snappy", claim(1<<32 - 1), 413},
		{"block that claims more than there is", "snappy", claim(1 << 62), 413},
		{"block that claims a limit that it cannot fill", "snappy", claim(1 << 20), 400},
		{"chunk of 16 MiB", "snappy", join([]byte(snappyMagic), []byte{0x00, 0xff, 0xff, 0xff}, bomb[:1000]), 400},
		{"padding of 16 MiB that is not there", "snappy", join([]byte(snappyMagic), []byte{0xfe, 0xff, 0xff, 0xff}, bomb[:1000]), 400},
		{"zero padding above the limit", "gzip", join(gz(good(t)), bomb[:1<<20]), 413},
	} {
		if res, out := d.do(t, req{body: tc.body, enc: tc.enc}); res.StatusCode != tc.want {
			t.Errorf("%s, %s: %s %q, want %d", tc.enc, tc.name, res.Status, out, tc.want)
		}
		want := codes.ResourceExhausted
		if tc.want == 400 {
			want = codes.InvalidArgument
		}
		if code, _ := d.grpcCall(t, otlpwire.Traces, frame(1, tc.body), "Grpc-Encoding", tc.enc); code != want {
			t.Errorf("%s, %s over gRPC: %v, want %v", tc.enc, tc.name, code, want)
		}
	}
	if _, out := d.do(t, req{body: claim(1 << 20), enc: "snappy"}); !bytes.Contains(out, []byte("cannot decode to")) {
		t.Errorf("a length that nothing can have: %q, want it refused before memory is taken for it", out)
	}
	// The whole limit is taken, where it is there.
	if res, out := d.do(t, req{body: s2.EncodeSnappy(nil, bomb[:1<<20]), enc: "snappy"}); res.StatusCode != 400 || !bytes.Contains(out, []byte("malformed")) {
		t.Errorf("a block of the limit: %s %q, want it decoded", res.Status, out)
	}
	if n := d.r.inFlight.Load(); n != 0 || d.items() != 0 {
		t.Errorf("%d bytes are still in flight, %d items came through", n, d.items())
	}
	d.probe(t)
}

// TestBlocksAreAdmitted: what a snappy block stands for counts before it is decoded.
func TestBlocksAreAdmitted(t *testing.T) {
	d := open(t, false, func(c *Config) { c.MaxRequest, c.MaxInFlight = 8<<20, 16<<20 })
	body := s2.EncodeSnappy(nil, make([]byte, 8<<20))
	d.r.inFlight.Store(10 << 20)
	if res, _ := d.do(t, req{body: body, enc: "snappy"}); res.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("%s, want it refused for now", res.Status)
	}
	if n := d.r.inFlight.Load(); n != 10<<20 {
		t.Errorf("%d bytes are in flight, want those of the others", n)
	}
	d.r.inFlight.Store(0)
}

// TestClientsCompress: grpc-go's own clients, and their answers.
func TestClientsCompress(t *testing.T) {
	d := open(t, false, nil)
	bad, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, []byte(`{"resourceSpans":[{"scopeSpans":[{"spans":[{}]}]}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"gzip", "zstd", "snappy", "deflate"} {
		before := d.items()
		for _, p := range [][]byte{good(t), long(t), bad} { // the last answer is not empty
			if err := d.call(t, otlpgrpc.Method(otlpwire.Traces), p, nil, grpc.UseCompressor(name)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if d.items() < before+100 {
			t.Errorf("%s: %d items", name, d.items()-before)
		}
	}
	if code, _ := d.grpcCall(t, otlpwire.Traces, frame(1, good(t)), "Grpc-Encoding", "lz4"); code != codes.Unimplemented {
		t.Errorf("lz4: %v, want what gRPC has for an encoding that a server does not know", code)
	}
}
