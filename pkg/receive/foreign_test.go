package receive

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/otlpwire/badinput"
)

// said reads the message of a partial success in JSON.
func said(t *testing.T, body []byte) (rejected, message string) {
	t.Helper()
	var answer struct {
		PartialSuccess struct{ RejectedSpans, RejectedDataPoints, RejectedLogRecords, ErrorMessage string }
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		t.Errorf("%q: %v", body, err)
	}
	p := answer.PartialSuccess
	return p.RejectedSpans + p.RejectedDataPoints + p.RejectedLogRecords, p.ErrorMessage
}

func snake(text string) string {
	for _, name := range []string{"resourceSpans", "scopeSpans", "resourceLogs", "scopeLogs", "logRecords", "resourceMetrics", "scopeMetrics", "dataPoints", "traceId", "spanId"} {
		var b strings.Builder
		for _, c := range name {
			if c < 'a' {
				b.WriteByte('_')
			}
			b.WriteRune(c | 0x20)
		}
		text = strings.ReplaceAll(text, `"`+name+`"`, `"`+b.String()+`"`)
	}
	return text
}

// TestNothingFound: a request in which nothing of the signal is found is a success, for
// unknown fields are ignored, and says so.
func TestNothingFound(t *testing.T) {
	d := open(t, false, nil)
	ex := badinput.Examples()
	for _, tc := range []struct {
		sig, text string
		want      string // "" for nothing to say
	}{
		{"traces", snake(ex["traces"]), `names in OTLP/JSON are lowerCamelCase: "resourceSpans", not "resource_spans"`},
		{"metrics", snake(ex["metrics"]), `lowerCamelCase: "resourceMetrics", not "resource_metrics"`},
		{"logs", snake(ex["logs"]), `lowerCamelCase: "resourceLogs", not "resource_logs"`},
		{"logs", `{"ResourceLogs":[{"ScopeLogs":[]}]}`, `lowerCamelCase: "resourceLogs", not "ResourceLogs"`},
		{"traces", `{"resourceSpans":[{"scope_spans":[{"spans":[{}]}]}]}`, `lowerCamelCase: "scopeSpans", not "scope_spans"`},
		{"logs", `{"resourceLogs":[{"scopeLogs":[{"log_records":[{}]}]}]}`, `lowerCamelCase: "logRecords", not "log_records"`},
		{"metrics", `{"resourceMetrics":[{"scopeMetrics":[{"metrics":[{"name":"m","sum":{"data_points":[{}]}}]}]}]}`, `lowerCamelCase: "dataPoints", not "data_points"`},
		{"traces", ex["logs"], `"resourceLogs" belongs to /v1/logs`},
		{"traces", ex["metrics"], `"resourceMetrics" belongs to /v1/metrics`},
		{"metrics", ex["traces"], `"resourceSpans" belongs to /v1/traces`},
		{"metrics", ex["logs"], `"resourceLogs" belongs to /v1/logs`},
		{"logs", ex["traces"], `"resourceSpans" belongs to /v1/traces`},
		{"logs", snake(ex["metrics"]), `"resource_metrics" belongs to /v1/metrics`},
		{"traces", `{"resourceSpans":[{"instrumentationLibrarySpans":[{"spans":[{}]}]}]}`, `OTLP/JSON has no name "instrumentationLibrarySpans" there`},
		{"traces", `{"` + strings.Repeat("<&é", 1000) + `":1}`, `no spans were found in a body of 4006 bytes`},
		{"logs", `{"\u0072esource_logs":[{}]}`, `not "resource_logs"`},

		{"traces", ``, ""},
		{"traces", `{}`, ""},
		{"traces", ` { } `, ""},
		{"traces", `{"resourceSpans":[]}`, ""},
		{"traces", `{"resourceSpans":null}`, ""},
		{"traces", `{"resourceSpans":[null]}`, ""},
		{"traces", `{"resourceSpans":[{}]}`, ""},
		{"traces", `{"resourceSpans":[{"resource":{"attributes":[{"key":"a"}],"more":1},"scopeSpans":[{"scope":{"name":"x","more":1},"spans":[]}]}]}`, ""},
		{"metrics", `{"resourceMetrics":[{"scopeMetrics":[{"metrics":[{"name":"m"},{"name":"n","gauge":{"dataPoints":[]}}]}]}]}`, ""},
		{"logs", `{"resourceLogs":[{"scopeLogs":[{"logRecords":[]}]}]}`, ""},
	} {
		for _, enc := range []string{"", "gzip"} {
			body := []byte(tc.text)
			if enc != "" {
				body = gz(body)
			}
			sig, _ := otlpwire.ParseSignal(tc.sig)
			counter := d.led.Of(sig).Refused(ledger.RefusedMalformed)
			before := testutil.ToFloat64(counter)
			res, out := d.do(t, req{path: "/v1/" + tc.sig, body: body, ctype: typeJSON, enc: enc})
			counted := testutil.ToFloat64(counter) - before
			if tc.want == "" {
				if res.StatusCode != http.StatusOK || string(out) != "{}" || counted != 0 {
					t.Errorf("%s %.100s: %s %s, counted %v", tc.sig, tc.text, res.Status, out, counted)
				}
				continue
			}
			rejected, message := said(t, out)
			begin := fmt.Sprintf("no %s were found in a body of %d bytes", nouns[sig], len(tc.text))
			if res.StatusCode != http.StatusOK || rejected != "0" || !strings.HasPrefix(message, begin) || !strings.Contains(message, tc.want) || counted != 1 || len(out) > 1000 {
				t.Errorf("%s %.100s: %s %s, counted %v", tc.sig, tc.text, res.Status, out, counted)
			}
		}
	}
	if n := d.items(); n != 0 {
		t.Errorf("%d items came through", n)
	}
	d.probe(t)
}

