package loki

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/otlpwire"
)

var relative = regexp.MustCompile(`"@([+-]\d+)s"`)

// input reads an OTLP/JSON request, in which "@-5s" stands for five seconds before it arrives (see pushed).
func input(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	return payload(t, string(text))
}

func payload(t *testing.T, text string) []byte {
	t.Helper()
	text = relative.ReplaceAllStringFunc(text, func(m string) string {
		n, _ := strconv.Atoi(m[2 : len(m)-2])
		return fmt.Sprintf(`"%d"`, time.Unix(1_700_000_000, 0).Add(time.Duration(n)*time.Second).UnixNano())
	})
	p, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(text), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func records(t *testing.T, resource, records string) []byte {
	t.Helper()
	return payload(t, `{"resourceLogs":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"s"}}`+resource+`]},"scopeLogs":[{"logRecords":[`+records+`]}]}]}`)
}

var levelOf = regexp.MustCompile(`level="(\w+)"`)

func TestLevels(t *testing.T) {
	cfg := DefaultConfig()
	got := map[string]string{}
	for _, line := range pushed(t, &cfg, input(t, "levels")) {
		_, text, _ := strings.Cut(line, "} 16")
		_, text, _ = strings.Cut(text, " ")
		got[text[:strings.LastIndex(text, " [")]] = levelOf.FindStringSubmatch(line)[1]
	}
	for text, want := range map[string]string{
		`{"level":50,"time":1726000000000,"msg":"pino error"}`: "error", `{"level":30,"msg":"Service started"}`: "info",
		`{"severity":"ERROR","message":"gcp style"}`: "error", `{"log.level":"error","message":"ecs style"}`: "error",
		`{"level":"error","msg":"map body"}`: "error", "dotnet text only": "info", "java.util.logging text only": "error", "syslog text only": "info",
		"otel short name only": "error", "syslog emerg": "fatal", "klog letter": "warn", "number wins over text": "error", "level in attributes": "error",
		` {"level":"error","msg":"leading blank"}`: "error", "level=error msg=logfmt": "error",
	} {
		if got[text] != want {
			t.Errorf("%s: %s, want %s", text, got[text], want)
		}
	}
	level := func(record string) string {
		return levelOf.FindStringSubmatch(pushed(t, &cfg, records(t, "", record))[0])[1]
	}
	for want, texts := range map[string]string{
		"trace": "TRACE Trace2 TRACE4 FINEST trce", "debug": "DEBUG debug3 DBG FINER FINE CONFIG Verbose DEBUG5 dbug", "info": "INFO INFO4 Information informational NOTICE inf I success",
		"warn": "WARN WARN3 Warning wrn w [WARN]", "error": "ERROR ERROR2 error4 err SEVERE fail alert Panic dpanic E", "fatal": "FATAL FATAL3 Critical crit emerg Emergency ftl F",
		"unknown": "whatever ERROR9 inf0 4 x1 INFOS",
	} {
		for text := range strings.FieldsSeq(texts) {
			for _, record := range []string{
				`{"severityText":%q}`, `{"severityNumber":25,"severityText":%q}`, `{"attributes":[{"key":"level","value":{"stringValue":%q}}]}`,
				`{"body":{"kvlistValue":{"values":[{"key":"Severity","value":{"stringValue":%q}}]}}}`,
				`{"body":{"kvlistValue":{"values":[{"key":"log","value":{"kvlistValue":{"values":[{"key":"level","value":{"stringValue":%q}}]}}}]}}}`,
			} {
				if got := level(fmt.Sprintf(record, text)); got != want {
					t.Errorf("%s: %s, want %s", fmt.Sprintf(record, text), got, want)
				}
			}
			for _, body := range []string{`{"msg":"x","lvl":"%s"}`, `{"log":{"level":"%s"}}`, `{"levelname":"%s","level":99}`, "ts=1 lvl=%s msg=x", `level="%s"`, `{"@l":"%s","cut`} {
				if want == "unknown" && strings.Contains(body, "99") {
					continue
				}
				if got := level(fmt.Sprintf(`{"body":{"stringValue":%q}}`, fmt.Sprintf(body, text))); got != want {
					t.Errorf("%s of %s: %s, want %s", body, text, got, want)
				}
			}
		}
	}
	for number, want := range map[string]string{"10": "trace", "20": "debug", "30": "info", "35": "info", "40": "warn", "50": "error", "60": "fatal", "99": "fatal", "9": "unknown", "-4": "unknown", "100": "unknown", "1e400": "unknown"} {
		if got := level(fmt.Sprintf(`{"body":{"stringValue":"{\"level\":%s}"}}`, number)); got != want {
			t.Errorf("level %s: %s, want %s", number, got, want)
		}
		if _, err := strconv.Atoi(number); err == nil {
			if got := level(fmt.Sprintf(`{"attributes":[{"key":"level","value":{"intValue":%q}}]}`, number)); got != want {
				t.Errorf("attribute level %s: %s, want %s", number, got, want)
			}
		}
	}
	for record, want := range map[string]string{
		`{"body":{"stringValue":"{\"levelno\":40,\"msg\":\"python\"}"}}`:                                                                       "error",
		`{"body":{"stringValue":"{\"severity_number\":13}"}}`:                                                                                  "warn",
		`{"body":{"stringValue":"{\"level\":[\"error\"]}"}}`:                                                                                   "unknown",
		`{"body":{"stringValue":"set the level=debug of all"}}`:                                                                                "unknown",
		`{"body":{"stringValue":"{\"log\":{\"log\":{\"level\":\"error\"}}}"}}`:                                                                 "unknown",
		`{"body":{"stringValue":"{"}}`:                                                                                                         "unknown",
		`{"severityNumber":9,"severityText":"ERROR"}`:                                                                                          "info",
		`{"severityText":"warn","attributes":[{"key":"level","value":{"stringValue":"error"}}]}`:                                               "warn",
		`{"attributes":[{"key":"level","value":{"stringValue":"error"}}],"body":{"stringValue":"{\"level\":\"info\"}"}}`:                       "error",
		`{"attributes":[{"key":"level","value":{"stringValue":"high"}}],"body":{"stringValue":"{\"level\":\"info\",\"severity\":\"fatal\"}"}}`: "info",
		`{"attributes":[{"key":"log.level","value":{"doubleValue":40}}]}`:                                                                      "warn",
	} {
		if got := level(record); got != want {
			t.Errorf("%s: %s, want %s", record, got, want)
		}
	}
}

// TestCutLines: wherever a line is cut, and whatever stands in it, what is whole is read.
func TestCutLines(t *testing.T) {
	line := `{ "a" : {"b":["}]","\\",{}],"level":"fatal"} ,"n":null,"log":{"x":1,"level":"warn"}, "t":"\"level\":\"trace\"","é":true}`
	none := func(func(key, value []byte)) {}
	body := func(text string) []byte { return protowire.AppendString([]byte{0x0a}, text) }
	for i := range len(line) + 1 {
		for _, end := range []string{"", "}", `"`, `\`, "]", "{", ":", ","} {
			want := 0
			if i > strings.Index(line, `"warn"}`)+6 {
				want = warn
			}
			if got := level(0, nil, body(line[:i]+end), none); got != want && got != warn {
				t.Errorf("%s: %d, want %d", line[:i]+end, got, want)
			}
		}
	}
}

func TestBothNamesOfTheEnvironment(t *testing.T) {
	cfg := DefaultConfig()
	got := pushed(t, &cfg, input(t, "environment-name"))
	if len(got) != 1 || !strings.Contains(got[0], `deployment_environment="staging"`) || !strings.Contains(got[0], "{deployment_environment_name staging}") {
		t.Errorf("got %v", got)
	}
	old, stable := `,{"key":"deployment.environment","value":{"stringValue":"old"}}`, `,{"key":"deployment.environment.name","value":{"stringValue":"stable"}}`
	for _, tc := range []struct{ label, resource, want, metadata string }{
		{"deployment.environment", old, `deployment_environment="old"`, ""}, {"deployment.environment", stable + old, `deployment_environment="old"`, "{deployment_environment_name stable}"},
		{"deployment.environment.name", old, `deployment_environment_name="old"`, "{deployment_environment old}"}, {"deployment.environment.name", stable, `deployment_environment_name="stable"`, ""},
	} {
		cfg.Labels = []string{tc.label}
		if got := pushed(t, &cfg, records(t, tc.resource, `{"timeUnixNano":"1"}`))[0]; !strings.HasPrefix(got, "{"+tc.want+", ") || !strings.Contains(got, tc.metadata) {
			t.Errorf("%s of %s: %s", tc.label, tc.resource, got)
		}
	}
}

// TestBodies: whatever a body is, its line is what Loki's own OTLP endpoint makes of it.
func TestBodies(t *testing.T) {
	cfg := DefaultConfig()
	got := strings.Join(pushed(t, &cfg, input(t, "bodies")), "\n")
	for _, want := range []string{
		" 42 [", " NaN [", " false [", " AAEC/w== [", ` ["a",1,"Infinity",null] [`, `{"dup":"2","msg":"<b>&\u2028 q\"","n":{"x":"AAE="}} [`,
		" multi\nline\r\n\ttab\x00nul\x1b[31mred [", " ev [{severity_number 9} {event_name com.acme.checkout}", " zero ids [{severity_number 9} {host_name h}", "{trace_id mdc-trace}", "{trace_id 5b8efff798038103d269b633813fc60c}",
		"{m_k_1 v}", "sevneg [{severity_number -3}", `{arr ["q",true]}`, ` service_name="bodies"`, "{scope_name lib}",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in\n%s", want, got)
		}
	}
	if n := strings.Count(got, `instance_id="as-1"`); n != 17 {
		t.Errorf("%d lines", n)
	}
}
