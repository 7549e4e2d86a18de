// Package loki writes logs to Loki over its push API.
//
// Stream labels come from a short allow-list, so that streams stay few; trace
// ID, span ID and every other attribute travel as structured metadata under the
// names that Loki's own OTLP endpoint uses, so that links from logs to traces
// work the same.
//
// # Not here
//
// Loki's OTLP endpoint as the other way in, and a guard on the number of
// streams.
package loki

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/snappy"
	"github.com/prometheus/common/model"
	"github.com/prometheus/otlptranslator"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/sink/attr"
	"github.com/penstock/penstock/pkg/sink/push"
)

// Config is what an operator may set.
type Config struct {
	// URL is where Loki listens; without a path /loki/api/v1/push is added.
	// Empty: no Loki.
	URL string `yaml:"url"`
	// Labels are the resource attributes that become stream labels, besides
	// level.
	Labels []string `yaml:"stream_labels"`
}

// DefaultLabels keep the number of streams at instances × services × levels.
func DefaultLabels() []string { return []string{"instance.id", "service.name"} }

const pushPath = "/loki/api/v1/push"

// Writer sends to one Loki. It is safe for concurrent use; records of one
// instance must come from one goroutine, in order.
type Writer struct {
	client *push.Client
	labels []string
}

// New returns a writer.
func New(cfg Config) (*Writer, error) {
	client, err := push.New(cfg.URL, pushPath, map[string]string{"Content-Type": "application/x-protobuf"})
	if err != nil {
		return nil, fmt.Errorf("loki.url: %w", err)
	}
	return &Writer{client: client, labels: cfg.Labels}, nil
}

// Takes asks Loki for its limits: reject_old_samples_max_age, and how far behind the
// newest record of its stream one may be while newer ones come in, half of
// ingester.max_chunk_age (Loki, pkg/ingester/stream.go).
func (w *Writer) Takes(ctx context.Context, since, now time.Time) (ok bool, text string, err error) {
	page, err := w.client.Get(ctx, pushPath, "/config")
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
		return false, fmt.Sprintf("loki takes records that are up to %v old, these are %v old: set limits_config.reject_old_samples_max_age to more", maxAge, old), nil
	case cfg.Limits.Unordered != nil && !*cfg.Limits.Unordered:
		return false, fmt.Sprintf("loki takes no record that is older than the newest of its stream, these are %v old: set limits_config.unordered_writes to true", old), nil
	case time.Duration(chunk)/2 < age:
		return false, fmt.Sprintf("loki takes records that are up to %v behind the newest of their stream, half of ingester.max_chunk_age, and these are %v old: set it to more than twice that", model.Duration(chunk/2), old), nil
	}
	return true, "", nil
}

// Name is the backend's label.
func (w *Writer) Name() string { return "loki" }

// Close does nothing; connections end when they idle.
func (w *Writer) Close() error { return nil }

// Write returns nil when Loki has stored every record of an OTLP request.
func (w *Writer) Write(ctx context.Context, instance string, payload []byte) error {
	var req logspb.LogsData
	if err := proto.Unmarshal(payload, &req); err != nil {
		return fault.Permanent(ledger.DeadUndecodable, fmt.Errorf("decode logs: %w", err))
	}
	b := newBatch(w.labels, instance)
	for _, rl := range req.GetResourceLogs() {
		b.resource(rl)
	}
	if len(b.order) == 0 {
		return nil
	}
	return w.client.Post(ctx, snappy.Encode(nil, b.request()))
}

type pair struct{ name, value string }

type entry struct {
	at       uint64 // Unix nanoseconds
	line     string
	metadata []pair
}

type stream struct {
	labels  string
	entries []entry
}

// batch turns one OTLP request into streams, in the order of first sight.
type batch struct {
	labels   []string
	instance string
	byLabels map[string]*stream
	order    []*stream
}

func newBatch(labels []string, instance string) *batch {
	return &batch{labels: labels, instance: instance, byLabels: make(map[string]*stream)}
}

var namer = otlptranslator.LabelNamer{PreserveMultipleUnderscores: true}

// name turns an attribute's key into a label name; a key that cannot be one
// keeps its letters and digits.
func name(key string) string {
	n, err := namer.Build(key)
	if err != nil || n == "" {
		return "unnamed"
	}
	return n
}

func (b *batch) resource(rl *logspb.ResourceLogs) {
	var labels, rest []pair
	for _, kv := range rl.GetResource().GetAttributes() {
		p := pair{name(kv.GetKey()), attr.Text(kv.GetValue())}
		switch {
		case kv.GetKey() == "instance.id" || p.value == "":
		case slices.Contains(b.labels, kv.GetKey()):
			labels = append(labels, p)
		default:
			rest = append(rest, p)
		}
	}
	labels = append(labels, pair{"instance_id", b.instance}) // as the subject says
	if !slices.ContainsFunc(labels, func(p pair) bool { return p.name == "service_name" }) {
		labels = append(labels, pair{"service_name", "unknown_service"})
	}
	for _, sl := range rl.GetScopeLogs() {
		scoped := slices.Clone(rest)
		if n := sl.GetScope().GetName(); n != "" {
			scoped = append(scoped, pair{"scope_name", n})
		}
		if v := sl.GetScope().GetVersion(); v != "" {
			scoped = append(scoped, pair{"scope_version", v})
		}
		for _, rec := range sl.GetLogRecords() {
			b.record(labels, scoped, rec)
		}
	}
}

