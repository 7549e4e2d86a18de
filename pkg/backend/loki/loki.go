// Package loki writes logs to Loki, over its push API or its OTLP endpoint.
//
// Over the push API (translate.go) stream labels come from a short allow list, so that there are few
// streams; trace ID, span ID and every other attribute become structured metadata under the names that
// Loki's own OTLP endpoint gives them, so that links from logs to traces work in the same way:
// `make test-oracle` reads them with Loki's parser. Over OTLP the bytes are sent unchanged, and Loki's
// otlp_config says what becomes a label.
//
// # Promises
//
//   - The instance's label comes from the subject of its logs, whatever they claim.
//   - Records of a stream are sent in the order of time within a request, and requests in the order
//     of their arrival.
//
// # Not here
//
// Retries, and finding refused items: package backend. HTTP: package httpclient.
package loki

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/snappy"
	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/httpclient"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Config is what an operator may set.
type Config struct {
	// The address of Loki; without a path /loki/api/v1/push is added, or /otlp/v1/logs with mode:
	// otlp. Empty: no Loki.
	URL string `yaml:"url"`
	// The protocol: push or otlp. With otlp Loki decides what becomes a stream label.
	Mode string `yaml:"mode"`
	// The resource attributes that become stream labels; level is the level of the record. For push
	// only.
	Labels            []string `yaml:"stream_labels"`
	Limits            Limits   `yaml:"limits"`
	httpclient.Access `yaml:",inline"`
}

// Limits keep one instance from filling up Loki's streams.
type Limits struct {
	// How many streams one instance may have in an hour of its records' time. Records of more
	// streams are dead-lettered. 0: no limit. For push only.
	Streams int `yaml:"streams_per_instance"`
}

// levelLabel is the label of the record's level.
const levelLabel = "level"

// DefaultConfig has no URL, and keeps the number of streams at instances × services ×
// environments × levels.
func DefaultConfig() Config {
	return Config{Mode: "push", Labels: []string{instanceID, "service.name", "deployment.environment", levelLabel}, Limits: Limits{Streams: 1000}}
}

func (cfg *Config) validate() error {
	var errs []error
	if cfg.Mode != "push" && cfg.Mode != "otlp" {
		errs = append(errs, fmt.Errorf("loki.mode is %q, want push or otlp", cfg.Mode))
	}
	if len(cfg.Labels) > 14 {
		errs = append(errs, fmt.Errorf("loki.stream_labels has %d labels: Loki accepts 15 by default, with service_name, and every one multiplies the streams", len(cfg.Labels)))
	}
	if cfg.Limits.Streams < 0 {
		errs = append(errs, fmt.Errorf("loki.limits.streams_per_instance is %d, want 0 or more", cfg.Limits.Streams))
	}
	return errors.Join(errs...)
}

const (
	pushPath = "/loki/api/v1/push"
	otlpPath = "/otlp/v1/logs"
)

// Writer sends to one Loki.
type Writer struct {
	cfg        Config
	client     *httpclient.Client
	batch      *batch // nil before the first write, and with mode otlp
	compressed []byte
}

// New returns a writer.
func New(cfg Config) (*Writer, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	path := pushPath
	if cfg.Mode == "otlp" {
		path = otlpPath
	}
	client, err := httpclient.New(cfg.URL, path, map[string]string{"Content-Type": "application/x-protobuf"})
	if err != nil {
		return nil, fmt.Errorf("loki.url: %w", err)
	}
	if err := client.Use("loki", cfg.Access); err != nil {
		return nil, err
	}
	client.Refused = refused
	return &Writer{cfg: cfg, client: client}, nil
}

// Session returns a writer for another goroutine, without memory of earlier payloads.
func (w *Writer) Session() *Writer { return &Writer{cfg: w.cfg, client: w.client} }

// refused recognises the error texts of Loki's distributor and ingester for invalid records.
func refused(status int, body string) (reason string) {
	if status != http.StatusBadRequest {
		return ""
	}
	body = strings.ToLower(body) // releases differ in capitalisation
	says := func(words ...string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(body, w) })
	}
	switch {
	case says("this feature is disallowed"): // allow_structured_metadata: the configuration is wrong, not the data
		return httpclient.Misconfigured
	case says("out of order", "too far behind"):
		return ledger.DeadOutOfOrder
	case says("timestamp too old"):
		return ledger.DeadTooOld
	case says("timestamp too new"):
		return ledger.DeadTooNew
	case says("max entry size", "line too long", "structured metadata too large", "too many structured metadata"):
		return ledger.DeadTooLarge
	}
	return ""
}

