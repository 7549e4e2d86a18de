package loki

import (
	"fmt"
	"strings"
	"testing"

	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	"google.golang.org/protobuf/proto"

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
	var req logspb.LogsData
	if err := proto.Unmarshal(p, &req); err != nil {
		t.Fatal(err)
	}
	b := newBatch(DefaultLabels(), "as-1")
	b.resource(req.ResourceLogs[0])
	var got []string
	for _, s := range b.order {
		for _, e := range s.entries {
			got = append(got, fmt.Sprintf("%s %d %s %v", s.labels, e.at, e.line, e.metadata))
		}
	}
	want := []string{
		`{instance_id="as-1", level="error", service_name="shop"} 3 plain [{host_name h"1} {n 5} {scope_name lib} {severity_number 17} {severity_text ERROR} {span_id eee19b7ec3c1b174} {thread_name w} {trace_id 5b8efff798038103d269b633813fc60c}]`,
		`{instance_id="as-1", level="info", service_name="shop"} 1 {"a":1,"b":[true]} [{host_name h"1} {scope_name lib} {severity_number 9}]`,
		`{instance_id="as-1", level="warn", service_name="shop"} 2 {"level":"Warning"} [{host_name h"1} {scope_name lib}]`,
		`{instance_id="as-1", level="unknown", service_name="shop"} 4  [{host_name h"1} {scope_name lib} {severity_text whatever they like}]`,
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
		var req logspb.LogsData
		if err := proto.Unmarshal(p, &req); err != nil {
			t.Fatalf("%s: %v", row.Name, err)
		}
		b := newBatch(DefaultLabels(), "as-1")
		b.resource(req.ResourceLogs[0])
		n := 0
		for _, s := range b.order {
			if !strings.Contains(s.labels, `instance_id="as-1"`) || strings.ContainsAny(s.labels, "\x1b\r\n") {
				t.Errorf("%s: stream %q", row.Name, s.labels)
			}
			n += len(s.entries)
		}
		if n != row.Items {
			t.Errorf("%s: %d lines, want %d", row.Name, n, row.Items)
		}
	}
}
