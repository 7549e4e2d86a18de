package main

import (
	"encoding/binary"
	"fmt"

	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/plog"
	"go.opentelemetry.io/collector/pdata/pmetric"
	"go.opentelemetry.io/collector/pdata/ptrace"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// identity is what all sides stamp: overwritten, whatever the sender set.
var identity = []struct{ key, val string }{{"instance.id", "as-17"}, {"instance.name", "as-17.example"}, {"customer.id", "acme"}}

// inserted is set where the sender has not.
var inserted = struct{ key, val string }{"service.namespace", "appserver"}

const partitions = 64

// place is the key function of all sides.
func place(id [16]byte) int { return int(binary.LittleEndian.Uint64(id[:8]) % partitions) }

// sink keeps results alive.
var sink int

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func operations(sig otlpwire.Signal, payload []byte) []operation {
	var st otlpwire.Stamp
	for _, a := range identity {
		st.Overwrite(a.key, a.val)
	}
	st.Insert(inserted.key, inserted.val)
	buf := make([]byte, 0, 2*len(payload)+4096)
	ops := []operation{
		{"preflight", []side{
			{"penstock", func() { sink += must(otlpwire.Scan(sig, payload, otlpwire.DefaultLimits)).Items }},
			{"plain", func() { sink += plainScan(sig, payload) }},
			{"pdata", func() { decodePdata(sig, payload) }},
			{"generated", func() { check(proto.Unmarshal(payload, generated(sig))) }},
		}},
		{"stamp", []side{
			{"penstock", func() { buf = must(st.Append(buf[:0], payload)) }},
			{"pdata", func() { sink += len(stampPdata(sig, payload)) }},
			{"generated", func() { sink += len(stampGenerated(sig, payload)) }},
		}},
		{"preflight+stamp", []side{
			{"penstock", func() {
				must(otlpwire.Scan(sig, payload, otlpwire.DefaultLimits))
				buf = must(st.Append(buf[:0], payload))
			}},
			{"plain", func() { sink += plainScan(sig, payload) }},
			{"pdata", func() { sink += len(stampPdata(sig, payload)) }},
			{"generated", func() { sink += len(stampGenerated(sig, payload)) }},
		}},
	}
	if sig != otlpwire.Traces {
		return ops
	}
	var sp otlpwire.Splitter
	key := func(item []byte) int {
		id, _ := otlpwire.SpanTrace(item)
		return place(id)
	}
	piece := func(_ int, p []byte) { sink += len(p) }
	return append(ops,
		operation{"split", []side{
			{"penstock", func() { check(sp.Split(payload, key, piece)) }},
			{"pdata", func() { splitPdata(payload) }},
			{"generated", func() { splitGenerated(payload) }},
		}},
		operation{"read", []side{
			{"penstock", func() { readWire(payload) }},
			{"pdata", func() { readPdata(payload) }},
			{"generated", func() { readGenerated(payload) }},
		}},
	)
}

// What a sampler asks of every span.
const (
	spanAttribute     = "http.route"
	resourceAttribute = "service.name"
)

func readWire(payload []byte) {
	var s otlpwire.Span
	for r := range otlpwire.Resources(payload) {
		name, _ := otlpwire.ResourceAttribute(r.Resource(), resourceAttribute)
		for sc := range r.Scopes() {
			for item := range sc.Items() {
				s.Parse(item)
				v, _ := s.Attribute(spanAttribute)
				sink += int(s.Status) + int(s.End-s.Start) + int(s.Kind) + int(s.Flags) + len(s.TraceState) + len(v.Str) + len(name.Str)
			}
		}
	}
}

func decodePdata(sig otlpwire.Signal, payload []byte) {
	switch sig {
	case otlpwire.Traces:
		must((&ptrace.ProtoUnmarshaler{}).UnmarshalTraces(payload))
	case otlpwire.Metrics:
		must((&pmetric.ProtoUnmarshaler{}).UnmarshalMetrics(payload))
	default:
		must((&plog.ProtoUnmarshaler{}).UnmarshalLogs(payload))
	}
}

func stampPdata(sig otlpwire.Signal, payload []byte) []byte {
	set := func(r pcommon.Resource) {
		for _, a := range identity {
			r.Attributes().PutStr(a.key, a.val)
		}
		if _, has := r.Attributes().Get(inserted.key); !has {
			r.Attributes().PutStr(inserted.key, inserted.val)
		}
	}
	switch sig {
	case otlpwire.Traces:
		td := must((&ptrace.ProtoUnmarshaler{}).UnmarshalTraces(payload))
		for _, rs := range td.ResourceSpans().All() {
			set(rs.Resource())
		}
		return must((&ptrace.ProtoMarshaler{}).MarshalTraces(td))
	case otlpwire.Metrics:
		md := must((&pmetric.ProtoUnmarshaler{}).UnmarshalMetrics(payload))
		for _, rm := range md.ResourceMetrics().All() {
			set(rm.Resource())
		}
		return must((&pmetric.ProtoMarshaler{}).MarshalMetrics(md))
	}
	ld := must((&plog.ProtoUnmarshaler{}).UnmarshalLogs(payload))
	for _, rl := range ld.ResourceLogs().All() {
		set(rl.Resource())
	}
	return must((&plog.ProtoMarshaler{}).MarshalLogs(ld))
}

func splitPdata(payload []byte) {
	td := must((&ptrace.ProtoUnmarshaler{}).UnmarshalTraces(payload))
	var parts [partitions]ptrace.Traces
	var made [partitions]bool
	for _, rs := range td.ResourceSpans().All() {
		var resources [partitions]ptrace.ResourceSpans
		var inResource [partitions]bool
		for _, ss := range rs.ScopeSpans().All() {
			var scopes [partitions]ptrace.ScopeSpans
			var inScope [partitions]bool
			for _, span := range ss.Spans().All() {
				p := place(span.TraceID())
				if !made[p] {
					parts[p], made[p] = ptrace.NewTraces(), true
				}
				if !inResource[p] {
					resources[p], inResource[p] = parts[p].ResourceSpans().AppendEmpty(), true
					rs.Resource().CopyTo(resources[p].Resource())
					resources[p].SetSchemaUrl(rs.SchemaUrl())
				}
				if !inScope[p] {
					scopes[p], inScope[p] = resources[p].ScopeSpans().AppendEmpty(), true
					ss.Scope().CopyTo(scopes[p].Scope())
					scopes[p].SetSchemaUrl(ss.SchemaUrl())
				}
				span.MoveTo(scopes[p].Spans().AppendEmpty())
			}
		}
	}
	for p := range parts {
		if made[p] {
			sink += len(must((&ptrace.ProtoMarshaler{}).MarshalTraces(parts[p])))
		}
	}
}

func readPdata(payload []byte) {
	td := must((&ptrace.ProtoUnmarshaler{}).UnmarshalTraces(payload))
	for _, rs := range td.ResourceSpans().All() {
		r, _ := rs.Resource().Attributes().Get(resourceAttribute)
		for _, ss := range rs.ScopeSpans().All() {
			for _, s := range ss.Spans().All() {
				v, _ := s.Attributes().Get(spanAttribute)
				sink += int(s.Status().Code()) + int(s.EndTimestamp()-s.StartTimestamp()) + int(s.Kind()) + int(s.Flags()) + len(s.TraceState().AsRaw()) + len(v.Str()) + len(r.Str())
			}
		}
	}
}

func generated(sig otlpwire.Signal) proto.Message {
	switch sig {
	case otlpwire.Traces:
		return new(tracepb.TracesData)
	case otlpwire.Metrics:
		return new(metricspb.MetricsData)
	}
	return new(logspb.LogsData)
}

func stampGenerated(sig otlpwire.Signal, payload []byte) []byte {
	m := generated(sig)
	check(proto.Unmarshal(payload, m))
	switch m := m.(type) {
	case *tracepb.TracesData:
		for _, r := range m.ResourceSpans {
			r.Resource = setGenerated(r.Resource)
		}
	case *metricspb.MetricsData:
		for _, r := range m.ResourceMetrics {
			r.Resource = setGenerated(r.Resource)
		}
	case *logspb.LogsData:
		for _, r := range m.ResourceLogs {
			r.Resource = setGenerated(r.Resource)
		}
	}
	return must(proto.Marshal(m))
}

func setGenerated(r *resourcepb.Resource) *resourcepb.Resource {
	if r == nil {
		r = &resourcepb.Resource{}
	}
	for _, a := range identity {
		put(r, a.key, a.val, true)
	}
	put(r, inserted.key, inserted.val, false)
	return r
}

func put(r *resourcepb.Resource, key, val string, overwrite bool) {
	v := &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: val}}
	for _, a := range r.Attributes {
		if a.Key == key {
			if overwrite {
				a.Value = v
			}
			return
		}
	}
	r.Attributes = append(r.Attributes, &commonpb.KeyValue{Key: key, Value: v})
}

