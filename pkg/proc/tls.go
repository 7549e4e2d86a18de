package proc

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
)

// ClientTLS holds files in PEM; empty means the system's roots and no client
// certificate.
type ClientTLS struct {
	CA   string `yaml:"ca_file"`   // who signed the server's certificate; default: the system's roots
	Cert string `yaml:"cert_file"` // client certificate
	Key  string `yaml:"key_file"`  // its private key
}

// Load reads the files. key is the section's name in the operator's configuration.
func (c ClientTLS) Load(key string) (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CA != "" {
		text, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, fmt.Errorf("%s.ca_file: %w", key, err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("%s.ca_file: %s holds no certificate in PEM", key, c.CA)
		}
	}
	if (c.Cert == "") != (c.Key == "") {
		return nil, errors.New(key + " needs both cert_file and key_file, or neither")
	}
	if c.Cert != "" {
		cert, err := tls.LoadX509KeyPair(c.Cert, c.Key)
		if err != nil {
			return nil, fmt.Errorf("%s.cert_file: %w", key, err)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	return cfg, nil
}
