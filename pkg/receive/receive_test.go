package receive

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/klauspost/compress/zstd"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// door is a running receiver and what came through it.
type door struct {
	r          *Receiver
	over       atomic.Bool
	revoked    atomic.Bool // nobody may send any more
	grpc, http string
	led        *ledger.Ledger

	mu     sync.Mutex
	taken  []Batch
	failOn error
	hold   func() // runs in Accept before it takes
	took   func() // and after it
}

const secret = "Bearer canary-token"

// open starts a receiver that takes a token when auth is set.
func open(t *testing.T, auth bool, change func(*Config)) *door {
	t.Helper()
	return openFor(t, auth, false, change)
}

// openFor also lets senders say where requests come from, and changes dependencies.
func openFor(t *testing.T, auth, origin bool, change func(*Config), deps ...func(*Deps)) *door {
	t.Helper()
	cfg := DefaultConfig()
	cfg.GRPC.Listen, cfg.HTTP.Listen = "127.0.0.1:0", "127.0.0.1:0"
	cfg.MaxRequest, cfg.MaxInFlight = 1<<20, 16<<20
	if change != nil {
		change(&cfg)
	}
	if err := cfg.Validate("receive"); err != nil {
		t.Fatal(err)
	}
	sender := NewSender(envelope.Instance{ID: "as-1"})
	d := &door{led: ledger.New(prometheus.NewRegistry())}
	own := Deps{
		Identify: func(c Credentials) (*Sender, error) {
			a := c.Authorization
			if c.Certificate != nil {
				return NewSender(envelope.Instance{ID: c.Certificate.Subject.CommonName}), nil
			}
			if d.revoked.Load() {
				return nil, errors.New("no token any more")
			}
			if auth && a != secret {
				return nil, errors.New("no valid token: want Bearer <token> & more")
			}
			if !auth && a != "" { // every name is an instance
				return NewSender(envelope.Instance{ID: a}), nil
			}
			return sender, nil
		},
		Accept: func(_ context.Context, b Batch) error {
			d.mu.Lock()
			defer d.mu.Unlock()
			if hold := d.hold; hold != nil {
				d.mu.Unlock()
				hold()
				d.mu.Lock()
			}
			if d.failOn != nil {
				return d.failOn
			}
			b.Payload = bytes.Clone(b.Payload)
			d.taken = append(d.taken, b)
			if d.took != nil {
				d.took()
			}
			return nil
		},
		Tokens: auth, Over: d.over.Load, Origin: origin, MaxPayload: 256 << 10, Ledger: d.led, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	for _, do := range deps {
		do(&own)
	}
	r, err := New(cfg, own)
	if err != nil {
		t.Fatal(err)
	}
	svc := r.Service()
	if err := services.StartAndAwaitRunning(t.Context(), svc); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := services.StopAndAwaitTerminated(context.Background(), svc); err != nil {
			t.Error(err)
		}
	})
	d.r = r
	d.grpc, d.http = r.Addrs()[0], "http://"+r.Addrs()[1]
	return d
}

func (d *door) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.failOn = err
}

// items returns how many items came through.
func (d *door) items() (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, b := range d.taken {
		n += b.Items
	}
	return n
}

const goodJSON = `{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"5b8efff798038103d269b633813fc60c","spanId":"eee19b7ec3c1b174","name":"x"}]}]}]}`