func splitGenerated(payload []byte) {
	m := &tracepb.TracesData{}
	check(proto.Unmarshal(payload, m))
	var parts [partitions]*tracepb.TracesData
	for _, rs := range m.ResourceSpans {
		var resources [partitions]*tracepb.ResourceSpans
		for _, ss := range rs.ScopeSpans {
			var scopes [partitions]*tracepb.ScopeSpans
			for _, span := range ss.Spans {
				p := place([16]byte(span.TraceId))
				if parts[p] == nil {
					parts[p] = &tracepb.TracesData{}
				}
				if resources[p] == nil {
					resources[p] = &tracepb.ResourceSpans{Resource: rs.Resource, SchemaUrl: rs.SchemaUrl}
					parts[p].ResourceSpans = append(parts[p].ResourceSpans, resources[p])
				}
				if scopes[p] == nil {
					scopes[p] = &tracepb.ScopeSpans{Scope: ss.Scope, SchemaUrl: ss.SchemaUrl}
					resources[p].ScopeSpans = append(resources[p].ScopeSpans, scopes[p])
				}
				scopes[p].Spans = append(scopes[p].Spans, span)
			}
		}
	}
	for _, p := range parts {
		if p != nil {
			sink += len(must(proto.Marshal(p)))
		}
	}
}

