// Package loki has penstock's pushes read by Loki's own parser, and holds the result
// against what that makes of the same logs at Loki's OTLP endpoint.
package loki

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-kit/log"
	"github.com/grafana/loki/v3/pkg/loghttp/push"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/plog"
	"go.opentelemetry.io/collector/pdata/plog/plogotlp"
)

type resolver struct{}

func (resolver) RetentionPeriodFor(labels.Labels) time.Duration  { return time.Hour }
func (resolver) RetentionHoursFor(labels.Labels) string          { return "1" }
func (resolver) PolicyFor(context.Context, labels.Labels) string { return "" }

// limits make Loki's OTLP endpoint use the labels that penstock has by default.
type limits struct{ push.EmptyLimits }

func (limits) DiscoverServiceName(string) []string { return []string{"service_name"} }

func (limits) OTLPConfig(string) push.OTLPConfig {
	return push.OTLPConfig{ResourceAttributes: push.ResourceAttributesConfig{
		AttributesConfig: []push.AttributesConfig{{Action: push.IndexLabel, Attributes: []string{"instance.id", "service.name", "deployment.environment"}}},
	}}
}

// read returns the lines that a request of a kind means to Loki, each with its labels and
// metadata, in order.
func read(t *testing.T, parse push.RequestParser, r *http.Request) []string {
	t.Helper()
	req, _, err := push.ParseRequest(log.NewNopLogger(), "tenant", 100<<20, 100<<20, r, limits{}, nil, parse, nil, resolver{}, "", "")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, s := range req.Streams {
		ls, err := parser.NewParser(parser.Options{}).ParseMetric(s.Labels)
		if err != nil {
			t.Fatalf("labels %s: %v", s.Labels, err)
		}
		level := ls.Get("level")
		if level == "" && parse != nil && strings.Contains(r.URL.Path, "push") {
			t.Errorf("no level in %s", s.Labels)
		}
		b := labels.NewBuilder(ls)
		b.Del("level") // Loki finds it out by itself, later
		for _, e := range s.Entries {
			var metadata []string
			for _, p := range e.StructuredMetadata {
				if p.Value != "" { // Loki takes no empty one
					metadata = append(metadata, fmt.Sprintf("%s=%q", p.Name, p.Value))
				}
			}
			slices.Sort(metadata)
			out = append(out, fmt.Sprintf("%s %d %q %s", b.Labels(), e.Timestamp.UnixNano(), e.Line, strings.Join(metadata, " ")))
		}
	}
	slices.Sort(out)
	return out
}

// pushes returns what penstock sends for logs, in a mode of loki.mode.
func pushes(t *testing.T, mode string, all []plog.Logs) (bodies [][][]byte) {
	t.Helper()
	var in bytes.Buffer
	for _, ld := range all {
		payload, err := (&plog.ProtoMarshaler{}).MarshalLogs(ld)
		if err != nil {
			t.Fatal(err)
		}
		_ = binary.Write(&in, binary.BigEndian, uint32(len(payload)))
		in.Write(payload)
	}
	cmd := exec.Command("go", "run", ".", mode)
	cmd.Dir, cmd.Stdin, cmd.Stderr = filepath.Join("..", "pushes"), &in, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	next := func() uint32 {
		n := binary.BigEndian.Uint32(out)
		out = out[4:]
		return n
	}
	for len(out) > 0 {
		var of [][]byte
		for range next() {
			n := next()
			of, out = append(of, out[:n]), out[n:]
		}
		bodies = append(bodies, of)
	}
	if len(bodies) != len(all) {
		t.Fatalf("pushes of %d requests, want %d", len(bodies), len(all))
	}
	return bodies
}

// request makes one of a body.
func request(path string, body []byte, encoding string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, path, bytes.NewReader(body))
	r.Header.Set("Content-Type", "application/x-protobuf")
	if encoding != "" {
		r.Header.Set("Content-Encoding", encoding)
	}
	return r
}

func TestLokiReadsPushesAsItsOwnOTLP(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	var all []plog.Logs
	for range 300 {
		all = append(all, generate(rng))
	}
	lines := 0
	for i, bodies := range pushes(t, "push", all) {
		var got []string
		for _, b := range bodies {
			got = append(got, read(t, push.ParseLokiRequest, request("/loki/api/v1/push", b, ""))...)
		}
		slices.Sort(got)
		body, err := plogotlp.NewExportRequestFromLogs(all[i]).MarshalProto()
		if err != nil {
			t.Fatal(err)
		}
		want := read(t, push.ParseOTLPRequest, request("/otlp/v1/logs", body, ""))
		if lines += len(want); len(want) != all[i].LogRecordCount() {
			t.Fatalf("Loki makes %d lines of %d records", len(want), all[i].LogRecordCount())
		}
		for k := range max(len(got), len(want)) {
			g, w := "nothing", "nothing"
			if k < len(got) {
				g = got[k]
			}
			if k < len(want) {
				w = want[k]
			}
			if g != w {
				t.Fatalf("line %d of %d\n penstock %s\n Loki     %s", k, len(want), g, w)
			}
		}
	}
	t.Logf("log lines compared %d differing 0", lines)
	if lines < 1000 {
		t.Errorf("%d lines only", lines)
	}
}

