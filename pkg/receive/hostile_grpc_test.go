package receive

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// frame is a gRPC message with its prefix.
func frame(compressed byte, body []byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{compressed}, uint32(len(body)))
	return append(b, body...)
}

// grpcCall sends bytes as the body of a gRPC request over a plain HTTP/2 client.
// The answer is the message without its prefix.
func (d *door) grpcCall(t *testing.T, sig otlpwire.Signal, body []byte, header ...string) (codes.Code, []byte) {
	t.Helper()
	code, out, err := d.tryGRPC(t.Context(), otlpgrpc.Method(sig), bytes.NewReader(body), header...)
	if err != nil {
		t.Fatalf("gRPC: %v", err)
	}
	return code, out
}

func (d *door) tryGRPC(ctx context.Context, method string, body io.Reader, header ...string) (codes.Code, []byte, error) {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: protocols}
	defer tr.CloseIdleConnections()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+d.grpc+method, body)
	if err != nil {
		return codes.Unknown, nil, err
	}
	r.Header.Set("Content-Type", "application/grpc")
	r.Header.Set("Te", "trailers")
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	res, err := tr.RoundTrip(r)
	if err != nil {
		return codes.Unknown, nil, err
	}
	defer func() { _ = res.Body.Close() }()
	out, err := io.ReadAll(res.Body)
	if err != nil {
		return codes.Unknown, nil, err
	}
	status := res.Trailer.Get("Grpc-Status")
	if status == "" {
		status = res.Header.Get("Grpc-Status")
	}
	if status == "" {
		return codes.Unknown, nil, fmt.Errorf("HTTP %s without grpc-status", res.Status)
	}
	var code int
	_, _ = fmt.Sscan(status, &code)
	if len(out) >= 5 {
		out = out[5:]
	}
	return codes.Code(code), out, nil
}