// TestSnakeCaseWithinItems: items that lack what stands there under another name.
func TestSnakeCaseWithinItems(t *testing.T) {
	d := open(t, false, nil)
	text := `{"resourceSpans":[{"scopeSpans":[{"spans":[{"trace_id":"5b8efff798038103d269b633813fc60c","span_id":"eee19b7ec3c1b174"}]}]}]}`
	res, out := d.do(t, req{body: []byte(text), ctype: typeJSON})
	if rejected, message := said(t, out); res.StatusCode != http.StatusOK || rejected != "1" || !strings.Contains(message, `"traceId", not "trace_id"`) {
		t.Errorf("%s %s", res.Status, out)
	}
}

// TestAnotherSignal: protobuf of one signal that is sent to another. Most of it cannot be
// read as that, and is refused, which has to say why; what can be read and has nothing
// in it is a success that says so.
func TestAnotherSignal(t *testing.T) {
	d := open(t, false, nil)
	small := map[string]string{
		"traces": goodJSON, "metrics": `{"resourceMetrics":[{"scopeMetrics":[{"metrics":[{"name":"m","gauge":{"dataPoints":[{"asDouble":1,"timeUnixNano":"5"}]}}]}]}]}`,
		"logs": `{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"stringValue":"hello"}}]}]}]}`,
	}
	attributes := map[string]string{"logs": `{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"attributes":[{"key":"a"}]}]}]}]}`} // no field that metrics have
	for _, set := range []map[string]string{badinput.Examples(), small, attributes} {
		for from, text := range set {
			own, _ := otlpwire.ParseSignal(from)
			p, _, err := otlpwire.FromJSON(nil, own, []byte(text), otlpwire.DefaultLimits)
			if err != nil {
				t.Fatal(err)
			}
			for _, sig := range otlpwire.Signals {
				if sig == own {
					continue
				}
				res, out := d.do(t, req{path: "/v1/" + sig.String(), body: p})
				if (res.StatusCode != 200 && res.StatusCode != 400) || !strings.Contains(string(out), "go to /v1/"+from) {
					t.Errorf("%s as %v: %s %q", from, sig, res.Status, out)
				}
				code, answer := d.grpcCall(t, sig, frame(0, p))
				if (code == codes.OK) != (res.StatusCode == 200) || code == codes.OK && string(answer) != string(out) {
					t.Errorf("%s as %v over gRPC: %v %q, over HTTP %s %q", from, sig, code, answer, res.Status, out)
				}
			}
		}
	}
	// Nothing is rejected, and there is something to say.
	p, _, _ := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(attributes["logs"]), otlpwire.DefaultLimits)
	res, out := d.do(t, req{path: "/v1/metrics", body: p})
	if want := fmt.Sprintf("no data points were found in a body of %d bytes; read as logs it holds 1 log records", len(p)); res.StatusCode != 200 || out[2] != 0x12 || !strings.Contains(string(out), want) {
		t.Errorf("%s %q, want %s", res.Status, out, want)
	}
	// Empty, or of a version to come: fields that nobody knows.
	later := protowire.AppendTag(nil, 1, protowire.BytesType)
	later = protowire.AppendBytes(later, protowire.AppendVarint(protowire.AppendTag(nil, 90, protowire.VarintType), 1))
	for name, p := range map[string][]byte{"no bytes": nil, "an empty resource": {0x0a, 0x00}, "an empty scope": {0x0a, 0x02, 0x12, 0x00}} {
		if res, out := d.do(t, req{body: p}); res.StatusCode != 200 || len(out) != 0 {
			t.Errorf("%s: %s %q", name, res.Status, out)
		}
	}
	if res, out := d.do(t, req{body: later}); res.StatusCode != 200 || !strings.HasSuffix(string(out), "no spans were found in a body of 5 bytes") {
		t.Errorf("a field that nobody knows: %s %q", res.Status, out)
	}
	// A span that is as empty as could be is not a log record.
	if _, out := d.do(t, req{body: []byte{0x0a, 0x04, 0x12, 0x02, 0x12, 0x00}}); strings.Contains(string(out), "/v1/logs") {
		t.Errorf("an empty span: %q", out)
	}
	if n := d.items(); n != 0 {
		t.Errorf("%d items came through", n)
	}
}