func good(t testing.TB) []byte {
	t.Helper()
	p, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, []byte(goodJSON), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func newGzipWriter(w io.Writer) *gzip.Writer { return gzip.NewWriter(w) }

func gz(b []byte) []byte {
	var buf bytes.Buffer
	w := newGzipWriter(&buf)
	_, _ = w.Write(b)
	_ = w.Close()
	return buf.Bytes()
}

func zs(b []byte) []byte {
	w, _ := zstd.NewWriter(nil)
	return w.EncodeAll(b, nil)
}

type req struct {
	method, path, ctype, enc string
	body                     []byte
	header                   http.Header
}

func (d *door) do(t *testing.T, r req) (*http.Response, []byte) {
	t.Helper()
	if r.method == "" {
		r.method = http.MethodPost
	}
	if r.path == "" {
		r.path = "/v1/traces"
	}
	h, err := http.NewRequestWithContext(t.Context(), r.method, d.http+r.path, bytes.NewReader(r.body))
	if err != nil {
		t.Fatal(err)
	}
	h.URL.RawPath, h.URL.Opaque = "", "" // the path as written
	if strings.Contains(r.path, "//") || strings.Contains(r.path, "..") || strings.Contains(r.path, "%") {
		h.URL.Opaque = "//" + h.URL.Host + r.path
	}
	if r.ctype != "-" {
		if r.ctype == "" {
			r.ctype = typeProtobuf
		}
		h.Header.Set("Content-Type", r.ctype)
	}
	if r.enc != "" {
		h.Header.Set("Content-Encoding", r.enc)
	}
	for k, v := range r.header {
		h.Header[k] = v
	}
	client := http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	res, err := client.Do(h)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, b
}

func TestHTTPTakesWhatIsGood(t *testing.T) {
	d := open(t, false, nil)
	p := good(t)
	n := 0
	for name, r := range map[string]req{
		"protobuf":               {body: p},
		"json":                   {body: []byte(goodJSON), ctype: typeJSON},
		"json with charset":      {body: []byte(goodJSON), ctype: "application/json; charset=utf-8"},
		"gzip":                   {body: gz(p), enc: "gzip"},
		"gzip in capitals":       {body: gz(p), enc: "GZIP"},
		"gzip json":              {body: gz([]byte(goodJSON)), ctype: typeJSON, enc: "gzip"},
		"zstd":                   {body: zs(p), enc: "zstd"},
		"identity":               {body: p, enc: "identity"},
		"forged tenant headers":  {body: p, header: http.Header{"X-Scope-Orgid": {"other"}, "Nats-Rollup": {"all"}}},
		"unknown fields of JSON": {body: []byte(strings.Replace(goodJSON, `"name"`, `"nom"`, 1)), ctype: typeJSON},
	} {
		res, body := d.do(t, r)
		want := typeProtobuf
		if strings.HasPrefix(r.ctype, typeJSON) {
			want = typeJSON
		}
		n++
		if res.StatusCode != 200 || res.Header.Get("Content-Type") != want || (want == typeProtobuf && len(body) != 0) || (want == typeJSON && string(body) != "{}") || d.items() != n {
			t.Errorf("%s: %s %s %q, %d items so far, want %d", name, res.Status, res.Header.Get("Content-Type"), body, d.items(), n)
		}
	}
	for name, r := range map[string]req{
		"empty body":         {},
		"empty JSON object":  {body: []byte("{}"), ctype: typeJSON},
		"empty JSON body":    {ctype: typeJSON},
		"empty resource":     {body: []byte{0x0a, 0x00}},
		"empty metrics":      {path: "/v1/metrics"},
		"empty logs":         {path: "/v1/logs"},
		"empty body in gzip": {body: gz(nil), enc: "gzip"},
	} {
		if res, body := d.do(t, r); res.StatusCode != 200 || d.items() != n {
			t.Errorf("%s: %s %q; %d items, want %d", name, res.Status, body, d.items(), n)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, b := range d.taken {
		if b.Instance != "as-1" || !strings.Contains(string(otlpwire.AppendJSON(nil, otlpwire.Traces, b.Payload)), `{"key":"instance.id","value":{"stringValue":"as-1"}}`) {
			t.Errorf("not stamped: %+v", b)
		}
	}
}

// TestHTTPRefusesBadInput has the rows of bad input for OTLP/HTTP: each gets
// its status, and nothing of it comes through.
func TestHTTPRefusesBadInput(t *testing.T) {
	d := open(t, false, nil)
	p := good(t)
	emptyMembers := bytes.Repeat(gz(nil), 10_000)
	badCRC := gz(p)
	badCRC[len(badCRC)-6] ^= 0xff
	// A zstd frame header that asks for a window of 2 GiB.
	hugeWindow := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00}
	for _, tc := range []struct {
		name string
		req
		want int
	}{
		{"garbage", req{body: []byte("hello, world")}, 400},
		{"truncated", req{body: p[:len(p)-3]}, 400},
		{"truncated JSON", req{body: []byte(goodJSON[:40]), ctype: typeJSON}, 400},
		{"protobuf as JSON", req{body: p, ctype: typeJSON}, 400},
		{"enum by name", req{body: []byte(strings.Replace(goodJSON, `"name":"x"`, `"kind":"SPAN_KIND_SERVER"`, 1)), ctype: typeJSON}, 400},
		{"larger than the limit", req{body: make([]byte, 1<<20+1)}, 413},
		{"gzip bomb", req{body: gz(make([]byte, 16<<20)), enc: "gzip"}, 413},
		{"zstd bomb", req{body: zs(make([]byte, 16<<20)), enc: "zstd"}, 413},
		{"zstd window of 2 GiB", req{body: hugeWindow, enc: "zstd"}, 400},
		{"ten thousand gzip members", req{body: emptyMembers, enc: "gzip"}, 400},
		{"gzip with trailing garbage", req{body: append(gz(p), 'x'), enc: "gzip"}, 400},
		{"gzip cut short", req{body: gz(p)[:20], enc: "gzip"}, 400},
		{"gzip with a bad checksum", req{body: badCRC, enc: "gzip"}, 400},
		{"gzip by header only", req{body: p, enc: "gzip"}, 400},
		{"gzip without a header", req{body: gz(p)}, 400},
		{"gzip twice", req{body: gz(gz(p)), enc: "gzip, gzip"}, 415},
		{"two encodings", req{body: p, header: http.Header{"Content-Encoding": {"gzip", "gzip"}}}, 415},
		{"br", req{body: p, enc: "br"}, 415},
		{"no content type", req{body: p, ctype: "-"}, 415},
		{"text", req{body: p, ctype: "text/plain"}, 415},
		{"JSON in UTF-16", req{body: []byte(goodJSON), ctype: "application/json; charset=utf-16"}, 415},
		{"GET", req{method: http.MethodGet}, 405},
		{"PUT", req{method: http.MethodPut, body: p}, 405},
		{"OPTIONS that is no preflight", req{method: http.MethodOptions}, 405},
		{"trailing slash", req{path: "/v1/traces/", body: p}, 404},
		{"double slash", req{path: "//v1/traces", body: p}, 404},
		{"dot segments", req{path: "/v1/../v1/traces", body: p}, 404},
		{"escaped dot segments", req{path: "/v1/%2e%2e/v1/traces", body: p}, 404},
		{"escaped letter", req{path: "/v1/trace%73", body: p}, 404},
		{"profiles", req{path: "/v1development/profiles", body: p}, 404},
	} {
		res, body := d.do(t, tc.req)
		if res.StatusCode != tc.want {
			t.Errorf("%s: %s %q, want %d", tc.name, res.Status, body, tc.want)
			continue
		}
		switch tc.want {
		case 400, 413: // a google.rpc.Status in the request's encoding
			text := ""
			if tc.ctype == typeJSON {
				var st struct {
					Code    int
					Message string
				}
				if err := json.Unmarshal(body, &st); err != nil || st.Code == 0 {
					t.Errorf("%s: body %q: %v", tc.name, body, err)
				}
				text = st.Message
			} else {
				var st statuspb.Status
				if err := proto.Unmarshal(body, &st); err != nil || st.Code == 0 {
					t.Errorf("%s: body %q: %v", tc.name, body, err)
				}
				text = st.Message
			}
			if text == "" || res.Header.Get("Retry-After") != "" {
				t.Errorf("%s: message %q, Retry-After %q", tc.name, text, res.Header.Get("Retry-After"))
			}
		}
	}
	if n := d.items(); n != 0 {
		t.Errorf("%d items came through", n)
	}
	if res, _ := d.do(t, req{body: p}); res.StatusCode != 200 || d.items() != 1 {
		t.Errorf("a good request after all that: %s", res.Status)
	}
}

func TestTooManyElementsAreRefused(t *testing.T) {
	d := open(t, false, func(c *Config) { c.MaxRequest = 4 << 20 })
	body := `{"resourceSpans":[{"scopeSpans":[{"spans":[{}` + strings.Repeat(",{}", 600_000) + `]}]}]}`
	if res, out := d.do(t, req{body: []byte(body), ctype: typeJSON}); res.StatusCode != 400 || !strings.Contains(string(out), "elements") {
		t.Errorf("%s %s", res.Status, out)
	}
}

func TestInvalidItemsArePartialSuccess(t *testing.T) {
	d := open(t, false, nil)
	spans := []string{
		`{"traceId":"5b8efff798038103d269b633813fc60c","spanId":"eee19b7ec3c1b174"}`,
		`{"traceId":"","spanId":"eee19b7ec3c1b174"}`,
		`{"traceId":"00000000000000000000000000000000","spanId":"eee19b7ec3c1b174"}`,
		`{"traceId":"5b8efff798038103d269b633813fc60c","spanId":"eee1"}`,
		`{"traceId":"5b8efff798038103d269b633813fc60c","spanId":"0000000000000000"}`,
		`{"traceId":"5b8efff798038103d269b633813fc6","spanId":"eee19b7ec3c1b174"}`,
	}
	body := `{"resourceSpans":[{"scopeSpans":[{"spans":[` + strings.Join(spans, ",") + `]}]}]}`
	res, out := d.do(t, req{body: []byte(body), ctype: typeJSON})
	var answer struct {
		PartialSuccess struct{ RejectedSpans, ErrorMessage string }
	}
	if err := json.Unmarshal(out, &answer); err != nil || res.StatusCode != 200 || answer.PartialSuccess.RejectedSpans != "5" || answer.PartialSuccess.ErrorMessage == "" {
		t.Errorf("%s %s: %v", res.Status, out, err)
	}
	if d.items() != 1 {
		t.Errorf("%d items came through, want 1", d.items())
	}
	if n := testutil.ToFloat64(d.led.Of(otlpwire.Traces).Refused(ledger.RefusedInvalid)); n != 5 {
		t.Errorf("refused counter %v, want 5", n)
	}
}

func TestLargeRequestsAreCutAndLargeItemsRejected(t *testing.T) {
	d := open(t, false, nil)
	record := func(size int) string {
		return `{"body":{"stringValue":"` + strings.Repeat("x", size) + `"}}`
	}
	body := `{"resourceLogs":[{"scopeLogs":[{"logRecords":[` + strings.Join([]string{record(100_000), record(100_000), record(300_000), record(100_000)}, ",") + `]}]}]}`
	res, out := d.do(t, req{path: "/v1/logs", body: []byte(body), ctype: typeJSON})
	if res.StatusCode != 200 || !strings.Contains(string(out), `"rejectedLogRecords":"1"`) {
		t.Errorf("%s %s", res.Status, out)
	}
	if d.items() != 3 {
		t.Errorf("%d items came through, want 3", d.items())
	}
	for _, b := range d.taken {
		if len(b.Payload) > 256<<10 {
			t.Errorf("a piece of %d bytes", len(b.Payload))
		}
	}
}

func TestWhatMayHealIsRetryable(t *testing.T) {
	d := open(t, false, nil)
	for _, err := range []error{fmt.Errorf("%w: the spool is full", ErrFull), errors.New("hub is away")} {
		d.fail(err)
		res, body := d.do(t, req{body: good(t)})
		var st statuspb.Status
		if uerr := proto.Unmarshal(body, &st); uerr != nil || res.StatusCode != 503 || res.Header.Get("Retry-After") != "1" || codes.Code(st.Code) != codes.Unavailable {
			t.Errorf("HTTP: %s, Retry-After %q, %v", res.Status, res.Header.Get("Retry-After"), &st)
		}
		gst := status.Convert(d.export(t, good(t)))
		if gst.Code() != codes.Unavailable || len(gst.Details()) != 1 {
			t.Fatalf("gRPC: %v", gst)
		}
		if ri, ok := gst.Details()[0].(*errdetails.RetryInfo); !ok || ri.GetRetryDelay().AsDuration() != retryAfter {
			t.Errorf("gRPC: details %v", gst.Details())
		}
	}
	if n := testutil.ToFloat64(d.led.Of(otlpwire.Traces).Refused(ledger.RefusedFull)); n != 2 {
		t.Errorf("refused{full} is %v, want 2", n)
	}
}

func TestOverloadIsRefusedBeforeReading(t *testing.T) {
	d := open(t, false, func(c *Config) { c.MaxRequest, c.MaxInFlight = 9<<20, 17<<20 })
	p := good(t)
	blocked := make(chan struct{})
	body, w := io.Pipe()
	go func() {
		defer close(blocked)
		h, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, d.http+"/v1/traces", body)
		h.Header.Set("Content-Type", typeProtobuf)
		if res, err := http.DefaultClient.Do(h); err == nil {
			_ = res.Body.Close()
		}
	}()
	// The first request holds most of the budget and never ends.
	_, _ = w.Write(make([]byte, 8900<<10))
	for deadline := time.Now().Add(10 * time.Second); d.r.inFlight.Load() < 8900<<10 && time.Now().Before(deadline); {
		runtime.Gosched() // the server has not read all of it
	}
	res, _ := d.do(t, req{body: make([]byte, 9000<<10)})
	if res.StatusCode != 503 || res.Header.Get("Retry-After") == "" {
		t.Errorf("second large request: %s", res.Status)
	}
	_ = w.CloseWithError(errors.New("given up"))
	<-blocked
	// The budget comes back when the server has noticed.
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if res, _ = d.do(t, req{body: p}); res.StatusCode == 200 {
			break
		}
	}
	if res.StatusCode != 200 {
		t.Errorf("after the flood: %s", res.Status)
	}
}