func (b *batch) record(labels, rest []pair, rec *logspb.LogRecord) {
	id := labelString(append(slices.Clone(labels), pair{"level", level(rec)}))
	s := b.byLabels[id]
	if s == nil {
		s = &stream{labels: id}
		b.byLabels[id] = s
		b.order = append(b.order, s)
	}
	md := slices.Clone(rest)
	add := func(n, v string) {
		if v != "" {
			md = append(md, pair{n, v})
		}
	}
	add("trace_id", hex.EncodeToString(rec.GetTraceId()))
	add("span_id", hex.EncodeToString(rec.GetSpanId()))
	add("severity_text", rec.GetSeverityText())
	if n := rec.GetSeverityNumber(); n != 0 {
		add("severity_number", strconv.Itoa(int(n)))
	}
	add("event_name", rec.GetEventName())
	for _, kv := range rec.GetAttributes() {
		add(name(kv.GetKey()), attr.Text(kv.GetValue()))
	}
	s.entries = append(s.entries, entry{
		at:       cmp.Or(rec.GetTimeUnixNano(), rec.GetObservedTimeUnixNano()),
		line:     attr.Text(rec.GetBody()),
		metadata: unique(md),
	})
}

// unique keeps the last of several pairs with one name.
func unique(md []pair) []pair {
	slices.SortStableFunc(md, func(a, b pair) int { return cmp.Compare(a.name, b.name) })
	out := md[:0]
	for i, p := range md {
		if i+1 == len(md) || md[i+1].name != p.name {
			out = append(out, p)
		}
	}
	return out
}

// levels are the names of the severity ranges of the OpenTelemetry log model,
// four numbers each.
var levels = [...]string{"trace", "debug", "info", "warn", "error", "fatal"}

// level is the severity as users of Loki know it: by number, else by text, else
// as a JSON body says, else unknown.
func level(rec *logspb.LogRecord) string {
	if n := int(rec.GetSeverityNumber()); n >= 1 && n <= 24 {
		return levels[(n-1)/4]
	}
	if t := known(rec.GetSeverityText()); t != "" {
		return t
	}
	if s, ok := rec.GetBody().GetValue().(*commonpb.AnyValue_StringValue); ok && strings.HasPrefix(s.StringValue, "{") {
		var body struct {
			Level string `json:"level"`
		}
		if json.Unmarshal([]byte(s.StringValue), &body) == nil {
			if t := known(body.Level); t != "" {
				return t
			}
		}
	}
	return "unknown"
}

// known maps a level's usual spellings to its name, and others to "": a label
// must not have as many values as customers can think of.
func known(t string) string {
	t = strings.ToLower(t)
	switch t {
	case "warning":
		return "warn"
	case "err":
		return "error"
	case "critical":
		return "fatal"
	}
	if slices.Contains(levels[:], t) {
		return t
	}
	return ""
}

// labelString writes labels in Loki's selector syntax, in the order of names.
func labelString(ls []pair) string {
	slices.SortFunc(ls, func(a, b pair) int { return cmp.Compare(a.name, b.name) })
	var sb strings.Builder
	sb.WriteByte('{')
	for i, l := range ls {
		if i > 0 {
			sb.WriteString(", ")
		}
		sb.WriteString(l.name)
		sb.WriteByte('=')
		sb.WriteString(strconv.Quote(l.value))
	}
	sb.WriteByte('}')
	return sb.String()
}

// request encodes a logproto.PushRequest: streams = 1 {labels = 1, entries = 2
// {timestamp = 1 {seconds = 1, nanos = 2}, line = 2, structuredMetadata = 3
// {name = 1, value = 2}}}. Entries of a stream are in the order of time.
func (b *batch) request() []byte {
	var out, st, en, part []byte
	str := func(dst []byte, num protowire.Number, s string) []byte {
		return protowire.AppendString(protowire.AppendTag(dst, num, protowire.BytesType), s)
	}
	msg := func(dst []byte, num protowire.Number, m []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(dst, num, protowire.BytesType), m)
	}
	for _, s := range b.order {
		st = str(st[:0], 1, s.labels)
		slices.SortStableFunc(s.entries, func(a, b entry) int { return cmp.Compare(a.at, b.at) })
		for _, e := range s.entries {
			part = protowire.AppendVarint(protowire.AppendTag(part[:0], 1, protowire.VarintType), e.at/1e9)
			part = protowire.AppendVarint(protowire.AppendTag(part, 2, protowire.VarintType), e.at%1e9)
			en = str(msg(en[:0], 1, part), 2, e.line)
			for _, p := range e.metadata {
				en = msg(en, 3, str(str(part[:0], 1, p.name), 2, p.value))
			}
			st = msg(st, 2, en)
		}
		out = msg(out, 1, st)
	}
	return out
}
