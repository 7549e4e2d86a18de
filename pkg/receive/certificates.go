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

// certificates are the listeners' certificate and the authorities that may sign senders'
// certificates. Both are reloaded when their files change; if a new file is broken, the previous
// content stays in force.
type certificates struct {
	pair     *config.File[*tls.Certificate] // nil for plain text
	cas      *config.File[*x509.CertPool]   // nil if senders have no certificates
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

// current returns the content of a file, or its last valid content, and logs an error of the file.
func current[T any](c *certificates, f *config.File[T]) T {
	value, _, err := f.Look() // it was read successfully at the start
	if err != nil {
		if held, due := c.said.Due(err.Error(), time.Now()); due {
			c.log.Error("cannot read a certificate file; its previous content stays in force", "err", err, "held_back", held)
		}
	}
	return value
}

// config returns the TLS configuration of a server for a protocol, by its ALPN name; nil for
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
	// A resumed session would not be verified again (CVE-2025-68121).
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

// of returns the certificate of a connection's peer; nil if it has none. It is verified again,
// because a certificate that was valid when the connection began may not be any more.
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

// maxVerified bounds the cache of verified certificates.
const maxVerified = 4096
