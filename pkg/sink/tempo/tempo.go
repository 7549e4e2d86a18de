// Package tempo writes traces to Tempo over OTLP/gRPC. Payloads travel as the
// bytes they came in.
package tempo

import (
	"context"
	"fmt"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpclient"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Config is what an operator may set.
type Config struct {
	// Endpoint is host:port or http://host:port for plain text, https://host:port
	// for TLS. Empty: no Tempo.
	Endpoint string `yaml:"endpoint"`
}

// Writer sends to one Tempo.
type Writer struct{ client *otlpclient.Client }

// New returns a writer; it connects with the first write.
func New(cfg Config) (*Writer, error) {
	c, err := otlpclient.New("tempo.endpoint", otlpclient.Config{Endpoint: cfg.Endpoint})
	if err != nil {
		return nil, err
	}
	return &Writer{c}, nil
}

// Name is the backend's label.
func (w *Writer) Name() string { return "tempo" }

// Close ends the connection.
func (w *Writer) Close() error { return w.client.Close() }

// Write returns nil when Tempo has accepted every span of an OTLP request.
func (w *Writer) Write(ctx context.Context, _ string, payload []byte) error {
	n, msg, err := w.client.Export(ctx, otlpwire.Traces, payload, nil)
	if err != nil {
		return fmt.Errorf("tempo: %w", err)
	}
	if n > 0 {
		return fault.Permanent(ledger.DeadRefused, fmt.Errorf("tempo rejected %d spans: %s", n, msg))
	}
	return nil
}
