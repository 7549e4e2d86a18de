package processor

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/otlpwire"
)

const card = "4111111111111111"

// redactionEdge are the rules of an edge's configuration.
func redactionEdge(t *testing.T) *Rules {
	t.Helper()
	text, err := os.ReadFile("testdata/redaction-edge.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var cfg struct {
		Processing Config `yaml:"processing"`
	}
	if err := yaml.Unmarshal(text, &cfg); err != nil {
		t.Fatal(err)
	}
	r, err := New("processing", cfg.Processing)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestEveryValueIsRedacted: of every type, at every depth, and texts that are no attributes.
func TestEveryValueIsRedacted(t *testing.T) {
	r := redactionEdge(t)
	for sig, name := range map[otlpwire.Signal]string{otlpwire.Logs: "logs-redaction", otlpwire.Traces: "traces-redaction"} {
		in, err := os.ReadFile("testdata/" + name + ".json")
		if err != nil {
			t.Fatal(err)
		}
		got, _, _ := apply(t, r, sig, string(in))
		// A key stays as it is, and so does the attribute keep.
		left := strings.NewReplacer(`"card-`+card+`"`, "", `{"key":"keep","value":{"stringValue":"`+card+`"}}`, "").Replace(compact(t, got))
		for _, bad := range []string{card, "4.111111111111111", "NDExMTEx", "other@block_value", `{\"ssn\"`, `"intValue":"123"`} {
			if strings.Contains(left, bad) {
				t.Errorf("%s: %s is left in %s", name, bad, left)
			}
		}
		want := []string{`"name":"lib ****"`, `"severityText":"****"`, `"eventName":"****"`, "paid with ****", "allow_value@block_value", "https://x/?c=****", `{"key":"int","value":{"stringValue":"****"}}`, `{"key":"dbl","value":{"stringValue":"****"}}`, `{"values":[{"stringValue":"****"},{"stringValue":"****"}]}`}
		if sig == otlpwire.Traces {
			want = []string{`"name":"GET /cards/****"`, `"name":"charge ****"`, `"traceState":"a=****"`, `"message":"declined ****"`, `"code":2`, `{"key":"n","value":{"stringValue":"****"}}`, `{"key":"l","value":{"stringValue":"****"}}`}
		}
		for _, w := range want {
			if !strings.Contains(left, w) {
				t.Errorf("%s: %s is missing in %s", name, w, left)
			}
		}
	}
}

func compact(t *testing.T, text string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestRedactionOfOtherTypes(t *testing.T) {
	r := rules(t, `redaction: {blocked_values: ['^-?4[0-9]{3,}(\.[0-9]+)?$', '^true$', 'secret'], ignored_keys: [keep]}`)
	for value, want := range map[string]string{
		`{"intValue":"-4111"}`: `{"stringValue":"****"}`, `{"intValue":"5111"}`: `{"intValue":"5111"}`, `{"doubleValue":4111.5}`: `{"stringValue":"****"}`, `{"doubleValue":411}`: `{"doubleValue":411}`,
		`{"boolValue":true}`: `{"stringValue":"****"}`, `{"boolValue":false}`: `{"boolValue":false}`,
		`{"arrayValue":{"values":[{"kvlistValue":{"values":[{"key":"a","value":{"intValue":"4111"}},{"key":"keep","value":{"intValue":"4111"}}]}},{"doubleValue":1}]}}`: `{"arrayValue":{"values":[{"kvlistValue":{"values":[{"key":"a","value":{"stringValue":"****"}},{"key":"keep","value":{"intValue":"4111"}}]}},{"doubleValue":1}]}}`,
	} {
		for sig, in := range map[otlpwire.Signal]string{otlpwire.Logs: logs(value, kv("k", value), 9), otlpwire.Traces: span(kv("k", value)), otlpwire.Metrics: metrics("m", kv("k", value))} {
			got, _, touched := apply(t, r, sig, in)
			if wanted := normal(t, sig, strings.ReplaceAll(in, value, want)); !same(t, got, wanted) || touched != (value != want) {
				t.Errorf("%v of %s: %s", sig, value, got)
			}
		}
	}
	// Names and texts.
	got, _, _ := apply(t, r, otlpwire.Metrics, `{"resourceMetrics":[{"scopeMetrics":[{"scope":{"name":"lib","version":"secret-1"},"metrics":[{"name":"secret.hits","description":"of the secret","unit":"1","gauge":{"dataPoints":[{"asInt":"4111","exemplars":[{"asInt":"1","filteredAttributes":[{"key":"a","value":{"intValue":"4111"}}]}]}]}}]}]}]}`)
	if strings.Contains(got, "secret") || !strings.Contains(got, "****.hits") || !regexp.MustCompile(`"asInt": ?"4111"`).MatchString(got) || strings.Contains(got, `"intValue"`) {
		t.Errorf("got %s", got)
	}
	got, _, _ = apply(t, r, otlpwire.Traces, `{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"5b8efff798038103d269b63300000001","spanId":"eee19b7ec3c10011","name":"n","links":[{"traceId":"5b8efff798038103d269b63300000001","spanId":"eee19b7ec3c10011","traceState":"a=secret"}]}]}]}]}`)
	if strings.Contains(got, "secret") || !strings.Contains(got, "a=****") {
		t.Errorf("got %s", got)
	}
}
