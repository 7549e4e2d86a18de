package receive

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := new(authority)
	a.cert, a.key, a.pem, _ = a.issue(t, &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

func (a *authority) issue(t *testing.T, template *x509.Certificate) (cert *x509.Certificate, key *ecdsa.PrivateKey, certPEM, keyPEM []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	if template.NotBefore = time.Now().Add(-time.Hour); template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(time.Hour)
	}
	parent, signer := template, key
	if a.cert != nil {
		parent, signer = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
}

// server writes a server's certificate and key.
func (a *authority) server(t *testing.T, cert, key string) {
	t.Helper()
	_, _, c, k := a.issue(t, &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	put(t, cert, c)
	put(t, key, k)
}

// client returns the configuration of a client that trusts a and has a certificate for
// name, by its signer; nil for none.
func (a *authority) client(t *testing.T, signer *authority, name string, until time.Time) *tls.Config {
	t.Helper()
	cfg := &tls.Config{RootCAs: x509.NewCertPool(), ClientSessionCache: tls.NewLRUClientSessionCache(8)}
	cfg.RootCAs.AddCert(a.cert)
	if signer != nil {
		_, _, c, k := signer.issue(t, &x509.Certificate{Subject: pkix.Name{CommonName: name}, NotAfter: until, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		pair, err := tls.X509KeyPair(c, k)
		if err != nil {
			t.Fatal(err)
		}
		// Also where the server does not name its signer.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return cfg
}

func put(t *testing.T, path string, text []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// caller is a client with a connection over each protocol, which it keeps.
type caller struct {
	d    *door
	http *http.Client
	grpc *grpc.ClientConn
}

func (d *door) caller(t *testing.T, cfg *tls.Config) *caller {
	t.Helper()
	conn, err := grpc.NewClient(d.grpc, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{TLSClientConfig: cfg.Clone(), ForceAttemptHTTP2: true}
	t.Cleanup(func() { _ = conn.Close(); tr.CloseIdleConnections() })
	return &caller{d, &http.Client{Transport: tr}, conn}
}

// send sends a request over each protocol and returns what became of them: an HTTP status
// and a code; 0 and Unavailable where there was no connection.
func (c *caller) send(t *testing.T, auth string) (httpStatus int, code codes.Code, res *http.Response) {
	t.Helper()
	p := good(t)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, strings.Replace(c.d.http, "http://", "https://", 1)+"/v1/traces", bytes.NewReader(p))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", typeProtobuf)
	ctx := t.Context()
	if auth != "" {
		req.Header.Set("Authorization", auth)
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", auth)
	}
	if res, err = c.http.Do(req); err == nil {
		httpStatus = res.StatusCode
		_, _ = io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
	}
	var answer rawBytes
	err = c.grpc.Invoke(ctx, otlpgrpc.Method(otlpwire.Traces), rawBytes(p), &answer, grpc.ForceCodec(clientCodec{}))
	return httpStatus, status.Code(err), res
}

func (c *caller) expect(t *testing.T, what, auth string, wantStatus int, wantCode codes.Code) *http.Response {
	t.Helper()
	got, code, res := c.send(t, auth)
	if got != wantStatus || code != wantCode {
		t.Errorf("%s: %d and %v, want %d and %v", what, got, code, wantStatus, wantCode)
	}
	return res
}

// TestCertificatesOfSenders: one whose certificate was signed by client_ca_file needs no
// token, another's certificate is no way in, and when the file changes, that holds for
// connections that are open, too.
func TestCertificatesOfSenders(t *testing.T) {
	ours, theirs, dir := newAuthority(t), newAuthority(t), t.TempDir()
	cert, key, ca := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "ca.pem")
	ours.server(t, cert, key)
	put(t, ca, ours.pem)
	d := open(t, true, func(c *Config) { c.TLS = TLSConfig{cert, key, ca} })
	named := d.caller(t, ours.client(t, ours, "as-9", time.Time{}))
	other := d.caller(t, ours.client(t, theirs, "as-9", time.Time{}))
	plain := d.caller(t, ours.client(t, nil, "", time.Time{}))
	brief := d.caller(t, ours.client(t, ours, "as-9", time.Now().Add(2*time.Second)))

	named.expect(t, "our certificate", "", 200, codes.OK)
	d.mu.Lock()
	for _, b := range d.taken {
		if b.Instance != "as-9" {
			t.Errorf("taken as %s", b.Instance)
		}
	}
	d.mu.Unlock()
	other.expect(t, "another's certificate", secret, 0, codes.Unavailable)
	plain.expect(t, "no certificate", "", 401, codes.Unauthenticated)
	plain.expect(t, "no certificate, a token", secret, 200, codes.OK)
	brief.expect(t, "a certificate that ends soon", "", 200, codes.OK)

	put(t, ca, []byte("nonsense"))
	named.expect(t, "a broken file", "", 200, codes.OK)
	put(t, ca, theirs.pem)
	named.expect(t, "on a connection that is open, by one who may no longer sign", "", 401, codes.Unauthenticated)
	named.http.CloseIdleConnections()
	d.caller(t, ours.client(t, ours, "as-9", time.Time{})).expect(t, "a new one by him", secret, 0, codes.Unavailable)
	d.caller(t, ours.client(t, theirs, "as-9", time.Time{})).expect(t, "by the new one", "", 200, codes.OK)
	put(t, ca, ours.pem)
	for deadline := time.Now().Add(20 * time.Second); ; {
		if got, code, _ := brief.send(t, ""); got == 401 && code == codes.Unauthenticated {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a certificate that has expired is taken on a connection that is open")
		}
	}
}

// TestServerCertificateIsReadAgain, for the next connection; while one of the two files has
// changed, or one is broken, the old pair stays.
func TestServerCertificateIsReadAgain(t *testing.T) {
	ours, dir := newAuthority(t), t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	ours.server(t, cert, key)
	d := open(t, false, func(c *Config) { c.TLS = TLSConfig{Cert: cert, Key: key} })
	serial := func() string {
		t.Helper()
		res := d.caller(t, ours.client(t, nil, "", time.Time{})).expect(t, "a new connection", "", 200, codes.OK)
		if res == nil {
			return ""
		}
		if got := res.TLS.NegotiatedProtocol; got != "http/1.1" {
			t.Errorf("OTLP/HTTP over %q", got)
		}
		return res.TLS.PeerCertificates[0].SerialNumber.String()
	}
	first := serial()
	old, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	ours.server(t, cert, key)
	second := serial()
	if second == first {
		t.Error("the new certificate is not used")
	}
	put(t, key, old)
	if serial() != second {
		t.Error("a key of another certificate was taken")
	}
}

// TestNoHTTP2OnTheHTTPPort: a client that speaks both gets HTTP/1.1, and one that begins
// with HTTP/2 no answer in it.
func TestNoHTTP2OnTheHTTPPort(t *testing.T) {
	ours, dir := newAuthority(t), t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	ours.server(t, cert, key)
	d := open(t, false, func(c *Config) { c.TLS = TLSConfig{Cert: cert, Key: key} })
	for _, protocols := range [][]string{{"h2", "http/1.1"}, {"http/1.1"}, nil, {"h2"}} {
		cfg := ours.client(t, nil, "", time.Time{})
		cfg.NextProtos = protocols
		conn, err := tls.Dial("tcp", strings.TrimPrefix(d.http, "http://"), cfg)
		if err != nil {
			if len(protocols) != 1 || protocols[0] != "h2" {
				t.Errorf("%v: %v", protocols, err)
			}
			continue
		}
		if got := conn.ConnectionState().NegotiatedProtocol; got == "h2" {
			t.Errorf("%v: %q", protocols, got)
		}
		_, _ = io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
		answer, _ := io.ReadAll(conn)
		if len(answer) > 0 && !bytes.HasPrefix(answer, []byte("HTTP/1.1 4")) && !bytes.HasPrefix(answer, []byte("HTTP/1.1 5")) {
			t.Errorf("%v: HTTP/2's preface is answered with %q", protocols, answer)
		}
		_ = conn.Close()
	}
}

// TestEdgeWantsCertificates: where there are no tokens, a sender without a certificate does
// not come in, and no session is taken up again without one.
func TestEdgeWantsCertificates(t *testing.T) {
	ours, dir := newAuthority(t), t.TempDir()
	cert, key, ca := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "ca.pem")
	ours.server(t, cert, key)
	put(t, ca, ours.pem)
	d := open(t, false, func(c *Config) { c.TLS = TLSConfig{cert, key, ca} })
	d.caller(t, ours.client(t, nil, "", time.Time{})).expect(t, "no certificate", "", 0, codes.Unavailable)
	c := d.caller(t, ours.client(t, ours, "as-1", time.Time{}))
	for range 2 {
		if res := c.expect(t, "a certificate", "", 200, codes.OK); res != nil && res.TLS.DidResume {
			t.Error("a session was taken up again")
		}
		c.http.CloseIdleConnections()
	}
	for _, wrong := range []TLSConfig{{Cert: cert}, {Key: key}, {ClientCA: ca}, {cert, key, key}, {cert, key, filepath.Join(dir, "none")}} {
		cfg := DefaultConfig()
		cfg.TLS = wrong
		if err := cfg.Validate("gateway"); err == nil || !strings.Contains(err.Error(), "gateway.tls") {
			t.Errorf("%+v: %v", wrong, err)
		}
	}
}
