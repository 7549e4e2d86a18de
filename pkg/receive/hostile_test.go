package receive

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/otlpwire/badinput"
)

// TestBadInput sends every row of bad input over HTTP, plain and in gzip, and
// over gRPC, and a good request after each: the row has its answer, and nothing
// of it comes through but what the answer says.
func TestBadInput(t *testing.T) {
	d := open(t, false, func(c *Config) { c.MaxRequest, c.MaxInFlight = 32<<20, 128<<20 })
	for _, row := range badinput.Rows() {
		name := row.ID + " " + row.Name
		sig, err := otlpwire.ParseSignal(row.Signal)
		if err != nil {
			t.Fatal(err)
		}
		body := row.Body()
		ctype := typeProtobuf
		if row.JSON {
			ctype = typeJSON
		}
		want := http.StatusOK
		if row.Refused {
			want = http.StatusBadRequest
		}
		for _, enc := range []string{"", "gzip"} {
			send := body
			if enc != "" {
				send = gz(body)
			}
			before := d.items()
			res, out := d.do(t, req{path: "/v1/" + row.Signal, body: send, ctype: ctype, enc: enc})
			if res.StatusCode != want || (want == http.StatusOK && rejected(t, row.JSON, out) != row.Rejected) {
				t.Errorf("%s %s: %s %.300q, want %d with %d rejected", name, enc, res.Status, out, want, row.Rejected)
			}
			if n := d.items() - before; n != row.Items {
				t.Errorf("%s %s: %d items came through, want %d", name, enc, n, row.Items)
			}
		}
		if row.JSON {
			continue
		}
		before := d.items()
		code, out := d.grpcCall(t, sig, frame(0, body))
		if (code == codes.OK) == row.Refused || (code != codes.OK && code != codes.InvalidArgument) || (code == codes.OK && rejected(t, false, out) != row.Rejected) {
			t.Errorf("%s over gRPC: %v %.300q, want refused: %v, %d rejected", name, code, out, row.Refused, row.Rejected)
		}
		if n := d.items() - before; n != row.Items {
			t.Errorf("%s over gRPC: %d items came through, want %d", name, n, row.Items)
		}
	}
	d.probe(t)
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, b := range d.taken {
		if rep, err := otlpwire.Scan(b.Signal, b.Payload, otlpwire.DefaultLimits); err != nil || !rep.Sound() || rep.Items != b.Items {
			t.Errorf("a batch of %d items that came through: %+v, %v", b.Items, rep, err)
		}
	}
	for _, sig := range otlpwire.Signals {
		if testutil.ToFloat64(d.led.Of(sig).Sanitised) == 0 && sig != otlpwire.Metrics {
			t.Errorf("%v: no string was counted as sanitised", sig)
		}
	}
	if n := testutil.ToFloat64(d.led.Of(otlpwire.Traces).Crowded); n == 0 {
		t.Error("no item was counted as crowded")
	}
}

// rejected reads the count out of a successful answer.
func rejected(t *testing.T, asJSON bool, body []byte) (n int) {
	t.Helper()
	if asJSON {
		var answer struct {
			PartialSuccess map[string]string
		}
		if err := json.Unmarshal(body, &answer); err != nil {
			t.Errorf("answer %q: %v", body, err)
		}
		for key, val := range answer.PartialSuccess {
			if strings.HasPrefix(key, "rejected") {
				_, _ = fmt.Sscan(val, &n)
			}
		}
		return n
	}
	if len(body) == 0 {
		return 0
	}
	partial, _ := protowire.ConsumeBytes(body[1:])
	if len(partial) == 0 || partial[0] != 0x08 {
		t.Errorf("answer %x", body)
		return -1
	}
	v, _ := protowire.ConsumeVarint(partial[1:])
	return int(v)
}

// probe sends a good request over both protocols.
func (d *door) probe(t *testing.T) {
	t.Helper()
	before := d.items()
	if res, out := d.do(t, req{body: good(t)}); res.StatusCode != http.StatusOK {
		t.Errorf("a good request after all that: %s %q", res.Status, out)
	}
	if err := d.export(t, good(t)); err != nil {
		t.Errorf("a good request over gRPC after all that: %v", err)
	}
	if n := d.items() - before; n != 2 {
		t.Errorf("%d items of two good requests came through", n)
	}
}

