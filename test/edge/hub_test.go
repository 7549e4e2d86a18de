package edge

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nkeys"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/test/daemon"
	"github.com/penstock/penstock/test/faultproxy"
)

// authority signs certificates for tests.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	ca   string // file
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	a.key = newKey(t)
	a.cert = &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	a.ca = a.write("ca.pem", "CERTIFICATE", der)
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a *authority) write(name, kind string, der []byte) string {
	a.t.Helper()
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// issue makes a certificate for loopback, for servers and clients.
func (a *authority) issue(name string) (cert, key string) {
	a.t.Helper()
	k := newKey(a.t)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.ParseIP("127.0.0.1")}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &k.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	return a.write(name+".pem", "CERTIFICATE", der), a.write(name+".key", "EC PRIVATE KEY", keyDER)
}

func (a *authority) server() *tls.Config {
	cert, key := a.issue("server")
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		a.t.Fatal(err)
	}
	cfg, err := config.ClientTLS{CA: a.ca}.Load("test")
	if err != nil {
		a.t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: cfg.RootCAs}
}

// serve runs a nats-server of its own.
func serve(t *testing.T, change func(*server.Options)) *server.Server {
	t.Helper()
	o := &server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: t.TempDir(), MaxPayload: 8 << 20, NoLog: true, NoSigs: true}
	change(o)
	s, err := server.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(20 * time.Second) {
		t.Fatal("nats-server is not ready")
	}
	return s
}

// TestWaysToTheHub forwards over every kind of connection and credential, and is
// refused without the right one, keeping the data.
func TestWaysToTheHub(t *testing.T) {
	const token = "a-token-that-nobody-prints"
	withTLS := func(verify, first bool) func(*server.Options, *authority) {
		return func(o *server.Options, a *authority) {
			o.TLSConfig, o.TLS, o.TLSVerify, o.TLSTimeout, o.TLSHandshakeFirst = a.server(), true, verify, 5, first
			if verify {
				o.TLSConfig.ClientAuth = tls.RequireAndVerifyClientCert
			}
		}
	}
	socket := func(secure bool) func(*server.Options, *authority) {
		return func(o *server.Options, a *authority) {
			o.Websocket.Host, o.Websocket.Port, o.Websocket.NoTLS = "127.0.0.1", server.RANDOM_PORT, !secure
			if secure {
				o.Websocket.TLSConfig = a.server()
			}
		}
	}
	for name, tc := range map[string]struct {
		serve  func(*server.Options, *authority)
		url    func(*server.Server, *server.Options) string
		config func(url string, a *authority) bus.Config
		wrong  func(*bus.Config) // what the server must refuse; nil for nothing
	}{
		"TLS": {withTLS(false, false), nil, func(url string, a *authority) bus.Config {
			return bus.Config{URL: strings.Replace(url, "nats:", "tls:", 1), TLS: config.ClientTLS{CA: a.ca}}
		}, func(c *bus.Config) { c.TLS.CA = "" }},
		"TLS first": {withTLS(false, true), nil, func(url string, a *authority) bus.Config {
			return bus.Config{URL: strings.Replace(url, "nats:", "tls:", 1), TLS: config.ClientTLS{CA: a.ca}, HandshakeFirst: true}
		}, func(c *bus.Config) { c.HandshakeFirst = false }},
		"mTLS": {withTLS(true, false), nil, func(url string, a *authority) bus.Config {
			cert, key := a.issue("client")
			return bus.Config{URL: strings.Replace(url, "nats:", "tls:", 1), TLS: config.ClientTLS{CA: a.ca, Cert: cert, Key: key}}
		}, func(c *bus.Config) { c.TLS.Cert, c.TLS.Key = "", "" }},
		"token": {func(o *server.Options, _ *authority) { o.Authorization = token }, nil, func(url string, _ *authority) bus.Config {
			return bus.Config{URL: url, Token: token}
		}, func(c *bus.Config) { c.Token = "wrong" }},
		"password": {func(o *server.Options, _ *authority) { o.Username, o.Password = "edge", token }, nil, func(url string, _ *authority) bus.Config {
			return bus.Config{URL: url, User: "edge", Pass: token}
		}, func(c *bus.Config) { c.Pass = "wrong" }},
		"WebSocket": {socket(false), func(s *server.Server, o *server.Options) string { return s.WebsocketURL() }, func(url string, _ *authority) bus.Config {
			return bus.Config{URL: url}
		}, nil},
		"WebSocket and TLS": {socket(true), func(s *server.Server, o *server.Options) string { return s.WebsocketURL() }, func(url string, a *authority) bus.Config {
			return bus.Config{URL: url, TLS: config.ClientTLS{CA: a.ca}}
		}, func(c *bus.Config) { c.TLS.CA = "" }},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAuthority(t)
			var opts *server.Options
			s := serve(t, func(o *server.Options) { tc.serve(o, a); opts = o })
			url := s.ClientURL()
			if tc.url != nil {
				url = tc.url(s, opts)
			}
			cfg := tc.config(url, a)
			as := cfg
			as.Name = "operator"
			operator(t, as)
			if tc.wrong != nil {
				wrong := cfg
				tc.wrong(&wrong)
				e := newEdge(t, "", t.TempDir(), hubSection(wrong))
				e.start()
				e.sendAll(3) // it spools
				if err := daemon.Until(t.Context(), 10*time.Second, func() error {
					if !strings.Contains(e.log(), "hub unreachable, spooling") {
						return fmt.Errorf("no line says that the hub refuses")
					}
					return nil
				}); err != nil {
					t.Error(err)
				}
				if got := metric(t, e, "penstock_forwarded_items_total", otlpwire.Logs); got != "0" {
					t.Errorf("%s items were forwarded with the wrong credential", got)
				}
				if strings.Contains(e.log(), token) {
					t.Error("the log holds the secret")
				}
			}
			e := newEdge(t, "", t.TempDir(), hubSection(cfg))
			e.start()
			e.sendAll(10)
			e.arrived(cfg)
		})
	}
}