func TestTokenIsRequired(t *testing.T) {
	d := open(t, true, nil)
	p := good(t)
	for name, auth := range map[string][]string{"none": nil, "wrong": {"Bearer x"}, "two": {secret, secret}, "NUL": {"Bearer a\x01b"}} {
		if name == "NUL" {
			continue // the client refuses to send it
		}
		res, body := d.do(t, req{body: p, header: http.Header{"Authorization": auth}})
		if res.StatusCode != 401 || res.Header.Get("WWW-Authenticate") != "Bearer" || bytes.Contains(body, []byte("canary")) {
			t.Errorf("%s: %s %q", name, res.Status, body)
		}
	}
	// The client is still writing when the server has had enough.
	if answer := d.raw(t, "POST /v1/traces HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "+strings.Repeat("x", 1<<20)+"\r\n\r\n"); !strings.HasPrefix(answer, "HTTP/1.1 431") && answer != "closed" {
		t.Errorf("token of 1 MiB: %.100q, want 431", answer)
	}
	if res, _ := d.do(t, req{body: p, header: http.Header{"Authorization": {secret}}}); res.StatusCode != 200 {
		t.Errorf("right token: %s", res.Status)
	}
	if c := status.Code(d.export(t, p)); c != codes.Unauthenticated {
		t.Errorf("gRPC without a token: %v", c)
	}
	if err := d.export(t, p, "authorization", secret); err != nil {
		t.Errorf("gRPC with the token: %v", err)
	}
	if d.items() != 2 {
		t.Errorf("%d items, want 2", d.items())
	}
}