// TestMemoryOfBadInput has the rows about memory: what handling them allocates
// is bounded by the bound of a request, not by what they claim.
func TestMemoryOfBadInput(t *testing.T) {
	const limit = 32 << 20
	d := open(t, false, func(c *Config) { c.MaxRequest, c.MaxInFlight = limit, 4*limit })
	d.probe(t)
	allocated := func(name string, want int, body []byte, enc, ctype, path string) {
		t.Helper()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		res, _ := d.do(t, req{path: path, body: body, enc: enc, ctype: ctype})
		runtime.ReadMemStats(&after)
		// In all, garbage included: a body grows by doubling, JSON is converted into
		// as much again, and what Mend and Halve copy comes on top.
		if want != 0 && res.StatusCode != want {
			t.Errorf("%s: %s, want %d", name, res.Status, want)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 8*limit {
			t.Errorf("%s: %s, %d bytes allocated for %d", name, res.Status, n, len(body))
		}
	}
	for _, row := range badinput.Rows() {
		if !row.Large {
			continue
		}
		ctype := typeProtobuf
		if row.JSON {
			ctype = typeJSON
		}
		allocated(row.ID+" "+row.Name, 0, row.Body(), "", ctype, "/v1/"+row.Signal)
	}
	bomb := gzipBomb(1 << 30)
	allocated("H1 gzip bomb", 413, bomb, "gzip", typeProtobuf, "/v1/traces")
	allocated("H1 gzip bomb of JSON", 413, bomb, "gzip", typeJSON, "/v1/traces")
	allocated("H2 zstd window of 2 GiB", 400, []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00}, "zstd", typeProtobuf, "/v1/traces")
	allocated("H3 snappy that claims 4 GiB", 413, []byte{0xff, 0xff, 0xff, 0xff, 0x0f, 0, 0}, "snappy", typeProtobuf, "/v1/traces")
	d.probe(t)
}

// gzipBomb becomes size bytes of zeros, before anybody sees that it has no end:
// what a megabyte of zeros is compressed to after another one, again and again.
func gzipBomb(size int) []byte {
	var buf bytes.Buffer
	w := newGzipWriter(&buf)
	zeros := make([]byte, 1<<20)
	_, _ = w.Write(zeros)
	_ = w.Flush()
	first := buf.Len()
	_, _ = w.Write(zeros)
	_ = w.Flush()
	return append(bytes.Clone(buf.Bytes()), bytes.Repeat(buf.Bytes()[first:], size/len(zeros)-2)...)
}

func TestSizesAtTheLimit(t *testing.T) {
	const limit = 1 << 20
	d := open(t, false, nil)
	// A request of a given size: an unknown field fills it up.
	sized := func(n int) []byte {
		p := good(t)
		pad := n - len(p) - 6 // two bytes of tag and four of length
		p = protowire.AppendTag(p, 100, protowire.BytesType)
		p = append(p, byte(pad&0x7f|0x80), byte(pad>>7&0x7f|0x80), byte(pad>>14&0x7f|0x80), byte(pad>>21))
		return append(p, make([]byte, pad)...)
	}
	for _, tc := range []struct {
		size, want int
		code       codes.Code
	}{{limit, 200, codes.OK}, {limit + 1, 413, codes.ResourceExhausted}} {
		p := sized(tc.size)
		if len(p) != tc.size {
			t.Fatalf("BUG: %d bytes, want %d", len(p), tc.size)
		}
		if res, _ := d.do(t, req{body: p}); res.StatusCode != tc.want {
			t.Errorf("%d bytes: %s, want %d", tc.size, res.Status, tc.want)
		}
		if res, _ := d.do(t, req{body: gz(p), enc: "gzip"}); res.StatusCode != tc.want {
			t.Errorf("%d bytes in gzip: %s, want %d", tc.size, res.Status, tc.want)
		}
		if answer := d.raw(t, "POST /v1/traces HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\nTransfer-Encoding: chunked\r\n\r\n"+
			fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(p), p)); !strings.HasPrefix(answer, fmt.Sprintf("HTTP/1.1 %d", tc.want)) {
			t.Errorf("%d bytes in chunks: %.100q, want %d", tc.size, answer, tc.want)
		}
		if code, _ := d.grpcCall(t, otlpwire.Traces, frame(0, p)); code != tc.code {
			t.Errorf("%d bytes over gRPC: %v, want %v", tc.size, code, tc.code)
		}
	}
	if n := d.items(); n != 4 {
		t.Errorf("%d items came through, want 4", n)
	}
}