// hubSection writes a configuration as YAML.
func hubSection(c bus.Config) string {
	return fmt.Sprintf("hub: {url: %q, creds: %q, user: %q, password: %q, token: %q, tls_handshake_first: %v, tls: {ca_file: %q, cert_file: %q, key_file: %q}}\n",
		c.URL, c.Creds, c.User, string(c.Pass), string(c.Token), c.HandshakeFirst, c.TLS.CA, c.TLS.Cert, c.TLS.Key)
}

// TestCredentialFile connects with an operator's credential file that may publish one
// instance's subjects and nothing else.
func TestCredentialFile(t *testing.T) {
	pair := func(kp nkeys.KeyPair, err error) (nkeys.KeyPair, string) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		pub, err := kp.PublicKey()
		if err != nil {
			t.Fatal(err)
		}
		return kp, pub
	}
	op, opPub := pair(nkeys.CreateOperator())
	acc, accPub := pair(nkeys.CreateAccount())
	_, sysPub := pair(nkeys.CreateAccount())
	sign := func(c jwt.Claims, kp nkeys.KeyPair) string {
		t.Helper()
		text, err := c.Encode(kp)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	opClaims := jwt.NewOperatorClaims(opPub)
	opClaims.SystemAccount = sysPub
	accClaims := jwt.NewAccountClaims(accPub)
	accClaims.Limits.JetStreamLimits = jwt.JetStreamLimits{DiskStorage: -1, MemoryStorage: -1, Streams: -1, Consumer: -1}
	creds := func(name string, change func(*jwt.UserClaims)) string {
		t.Helper()
		user, userPub := pair(nkeys.CreateUser())
		claims := jwt.NewUserClaims(userPub)
		change(claims)
		seed, err := user.Seed()
		if err != nil {
			t.Fatal(err)
		}
		text, err := jwt.FormatUserConfig(sign(claims, acc), seed)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), name+".creds")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	s := serve(t, func(o *server.Options) {
		resolver := &server.MemAccResolver{}
		if err := resolver.Store(accPub, sign(accClaims, op)); err != nil {
			t.Fatal(err)
		}
		if err := resolver.Store(sysPub, sign(jwt.NewAccountClaims(sysPub), op)); err != nil {
			t.Fatal(err)
		}
		trusted, err := jwt.DecodeOperatorClaims(sign(opClaims, op))
		if err != nil {
			t.Fatal(err)
		}
		o.TrustedOperators, o.AccountResolver, o.SystemAccount = []*jwt.OperatorClaims{trusted}, resolver, sysPub
	})
	all := bus.Config{URL: s.ClientURL(), Creds: creds("operator", func(*jwt.UserClaims) {})}
	as := all
	as.Name = "operator"
	operator(t, as)
	mine := bus.Config{URL: s.ClientURL(), Creds: creds("edge", func(c *jwt.UserClaims) {
		c.Pub.Allow = jwt.StringList{"otlp.traces.as-1", "otlp.metrics.as-1", "otlp.logs.as-1"}
		c.Sub.Allow = jwt.StringList{"_INBOX_as-1.>"}
	})}
	e := newEdge(t, "", t.TempDir(), hubSection(mine))
	e.start()
	e.sendAll(10)
	e.arrived(all)
}

