package receive

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/klauspost/compress/s2"
	"github.com/prometheus/client_golang/prometheus/testutil"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// panicked checks what is counted and held after n requests that have panicked.
func (d *door) panicked(t *testing.T, what string, n int) {
	t.Helper()
	caught, refused := testutil.ToFloat64(d.led.Panics(ledger.PanicReceiver)), testutil.ToFloat64(d.led.Of(otlpwire.Traces).Refused(ledger.RefusedMalformed))
	if held := d.r.inFlight.Load(); caught != float64(n) || refused != float64(n) || held != 0 {
		t.Errorf("%s: %v panics, %v refused, want %d; %d bytes are in flight", what, caught, refused, n, held)
	}
}

// TestAPanicConcernsOneRequest: wherever a request makes the receiver panic, it is refused for good, and nothing of it stays.
func TestAPanicConcernsOneRequest(t *testing.T) {
	var said logtest.Log
	var asked atomic.Int64
	d := openFor(t, false, false, nil, func(deps *Deps) {
		identify, accept := deps.Identify, deps.Accept
		deps.Log = said.Logger(slog.LevelInfo)
		deps.Identify = func(c Credentials) (*Sender, error) {
			switch {
			case c.Authorization == "stamp":
				return &Sender{Instance: envelope.Instance{ID: "as-nil"}}, nil // it has none
			case c.Authorization == "identify" && asked.Add(1)%2 == 0: // when the request has arrived
				panic("nobody is like that")
			}
			return identify(c)
		}
		deps.Process = func(_ otlpwire.Signal, payload []byte) ([]byte, int) {
			if bytes.Contains(payload, []byte("process")) {
				panic("what a name")
			}
			return payload, 0
		}
		deps.Accept = func(ctx context.Context, b Batch) error {
			if bytes.Contains(b.Payload, []byte("accept")) {
				panic("what a batch")
			}
			return accept(ctx, b)
		}
	})
	n := 0
	for _, stage := range []string{"identify", "process", "stamp", "accept"} {
		text := []byte(strings.Replace(goodJSON, `"x"`, `"`+stage+strings.Repeat("y", 100<<10)+`"`, 1))
		payload, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, text, otlpwire.DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		header := http.Header{"Authorization": {stage}}
		for name, r := range map[string]req{
			"protobuf": {body: payload, header: header}, "JSON": {body: text, ctype: typeJSON, header: header},
			"gzip": {body: gz(payload), enc: "gzip", header: header}, "a snappy block": {body: s2.EncodeSnappy(nil, payload), enc: "snappy", header: header},
		} {
			n++
			res, body := d.do(t, r)
			var st statuspb.Status
			if r.ctype == typeJSON {
				err = json.Unmarshal(body, &st)
			} else {
				err = proto.Unmarshal(body, &st)
			}
			if err != nil || res.StatusCode != 400 || res.Header.Get("Retry-After") != "" || codes.Code(st.Code) != codes.InvalidArgument || st.Message == "" {
				t.Errorf("%s, %s: %s, Retry-After %q, %v, %v", stage, name, res.Status, res.Header.Get("Retry-After"), &st, err)
			}
			d.panicked(t, stage+", "+name, n)
		}
		n++
		if st := status.Convert(d.export(t, payload, "authorization", stage)); st.Code() != codes.InvalidArgument || len(st.Details()) != 0 {
			t.Errorf("%s over gRPC: %v, %v", stage, st.Err(), st.Details())
		}
		d.panicked(t, stage+" over gRPC", n)
	}
	if text := said.String(); strings.Count(text, "made the receiver panic") != 1 || !strings.Contains(text, "nobody is like that") || !strings.Contains(text, "panic_test.go") {
		t.Errorf("it says, not once with the stack: %s", text)
	}
	if got := d.items(); got != 0 {
		t.Errorf("%d items came through", got)
	}
	d.probe(t)
}

// bomb is a body that panics when something of it has been read.
type bomb struct {
	io.Reader
	with any
}

func (b bomb) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if n == 0 && err != nil {
		panic(b.with)
	}
	return n, nil
}

func (bomb) Close() error { return nil }

// TestAPanicWhileABodyIsRead: nothing of it is held, and the decompressors of others are sound.
func TestAPanicWhileABodyIsRead(t *testing.T) {
	d := open(t, false, func(c *Config) { c.MaxInFlight = 9 << 20 }) // for one zstd window
	payload := good(t)
	bodies := map[string][]byte{"": payload, "gzip": gz(payload), "zstd": zs(payload), "deflate": zl(payload), "snappy": s2.EncodeSnappy(nil, payload)}
	n := 0
	for range 3 {
		for enc, body := range bodies {
			answer := httptest.NewRecorder()
			r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/traces", bomb{bytes.NewReader(body[:len(body)/2]), "a body"})
			r.Header.Set("Content-Type", typeProtobuf)
			r.Header.Set("Content-Encoding", enc)
			n++
			if d.r.serveHTTP(answer, r); answer.Code != 400 {
				t.Errorf("%q: %d %s", enc, answer.Code, answer.Body)
			}
			d.panicked(t, "half a body in "+enc, n)
		}
	}
	for enc, body := range bodies {
		if res, out := d.do(t, req{body: body, enc: enc}); res.StatusCode != 200 {
			t.Errorf("a whole body in %q: %s %s", enc, res.Status, out)
		}
	}
	d.panicked(t, "whole bodies", n)
}

// TestAnAbortedHandlerIsNoPanic: net/http itself recovers that, and closes the connection.
func TestAnAbortedHandlerIsNoPanic(t *testing.T) {
	d := open(t, false, nil)
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/traces", bomb{strings.NewReader("x"), http.ErrAbortHandler})
	r.Header.Set("Content-Type", typeProtobuf)
	func() {
		defer func() {
			if v := recover(); v != http.ErrAbortHandler { //nolint:errorlint // it must be this very value
				t.Errorf("%v", v)
			}
		}()
		d.r.serveHTTP(httptest.NewRecorder(), r)
	}()
	d.panicked(t, "aborted", 0)
}

// broken is a gRPC request with a length, but its message panics.
type broken struct {
	grpc.ServerTransportStream
	with any
}

func (b *broken) RecvCompress() string              { return "" }
func (b *broken) Read(int) (mem.BufferSlice, error) { panic(b.with) }
func (b *broken) ReadMessageHeader(p []byte) error {
	binary.BigEndian.PutUint32(p[1:], 1000)
	return nil
}

// stream is one in a context.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s stream) Context() context.Context { return s.ctx }

// TestAPanicWhileAMessageIsRead: what its client may send unasked is not held any more. grpc-go recovers nothing, so what
// net/http would recover is an error, too.
func TestAPanicWhileAMessageIsRead(t *testing.T) {
	d := open(t, false, nil)
	for i, with := range []any{errors.New("a message"), http.ErrAbortHandler} {
		if err := d.r.export(otlpwire.Traces, stream{ctx: grpc.NewContextWithServerTransportStream(t.Context(), &broken{with: with})}); status.Code(err) != codes.InvalidArgument {
			t.Error(err)
		}
		d.panicked(t, fmt.Sprint(with), i+1)
	}
	d.probe(t)
}