// TestBrokenGRPC has requests that no gRPC library sends.
func TestBrokenGRPC(t *testing.T) {
	d := open(t, false, func(c *Config) { c.RequestTimeout = 500 * time.Millisecond })
	p := good(t)
	export := otlpgrpc.Method(otlpwire.Traces)
	refused := []codes.Code{codes.InvalidArgument}
	byGRPC := []codes.Code{codes.Unimplemented, codes.Internal} // before we are asked
	for _, tc := range []struct {
		name, method string
		body         []byte
		header       []string
		want         []codes.Code
		items        int
	}{
		{"good", export, frame(0, p), nil, []codes.Code{codes.OK}, 1},
		{"compressed without an encoding", export, frame(1, p), nil, refused, 0},
		{"gzip announced, not used", export, frame(0, p), []string{"Grpc-Encoding", "gzip"}, []codes.Code{codes.OK}, 1},
		{"gzip announced, not gzip", export, frame(1, p), []string{"Grpc-Encoding", "gzip"}, refused, 0},
		{"gzip cut short", export, frame(1, gz(p)[:20]), []string{"Grpc-Encoding", "gzip"}, refused, 0},
		{"unknown encoding", export, frame(1, p), []string{"Grpc-Encoding", "lzma"}, []codes.Code{codes.Unimplemented}, 0},
		{"unknown flag", export, frame(7, p), nil, refused, 0},
		{"gzip with something behind", export, frame(1, append(gz(p), p...)), []string{"Grpc-Encoding", "gzip"}, refused, 0},
		{"message cut short", export, frame(0, p)[:len(p)], nil, refused, 0},
		{"two messages", export, append(frame(0, p), frame(0, p)...), nil, refused, 0},
		{"no message", export, nil, nil, refused, 0},
		{"prefix alone", export, []byte{0, 0, 0, 0, 9}, nil, refused, 0},
		{"length of 4 GiB", export, []byte{0, 0xff, 0xff, 0xff, 0xff, 1}, nil, []codes.Code{codes.ResourceExhausted}, 0},
		{"gzip bomb", export, frame(1, gz(make([]byte, 8<<20))), []string{"Grpc-Encoding", "gzip"}, []codes.Code{codes.ResourceExhausted}, 0},
		{"zstd bomb", export, frame(1, zs(make([]byte, 8<<20))), []string{"Grpc-Encoding", "zstd"}, []codes.Code{codes.ResourceExhausted}, 0},
		{"zstd window of 2 GiB", export, frame(1, []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00}), []string{"Grpc-Encoding", "zstd"}, refused, 0},
		{"binary metadata", export, frame(0, p), []string{"X-Bin", base64.StdEncoding.EncodeToString([]byte{0, 255})}, []codes.Code{codes.OK}, 1},
		{"broken binary metadata", export, frame(0, p), []string{"X-Bin", "%%%"}, byGRPC, 0},
		{"deadline that is over", export, frame(0, p), []string{"Grpc-Timeout", "1n"}, []codes.Code{codes.DeadlineExceeded}, 0},
		{"deadline that is none", export, frame(0, p), []string{"Grpc-Timeout", "soon"}, byGRPC, 0},
		{"wrong method", "/" + otlpgrpc.Service(otlpwire.Traces) + "/Import", frame(0, p), nil, []codes.Code{codes.Unimplemented}, 0},
		{"path without a service", "/x", frame(0, p), nil, []codes.Code{codes.Unimplemented}, 0},
		{"reflection", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", frame(0, nil), nil, []codes.Code{codes.Unimplemented}, 0},
	} {
		before := d.items()
		code, _, err := d.tryGRPC(t.Context(), tc.method, bytes.NewReader(tc.body), tc.header...)
		ok := err != nil && tc.items == 0 // the stream or connection was closed
		for _, w := range tc.want {
			ok = ok || (err == nil && code == w)
		}
		if n := d.items() - before; !ok || n != tc.items {
			t.Errorf("%s: %v, %v, %d items; want one of %v", tc.name, code, err, n, tc.want)
		}
	}
	if _, _, err := d.tryGRPC(t.Context(), export, bytes.NewReader(frame(0, p)), "X-Large", strings.Repeat("x", 1<<20)); err == nil {
		t.Error("metadata of 1 MiB were taken")
	}
	d.probe(t)
}

// held begins n requests that do not end, with what each sends first. It returns the
// codes of those that are answered all the same, and what ends the others.
func (d *door) held(t *testing.T, n int, first []byte, header ...string) (answered <-chan codes.Code, end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	seen := make(chan codes.Code, n)
	for range n {
		body, w := io.Pipe()
		t.Cleanup(func() { _ = w.Close() })
		wg.Go(func() {
			if code, _, err := d.tryGRPC(ctx, otlpgrpc.Method(otlpwire.Traces), body, header...); err == nil {
				seen <- code
			}
		})
		_, _ = w.Write(first)
	}
	return seen, func() { cancel(); wg.Wait() }
}

// TestHeldMessagesCount: a client that sends a message and does not end its stream
// holds bytes, and those count.
func TestHeldMessagesCount(t *testing.T) {
	d := open(t, false, func(c *Config) { c.MaxRequest, c.MaxInFlight, c.RequestTimeout = 9<<20, 17<<20, 10*time.Second })
	p := gz(append(good(t), bytes.Repeat([]byte{0xa0, 0x06, 0x01}, 3<<20-1000)...)) // nearly 9 MiB of an unknown field
	codesSeen, end := d.held(t, 2, frame(1, p), "Grpc-Encoding", "gzip")
	// One of the two is held, the other is refused at once.
	if code := <-codesSeen; code != codes.Unavailable {
		t.Errorf("%v, want %v", code, codes.Unavailable)
	}
	end()
	d.probe(t)
}

