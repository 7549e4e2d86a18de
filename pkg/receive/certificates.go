package receive

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/config"
)

// certificates are those of the listeners and who may sign those of senders. Both are read
// again when their files change; what is broken then leaves what was before in force.
type certificates struct {
	pair     *config.File[*tls.Certificate] // nil for plain text
	cas      *config.File[*x509.CertPool]   // nil for no certificates of senders
	optional bool                           // a sender may have none
	log      *slog.Logger
	said     backoff.Repeats

	mu       sync.Mutex
	pool     *x509.CertPool
	verified map[*x509.Certificate]struct{} // by pool
}

func (c TLSConfig) load() (*certificates, error) {
	certs := &certificates{}
	if (c.Cert == "") != (c.Key == "") {
		return nil, errors.New("needs both cert_file and key_file, or neither")
	}
	if c.Cert == "" {
		if c.ClientCA != "" {
			return nil, errors.New("has client_ca_file, which needs cert_file and key_file")
		}
		return certs, nil
	}
	certs.pair = config.KeyPair(c.Cert, c.Key)
	_, err := certs.pair.Get()
	if err == nil && c.ClientCA != "" {
		certs.cas = config.CertPool(c.ClientCA)
		_, err = certs.cas.Get()
	}
	return certs, err
}

// current returns what a file holds, or has held, and logs what is wrong with it.
func current[T any](c *certificates, f *config.File[T]) T {
	value, _, err := f.Look() // it could be read at the start
	if err != nil {
		if held, due := c.said.Due(err.Error(), time.Now()); due {
			c.log.Error("a certificate file cannot be read: what it held before stays in force", "err", err, "held_back", held)
		}
	}
	return value
}

// config returns what a server of a protocol uses, in the name that TLS has for it; nil for
// plain text.
func (c *certificates) config(protocol string) *tls.Config {
	if c.pair == nil {
		return nil
	}
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{protocol},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return current(c, c.pair), nil },
	}
	if c.cas == nil {
		return cfg
	}
	// A session that is taken up again is not verified again (CVE-2025-68121).
	cfg.SessionTicketsDisabled = true
	if cfg.ClientAuth = tls.RequireAndVerifyClientCert; c.optional {
		cfg.ClientAuth = tls.VerifyClientCertIfGiven
	}
	base := cfg.Clone()
	cfg.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		now := base.Clone()
		now.ClientCAs = current(c, c.cas)
		return now, nil
	}
	return cfg
}

// of returns the certificate of a connection's other side; nil for none. That it was valid
// when the connection began does not mean that it is.
func (c *certificates) of(state *tls.ConnectionState) (*x509.Certificate, error) {
	if c.cas == nil || state == nil || len(state.PeerCertificates) == 0 {
		return nil, nil
	}
	pool, leaf := current(c, c.cas), state.PeerCertificates[0]
	if time.Now().After(leaf.NotAfter) {
		return nil, fmt.Errorf("client certificate has expired at %v", leaf.NotAfter)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if pool != c.pool || len(c.verified) > maxVerified {
		c.pool, c.verified = pool, map[*x509.Certificate]struct{}{}
	}
	if _, known := c.verified[leaf]; known {
		return leaf, nil
	}
	opts := x509.VerifyOptions{Roots: pool, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, cert := range state.PeerCertificates[1:] {
		opts.Intermediates.AddCert(cert)
	}
	if _, err := leaf.Verify(opts); err != nil {
		return nil, fmt.Errorf("client certificate: %w", err)
	}
	c.verified[leaf] = struct{}{}
	return leaf, nil
}

// maxVerified bounds the certificates that are known to be signed by those who may.
const maxVerified = 4096
