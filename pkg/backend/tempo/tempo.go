// Package tempo writes traces to Tempo over OTLP, gRPC or HTTP. Payloads are sent as the bytes in which
// they arrived.
package tempo

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/httpclient"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpclient"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Config is what an operator may set.
type Config struct {
	// The address of Tempo, host:port or http://host:port for plain text, https://host:port for
	// TLS. Empty: no Tempo.
	Endpoint string `yaml:"endpoint"`
	// The protocol: grpc or http. With http the endpoint may have a path, before /v1/traces.
	Protocol string `yaml:"protocol"`
	// The compression: gzip or none.
	Compression string `yaml:"compression"`
	// The address of Tempo's HTTP server, http://host:3200. A replay reads there how old spans may
	// be. Empty: this is not checked.
	StatusURL         string `yaml:"status_url"`
	httpclient.Access `yaml:",inline"`
}

// DefaultConfig has no endpoint.
func DefaultConfig() Config { return Config{Protocol: "grpc", Compression: "none"} }

// Writer sends to one Tempo.
type Writer struct {
	client *otlpclient.Client
	access httpclient.Access
	status *httpclient.Client // nil: no status_url
}

// New returns a writer; it connects with the first write.
func New(cfg Config) (*Writer, error) {
	var errs []error
	if cfg.Protocol != "grpc" && cfg.Protocol != "http" {
		errs = append(errs, fmt.Errorf("tempo.protocol is %q, want grpc or http", cfg.Protocol))
	}
	if cfg.Compression != "gzip" && cfg.Compression != "none" {
		errs = append(errs, fmt.Errorf("tempo.compression is %q, want gzip or none", cfg.Compression))
	}
	w := &Writer{access: cfg.Access}
	errs = append(errs, w.access.Open("tempo", strings.HasPrefix(cfg.Endpoint, "https://")))
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	own, err := cfg.TLS.LoadFor("tempo.tls", hostOf(cfg.Endpoint))
	if err != nil {
		return nil, err
	}
	if w.client, err = otlpclient.New("tempo.endpoint", otlpclient.Config{Endpoint: cfg.Endpoint, HTTP: cfg.Protocol == "http", Gzip: cfg.Compression == "gzip", TLS: own}); err != nil {
		return nil, err
	}
	if cfg.StatusURL != "" {
		if w.status, err = statusClient(cfg); err != nil {
			return nil, errors.Join(err, w.client.Close())
		}
	}
	return w, nil
}

// statusClient asks Tempo's status page.
func statusClient(cfg Config) (*httpclient.Client, error) {
	c, err := httpclient.New(strings.TrimSuffix(cfg.StatusURL, "/"), statusPath, nil)
	if err != nil {
		return nil, fmt.Errorf("tempo.status_url: %w", err)
	}
	access := cfg.Access
	if !strings.HasPrefix(cfg.StatusURL, "https://") { // no secrets in plain text
		access = httpclient.Access{Tenant: cfg.Tenant}
	}
	return c, c.Use("tempo", access)
}

// hostOf returns the host of a TLS endpoint, which has a scheme.
func hostOf(endpoint string) string {
	u, err := url.Parse(endpoint)
	if err != nil {
		return ""
	}
	return u.Hostname()
}

// Name is the backend's label.
func (w *Writer) Name() string { return "tempo" }

// Close ends the connection.
func (w *Writer) Close() error { return w.client.Close() }

// Write returns nil when Tempo has accepted every span of an OTLP request.
func (w *Writer) Write(ctx context.Context, instance string, payload []byte) error {
	own, err := w.access.Of(instance)
	if err != nil {
		return err
	}
	headers := make(map[string]string, len(own))
	for name := range own {
		headers[strings.ToLower(name)] = own.Get(name)
	}
	n, msg, err := w.client.Export(ctx, otlpwire.Traces, payload, headers)
	if err != nil {
		return fmt.Errorf("tempo: %w", err)
	}
	if n == 0 {
		return nil
	}
	err = fmt.Errorf("tempo rejected %d spans: %s", n, msg)
	switch { // error texts of Tempo 2; Tempo 3 has none
	case strings.Contains(msg, "LIVE_TRACES_EXCEEDED"), strings.Contains(msg, "RATE_LIMITED"):
		return fault.Sender(err) // temporary; and a span that is stored twice is shown once
	case strings.Contains(msg, "TRACE_TOO_LARGE"):
		return fault.Permanent(ledger.DeadTooLarge, err)
	}
	return fault.Permanent(ledger.DeadRefused, err)
}
