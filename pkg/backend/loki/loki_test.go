package loki

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/otlpwire/badinput"
)

func TestStreamsAndMetadata(t *testing.T) {
	text := `{"resourceLogs":[{"resource":{"attributes":[
		{"key":"instance.id","value":{"stringValue":"forged"}},{"key":"service.name","value":{"stringValue":"shop"}},{"key":"host.name","value":{"stringValue":"h\"1"}}]},
		"scopeLogs":[{"scope":{"name":"lib"},"logRecords":[
		{"timeUnixNano":"3","severityNumber":17,"severityText":"ERROR","body":{"stringValue":"plain"},"traceId":"5b8efff798038103d269b633813fc60c","spanId":"eee19b7ec3c1b174","attributes":[{"key":"thread.name","value":{"stringValue":"w"}},{"key":"n","value":{"intValue":"5"}}]},
		{"timeUnixNano":"1","severityNumber":9,"body":{"kvlistValue":{"values":[{"key":"a","value":{"intValue":"1"}},{"key":"b","value":{"arrayValue":{"values":[{"boolValue":true}]}}}]}}},
		{"observedTimeUnixNano":"2","body":{"stringValue":"{\"level\":\"Warning\"}"}},
		{"timeUnixNano":"4","severityText":"whatever they like"}
		]}]}]}`
	p, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(text), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	got := pushed(t, &cfg, p)
	want := []string{
		`{instance_id="as-1", level="error", service_name="shop"} 3 plain [{thread_name w} {n 5} {severity_number 17} {severity_text ERROR} {trace_id 5b8efff798038103d269b633813fc60c} {span_id eee19b7ec3c1b174} {host_name h"1} {scope_name lib}]`,
		`{instance_id="as-1", level="info", service_name="shop"} 1 {"a":1,"b":[true]} [{severity_number 9} {host_name h"1} {scope_name lib}]`,
		`{instance_id="as-1", level="warn", service_name="shop"} 2 {"level":"Warning"} [{host_name h"1} {scope_name lib}]`,
		`{instance_id="as-1", level="unknown", service_name="shop"} 4  [{severity_text whatever they like} {host_name h"1} {scope_name lib}]`,
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestLabelsAreThereOnce: what a resource calls level, or instance_id, is no second label.
func TestLabelsAreThereOnce(t *testing.T) {
	p, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(`{"resourceLogs":[{"resource":{"attributes":[
		{"key":"level","value":{"stringValue":"prod"}},{"key":"instance_id","value":{"stringValue":"forged"}},{"key":"service.name","value":{"stringValue":"shop"}}]},
		"scopeLogs":[{"logRecords":[{"timeUnixNano":"3","severityNumber":9,"body":{"stringValue":"x"}}]}]}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.Labels = append(cfg.Labels, "instance_id")
	want := `{instance_id="as-1", level="info", service_name="shop"} 3 x [{severity_number 9} {level prod}]`
	if got := pushed(t, &cfg, p); len(got) != 1 || got[0] != want {
		t.Errorf("got  %v\nwant %s", got, want)
	}
}

// TestStreams: each resource has its own, an instance so many, and lines go in the order of
// time, in pushes that a tenant's burst allows.
func TestStreams(t *testing.T) {
	resource := func(service string, times ...int) string {
		var records []string
		for _, at := range times {
			records = append(records, fmt.Sprintf(`{"timeUnixNano":"%d","severityNumber":9,"body":{"stringValue":"x"}}`, at))
		}
		return `{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"` + service + `"}}]},"scopeLogs":[{"logRecords":[` + strings.Join(records, ",") + `]}]}`
	}
	payload := func(resources ...string) []byte {
		p, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(`{"resourceLogs":[`+strings.Join(resources, ",")+`]}`), otlpwire.DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	cfg := DefaultConfig()
	cfg.Labels = []string{"service.name"}
	got := pushed(t, &cfg, payload(resource("a", 3, 1), resource("b", 2), resource("a", 2)))
	var short []string
	for _, line := range got {
		short = append(short, strings.Join(strings.Fields(line)[:2], " "))
	}
	if want := `{service_name="a"} 1 {service_name="a"} 2 {service_name="a"} 3 {service_name="b"} 2`; strings.Join(short, " ") != want {
		t.Errorf("got  %v\nwant %s", short, want)
	}
	cfg.Limits.Streams = 3
	b := newBatch(&cfg)
	step := func(at time.Time, services ...string) (refused int) {
		var all []string
		for _, s := range services {
			all = append(all, resource(s, 1))
		}
		b.reset("as-1", at)
		b.add(payload(all...))
		for _, r := range b.refused {
			refused += len(r.Items)
		}
		return refused
	}
	now := time.Unix(1_700_000_000, 0)
	for i, want := range []int{step(now, "a", "b", "c", "d", "e"), step(now, "c", "d"), step(now.Add(time.Hour), "d", "e")} {
		if want != []int{2, 1, 0}[i] {
			t.Errorf("step %d: %d refused", i, want)
		}
	}
	large := make([]int, 70_000)
	for i := range large {
		large[i] = i + 1
	}
	cfg = DefaultConfig()
	b = newBatch(&cfg)
	b.reset("as-1", now)
	b.add(payload(resource("a", large...)))
	pushes, bytes := 0, 0
	for body := b.request(); body != nil; body = b.request() {
		if pushes++; len(body) > maxRequest+4096 {
			t.Errorf("a push of %d bytes", len(body))
		}
		bytes += len(body)
	}
	if pushes < 2 || pushes > bytes/maxRequest+1 {
		t.Errorf("%d pushes of %d bytes", pushes, bytes)
	}
}

// TestHugeLogsStayWithinBounds: payloads of a megabyte at the most that would take gigabytes.
func TestHugeLogsStayWithinBounds(t *testing.T) {
	huge := strings.Repeat("x", 400_000)
	var nested []string
	for i := range 20_000 {
		nested = append(nested, fmt.Sprintf(`{"key":"%d","value":{"intValue":"1"}}`, i))
	}
	for name, tc := range map[string]struct {
		attributes, record string
		records            int
		large              bool
		refused            int
	}{
		"a resource on many records":        {`{"key":"a","value":{"stringValue":"` + huge[:200_000] + `"}}`, `{}`, 10_000, true, 0},
		"a larger resource on many records": {`{"key":"a","value":{"stringValue":"` + huge + `"}}`, `{}`, 10_000, false, 10_000},
		"a long name on many values":        {`{"key":"` + huge + `","value":{"stringValue":"x"}}`, `{"attributes":[{"key":"` + huge + `","value":{"kvlistValue":{"values":[` + strings.Join(nested, ",") + `]}}}]}`, 1, false, 1},
	} {
		p, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(`{"resourceLogs":[{"resource":{"attributes":[`+tc.attributes+`]},"scopeLogs":[{"logRecords":[`+strings.Repeat(tc.record+",", tc.records-1)+tc.record+`]}]}]}`), otlpwire.DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		cfg := DefaultConfig()
		b := newBatch(&cfg)
		b.reset("as-1", time.Unix(1_700_000_000, 0))
		b.add(p)
		refused := 0
		for _, r := range b.refused {
			refused += len(r.Items)
		}
		if b.large != tc.large || refused != tc.refused || len(b.entries) > maxEntries+maxEntry || cap(b.message) > 4*maxEntry {
			t.Errorf("%s: large %v, %d refused, %d bytes of entries, %d of one", name, b.large, refused, len(b.entries), cap(b.message))
		}
	}
}

func TestLabelsAreQuoted(t *testing.T) {
	if got := labelString([]pair{{"b", "x\"}\n"}, {"a", "é"}}); got != `{a="é", b="x\"}\n"}` {
		t.Errorf("got %s", got)
	}
}

// TestBadInput writes the rows of bad logs that the door lets pass: one stream
// of the instance that sent them, and a line for each.
func TestBadInput(t *testing.T) {
	for _, row := range badinput.Rows() {
		if row.Signal != "logs" || row.JSON || row.Refused || row.Large {
			continue
		}
		p, err := otlpwire.Mend(otlpwire.Logs, row.Body())
		if err != nil {
			t.Fatalf("%s: %v", row.Name, err)
		}
		cfg := DefaultConfig()
		n := 0
		for _, line := range pushed(t, &cfg, p) {
			if !strings.Contains(line, `instance_id="as-1"`) || strings.ContainsAny(line[:strings.IndexByte(line, '}')], "\x1b\r\n") {
				t.Errorf("%s: stream %q", row.Name, line)
			}
			n++
		}
		if n != row.Items {
			t.Errorf("%s: %d lines, want %d", row.Name, n, row.Items)
		}
	}
}

// pushed returns the entries of the pushes that a payload becomes, a line each.
func pushed(t *testing.T, cfg *Config, payload []byte) (out []string) {
	t.Helper()
	b := newBatch(cfg)
	b.reset("as-1", time.Unix(1_700_000_000, 0))
	b.add(payload)
	each := func(msg []byte, visit func(otlpwire.Field)) {
		for i := 0; i < len(msg); {
			var f otlpwire.Field
			f, i = otlpwire.NextField(msg, i)
			visit(f)
		}
	}
	const bytesField = int(protowire.BytesType)
	for body := b.request(); body != nil; body = b.request() {
		each(body, func(stream otlpwire.Field) {
			labels := ""
			each(stream.Bytes, func(f otlpwire.Field) {
				if f.Tag == 1<<3|bytesField {
					labels = string(f.Bytes)
					return
				}
				var at uint64
				var line string
				var metadata []string
				each(f.Bytes, func(f otlpwire.Field) {
					switch f.Tag {
					case 1<<3 | bytesField:
						each(f.Bytes, func(f otlpwire.Field) { at += map[int]uint64{8: 1e9, 16: 1}[f.Tag] * f.Bits })
					case 2<<3 | bytesField:
						line = string(f.Bytes)
					case 3<<3 | bytesField:
						var p []string
						each(f.Bytes, func(f otlpwire.Field) { p = append(p, string(f.Bytes)) })
						metadata = append(metadata, "{"+strings.Join(p, " ")+"}")
					}
				})
				out = append(out, fmt.Sprintf("%s %d %s %v", labels, at, line, metadata))
			})
		})
	}
	return out
}