// Takes reads Loki's limits: reject_old_samples_max_age, and half of ingester.max_chunk_age, which is
// how much older than the newest record of its stream a record may be while newer ones arrive (Loki,
// pkg/ingester/stream.go).
func (w *Writer) Takes(ctx context.Context, since, now time.Time) (ok bool, text string, err error) {
	own := pushPath
	if w.cfg.Mode == "otlp" {
		own = otlpPath
	}
	page, err := w.client.Get(ctx, own, "/config")
	if err != nil {
		return false, "", err
	}
	var cfg struct {
		Limits struct {
			Reject    *bool  `yaml:"reject_old_samples"`
			MaxAge    string `yaml:"reject_old_samples_max_age"`
			Unordered *bool  `yaml:"unordered_writes"`
		} `yaml:"limits_config"`
		Ingester struct {
			MaxChunkAge string `yaml:"max_chunk_age"`
		} `yaml:"ingester"`
	}
	if err := yaml.Unmarshal(page, &cfg); err != nil {
		return false, "", fmt.Errorf("loki's configuration: %w", err)
	}
	maxAge, err := model.ParseDuration(cmp.Or(cfg.Limits.MaxAge, "1w"))
	if err != nil {
		return false, "", fmt.Errorf("loki's limits_config.reject_old_samples_max_age: %w", err)
	}
	chunk, err := model.ParseDuration(cmp.Or(cfg.Ingester.MaxChunkAge, "2h"))
	if err != nil {
		return false, "", fmt.Errorf("loki's ingester.max_chunk_age: %w", err)
	}
	age := now.Sub(since)
	old := age.Round(time.Second)
	switch {
	case (cfg.Limits.Reject == nil || *cfg.Limits.Reject) && time.Duration(maxAge) < age:
		return false, fmt.Sprintf("loki accepts records that are up to %v old, these are %v old: increase limits_config.reject_old_samples_max_age", maxAge, old), nil
	case cfg.Limits.Unordered != nil && !*cfg.Limits.Unordered:
		return false, fmt.Sprintf("loki accepts no record that is older than the newest of its stream, these are %v old: set limits_config.unordered_writes to true", old), nil
	case time.Duration(chunk)/2 < age:
		return false, fmt.Sprintf("loki accepts records that are up to %v older than the newest of their stream, half of ingester.max_chunk_age, and these are %v old: set it to more than twice that", chunk/2, old), nil
	}
	return true, "", nil
}

// Name is the backend's label.
func (w *Writer) Name() string { return "loki" }

// Close does nothing; idle connections time out.
func (w *Writer) Close() error { return nil }

// Write is [Writer.WriteArrived] for a payload that arrives now.
func (w *Writer) Write(ctx context.Context, instance string, payload []byte) error {
	return w.WriteArrived(ctx, instance, payload, time.Time{})
}

// WriteArrived returns nil when Loki has stored every record of an OTLP request, and [fault.Parts]
// when it has stored all but those named there. Records without any time get that of the arrival,
// whenever they are written; the zero time means now.
func (w *Writer) WriteArrived(ctx context.Context, instance string, payload []byte, arrival time.Time) error {
	if arrival.IsZero() {
		arrival = time.Now()
	}
	if w.cfg.Mode == "otlp" {
		w.compressed = httpclient.Gzip(w.compressed[:0], otlpwire.Observed(payload, uint64(arrival.UnixNano())))
		_, _, err := w.client.Send(ctx, instance, w.compressed, http.Header{"Content-Encoding": {"gzip"}})
		return err
	}
	if w.batch == nil {
		w.batch = newBatch(&w.cfg)
	}
	b := w.batch
	b.reset(instance, arrival)
	if b.add(payload); b.large {
		return fault.Permanent(ledger.DeadTooLarge, errors.New("its lines take too much memory together"))
	}
	for body := b.request(); body != nil; body = b.request() {
		w.compressed = snappy.Encode(w.compressed[:cap(w.compressed)], body)
		if _, _, err := w.client.Send(ctx, instance, w.compressed, nil); err != nil {
			return err // Loki keeps a line that it gets twice only once
		}
	}
	return b.refused.Parts(func(records []int) []byte { return otlpwire.Pick(otlpwire.Logs, payload, records) })
}

// Translate calls visit with the uncompressed pushes of a payload; it is for benchmarks.
func (w *Writer) Translate(instance string, payload []byte, visit func(push []byte)) {
	if w.batch == nil {
		w.batch = newBatch(&w.cfg)
	}
	w.batch.reset(instance, time.Now())
	w.batch.add(payload)
	for body := w.batch.request(); body != nil; body = w.batch.request() {
		visit(body)
	}
}
