package config

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
)

// ClientTLS names PEM files; empty means the system's roots and no client certificate. A changed
// certificate is reloaded for the next connection, and with LoadFor so are the authorities.
type ClientTLS struct {
	// A PEM file with the authorities that may sign the server's certificate. Empty: the system's.
	CA string `yaml:"ca_file"`
	// A PEM file with the client certificate.
	Cert string `yaml:"cert_file"`
	// A PEM file with the client certificate's private key.
	Key string `yaml:"key_file"`
	// The name that the server's certificate must have, where it differs from that of the address.
	ServerName string `yaml:"server_name"`
	// Disables certificate verification: a man in the middle can read and alter traffic.
	Insecure bool `yaml:"insecure_skip_verify"`
}

// Load reads the files; the authorities are not reloaded later. key is the section's name in the
// operator's configuration.
func (c ClientTLS) Load(key string) (*tls.Config, error) {
	roots, cfg, err := c.load(key)
	if err == nil && roots != nil {
		cfg.RootCAs, err = roots.Get()
	}
	return cfg, err
}

// LoadFor is Load for connections to one host, a name or an IP address. The authorities are reloaded when
// they change.
func (c ClientTLS) LoadFor(key, host string) (*tls.Config, error) {
	roots, cfg, err := c.load(key)
	if err != nil || roots == nil || c.Insecure {
		return cfg, err
	}
	if c.ServerName != "" {
		host = c.ServerName
	}
	// crypto/tls reads its roots only once. So its verification is done here, including that of the name:
	// for an IP address the state of the connection has no name.
	cfg.InsecureSkipVerify = true
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		pool, err := roots.Get()
		if err != nil {
			return err
		}
		opts := x509.VerifyOptions{Roots: pool, DNSName: host, Intermediates: x509.NewCertPool()}
		for _, cert := range cs.PeerCertificates[1:] {
			opts.Intermediates.AddCert(cert)
		}
		if _, err = cs.PeerCertificates[0].Verify(opts); err != nil {
			return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
		}
		return nil
	}
	return cfg, nil
}

// load reads the files for the first time. roots is nil for the system's.
func (c ClientTLS) load(key string) (roots *File[*x509.CertPool], cfg *tls.Config, err error) {
	cfg = &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.ServerName, InsecureSkipVerify: c.Insecure}
	if c.CA != "" {
		roots = CertPool(c.CA)
		if _, err := roots.Get(); err != nil {
			return nil, nil, fmt.Errorf("%s.ca_file: %w", key, err)
		}
	}
	if (c.Cert == "") != (c.Key == "") {
		return nil, nil, errors.New(key + " needs both cert_file and key_file, or neither")
	}
	if c.Cert != "" {
		pair := KeyPair(c.Cert, c.Key)
		if _, err := pair.Get(); err != nil {
			return nil, nil, fmt.Errorf("%s.cert_file: %w", key, err)
		}
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair.Get() }
	}
	return roots, cfg, nil
}

// CertPool returns the certificates of a PEM file.
func CertPool(path string) *File[*x509.CertPool] {
	return NewFile(path, func(text []byte) (*x509.CertPool, error) {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("%s has no certificate in PEM", path)
		}
		return pool, nil
	})
}

// KeyPair returns a certificate chain and its private key from PEM files. They are reloaded when either
// has changed; while the two do not match, the old pair stays in use.
func KeyPair(cert, key string) *File[*tls.Certificate] {
	return NewFile(key, func(private []byte) (*tls.Certificate, error) {
		public, err := os.ReadFile(cert)
		if err != nil {
			return nil, err
		}
		pair, err := tls.X509KeyPair(public, private)
		return &pair, err
	}, cert)
}

// File is the parsed content of a file, reloaded when it has changed.
type File[T any] struct {
	path  string
	also  []string
	parse func([]byte) (T, error)

	mu    sync.Mutex
	seen  []os.FileInfo
	value T
	ok    bool
}

// NewFile returns a file whose content is parsed by parse. A change of one of the others, if given,
// reloads it, too.
func NewFile[T any](path string, parse func([]byte) (T, error), others ...string) *File[T] {
	return &File[T]{path: path, also: others, parse: parse}
}

// Get returns the content of the file. While the file cannot be read or parsed, that is its last valid
// content; it is an error only if there never was any.
func (f *File[T]) Get() (T, error) {
	value, known, err := f.Look()
	if known {
		err = nil
	}
	return value, err
}

// Look is Get that also returns why the file cannot be read or parsed now; known says whether it ever
// could.
func (f *File[T]) Look() (value T, known bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	err = f.lookLocked()
	return f.value, f.ok, err
}

func (f *File[T]) lookLocked() error {
	seen := make([]os.FileInfo, 0, 2)
	for _, path := range append([]string{f.path}, f.also...) {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		seen = append(seen, info)
	}
	if f.ok && slices.EqualFunc(seen, f.seen, unchanged) {
		return nil
	}
	text, err := os.ReadFile(f.path)
	if err != nil {
		return err
	}
	value, err := f.parse(text)
	if err == nil {
		f.value, f.seen, f.ok = value, seen, true
	}
	return err
}

// unchanged reports whether a file is the same one, and was not written to. The time alone is not enough:
// another file with the time of the first may have been moved here.
func unchanged(a, b os.FileInfo) bool {
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}