// TestRevokedWhileItSends takes the right to send away when a request has begun, over
// both protocols: what arrives then is refused, and so is the next on its connection.
func TestRevokedWhileItSends(t *testing.T) {
	for _, protocol := range []string{"http", "grpc"} {
		d := open(t, true, nil)
		p := good(t)
		body, w := io.Pipe()
		done := make(chan string, 1)
		if protocol == "http" {
			go func() {
				h, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, d.http+"/v1/traces", body)
				h.Header.Set("Content-Type", typeProtobuf)
				h.Header.Set("Authorization", secret)
				res, err := http.DefaultClient.Do(h)
				if err != nil {
					done <- err.Error()
					return
				}
				_ = res.Body.Close()
				done <- res.Status
			}()
		} else {
			p = frame(0, p)
			go func() {
				code, _, err := d.tryGRPC(t.Context(), otlpgrpc.Method(otlpwire.Traces), body, "Authorization", secret)
				done <- fmt.Sprint(code, " ", err)
			}()
		}
		_, _ = w.Write(p[:len(p)/2])
		for deadline := time.Now().Add(10 * time.Second); d.r.inFlight.Load() == 0 && time.Now().Before(deadline); {
			runtime.Gosched() // it has not begun to read
		}
		d.revoked.Store(true)
		_, _ = w.Write(p[len(p)/2:])
		_ = w.Close()
		if got := <-done; got != "401 Unauthorized" && got != "Unauthenticated <nil>" {
			t.Errorf("%s: %s", protocol, got)
		}
		if n := d.items(); n != 0 {
			t.Errorf("%s: %d items came through", protocol, n)
		}
	}
}

