// Package tempo writes traces to Tempo over OTLP/gRPC. Payloads travel as the
// bytes they came in.
package tempo

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpclient"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink/push"
)

// Config is what an operator may set.
type Config struct {
	// Endpoint is host:port or http://host:port for plain text, https://host:port
	// for TLS. Empty: no Tempo.
	Endpoint string `yaml:"endpoint"`
	// StatusURL is where Tempo serves HTTP, http://host:3200. A replay asks there how
	// old spans may be. Empty: it is not asked.
	StatusURL string `yaml:"status_url"`
}

// Writer sends to one Tempo.
type Writer struct {
	client *otlpclient.Client
	status *push.Client // nil: not asked
}

// New returns a writer; it connects with the first write.
func New(cfg Config) (*Writer, error) {
	c, err := otlpclient.New("tempo.endpoint", otlpclient.Config{Endpoint: cfg.Endpoint})
	if err != nil {
		return nil, err
	}
	w := &Writer{client: c}
	if cfg.StatusURL != "" {
		if w.status, err = push.New(strings.TrimSuffix(cfg.StatusURL, "/"), statusPath, nil); err != nil {
			return nil, fmt.Errorf("tempo.status_url: %w", err)
		}
	}
	return w, nil
}

const statusPath = "/status/config"

// Takes asks Tempo how old spans may be to be found by a search in their time: those
// beyond ingestion_time_range_slack it takes, too, but files their block under now.
func (w *Writer) Takes(ctx context.Context, since, now time.Time) (ok bool, text string, err error) {
	age := now.Sub(since)
	const what = "tempo takes spans of any age, but a search by time finds those older than storage.trace.wal.ingestion_time_range_slack under the time of the replay"
	if w.status == nil {
		return true, what + " (2m by default; with tempo.status_url it is asked)", nil
	}
	page, err := w.status.Get(ctx, statusPath, statusPath)
	if err != nil {
		return false, "", err
	}
	var cfg struct {
		Storage struct {
			Trace struct {
				WAL struct {
					Slack string `yaml:"ingestion_time_range_slack"`
				} `yaml:"wal"`
			} `yaml:"trace"`
		} `yaml:"storage"`
	}
	if err := yaml.Unmarshal(page, &cfg); err != nil {
		return false, "", fmt.Errorf("tempo's configuration: %w", err)
	}
	slack, err := model.ParseDuration(cmp.Or(cfg.Storage.Trace.WAL.Slack, "2m"))
	if err != nil {
		return false, "", fmt.Errorf("tempo's storage.trace.wal.ingestion_time_range_slack: %w", err)
	}
	if time.Duration(slack) < age {
		return false, fmt.Sprintf("%s: it is %v, and these are %v old", what, slack, age.Round(time.Second)), nil
	}
	return true, "", nil
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
