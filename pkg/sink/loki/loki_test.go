package loki

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/badinput"
	"github.com/penstock/penstock/pkg/otlpwire"
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
