// Package prometheus writes metrics to Prometheus over remote_write 2.0, or 1.0 if the receiver does
// not know 2.0.
//
// OTLP bytes become series without an intermediate form (translate.go), with the names that
// otlptranslator gives them by one of four strategies, and as Prometheus's own translation makes
// them: `make test-oracle` compares the two. Exponential histograms become native ones, deltas are
// added up, exemplars, start times, metadata and the ends of series are sent, too, and each
// resource has its target_info.
//
// # Promises
//
//   - Identity wins over data point attributes of the same name: a customer cannot
//     forge instance_id.
//   - Samples of a series are sent in the order of their arrival, one request at a time.
//   - A request that failed has the same samples when it is retried.
//   - If Prometheus cannot store some points of a payload, the others are stored.
//
// # Not here
//
// Retries, and finding refused items: package backend. HTTP: package httpclient.
package prometheus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/snappy"
	"github.com/prometheus/common/model"
	"github.com/prometheus/otlptranslator"
	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/httpclient"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Config is what an operator may set.
type Config struct {
	// The address of Prometheus; without a path /api/v1/write is added. Empty: no Prometheus.
	URL string `yaml:"url"`
	// The version of remote_write: auto, 2.0 or 1.0. auto falls back to 1.0 where the receiver does
	// not understand 2.0, and tries 2.0 again every hour.
	Protocol string `yaml:"protocol"`
	// How names are translated, one of the values of Prometheus's otlp.translation_strategy.
	Strategy string `yaml:"translation_strategy"`
	// The resource attributes that become labels of every series; the others are labels of
	// target_info.
	Labels []string `yaml:"resource_labels"`
	// Labels that are added to every series which has no label of that name.
	External map[string]string `yaml:"external_labels"`
	// Adds otel_scope_name, otel_scope_version, otel_scope_schema_url and the scope's attributes to
	// every series.
	ScopeLabels bool `yaml:"scope_labels"`
	// Writes target_info for every resource, once in 2.5 minutes.
	TargetInfo        bool   `yaml:"target_info"`
	Limits            Limits `yaml:"limits"`
	httpclient.Access `yaml:",inline"`
}

// Limits keep one instance from filling up Prometheus, and the sink.
type Limits struct {
	// How many series one instance may create in a minute of its points' time, with the buckets of
	// histograms and the quantiles of summaries; ten times as many in its first five minutes. More
	// are dead-lettered. 0: no limit.
	NewSeries int `yaml:"new_series_per_minute"`
	// How many values an attribute of one instance's points may have in an hour. Points with more
	// are dead-lettered. 0: no limit.
	LabelValues int `yaml:"label_values"`
	// How many series with delta temporality have their sum remembered, per partition. Beyond that
	// the oldest sums are forgotten, and begin at zero again.
	DeltaSeries int `yaml:"delta_series"`
}

// DefaultConfig has no URL.
func DefaultConfig() Config {
	return Config{
		Protocol: "auto", Strategy: string(otlptranslator.UnderscoreEscapingWithSuffixes), TargetInfo: true,
		// They distinguish instances and services.
		Labels: []string{"instance.id", "instance.name", "customer.id", "deployment.environment", "service.name", "service.namespace"},
		Limits: Limits{NewSeries: 20_000, LabelValues: 10_000, DeltaSeries: 100_000},
	}
}

// strategies are those of Prometheus.
var strategies = []string{
	string(otlptranslator.UnderscoreEscapingWithSuffixes), string(otlptranslator.UnderscoreEscapingWithoutSuffixes),
	string(otlptranslator.NoUTF8EscapingWithSuffixes), string(otlptranslator.NoTranslation),
}