// raw writes text to the HTTP port and returns what comes back until the server
// closes or an answer is complete.
func (d *door) raw(t *testing.T, text string) string {
	t.Helper()
	conn := dial(t, strings.TrimPrefix(d.http, "http://"))
	go func() { _, _ = io.WriteString(conn, text) }()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return "closed"
	}
	defer func() { _ = res.Body.Close() }()
	body, _ := io.ReadAll(res.Body)
	return res.Proto + " " + res.Status + " " + string(body)
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// TestHTTPFraming has requests that lie about where they end: refused or closed,
// and never two requests where there is one.
func TestHTTPFraming(t *testing.T) {
	d := open(t, false, func(c *Config) { c.RequestTimeout = 300 * time.Millisecond })
	p := string(good(t))
	head := "POST /v1/traces HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\n"
	smuggled := fmt.Sprintf("%sContent-Length: %d\r\n\r\n%s", head, len(p), p)
	for _, tc := range []struct {
		name, text string
		want       []string
	}{
		{"length too long", fmt.Sprintf("%sContent-Length: %d\r\n\r\n%s", head, len(p)+10, p), []string{"HTTP/1.1 408", "closed"}},
		{"length too short", fmt.Sprintf("%sContent-Length: %d\r\n\r\n%s", head, len(p)-3, p), []string{"HTTP/1.1 400"}},
		{"negative length", head + "Content-Length: -1\r\n\r\n" + p, []string{"HTTP/1.1 400"}},
		{"two lengths", fmt.Sprintf("%sContent-Length: %d\r\nContent-Length: 5\r\n\r\n%s", head, len(p), p), []string{"HTTP/1.1 400"}},
		{"length beyond int64", head + "Content-Length: 99999999999999999999\r\n\r\n" + p, []string{"HTTP/1.1 400"}},
		{"length of a gigabyte", head + "Content-Length: 1073741824\r\n\r\n", []string{"HTTP/1.1 413"}},
		// Chunks win (RFC 9112, section 6.3), and what follows is a request of its own
		// with a token of its own: nothing to gain without a proxy that disagrees.
		{"length and chunks", fmt.Sprintf("%sContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n%s", head, smuggled), []string{"HTTP/1.1 400", "HTTP/1.1 200", "closed"}},
		{"chunks and identity", head + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", []string{"HTTP/1.1 400", "HTTP/1.1 501", "closed"}},
		{"chunk of a negative size", head + "Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n", []string{"HTTP/1.1 400"}},
		{"chunk without an end", head + "Transfer-Encoding: chunked\r\n\r\nffffffff\r\nhello", []string{"HTTP/1.1 408", "closed"}},
		{"100-continue and no body", head + "Expect: 100-continue\r\nContent-Length: 10\r\n\r\n", []string{"HTTP/1.1 100", "HTTP/1.1 408", "closed"}},
		{"another expectation", head + "Expect: miracles\r\nContent-Length: 10\r\n\r\n", []string{"HTTP/1.1 417"}},
		{"headers that stall", head, []string{"HTTP/1.1 408", "closed"}},
		{"space before the colon", "POST /v1/traces HTTP/1.1\r\nHost: x\r\nContent-Length : 1\r\n\r\nx", []string{"HTTP/1.1 400"}},
		{"a header of 1 MiB", head + "X: " + strings.Repeat("x", 1<<20) + "\r\n\r\n", []string{"HTTP/1.1 431", "closed"}},
		{"NUL in the token", head + "Authorization: Bearer a\x00b\r\nContent-Length: 0\r\n\r\n", []string{"HTTP/1.1 400"}},
		{"no HTTP at all", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", []string{"HTTP/1.1 400", "closed"}},
	} {
		got := d.raw(t, tc.text)
		ok := false
		for _, w := range tc.want {
			ok = ok || strings.HasPrefix(got, w)
		}
		if !ok {
			t.Errorf("%s: %.200q, want %v", tc.name, got, tc.want)
		}
	}
	if n := d.items(); n > 1 {
		t.Errorf("%d items came through", n)
	}
	d.probe(t)
}

// TestSlowClients opens connections that give a byte now and then, or nothing:
// all are closed by the deadline, and good requests pass beside them.
func TestSlowClients(t *testing.T) {
	d := open(t, false, func(c *Config) { c.RequestTimeout, c.MaxConnections = 500*time.Millisecond, 400 })
	addr := strings.TrimPrefix(d.http, "http://")
	head := "POST /v1/traces HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\nContent-Length: 1000\r\n\r\n"
	var wg sync.WaitGroup
	for n := range 60 {
		conn := dial(t, addr)
		wg.Go(func() {
			text := ""
			switch n % 4 {
			case 0: // nothing
			case 1: // headers, byte by byte
				text = head
			case 2: // a body, byte by byte
				_, _ = io.WriteString(conn, head)
				text = strings.Repeat("x", 1000)
			case 3: // headers, then nothing
				_, _ = io.WriteString(conn, head)
			}
			closed := make(chan struct{})
			go func() {
				_, _ = io.Copy(io.Discard, conn)
				close(closed)
			}()
			for i := 0; ; i++ {
				select {
				case <-closed:
					return
				case <-time.After(20 * time.Millisecond):
					if i < len(text) {
						_, _ = io.WriteString(conn, text[i:i+1])
					}
				}
			}
		})
	}
	d.probe(t)
	wg.Wait() // the connections' own deadline is 30 s, ours half a second
	if n := d.items(); n != 2 {
		t.Errorf("%d items came through, want those of the probe", n)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	d := open(t, false, func(c *Config) { c.MaxConnections, c.RequestTimeout = 4, 500*time.Millisecond })
	var conns []net.Conn
	for range 40 {
		conns = append(conns, dial(t, strings.TrimPrefix(d.http, "http://")))
	}
	// Four at a time are let in and closed, for their silence or to make room; the rest
	// waits, and so does the good request, until it is its turn.
	if res, _ := d.do(t, req{body: good(t)}); res.StatusCode != http.StatusOK {
		t.Errorf("%s", res.Status)
	}
	for i, c := range conns {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !strings.Contains(fmt.Sprint(err), "reset") {
			t.Errorf("connection %d: %v, want it closed", i, err)
		}
	}
}

// TestConcurrentSendersDoNotMix sends 64 requests at once, each of another
// instance and in another encoding, and compares what arrives byte by byte.
func TestConcurrentSendersDoNotMix(t *testing.T) {
	d := open(t, false, func(c *Config) { c.MaxInFlight = 64 << 20 })
	const senders, rounds = 64, 8
	var wg sync.WaitGroup
	for n := range senders {
		name := fmt.Sprintf("tenant-%d", n)
		text := `{"resourceSpans":[{"resource":{"attributes":[{"key":"tenant","value":{"stringValue":"` + name + `"}}]},"scopeSpans":[{"spans":[` +
			strings.TrimSuffix(strings.Repeat(`{"traceId":"5b8efff798038103d269b633813fc60c","spanId":"eee19b7ec3c1b174","name":"`+name+`"},`, n*8+1), ",") + `]}]}]}`
		p, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, []byte(text), otlpwire.DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		auth := http.Header{"Authorization": {name}}
		wg.Go(func() {
			for range rounds {
				code := http.StatusOK
				switch n % 6 {
				case 0:
					res, _ := d.do(t, req{body: p, header: auth})
					code = res.StatusCode
				case 1:
					res, _ := d.do(t, req{body: gz(p), enc: "gzip", header: auth})
					code = res.StatusCode
				case 2:
					res, _ := d.do(t, req{body: zs(p), enc: "zstd", header: auth})
					code = res.StatusCode
				case 3:
					res, _ := d.do(t, req{body: []byte(text), ctype: typeJSON, header: auth})
					code = res.StatusCode
				case 4:
					c, _ := d.grpcCall(t, otlpwire.Traces, frame(0, p), "Authorization", name)
					code += int(c)
				case 5:
					c, _ := d.grpcCall(t, otlpwire.Traces, frame(1, gz(p)), "Authorization", name, "Grpc-Encoding", "gzip")
					code += int(c)
				}
				if code != http.StatusOK {
					t.Errorf("%s: %d", name, code)
				}
			}
		})
	}
	wg.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	items := 0
	for _, b := range d.taken {
		items += b.Items
		for r := range otlpwire.Resources(b.Payload) {
			tenant, _ := otlpwire.ResourceAttribute(r.Resource(), "tenant")
			instance, _ := otlpwire.ResourceAttribute(r.Resource(), "instance.id")
			for sc := range r.Scopes() {
				for item := range sc.Items() {
					var sp otlpwire.Span
					if sp.Parse(item); string(tenant.Str) != b.Instance || string(instance.Str) != b.Instance || string(sp.Name) != b.Instance {
						t.Fatalf("of %s: tenant %s, instance %s, span %s", b.Instance, tenant.Str, instance.Str, sp.Name)
					}
				}
			}
		}
	}
	if want := rounds * (senders + 8*senders*(senders-1)/2); items != want {
		t.Errorf("%d items, want %d", items, want)
	}
}
