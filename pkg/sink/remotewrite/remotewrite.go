// Package remotewrite writes metrics to Prometheus over remote_write 1.0.
//
// Gauges, sums, explicit histograms and summaries become series with the names
// that otlptranslator gives them (UnderscoreEscapingWithSuffixes). A chosen set
// of resource attributes stands on every series, and wins over data point
// attributes of the same name: a customer cannot forge instance_id.
//
// # Not here
//
// Delta temporality and exponential histograms: such a metric is dead-lettered
// as unsupported. Remote_write 2.0.
package remotewrite

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/klauspost/compress/snappy"
	"github.com/prometheus/common/model"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/sink/push"
)

// Config is what an operator may set.
type Config struct {
	// URL is where Prometheus listens; without a path /api/v1/write is added.
	// Empty: no Prometheus.
	URL string `yaml:"url"`
	// Labels are the resource attributes that stand on every series.
	Labels []string `yaml:"resource_labels"`
}

// DefaultLabels tell instances and services apart.
func DefaultLabels() []string {
	return []string{"instance.id", "instance.name", "customer.id", "deployment.environment", "service.name", "service.namespace"}
}

const writePath = "/api/v1/write"

// Writer sends to one Prometheus. It is safe for concurrent use; series of one
// instance must come from one goroutine, in order.
type Writer struct {
	client *push.Client
	labels []string
}

// New returns a writer.
func New(cfg Config) (*Writer, error) {
	client, err := push.New(cfg.URL, writePath, map[string]string{
		"Content-Type":                      "application/x-protobuf",
		"Content-Encoding":                  "snappy",
		"X-Prometheus-Remote-Write-Version": "0.1.0",
	})
	if err != nil {
		return nil, fmt.Errorf("prometheus.url: %w", err)
	}
	// Prometheus 2.42 answers 500 to a sample that is too old: by the book that
	// would be tried again for ever. Newer ones answer 400.
	client.Refused = func(status int, body string) bool {
		return status == 500 && (strings.Contains(body, "too old sample") || strings.Contains(body, "out of bounds"))
	}
	return &Writer{client: client, labels: cfg.Labels}, nil
}

// Takes asks Prometheus how far back it takes samples while newer ones come in: as far
// as storage.tsdb.out_of_order_time_window says, which is not at all by default.
func (w *Writer) Takes(ctx context.Context, since, now time.Time) (ok bool, text string, err error) {
	page, err := w.client.Get(ctx, writePath, "/api/v1/status/config")
	if err != nil {
		return false, "", err
	}
	var answer struct {
		Data struct {
			YAML string `json:"yaml"`
		} `json:"data"`
	}
	var cfg struct {
		Storage struct {
			TSDB struct {
				Window string `yaml:"out_of_order_time_window"`
			} `yaml:"tsdb"`
		} `yaml:"storage"`
	}
	if err := json.Unmarshal(page, &answer); err != nil {
		return false, "", fmt.Errorf("prometheus's configuration: %w", err)
	}
	if err := yaml.Unmarshal([]byte(answer.Data.YAML), &cfg); err != nil {
		return false, "", fmt.Errorf("prometheus's configuration: %w", err)
	}
	var window model.Duration
	if text := cfg.Storage.TSDB.Window; text != "" {
		if window, err = model.ParseDuration(text); err != nil {
			return false, "", fmt.Errorf("prometheus's storage.tsdb.out_of_order_time_window: %w", err)
		}
	}
	if age := now.Sub(since); time.Duration(window) < age {
		return false, fmt.Sprintf("prometheus takes samples that are up to %v old while newer ones come in, these are %v old: set storage.tsdb.out_of_order_time_window to %v or more and reload it",
			window, age.Round(time.Second), model.Duration(age.Truncate(time.Hour)+2*time.Hour)), nil
	}
	return true, "", nil
}

// Name is the backend's label.
func (w *Writer) Name() string { return "prometheus" }

// Close does nothing; connections end when they idle.
func (w *Writer) Close() error { return nil }

// Write returns nil when Prometheus has stored every sample of an OTLP request.
// A metric that has no translation makes the request fail for good; the caller
// narrows it down.
func (w *Writer) Write(ctx context.Context, instance string, payload []byte) error {
	var req metricspb.MetricsData
	if err := proto.Unmarshal(payload, &req); err != nil {
		return fault.Permanent(ledger.DeadUndecodable, fmt.Errorf("decode metrics: %w", err))
	}
	tr := newTranslation(w.labels, instance)
	if err := tr.add(&req); err != nil {
		return fault.Permanent(ledger.DeadUnsupported, err)
	}
	if len(tr.order) == 0 {
		return nil
	}
	return w.client.Post(ctx, snappy.Encode(nil, tr.request()))
}