func readGenerated(payload []byte) {
	m := &tracepb.TracesData{}
	check(proto.Unmarshal(payload, m))
	for _, rs := range m.ResourceSpans {
		r := find(rs.GetResource().GetAttributes(), resourceAttribute)
		for _, ss := range rs.ScopeSpans {
			for _, s := range ss.Spans {
				v := find(s.Attributes, spanAttribute)
				sink += int(s.GetStatus().GetCode()) + int(s.EndTimeUnixNano-s.StartTimeUnixNano) + int(s.Kind) + int(s.Flags) + len(s.TraceState) + len(v) + len(r)
			}
		}
	}
}

func find(kvs []*commonpb.KeyValue, key string) string {
	for _, kv := range kvs {
		if kv.Key == key {
			return kv.GetValue().GetStringValue()
		}
	}
	return ""
}

// plainScan counts the fields of all messages by tag and length alone. Which
// fields hold messages is all it knows.
func plainScan(sig otlpwire.Signal, b []byte) int {
	return plain(b, [...]uint8{otlpwire.Traces: tracesRequest, otlpwire.Metrics: metricsRequest, otlpwire.Logs: logsRequest}[sig])
}

// The messages of the requests below, by number; children gives the message in a
// field, 0 for none.
const (
	tracesRequest = iota + 1
	metricsRequest
	logsRequest
	resourceSpans
	scopeSpans
	resourceMetrics
	scopeMetrics
	resourceLogs
	scopeLogs
	resourceMsg
	scopeMsg
	keyValue
	anyValue
	array
	span
	event
	status
	metric
	points
	point
	histPoints
	histPoint
	record
	numMessages
)

var children = [numMessages][17]uint8{
	tracesRequest:   {1: resourceSpans},
	metricsRequest:  {1: resourceMetrics},
	logsRequest:     {1: resourceLogs},
	resourceSpans:   {1: resourceMsg, 2: scopeSpans},
	scopeSpans:      {1: scopeMsg, 2: span},
	resourceMetrics: {1: resourceMsg, 2: scopeMetrics},
	scopeMetrics:    {1: scopeMsg, 2: metric},
	resourceLogs:    {1: resourceMsg, 2: scopeLogs},
	scopeLogs:       {1: scopeMsg, 2: record},
	resourceMsg:     {1: keyValue},
	scopeMsg:        {3: keyValue},
	keyValue:        {2: anyValue},
	anyValue:        {5: array, 6: array},
	array:           {1: anyValue},
	span:            {9: keyValue, 11: event, 13: event, 15: status},
	event:           {3: keyValue, 4: keyValue},
	metric:          {5: points, 7: points, 9: histPoints},
	points:          {1: point},
	point:           {7: keyValue},
	histPoints:      {1: histPoint},
	histPoint:       {9: keyValue},
	record:          {5: anyValue, 6: keyValue},
}

func plain(b []byte, msg uint8) (fields int) {
	for i := 0; i < len(b); {
		tag, n := varint(b[i:])
		i += n
		fields++
		switch tag & 7 {
		case 0:
			_, n = varint(b[i:])
			i += n
		case 1:
			i += 8
		case 5:
			i += 4
		case 2:
			size, n := varint(b[i:])
			i += n
			if num := tag >> 3; num < 17 && children[msg][num] != 0 {
				fields += plain(b[i:i+int(size)], children[msg][num])
			}
			i += int(size)
		default:
			panic(fmt.Sprintf("BUG: wire type %d in a generated request", tag&7))
		}
	}
	return fields
}

func varint(b []byte) (v uint64, n int) {
	if b[0] < 0x80 {
		return uint64(b[0]), 1
	}
	return binary.Uvarint(b)
}