// TestGRPCIsAdmittedBeforeItIsRead: where there is no room for a request, its client
// sends no more of it than it may send unasked.
func TestGRPCIsAdmittedBeforeItIsRead(t *testing.T) {
	d := open(t, false, func(c *Config) { c.MaxRequest, c.MaxInFlight, c.RequestTimeout = 9<<20, 17<<20, 10*time.Second })
	for _, tc := range []struct {
		name string
		free int // bytes of MaxInFlight
		want codes.Code
		sent int // bytes at the most
	}{
		{"room for the request", 17 << 20, codes.InvalidArgument, 9 << 20}, // read whole, and found to be no OTLP
		{"room for a part of it", 2 << 20, codes.Unavailable, 3 << 20},
		{"no room", 100 << 10, codes.Unavailable, 1 << 20},
	} {
		taken := int(d.r.cfg.MaxInFlight) - tc.free
		d.r.inFlight.Add(int64(taken))
		body := &counted{Reader: bytes.NewReader(frame(0, bytes.Repeat([]byte{0xff}, 8<<20)))}
		code, _, err := d.tryGRPC(t.Context(), otlpgrpc.Method(otlpwire.Traces), body)
		if err != nil || code != tc.want || body.n.Load() > int64(tc.sent) {
			t.Errorf("%s: %v, %v after %d bytes; want %v after at most %d", tc.name, code, err, body.n.Load(), tc.want, tc.sent)
		}
		d.r.inFlight.Add(-int64(taken))
		if n := d.r.inFlight.Load(); n != 0 {
			t.Errorf("%s: %d bytes are still held", tc.name, n)
		}
	}
	d.probe(t)
}

// TestWhatMayComeCounts: a request of which only the length has come holds what its
// client may send unasked.
func TestWhatMayComeCounts(t *testing.T) {
	d := open(t, false, func(c *Config) { c.MaxRequest, c.MaxInFlight, c.RequestTimeout = 9<<20, 17<<20, 10*time.Second })
	taken := int(d.r.cfg.MaxInFlight) - 500<<10
	d.r.inFlight.Add(int64(taken))
	codesSeen, end := d.held(t, 2, frame(0, make([]byte, 1<<20))[:6])
	if code := <-codesSeen; code != codes.Unavailable {
		t.Errorf("%v, want %v", code, codes.Unavailable)
	}
	end()
	d.r.inFlight.Add(-int64(taken))
	d.probe(t)
}