var labelName = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_]*$`)

func (cfg *Config) validate() error {
	var errs []error
	if !slices.Contains([]string{"auto", "1.0", "2.0"}, cfg.Protocol) {
		errs = append(errs, fmt.Errorf("prometheus.protocol is %q, want auto, 1.0 or 2.0", cfg.Protocol))
	}
	if !slices.Contains(strategies, cfg.Strategy) {
		errs = append(errs, fmt.Errorf("prometheus.translation_strategy is %q, want one of %s", cfg.Strategy, strings.Join(strategies, ", ")))
	}
	for name := range cfg.External {
		if !labelName.MatchString(name) || strings.HasPrefix(name, "__") {
			errs = append(errs, fmt.Errorf("prometheus.external_labels: %q is not a label name", name))
		}
	}
	if l := cfg.Limits; l.NewSeries < 0 || l.LabelValues < 0 || l.DeltaSeries < 1 {
		errs = append(errs, errors.New("prometheus.limits: want 0 or more, and a delta_series of at least 1"))
	}
	return errors.Join(errs...)
}

const writePath = "/api/v1/write"

// Writer sends to one Prometheus.
type Writer struct {
	*receiver
	translation *translation // nil before the first write
	encoder     encoder
	compressed  []byte
	refused     piece // what was refused last: its halves are written without target_info
}

// piece identifies the parts of one payload.
type piece struct {
	instance string
	arrival  time.Time
}

// receiver is the state that the writers to one Prometheus share.
type receiver struct {
	cfg    Config
	client *httpclient.Client
	// fallback is when 2.0 was not understood, in Unix seconds; 0 if it was, or was not tried.
	fallback atomic.Int64
	// confirmed says that 2.0 is understood.
	confirmed atomic.Bool
}

// New returns a writer.
func New(cfg Config) (*Writer, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	client, err := httpclient.New(cfg.URL, writePath, map[string]string{"Content-Encoding": "snappy"})
	if err != nil {
		return nil, fmt.Errorf("prometheus.url: %w", err)
	}
	if err := client.Use("prometheus", cfg.Access); err != nil {
		return nil, err
	}
	client.Refused = refused
	return &Writer{receiver: &receiver{cfg: cfg, client: client}}, nil
}

// Session returns a writer for another goroutine, without memory of earlier payloads.
func (w *Writer) Session() *Writer { return &Writer{receiver: w.receiver} }

// refused recognises the error texts of Prometheus and compatible receivers for samples that are
// refused for good. Prometheus 2.42 answers 500 to one that is too old, which would otherwise be
// retried for ever.
func refused(status int, body string) (reason string) {
	if status != http.StatusBadRequest && status != http.StatusInternalServerError && status != http.StatusConflict {
		return ""
	}
	switch {
	case strings.Contains(body, "too far in the future"), strings.Contains(body, "too-far-in-future"), strings.Contains(body, "max-future"):
		return ledger.DeadTooNew
	case strings.Contains(body, "out of order sample"), strings.Contains(body, "duplicate sample"),
		strings.Contains(body, "sample-out-of-order"), strings.Contains(body, "sample-duplicate-timestamp"): // Mimir
		return ledger.DeadOutOfOrder
	case strings.Contains(body, "too old sample"), strings.Contains(body, "out of bounds"), strings.Contains(body, "sample-timestamp-too-old"):
		return ledger.DeadTooOld
	case strings.Contains(body, "observations found in buckets"): // a histogram; some releases answer 500
		return ledger.DeadRefused
	case strings.Contains(body, "native histograms are disabled"): // also 500 in some releases; the configuration is wrong, not the data
		return httpclient.Misconfigured
	case status == http.StatusConflict: // Thanos: there is another sample, or a newer one
		return ledger.DeadOutOfOrder
	}
	return ""
}

// Takes asks Prometheus how old samples may be while newer ones arrive: as old as
// storage.tsdb.out_of_order_time_window says, which is 0 by default.
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
		return false, fmt.Sprintf("prometheus accepts samples that are up to %v old while newer ones arrive, these are %v old: set storage.tsdb.out_of_order_time_window to %v or more and reload it",
			window, age.Round(time.Second), model.Duration(age.Truncate(time.Hour)+2*time.Hour)), nil
	}
	return true, "", nil
}

// Name is the backend's label.
func (w *Writer) Name() string { return "prometheus" }

// Close does nothing; idle connections time out.
func (w *Writer) Close() error { return nil }

// Write is [Writer.WriteArrived] for a payload that arrives now.
func (w *Writer) Write(ctx context.Context, instance string, payload []byte) error {
	return w.WriteArrived(ctx, instance, payload, time.Time{})
}

// WriteArrived returns nil when Prometheus has stored every sample of an OTLP request, and
// [fault.Parts] when it has stored all but those named there. arrival is when the hub stored the
// request, or the edge if there is no hub; the zero time means now.
func (w *Writer) WriteArrived(ctx context.Context, instance string, payload []byte, arrival time.Time) error {
	if w.translation == nil {
		w.translation = newTranslation(&w.cfg)
	}
	if arrival.IsZero() {
		arrival = time.Now()
	}
	t := w.translation
	translate := func(plain bool) error {
		t.reset(instance, arrival)
		t.plain = plain
		t.add(payload)
		return w.send(ctx, t, payload)
	}
	part := piece{instance, arrival}
	err := translate(w.refused == part)
	if _, refused := fault.Reason(err); refused && len(t.memory.written) > 0 {
		// target_info is our own addition; the sender's points must not be lost because of it.
		targets := slices.Collect(maps.Keys(t.memory.written))
		if err = translate(true); err == nil {
			t.memory.doubt(targets, arrival.UnixMilli())
		}
	}
	if _, refused := fault.Reason(err); refused {
		if w.refused = part; fault.IsWhole(err) || otlpwire.Count(otlpwire.Metrics, payload) < 2 {
			t.memory.forget()
		}
	}
	if err != nil {
		return err
	}
	t.commit()
	return fault.Known(t.refused.Parts(func(points []int) []byte { return otlpwire.Pick(otlpwire.Metrics, payload, points) }), t.known)
}

var errLarge = errors.New("its series take too much memory together")

// Translate calls visit with the uncompressed requests of remote_write 2.0 for a payload, and how many
// samples and histograms each has; it is for benchmarks.
func (w *Writer) Translate(instance string, payload []byte, visit func(request []byte, samples int)) {
	if w.translation == nil {
		w.translation = newTranslation(&w.cfg)
	}
	w.translation.reset(instance, time.Now())
	w.translation.add(payload)
	w.encoder.series = 0
	for body := w.encoder.next(w.translation, 2); body != nil; body = w.encoder.next(w.translation, 2) {
		visit(body, w.encoder.samples+w.encoder.histogram)
	}
}

// reprobe is after how long 2.0 is tried again.
const reprobe = time.Hour

func (r *receiver) version() int {
	at := r.fallback.Load()
	if r.cfg.Protocol == "1.0" || r.cfg.Protocol == "auto" && at != 0 && time.Since(time.Unix(at, 0)) < reprobe {
		return 1
	}
	return 2
}

// send sends the translation in as many requests as necessary.
func (w *Writer) send(ctx context.Context, t *translation, payload []byte) error {
	if t.large {
		return fault.Permanent(ledger.DeadTooLarge, errLarge)
	}
	e := &w.encoder
	for e.series = 0; e.series < len(t.series); {
		from, version := e.series, w.version()
		err := w.post(ctx, t, version)
		if version == 2 && w.cfg.Protocol == "auto" && w.misunderstood(err) {
			e.series = from
			if err = w.post(ctx, t, 1); err == nil {
				w.fallback.Store(time.Now().Unix())
				w.confirmed.Store(false)
			}
		}
		if err != nil && from > 0 {
			return fmt.Errorf("%w (%w)", err, httpclient.ErrBegun)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// errNotWritten is a success of a receiver that does not report what it has written: one that knows
// only 1.0 has read nothing.
var errNotWritten = errors.New("prometheus does not report what it has written, so it does not understand remote_write 2.0; set prometheus.protocol to auto or 1.0")

// misunderstood reports whether an answer to 2.0 is that of a receiver that does not know it: 415, 400
// from one that has never accepted 2.0, or a success without the headers of 2.0.
func (r *receiver) misunderstood(err error) bool {
	var answer *httpclient.Error
	if errors.As(err, &answer) {
		return answer.Status == http.StatusUnsupportedMediaType || answer.Status == http.StatusBadRequest && !r.confirmed.Load()
	}
	return errors.Is(err, errNotWritten)
}

var contentTypes = [...]string{1: "application/x-protobuf", 2: "application/x-protobuf;proto=io.prometheus.write.v2.Request"}
var versions = [...]string{1: "0.1.0", 2: "2.0.0"}

// The headers in which a receiver of 2.0 reports what it has written.
const (
	samplesWritten    = "X-Prometheus-Remote-Write-Samples-Written"
	histogramsWritten = "X-Prometheus-Remote-Write-Histograms-Written"
	exemplarsWritten  = "X-Prometheus-Remote-Write-Exemplars-Written"
)

// post sends the next request.
func (w *Writer) post(ctx context.Context, t *translation, version int) error {
	body := w.encoder.next(t, version)
	w.compressed = snappy.Encode(w.compressed[:cap(w.compressed)], body)
	header, _, err := w.client.Send(ctx, t.instance, w.compressed, http.Header{
		"Content-Type": {contentTypes[version]}, "X-Prometheus-Remote-Write-Version": {versions[version]},
	})
	if version == 1 || header == nil {
		return err
	}
	samples, said := written(header, samplesWritten)
	histograms, also := written(header, histogramsWritten)
	_, exemplars := written(header, exemplarsWritten)
	if !said && !also && !exemplars {
		if err == nil {
			return fault.Configuration(errNotWritten)
		}
		return err
	}
	w.confirmed.Store(true)
	switch e := &w.encoder; {
	case samples >= e.samples && histograms >= e.histogram:
		return nil // if all samples and histograms are stored, the error is about an exemplar
	case err == nil:
		return fault.Permanent(ledger.DeadRefused, fmt.Errorf("prometheus has written %d of %d samples and %d of %d histograms, without a reason", samples, e.samples, histograms, e.histogram))
	}
	return err
}

// written reads one of these headers; an invalid number counts as all.
func written(h http.Header, name string) (n int, said bool) {
	text := h.Get(name)
	n, err := strconv.Atoi(text)
	if err != nil && text != "" {
		n = math.MaxInt
	}
	return n, text != ""
}
