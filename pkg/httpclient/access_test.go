package httpclient

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/fault"
)

// authority signs certificates for tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{}
	a.cert, a.key, a.pem, _ = issue(t, nil, &x509.Certificate{Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

// issue makes a certificate, by an authority or by itself.
func issue(t *testing.T, by *authority, template *x509.Certificate) (cert *x509.Certificate, key *ecdsa.PrivateKey, certPEM, keyPEM []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := template, key
	if by != nil {
		parent, signer = by.cert, by.key
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

// again issues a further certificate for a key.
func again(t *testing.T, by *authority, keyPEM []byte) []byte {
	t.Helper()
	block, _ := pem.Decode(keyPEM)
	private, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "sink"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, &private.(*ecdsa.PrivateKey).PublicKey, by.key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// put writes a file, a second younger than before.
func put(t *testing.T, path string, text []byte) string {
	t.Helper()
	at := time.Now()
	if info, err := os.Stat(path); err == nil {
		at = info.ModTime().Add(time.Second)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, at, at); err != nil {
		t.Fatal(err)
	}
	return path
}

// server is one of TLS that wants a client's certificate of an authority.
func server(t *testing.T, own, clients *authority, name string, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	_, _, certPEM, keyPEM := issue(t, own, &x509.Certificate{Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}})
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(handler)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	if clients != nil {
		srv.TLS.ClientAuth, srv.TLS.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
		srv.TLS.ClientCAs.AddCert(clients.cert)
	}
	srv.Config.ErrorLog = nil
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv
}

// TestTLS: the server must be who it says, and its authority one that is trusted; a client
// shows its certificate. Files that change count for the next connection. What is wrong is
// a matter of configuration: data waits, nothing is given up.
func TestTLS(t *testing.T) {
	ours, others := newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	ca := put(t, filepath.Join(dir, "ca.pem"), ours.pem)
	client := func(a *authority) (cert, key []byte) {
		_, _, cert, key = issue(t, a, &x509.Certificate{Subject: pkix.Name{CommonName: "sink"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		return cert, key
	}
	certPEM, keyPEM := client(ours)
	cert, key := put(t, filepath.Join(dir, "cert.pem"), certPEM), put(t, filepath.Join(dir, "key.pem"), keyPEM)
	seen := ""
	srv := server(t, ours, ours, "backend.example", func(_ http.ResponseWriter, r *http.Request) {
		seen = r.TLS.PeerCertificates[0].SerialNumber.String()
	})
	send := func(access Access) error {
		c, err := New(srv.URL, "/p", nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Use("loki", access); err != nil {
			t.Fatal(err)
		}
		defer c.http.CloseIdleConnections()
		return post(t, c, "x")
	}
	good := Access{TLS: config.ClientTLS{CA: ca, Cert: cert, Key: key, ServerName: "backend.example"}}
	if err := send(good); err != nil {
		t.Fatalf("all is well: %v", err)
	}
	first := seen
	for name, wrong := range map[string]func(*Access){
		"another name":            func(a *Access) { a.TLS.ServerName = "other.example" },
		"the system's roots":      func(a *Access) { a.TLS.CA = "" },
		"no certificate":          func(a *Access) { a.TLS.Cert, a.TLS.Key = "", "" },
		"another authority":       func(a *Access) { a.TLS.CA = put(t, filepath.Join(dir, "other.pem"), others.pem) },
		"the name of the address": func(a *Access) { a.TLS.ServerName = "" },
	} {
		a := good
		wrong(&a)
		if err := send(a); err == nil || !fault.IsConfiguration(err) {
			t.Errorf("%s: %v, want an error of configuration", name, err)
		}
	}
	insecure := good
	insecure.TLS.CA, insecure.TLS.ServerName, insecure.TLS.Insecure = "", "", true
	if err := send(insecure); err != nil {
		t.Errorf("insecure_skip_verify: %v", err)
	}

	// One client, whose files change.
	c, _ := New(srv.URL, "/p", nil)
	if err := c.Use("loki", good); err != nil {
		t.Fatal(err)
	}
	if err := post(t, c, "x"); err != nil {
		t.Fatal(err)
	}
	certPEM, keyPEM = client(ours)
	put(t, cert, certPEM) // the key comes a moment later: until then the old pair counts
	c.http.CloseIdleConnections()
	if err := post(t, c, "x"); err != nil || seen != first {
		t.Errorf("half of a new pair: %v, certificate %s, want %s", err, seen, first)
	}
	put(t, key, keyPEM)
	c.http.CloseIdleConnections()
	if err := post(t, c, "x"); err != nil || seen == first {
		t.Errorf("a new pair: %v, the same certificate", err)
	}
	second := seen
	certPEM = again(t, ours, keyPEM) // renewed, with the same key
	put(t, cert, certPEM)
	c.http.CloseIdleConnections()
	if err := post(t, c, "x"); err != nil || seen == second {
		t.Errorf("a new certificate for the same key: %v, the same certificate", err)
	}
	put(t, ca, others.pem)
	c.http.CloseIdleConnections()
	if err := post(t, c, "x"); !fault.IsConfiguration(err) {
		t.Errorf("an authority that is not trusted any more: %v", err)
	}
	put(t, ca, append(others.pem, ours.pem...))
	c.http.CloseIdleConnections()
	if err := post(t, c, "x"); err != nil {
		t.Errorf("both authorities: %v", err)
	}
}

func TestCredentialsAndTenants(t *testing.T) {
	var got http.Header
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = r.Header }))
	defer srv.Close()
	dir := t.TempDir()
	secret := put(t, filepath.Join(dir, "secret"), []byte("one\n"))
	customers := put(t, filepath.Join(dir, "customers.yaml"), []byte("as-1: c-7\nas-2: other\n"))
	for name, tc := range map[string]struct {
		access       Access
		header, want string
	}{
		"bearer":          {Access{BearerToken: secret}, "Authorization", "Bearer one"},
		"basic":           {Access{BasicAuth: BasicAuth{Username: "joe", Password: "pw"}}, "Authorization", "Basic am9lOnB3"},
		"basic from file": {Access{BasicAuth: BasicAuth{Username: "joe", PasswordFile: secret}}, "Authorization", "Basic am9lOm9uZQ=="},
		"own header":      {Access{Headers: map[string]config.Secret{"X-Api-Key": "k"}}, "X-Api-Key", "k"},
		"no tenant":       {Access{}, "X-Scope-OrgID", ""},
		"one tenant":      {Access{Tenant: Tenant{Default: "all"}}, "X-Scope-OrgID", "all"},
		"instance":        {Access{Tenant: Tenant{From: "instance"}}, "X-Scope-OrgID", "as-1"},
		"customer":        {Access{Tenant: Tenant{From: "customer", CustomersFile: customers}}, "X-Scope-OrgID", "c-7"},
		"mapped":          {Access{Tenant: Tenant{From: "customer", CustomersFile: customers, Map: map[string]string{"c-7": "seven"}, Default: "others"}}, "X-Scope-OrgID", "seven"},
		"not mapped":      {Access{Tenant: Tenant{From: "instance", Map: map[string]string{"c-7": "seven"}, Default: "others"}}, "X-Scope-OrgID", "others"},
		"other header":    {Access{Tenant: Tenant{From: "instance", Header: "X-Tenant"}}, "X-Tenant", "as-1"},
	} {
		c, _ := New(srv.URL, "/p", nil)
		if err := c.Use("loki", tc.access); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if _, _, err := c.Send(t.Context(), "as-1", []byte("x"), nil); err != nil || got.Get(tc.header) != tc.want {
			t.Errorf("%s: %q, want %q (%v)", name, got.Get(tc.header), tc.want, err)
		}
	}
	c, _ := New(srv.URL, "/p", nil)
	if err := c.Use("loki", Access{BearerToken: secret}); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ text, want string }{{"two", "Bearer two"}, {"", "Bearer two"}, {"three\n", "Bearer three"}} {
		put(t, secret, []byte(step.text)) // an empty one is being written
		if err := post(t, c, "x"); err != nil || got.Get("Authorization") != step.want {
			t.Errorf("file with %q: %q, want %q (%v)", step.text, got.Get("Authorization"), step.want, err)
		}
	}
	byCustomer, _ := New(srv.URL, "/p", nil)
	if err := byCustomer.Use("loki", Access{Tenant: Tenant{From: "customer", CustomersFile: customers}}); err != nil {
		t.Fatal(err)
	}
	send := func(instance, want string) {
		t.Helper()
		if _, _, err := byCustomer.Send(t.Context(), instance, []byte("x"), nil); err != nil || got.Get("X-Scope-OrgID") != want {
			t.Errorf("%s: %q, want %q (%v)", instance, got.Get("X-Scope-OrgID"), want, err)
		}
	}
	send("as-1", "c-7")
	if _, _, err := byCustomer.Send(t.Context(), "as-3", nil, nil); !fault.IsWhole(err) {
		t.Errorf("an instance of no customer: %v, want it to be given up", err)
	}
	put(t, customers, []byte("as-1: c-8\nas-3: c-9 # new\n"))
	send("as-3", "c-9")
	put(t, customers, []byte("as-1: 'a|b'\nas-3: c-8\n")) // no tenant: the file stays as it was
	send("as-1", "c-8")
	for name, tc := range map[string]struct {
		url    string
		access Access
		want   string
	}{
		"TLS and plain text": {srv.URL, Access{TLS: config.ClientTLS{Insecure: true}}, "loki.tls: the backend's address is plain text"},
		"no user":            {srv.URL, Access{BasicAuth: BasicAuth{Password: "x"}}, "loki.basic_auth has a password and no username"},
		"two passwords":      {srv.URL, Access{BasicAuth: BasicAuth{Username: "a", Password: "x", PasswordFile: secret}}, "set one"},
		"two ways":           {srv.URL, Access{BasicAuth: BasicAuth{Username: "a"}, BearerToken: secret}, "bearer_token_file are both set"},
		"two lines":          {srv.URL, Access{BearerToken: put(t, filepath.Join(t.TempDir(), "token"), []byte("a\nb\n"))}, "want one line with the secret"},
		"an empty file":      {srv.URL, Access{BasicAuth: BasicAuth{Username: "a", PasswordFile: put(t, filepath.Join(t.TempDir(), "password"), []byte("\n"))}}, "want one line with the secret"},
		"no file":            {srv.URL, Access{BearerToken: "/nowhere"}, "loki.bearer_token_file: /nowhere"},
		"authorization":      {srv.URL, Access{Headers: map[string]config.Secret{"authorization": "x"}}, "loki.headers: set Authorization by"},
		"tenant of nobody":   {srv.URL, Access{Tenant: Tenant{From: "customer"}}, "which needs tenant.customers_file"},
		"several tenants":    {srv.URL, Access{Tenant: Tenant{Default: "a|b"}}, `loki.tenant.default: "a|b" is not a tenant name`},
		"a way up":           {srv.URL, Access{Tenant: Tenant{From: "instance", Map: map[string]string{"as-1": ".."}}}, `loki.tenant.map: as-1: ".."`},
		"a way to admin":     {srv.URL, Access{Tenant: Tenant{Default: "../admin"}}, `"../admin" is not a tenant name`},
		"whose tenant":       {srv.URL, Access{Tenant: Tenant{From: "moon"}}, `loki.tenant.from is "moon"`},
		"no pair":            {"https://h", Access{TLS: config.ClientTLS{Cert: "x"}}, "needs both cert_file and key_file"},
	} {
		c, err := New(tc.url, "/p", nil)
		if err == nil {
			err = c.Use("loki", tc.access)
		}
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
	if _, err := New("http://joe:pw@h", "/p", nil); err == nil || strings.Contains(err.Error(), "pw") {
		t.Errorf("a password in the URL: %v", err)
	}
}

// TestSecretsSaidBackAreNotLogged: B8.
func TestSecretsSaidBackAreNotLogged(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "no \x1b[31m"+r.Header.Get("Authorization")+" and "+r.Header.Get("X-Api-Key")+" for "+r.Header.Get("X-Scope-OrgID"), 400)
	}))
	defer srv.Close()
	secret := put(t, filepath.Join(t.TempDir(), "secret"), []byte("s3cr3t-t0ken"))
	c, _ := New(srv.URL, "/p", nil)
	if err := c.Use("loki", Access{BearerToken: secret, Headers: map[string]config.Secret{"X-Api-Key": "an-api-key"}, Tenant: Tenant{Default: "everybody"}}); err != nil {
		t.Fatal(err)
	}
	err := post(t, c, "x")
	if err == nil || strings.Contains(err.Error(), "s3cr3t") || strings.Contains(err.Error(), "an-api-key") || strings.Contains(err.Error(), "\x1b") || strings.Count(err.Error(), "[redacted]") != 2 || !strings.Contains(err.Error(), "everybody") {
		t.Errorf("got %q", err)
	}
}

// TestNoAnswerIsCutOff: F37 and B4. Whatever a backend does, a request ends.
func TestNoAnswerIsCutOff(t *testing.T) {
	ended := make(chan struct{})
	defer close(ended)
	drip := func(r *http.Request, write func()) {
		_, _ = io.Copy(io.Discard, r.Body) // only then is it seen that the other side has gone
		for range 1000 {
			write()
			select {
			case <-time.After(20 * time.Millisecond):
			case <-r.Context().Done():
				return
			case <-ended:
				return
			}
		}
	}
	for name, answer := range map[string]http.HandlerFunc{
		"hangs": func(_ http.ResponseWriter, r *http.Request) { drip(r, func() {}) },
		"a byte at a time": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(503)
			drip(r, func() { _, _ = w.Write([]byte("x")); _ = http.NewResponseController(w).Flush() })
		},
		"endless 1xx": func(w http.ResponseWriter, r *http.Request) { drip(r, func() { w.WriteHeader(http.StatusEarlyHints) }) },
		"large header": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Large", strings.Repeat("x", 100<<10))
			w.WriteHeader(503)
		},
	} {
		srv := httptest.NewServer(answer)
		c, err := New(srv.URL, "/p", nil)
		if err != nil {
			t.Fatal(err)
		}
		c.http.Timeout = 300 * time.Millisecond
		err = post(t, c, "x")
		if _, permanent := fault.Reason(err); err == nil || permanent || fault.IsConfiguration(err) {
			t.Errorf("%s: %v, want an error that may heal", name, err)
		}
		srv.CloseClientConnections()
		srv.Close()
	}
}