// counted counts what was read of it.
type counted struct {
	io.Reader
	n atomic.Int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// TestWindowsCountBeforeReading: requests that have sent nothing but the length of
// their message hold what their decompressors may take.
func TestWindowsCountBeforeReading(t *testing.T) {
	d := open(t, false, func(c *Config) { c.MaxRequest, c.MaxInFlight, c.RequestTimeout = 1<<20, 17<<20, 10*time.Second })
	codesSeen, end := d.held(t, 3, frame(1, make([]byte, 1000))[:6], "Grpc-Encoding", "zstd")
	if code := <-codesSeen; code != codes.Unavailable {
		t.Errorf("%v, want %v", code, codes.Unavailable)
	}
	if len(codesSeen) > 0 {
		t.Errorf("another was answered, too: %v", <-codesSeen)
	}
	end()
	d.probe(t)
}

// TestMemoryLimitRefuses: over both protocols, with a code that says again.
func TestMemoryLimitRefuses(t *testing.T) {
	d := open(t, false, nil)
	d.over.Store(true)
	if res, _ := d.do(t, req{body: good(t)}); res.StatusCode != 503 || res.Header.Get("Retry-After") == "" {
		t.Errorf("HTTP: %s", res.Status)
	}
	if st := status.Convert(d.export(t, good(t))); st.Code() != codes.Unavailable || len(st.Details()) != 1 {
		t.Errorf("gRPC: %v", st)
	}
	if n := testutil.ToFloat64(d.led.Of(otlpwire.Traces).Refused(ledger.RefusedOverload)); n != 2 {
		t.Errorf("refused{overload} is %v, want 2", n)
	}
	d.over.Store(false)
	d.probe(t)
}

// TestLargeHeadIsRejectedAtOnce: a resource that no message can hold costs one
// look, not one for every item under it.
func TestLargeHeadIsRejectedAtOnce(t *testing.T) {
	d := open(t, false, func(c *Config) { c.MaxRequest, c.MaxInFlight = 16<<20, 64<<20 })
	const records = 100_000
	body := `{"resourceLogs":[{"resource":{"attributes":[{"key":"k","value":{"stringValue":"` + strings.Repeat("x", 8<<20) + `"}}]},"scopeLogs":[{"logRecords":[{}` +
		strings.Repeat(",{}", records-1) + `]}]},{"scopeLogs":[{"logRecords":[{}]}]}]}`
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	res, out := d.do(t, req{path: "/v1/logs", body: []byte(body), ctype: typeJSON})
	runtime.ReadMemStats(&after)
	if res.StatusCode != http.StatusOK || rejected(t, true, out) != records || d.items() != 1 {
		t.Errorf("%s %.200q, %d items", res.Status, out, d.items())
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 20*uint64(len(body)) {
		t.Errorf("%d bytes allocated for %d", n, len(body))
	}
}

// TestUnfinishedStreams opens streams that never end, on one connection and on
// many: the deadline closes them.
func TestUnfinishedStreams(t *testing.T) {
	d := open(t, false, func(c *Config) { c.RequestTimeout = 500 * time.Millisecond })
	var wg sync.WaitGroup
	for range 50 {
		body, w := io.Pipe()
		t.Cleanup(func() { _ = w.Close() })
		wg.Go(func() {
			_, _, _ = d.tryGRPC(t.Context(), otlpgrpc.Method(otlpwire.Traces), body)
		})
		_, _ = w.Write([]byte{0, 0, 0, 1}) // and no more
	}
	wg.Wait()
	d.probe(t)
}

// TestClientGoesAway resets requests while Accept is at work: what is stored is
// stored, nothing hangs.
func TestClientGoesAway(t *testing.T) {
	d := open(t, false, nil)
	entered, leave := make(chan struct{}), make(chan struct{})
	d.hold = func() { entered <- struct{}{}; <-leave }
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, _, err := d.tryGRPC(ctx, otlpgrpc.Method(otlpwire.Traces), bytes.NewReader(frame(0, good(t))))
		done <- err
	}()
	<-entered
	cancel()
	if err := <-done; err == nil {
		t.Error("the client got an answer")
	}
	taken := make(chan struct{})
	d.mu.Lock()
	d.hold, d.took = nil, sync.OnceFunc(func() { close(taken) })
	d.mu.Unlock()
	close(leave)
	select {
	case <-taken:
	case <-time.After(10 * time.Second):
	}
	if n := d.items(); n != 1 {
		t.Errorf("%d items, want the one whose client went away after it was accepted", n)
	}
	d.probe(t)
}

// h2 is a raw HTTP/2 connection to the gRPC port.
type h2 struct {
	conn   net.Conn
	fr     *http2.Framer
	header []byte // an encoded header block of an export
}

func (d *door) http2(t *testing.T, path string) *h2 {
	t.Helper()
	conn := dial(t, d.grpc)
	w := bufio.NewWriterSize(conn, 1<<16)
	h := &h2{conn: conn, fr: http2.NewFramer(flushing{w}, bufio.NewReader(conn))}
	_, _ = io.WriteString(w, http2.ClientPreface)
	_ = h.fr.WriteSettings()
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	enc.SetMaxDynamicTableSize(0)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", path}, {":authority", "x"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		_ = enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1], Sensitive: true})
	}
	h.header = buf.Bytes()
	return h
}

type flushing struct{ *bufio.Writer }

func (f flushing) Write(p []byte) (int, error) {
	n, err := f.Writer.Write(p)
	if err == nil {
		err = f.Flush()
	}
	return n, err
}

// untilClosed reads frames until the server ends the connection and reports
// whether it said GOAWAY.
func (h *h2) untilClosed() (goaway bool) {
	for {
		f, err := h.fr.ReadFrame()
		if err != nil {
			var timeout net.Error
			return goaway && (!errors.As(err, &timeout) || !timeout.Timeout())
		}
		if _, ok := f.(*http2.GoAwayFrame); ok {
			goaway = true
		}
	}
}