// TestHalfOpenConnection: the way back from the hub is lost without a word, then the
// way there. Everything arrives once the connection has been given up.
func TestHalfOpenConnection(t *testing.T) {
	hub := startHub(t)
	proxy, err := faultproxy.Start(strings.TrimPrefix(hub, "nats://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	e := newEdge(t, "nats://"+proxy.Addr(), t.TempDir(), "")
	e.start()
	e.sendAll(10)
	e.arrived(bus.Config{URL: hub})
	for _, f := range []faultproxy.Fault{{DropDown: true}, {DropUp: true}} {
		proxy.Set(f)
		e.sendAll(10)
		// The edge gives the connection up by itself: new ones work.
		if err := daemon.Until(t.Context(), 30*time.Second, func() error {
			if proxy.Connections() == 0 {
				return nil
			}
			return fmt.Errorf("the edge holds on to a connection that does not answer")
		}); err != nil {
			t.Error(err)
		}
		proxy.Set(faultproxy.Fault{})
		e.arrived(bus.Config{URL: hub})
	}
}

// TestBitsFlipOnTheWire: with TLS a flipped bit is a broken connection, and nothing
// else.
func TestBitsFlipOnTheWire(t *testing.T) {
	a := newAuthority(t)
	s := serve(t, func(o *server.Options) { o.TLSConfig, o.TLS, o.TLSTimeout = a.server(), true, 5 })
	proxy, err := faultproxy.Start(s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	cfg := bus.Config{URL: "tls://" + s.Addr().String(), TLS: config.ClientTLS{CA: a.ca}}
	as := cfg
	as.Name = "operator"
	operator(t, as)
	through := cfg
	through.URL = "tls://" + proxy.Addr()
	e := newEdge(t, "", t.TempDir(), hubSection(through))
	e.start()
	for range 3 {
		e.sendAll(10)
		proxy.Set(faultproxy.Fault{Flip: true})
		e.sendAll(10)
		if err := daemon.Until(t.Context(), 20*time.Second, func() error {
			if proxy.Connections() == 0 {
				return nil
			}
			return fmt.Errorf("a connection with flipped bits goes on")
		}); err != nil {
			t.Error(err)
		}
		proxy.Set(faultproxy.Fault{})
	}
	e.arrived(cfg)
	if n := metric(t, e, "penstock_forwarded_items_total", otlpwire.Logs); n != "60" {
		t.Errorf("%s items forwarded, want 60", n)
	}
}

// TestHubWithASmallPayload: a hub that takes small messages only would hold the spool's
// first large one for ever. The log says what to set, and nothing is lost meanwhile.
func TestHubWithASmallPayload(t *testing.T) {
	s := serve(t, func(o *server.Options) { o.MaxPayload = 512 << 10 })
	e := newEdge(t, s.ClientURL(), t.TempDir(), "")
	e.start()
	e.sendAll(3)
	if err := daemon.Until(t.Context(), 10*time.Second, func() error {
		if !strings.Contains(e.log(), "set its max_payload") {
			return fmt.Errorf("the log does not say what to do")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if n := metric(t, e, "penstock_forwarded_items_total", otlpwire.Logs); n != "0" {
		t.Errorf("%s items forwarded", n)
	}
}