// TestOTLPModeIsWhatLokiReads: in the other mode Loki gets what it knows.
func TestOTLPModeIsWhatLokiReads(t *testing.T) {
	ld := generate(rand.New(rand.NewPCG(6, 6)))
	bodies := pushes(t, "otlp", []plog.Logs{ld})[0]
	if len(bodies) != 1 {
		t.Fatalf("%d requests", len(bodies))
	}
	if n := len(read(t, push.ParseOTLPRequest, request("/otlp/v1/logs", bodies[0], "gzip"))); n != ld.LogRecordCount() {
		t.Errorf("%d lines of %d", n, ld.LogRecordCount())
	}
}

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

var (
	keys  = []string{"http.method", "a.b", "a__b", "9lives", "_private", "ünïcode", "UPPER", "with space", "thread.id", "x", "code.function"}
	texts = []string{"", "GET", "ü", `"quoted"`, "a\nb", "日本", "{}", `{"level":"warning","msg":"x"}`, "plain text"}
)

func value(r *rand.Rand, v pcommon.Value, depth int) {
	switch n := r.IntN(12); {
	case n < 5:
		v.SetStr(pick(r, texts))
	case n == 5:
		v.SetBool(r.IntN(2) == 0)
	case n == 6:
		v.SetInt(r.Int64())
	case n == 7:
		v.SetDouble(pick(r, []float64{0, 0.1, 1e21, 1e-7, -1.5, math.MaxFloat64}))
	case n == 8:
		v.SetEmptyBytes().FromRaw([]byte{0, 1, 255})
	case n == 9 && depth < 3:
		s := v.SetEmptySlice()
		for range r.IntN(3) {
			value(r, s.AppendEmpty(), depth+1)
		}
	case n == 10 && depth < 3:
		m := v.SetEmptyMap()
		for range r.IntN(3) {
			value(r, m.PutEmpty(pick(r, keys)), depth+1)
		}
	}
}

// generate returns logs with identity as an edge stamps it.
func generate(r *rand.Rand) plog.Logs {
	ld := plog.NewLogs()
	for range 1 + r.IntN(3) {
		rl := ld.ResourceLogs().AppendEmpty()
		as := rl.Resource().Attributes()
		as.PutStr("instance.id", "as-1")
		for name, values := range map[string][]string{"service.name": {"shop", "cart"}, "deployment.environment": {"prod", "test \"1\""}, "customer.id": {"c-1"}} {
			if r.IntN(4) > 0 {
				as.PutStr(name, pick(r, values))
			}
		}
		for range r.IntN(4) {
			value(r, as.PutEmpty(pick(r, keys)), 0)
		}
		for range 1 + r.IntN(2) {
			sl := rl.ScopeLogs().AppendEmpty()
			sl.Scope().SetName(pick(r, []string{"", "lib"}))
			sl.Scope().SetVersion(pick(r, []string{"", "1.0"}))
			sl.Scope().SetDroppedAttributesCount(uint32(r.IntN(2)))
			if r.IntN(2) == 0 {
				value(r, sl.Scope().Attributes().PutEmpty(pick(r, keys)), 0)
			}
			for range r.IntN(8) {
				rec := sl.LogRecords().AppendEmpty()
				at := time.Unix(1_700_000_000, int64(r.IntN(1e9)))
				switch r.IntN(3) {
				case 0:
					rec.SetTimestamp(pcommon.NewTimestampFromTime(at))
				case 1:
					rec.SetTimestamp(pcommon.NewTimestampFromTime(at))
					fallthrough
				default:
					rec.SetObservedTimestamp(pcommon.NewTimestampFromTime(at.Add(time.Second)))
				}
				rec.SetSeverityNumber(plog.SeverityNumber(r.IntN(25)))
				rec.SetSeverityText(pick(r, []string{"", "ERROR", "whatever"}))
				rec.SetFlags(plog.LogRecordFlags(r.IntN(2)))
				rec.SetDroppedAttributesCount(uint32(r.IntN(2)))
				if r.IntN(2) == 0 {
					rec.SetTraceID([16]byte{1, 15: byte(r.IntN(255))})
					rec.SetSpanID([8]byte{7, byte(r.IntN(255))})
				}
				value(r, rec.Body(), 0)
				for range r.IntN(5) {
					value(r, rec.Attributes().PutEmpty(pick(r, keys)), 0)
				}
			}
		}
	}
	return ld
}