// TestHTTP2Attacks sends frames that cost the sender little: no handler takes
// anything, the server lives, and what it cannot bear it ends.
func TestHTTP2Attacks(t *testing.T) {
	d := open(t, false, func(c *Config) { c.RequestTimeout = time.Second })
	export := otlpgrpc.Method(otlpwire.Traces)
	for _, tc := range []struct {
		name, path string
		closed     bool // the server must end the connection
		attack     func(h *h2) error
	}{
		{"rapid reset", export, false, func(h *h2) error {
			for n := range uint32(20_000) {
				if err := h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*n + 1, BlockFragment: h.header, EndHeaders: true}); err != nil {
					return err
				}
				if err := h.fr.WriteRSTStream(2*n+1, http2.ErrCodeCancel); err != nil {
					return err
				}
			}
			return nil
		}},
		{"continuation flood", export, true, func(h *h2) error {
			if err := h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: h.header}); err != nil {
				return err
			}
			var buf bytes.Buffer
			enc := hpack.NewEncoder(&buf)
			_ = enc.WriteField(hpack.HeaderField{Name: "x", Value: strings.Repeat("y", 1000), Sensitive: true})
			for range 100_000 {
				if err := h.fr.WriteContinuation(1, false, buf.Bytes()); err != nil {
					return err
				}
			}
			return nil
		}},
		{"settings churn", export, false, func(h *h2) error {
			for n := range uint32(20_000) {
				if err := h.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: n % 2 << 20}); err != nil {
					return err
				}
			}
			return nil
		}},
		{"ping flood", export, true, func(h *h2) error {
			for range 20_000 {
				if err := h.fr.WritePing(false, [8]byte{}); err != nil {
					return err
				}
			}
			return nil
		}},
		{"data byte by byte", export, false, func(h *h2) error {
			if err := h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: h.header, EndHeaders: true}); err != nil {
				return err
			}
			for _, c := range frame(0, make([]byte, 20_000)) {
				if err := h.fr.WriteData(1, false, []byte{c}); err != nil {
					return err
				}
			}
			return nil
		}},
		{"empty data", export, false, func(h *h2) error {
			if err := h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: h.header, EndHeaders: true}); err != nil {
				return err
			}
			for range 20_000 {
				if err := h.fr.WriteData(1, false, nil); err != nil {
					return err
				}
			}
			return nil
		}},
		{"empty header names", export, false, func(h *h2) error {
			block := append(bytes.Clone(h.header), 0x10, 0x00, 0x00) // a literal, never indexed, of two empty strings
			return h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true, EndStream: true})
		}},
		{"path without a slash", "v1", false, func(h *h2) error {
			return h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: h.header, EndHeaders: true, EndStream: true})
		}},
		{"stream zero", export, true, func(h *h2) error {
			h.fr.AllowIllegalWrites = true
			return h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 0, BlockFragment: h.header, EndHeaders: true})
		}},
		{"frame larger than allowed", export, true, func(h *h2) error {
			h.fr.AllowIllegalWrites = true
			return h.fr.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, 1<<20))
		}},
		{"broken header block", export, true, func(h *h2) error {
			return h.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: bytes.Repeat([]byte{0xff}, 100), EndHeaders: true})
		}},
	} {
		h := d.http2(t, tc.path)
		answered := make(chan bool, 1)
		go func() { answered <- h.untilClosed() }()
		err := tc.attack(h) // fails when the server has closed, which is an answer
		if tc.closed {
			select {
			case <-answered:
			case <-time.After(20 * time.Second):
				t.Errorf("%s: the connection is still open (%v)", tc.name, err)
			}
		}
		d.probe(t)
		_ = h.conn.Close()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, b := range d.taken {
		if b.Items != 1 {
			t.Errorf("a batch of %d items came through", b.Items)
		}
	}
}
