package tempo

import (
	"bytes"
	"compress/gzip"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/httpclient"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpgrpc"
)

// rejected is an answer that takes a request but for n spans.
func rejected(n uint64, why string) []byte {
	partial := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), n)
	partial = protowire.AppendString(protowire.AppendTag(partial, 2, protowire.BytesType), why)
	return protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), partial)
}

// overHTTP returns a writer to a server of a test, with settings of its own.
func overHTTP(t *testing.T, handler http.HandlerFunc, set func(*Config, string)) *Writer {
	t.Helper()
	srv := httptest.NewServer(handler)
	t.Cleanup(srv.Close)
	cfg := DefaultConfig()
	cfg.Endpoint, cfg.Protocol = srv.URL, "http"
	if set != nil {
		set(&cfg, srv.URL)
	}
	w, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	return w
}

// TestWhatARejectionMeans: spans that are given up, and those that are tried again.
func TestWhatARejectionMeans(t *testing.T) {
	for name, tc := range map[string]struct {
		status int
		answer []byte
		reason string // it is for good
		sender bool   // it is of who sends
		ok     bool
	}{
		"all taken":          {status: 200, ok: true},
		"none rejected":      {status: 200, answer: rejected(0, "a warning"), ok: true},
		"no reason":          {status: 200, answer: rejected(2, ""), reason: ledger.DeadRefused},
		"another reason":     {status: 200, answer: rejected(2, "UNKNOWN_ERROR"), reason: ledger.DeadRefused},
		"too many of a user": {status: 200, answer: rejected(2, "LIVE_TRACES_EXCEEDED: max live traces exceeded"), sender: true},
		"too fast":           {status: 200, answer: rejected(2, "RATE_LIMITED: ingestion rate limit"), sender: true},
		"too large":          {status: 200, answer: rejected(2, "TRACE_TOO_LARGE: max size of trace (5) exceeded"), reason: ledger.DeadTooLarge},
		"no request of ours": {status: 400, reason: ledger.DeadRefused},
		"not now":            {status: 503},
		"who is this":        {status: 401, sender: true},
	} {
		w := overHTTP(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(tc.status)
			_, _ = w.Write(tc.answer)
		}, nil)
		err := w.Write(t.Context(), "as-1", nil)
		reason, _ := fault.Reason(err)
		if (err == nil) != tc.ok || reason != tc.reason || fault.IsSender(err) != tc.sender {
			t.Errorf("%s: %v, reason %q, sender %v", name, err, reason, fault.IsSender(err))
		}
		if err != nil && !strings.HasPrefix(err.Error(), "tempo") {
			t.Errorf("%s: %v does not say of whom it is", name, err)
		}
	}
}

// TestBytesTravelAsTheyAre: with whose they are, compressed where that is set.
func TestBytesTravelAsTheyAre(t *testing.T) {
	payload := []byte("\x0a\x00 bytes of spans")
	for _, compression := range []string{"none", "gzip"} {
		var got []byte
		var header http.Header
		var path string
		w := overHTTP(t, func(_ http.ResponseWriter, r *http.Request) {
			header, path = r.Header, r.URL.Path
			got, _ = io.ReadAll(r.Body)
		}, func(cfg *Config, url string) {
			cfg.Endpoint = url + "/otlp/"
			cfg.Compression = compression
			cfg.Headers = map[string]config.Secret{"X-Site": "berlin"}
			cfg.Tenant = httpclient.Tenant{From: "instance", Map: map[string]string{"as-1": "shop"}}
		})
		if err := w.Write(t.Context(), "as-1", payload); err != nil {
			t.Fatal(err)
		}
		if header.Get("Content-Encoding") == "gzip" {
			z, err := gzip.NewReader(bytes.NewReader(got))
			if err != nil {
				t.Fatal(err)
			}
			got, _ = io.ReadAll(z)
		}
		if !bytes.Equal(got, payload) || path != "/otlp/v1/traces" || (header.Get("Content-Encoding") == "gzip") != (compression == "gzip") {
			t.Errorf("%s: %q at %s, %v", compression, got, path, header)
		}
		if header.Get("X-Scope-OrgID") != "shop" || header.Get("X-Site") != "berlin" {
			t.Errorf("%s: whose is it? %v", compression, header)
		}
	}
}

// TestMetadataOfGRPC: the same headers, under names that gRPC has.
func TestMetadataOfGRPC(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	type request struct {
		method string
		body   []byte
		md     metadata.MD
	}
	got := make(chan request, 1)
	srv := grpc.NewServer(grpc.ForceServerCodecV2(otlpgrpc.Codec{}), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		var in []byte
		if err := s.RecvMsg(&in); err != nil {
			return err
		}
		method, _ := grpc.MethodFromServerStream(s)
		md, _ := metadata.FromIncomingContext(s.Context())
		got <- request{method, bytes.Clone(in), md}
		return s.SendMsg(rejected(1, "TRACE_TOO_LARGE"))
	}))
	go func() { _ = srv.Serve(ln) }()
	defer srv.Stop()
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.Endpoint, cfg.BearerToken, cfg.Tenant.From = ln.Addr().String(), token, "instance"
	w, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	if reason, _ := fault.Reason(w.Write(t.Context(), "as-1", []byte("spans"))); reason != ledger.DeadTooLarge {
		t.Errorf("reason %q", reason)
	}
	r := <-got
	if r.method != "/opentelemetry.proto.collector.trace.v1.TraceService/Export" || string(r.body) != "spans" ||
		strings.Join(r.md.Get("authorization"), "") != "Bearer secret" || strings.Join(r.md.Get("x-scope-orgid"), "") != "as-1" {
		t.Errorf("%s: %q, %v", r.method, r.body, r.md)
	}
}

// TestNobodysSpansAreNotSent: without a tenant they are given up as a whole, and Tempo is not asked.
func TestNobodysSpansAreNotSent(t *testing.T) {
	var asked atomic.Int32
	customers := filepath.Join(t.TempDir(), "customers.yaml")
	if err := os.WriteFile(customers, []byte("as-2: acme\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := overHTTP(t, func(http.ResponseWriter, *http.Request) { asked.Add(1) }, func(cfg *Config, _ string) {
		cfg.Tenant = httpclient.Tenant{From: "customer", CustomersFile: customers}
	})
	if err := w.Write(t.Context(), "as-1", nil); !fault.IsWhole(err) || asked.Load() != 0 {
		t.Errorf("%v, asked %d times", err, asked.Load())
	}
	if err := w.Write(t.Context(), "as-2", nil); err != nil || asked.Load() != 1 {
		t.Errorf("%v, asked %d times", err, asked.Load())
	}
}

// TestNoSecretInPlainText: a status page without TLS is asked for the tenant, and gets no credential.
func TestNoSecretInPlainText(t *testing.T) {
	var header http.Header
	w := overHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		header = r.Header
		_, _ = io.WriteString(w, "target: all\n")
	}, func(cfg *Config, url string) {
		cfg.StatusURL = url + "/"
		cfg.BasicAuth = httpclient.BasicAuth{Username: "joe", Password: "pw"}
		cfg.Headers = map[string]config.Secret{"X-Key": "secret"}
		cfg.Tenant.Default = "shop"
	})
	now := time.Now()
	if ok, text, err := w.Takes(t.Context(), now.Add(-time.Minute), now); !ok || err != nil {
		t.Errorf("%v, %s, %v", ok, text, err)
	}
	if header.Get("Authorization") != "" || header.Get("X-Key") != "" || header.Get("X-Scope-OrgID") != "shop" {
		t.Errorf("asked with %v", header)
	}
}