// export sends one request over gRPC.
func (d *door) export(t *testing.T, payload []byte, md ...string) error {
	t.Helper()
	return d.call(t, otlpgrpc.Method(otlpwire.Traces), payload, md)
}

func (d *door) call(t *testing.T, method string, payload []byte, md []string, opts ...grpc.CallOption) error {
	t.Helper()
	conn, err := grpc.NewClient(d.grpc, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx := metadata.AppendToOutgoingContext(t.Context(), md...)
	var answer rawBytes
	return conn.Invoke(ctx, method, rawBytes(payload), &answer, append(opts, grpc.ForceCodec(clientCodec{}))...)
}

type rawBytes []byte

type clientCodec struct{}

func (clientCodec) Name() string                  { return "proto" }
func (clientCodec) Marshal(v any) ([]byte, error) { return v.(rawBytes), nil }
func (clientCodec) Unmarshal(b []byte, v any) error {
	*v.(*rawBytes) = bytes.Clone(b)
	return nil
}

func TestGRPCCodes(t *testing.T) {
	d := open(t, false, nil)
	p := good(t)
	export := otlpgrpc.Method(otlpwire.Traces)
	for _, tc := range []struct {
		name, method string
		payload      []byte
		opts         []grpc.CallOption
		want         codes.Code
	}{
		{"good", export, p, nil, codes.OK},
		{"good in gzip", export, p, []grpc.CallOption{grpc.UseCompressor("gzip")}, codes.OK},
		{"good in zstd", export, p, []grpc.CallOption{grpc.UseCompressor("zstd")}, codes.OK},
		{"empty", export, nil, nil, codes.OK},
		{"garbage", export, []byte("hello"), nil, codes.InvalidArgument},
		{"truncated", export, p[:len(p)-2], nil, codes.InvalidArgument},
		{"too large", export, make([]byte, 1<<20+1), nil, codes.ResourceExhausted},
		{"gzip bomb", export, make([]byte, 8<<20), []grpc.CallOption{grpc.UseCompressor("gzip"), grpc.MaxCallSendMsgSize(16 << 20)}, codes.ResourceExhausted},
		{"wrong method", "/" + otlpgrpc.Service(otlpwire.Traces) + "/Import", p, nil, codes.Unimplemented},
		{"wrong service", "/opentelemetry.proto.collector.profiles.v1development.ProfilesService/Export", p, nil, codes.Unimplemented},
		{"reflection", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", nil, nil, codes.Unimplemented},
	} {
		err := d.call(t, tc.method, tc.payload, nil, tc.opts...)
		if status.Code(err) != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
		if st := status.Convert(err); tc.want == codes.ResourceExhausted && len(st.Details()) > 0 {
			t.Errorf("%s: RetryInfo on what must not be sent again: %v", tc.name, st.Details())
		}
	}
	if d.items() != 3 {
		t.Errorf("%d items, want 3", d.items())
	}
}

func TestListenErrorsSayWhatToDo(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	cfg := DefaultConfig()
	cfg.GRPC.Listen, cfg.HTTP.Listen = "127.0.0.1:0", ln.Addr().String()
	r, err := New(cfg, Deps{Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Ledger: ledger.New(prometheus.NewRegistry())})
	if err != nil {
		t.Fatal(err)
	}
	err = services.StartAndAwaitRunning(t.Context(), r.Service())
	if err == nil || !strings.Contains(err.Error(), "OTLP/HTTP") || !strings.Contains(err.Error(), ln.Addr().String()) || !strings.Contains(err.Error(), "in use") {
		t.Errorf("got %v", err)
	}
}

func TestConfigSaysWhatIsUnsafe(t *testing.T) {
	for addr, ok := range map[string]bool{"127.0.0.1:1": true, "localhost:1": true, "[::1]:1": true, "0.0.0.0:1": false, ":1": false, "10.0.0.1:1": false, "nonsense": false, "": true} {
		c := DefaultConfig()
		c.HTTP.Listen = addr
		if err := c.Validate("receive"); (err == nil) != ok {
			t.Errorf("%q: %v", addr, err)
		}
	}
	c := DefaultConfig()
	c.HTTP.Listen, c.Insecure = "0.0.0.0:4318", true
	if err := c.Validate("receive"); err != nil {
		t.Errorf("insecure: true: %v", err)
	}
}
