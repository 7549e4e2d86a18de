package processor

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/otlpwire/badinput"
)

func rules(t *testing.T, text string) *Rules {
	t.Helper()
	var cfg Config
	if err := yaml.Unmarshal([]byte(text), &cfg); err != nil {
		t.Fatal(err)
	}
	r, err := New("processing", cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// kv writes attributes in OTLP/JSON; values are JSON of an AnyValue.
func kv(pairs ...string) string {
	var out []string
	for i := 0; i < len(pairs); i += 2 {
		v := pairs[i+1]
		if !strings.HasPrefix(v, "{") {
			v = fmt.Sprintf(`{"stringValue":%q}`, v)
		}
		out = append(out, fmt.Sprintf(`{"key":%q,"value":%s}`, pairs[i], v))
	}
	return "[" + strings.Join(out, ",") + "]"
}

func span(attributes string, more ...string) string {
	return fmt.Sprintf(`{"resourceSpans":[{"resource":{"attributes":%s},"scopeSpans":[{"scope":{"name":"lib"},"spans":[{"traceId":"5b8efff798038103d269b633813fc60c","spanId":"eee19b7ec3c1b174","name":"GET /x","attributes":%s%s}]}]}]}`, kv("service.name", "shop", "host.name", "h1"), attributes, strings.Join(more, ""))
}

func logs(body, attributes string, severity int) string {
	return fmt.Sprintf(`{"resourceLogs":[{"resource":{"attributes":%s},"scopeLogs":[{"logRecords":[{"severityNumber":%d,"body":%s,"attributes":%s}]}]}]}`, kv("service.name", "shop"), severity, body, attributes)
}

func metrics(name, attributes string) string {
	point := `{"timeUnixNano":"1","attributes":` + attributes
	return fmt.Sprintf(`{"resourceMetrics":[{"scopeMetrics":[{"metrics":[
		{"name":%[1]q,"gauge":{"dataPoints":[%[2]s,"asInt":"1"}]}},
		{"name":%[1]q,"sum":{"dataPoints":[%[2]s,"asInt":"1","exemplars":[{"asInt":"1","filteredAttributes":%[3]s}]}]}},
		{"name":%[1]q,"histogram":{"dataPoints":[%[2]s,"exemplars":[{"asInt":"1","filteredAttributes":%[3]s}]}]}},
		{"name":%[1]q,"exponentialHistogram":{"dataPoints":[%[2]s,"exemplars":[{"asInt":"1","filteredAttributes":%[3]s}]}]}},
		{"name":%[1]q,"summary":{"dataPoints":[%[2]s}]}}]}]}]}`, name, point, attributes)
}

// apply returns what rules make of an OTLP/JSON request, and how many items they drop.
func apply(t *testing.T, r *Rules, sig otlpwire.Signal, in string) (out string, dropped int, touched bool) {
	t.Helper()
	p, _, err := otlpwire.FromJSON(nil, sig, []byte(in), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatalf("%v: %s", err, in)
	}
	before := bytes.Clone(p)
	got, dropped := r.Apply(sig, p)
	if !bytes.Equal(before, p) {
		t.Fatal("the payload was written to")
	}
	rep, err := otlpwire.Scan(sig, got, otlpwire.DefaultLimits)
	if err != nil || !rep.Sound() {
		t.Fatalf("what comes out is not sound: %v, %+v", err, rep)
	}
	touched = len(got) == 0 || len(p) == 0 || &got[0] != &p[0]
	return string(otlpwire.AppendJSON(nil, sig, got)), dropped, touched
}

func same(t *testing.T, a, b string) bool {
	t.Helper()
	var x, y any
	if json.Unmarshal([]byte(a), &x) != nil || json.Unmarshal([]byte(b), &y) != nil {
		t.Fatalf("no JSON: %s, %s", a, b)
	}
	p, _ := json.Marshal(x)
	q, _ := json.Marshal(y)
	return bytes.Equal(p, q)
}

// normal is a request as the wire format gives it back.
func normal(t *testing.T, sig otlpwire.Signal, in string) string {
	t.Helper()
	out, _, _ := apply(t, nil, sig, in)
	return out
}

func TestActions(t *testing.T) {
	in := span(kv("user.email", "a@b.c", "n", `{"intValue":"5"}`, "keep", "x", "db.password", "p", "api.password", "q"))
	for name, tc := range map[string]struct{ rules, want string }{
		"insert":                 {`attributes: [{actions: [{key: env, action: insert, value: prod}, {key: keep, action: insert, value: other}]}]`, kv("user.email", "a@b.c", "n", `{"intValue":"5"}`, "keep", "x", "db.password", "p", "api.password", "q", "env", "prod")},
		"update":                 {`attributes: [{actions: [{key: env, action: update, value: prod}, {key: keep, action: update, value: 7}]}]`, kv("user.email", "a@b.c", "n", `{"intValue":"5"}`, "keep", `{"intValue":"7"}`, "db.password", "p", "api.password", "q")},
		"upsert":                 {`attributes: [{actions: [{key: env, action: upsert, value: true}, {key: keep, action: upsert, value: 1.5}]}]`, kv("user.email", "a@b.c", "n", `{"intValue":"5"}`, "keep", `{"doubleValue":1.5}`, "db.password", "p", "api.password", "q", "env", `{"boolValue":true}`)},
		"from another":           {`attributes: [{actions: [{key: copy, action: insert, from_attribute: n}, {key: none, action: insert, from_attribute: missing}]}]`, kv("user.email", "a@b.c", "n", `{"intValue":"5"}`, "keep", "x", "db.password", "p", "api.password", "q", "copy", `{"intValue":"5"}`)},
		"delete":                 {`attributes: [{actions: [{key: n, action: delete}, {pattern: "password$", action: delete}]}]`, kv("user.email", "a@b.c", "keep", "x")},
		"hash":                   {`attributes: [{actions: [{key: user.email, action: hash}, {key: n, action: hash}]}]`, kv("user.email", "", "n", "", "keep", "x", "db.password", "p", "api.password", "q")},
		"only others":            {`attributes: [{include: {match_type: strict, services: [cart]}, actions: [{key: n, action: delete}]}]`, ""},
		"not this one":           {`attributes: [{exclude: {match_type: regexp, span_names: ["^GET "]}, actions: [{key: n, action: delete}]}]`, ""},
		"this one":               {`attributes: [{include: {match_type: regexp, services: ["^sh"], span_names: [POST, "GET /."], attributes: [{key: n, value: 5}, {key: keep}], resources: [{key: host.name, value: h1}]}, actions: [{pattern: "^(n|db.*|api.*|user.*)$", action: delete}]}]`, kv("keep", "x")},
		"no such attribute":      {`attributes: [{include: {match_type: strict, attributes: [{key: n, value: 6}]}, actions: [{key: n, action: delete}]}]`, ""},
		"no log record":          {`attributes: [{include: {match_type: strict, log_severity_number: {min: 1, match_undefined: true}}, actions: [{key: n, action: delete}]}]`, ""},
		"nothing to do":          {`attributes: [{actions: [{key: missing, action: delete}]}]`, ""},
		"each on the one before": {`attributes: [{actions: [{key: a, action: insert, value: x}]}, {include: {match_type: strict, attributes: [{key: a, value: x}]}, actions: [{pattern: "^(a|n|keep|db.*|api.*)$", action: delete}]}]`, kv("user.email", "a@b.c")},
	} {
		got, dropped, touched := apply(t, rules(t, tc.rules), otlpwire.Traces, in)
		want := in
		if tc.want != "" {
			want = span(tc.want)
		}
		if name == "hash" { // the sums are those of sha256sum
			if !strings.Contains(got, "d648b243a3e817eaa3309e00e183483f2867baadf522099f0c2121770536b25a") || strings.Contains(got, "a@b.c") || !strings.Contains(got, "f13ee6ed54ea2aae9fc49a9faeb5da6e8ddef0e12ed5d30d35a624ae813e0485") {
				t.Errorf("hash: %s", got)
			}
			continue
		}
		if !same(t, got, normal(t, otlpwire.Traces, want)) || dropped != 0 || touched != (tc.want != "") {
			t.Errorf("%s: touched %v\n got %s\nwant %s", name, touched, got, want)
		}
	}
	res := rules(t, `resource: [{key: host.name, action: delete}, {key: region, action: insert, value: eu}]`)
	got, _, _ := apply(t, res, otlpwire.Traces, in)
	if !strings.Contains(got, `"region"`) || strings.Contains(got, "host.name") || !strings.Contains(got, "user.email") {
		t.Errorf("resource: %s", got)
	}
}

func TestActionsReachEveryKindOfItem(t *testing.T) {
	r := rules(t, `attributes: [{actions: [{key: secret, action: delete}]}]`)
	for sig, in := range map[otlpwire.Signal]string{otlpwire.Logs: logs(`{"stringValue":"x"}`, kv("secret", "s", "a", "b"), 9), otlpwire.Metrics: metrics("m", kv("secret", "s", "a", "b"))} {
		got, _, _ := apply(t, r, sig, in)
		want := 0
		if sig == otlpwire.Metrics {
			want = 3 // exemplars are no items
		}
		if n := strings.Count(got, "secret"); n != want || !strings.Contains(got, `"a"`) {
			t.Errorf("%v: %d are left: %s", sig, n, got)
		}
	}
}

func TestRedaction(t *testing.T) {
	r := rules(t, `
redaction:
  blocked_values: ["://[^/@ ]+@", '[\w.]+@[\w.]+\.[a-z]{2,}', "4[0-9]{15}"]
  blocked_key_patterns: ["(?i)token"]
  ignored_keys: [fine]
  allowed_values: ["^support@example.org$"]
`)
	nested := `{"kvlistValue":{"values":[{"key":"mail","value":{"stringValue":"to a@b.org"}},{"key":"list","value":{"arrayValue":{"values":[{"intValue":"1"},{"stringValue":"4111111111111111"}]}}},{"key":"Token","value":{"intValue":"5"}}]}}`
	in := span(kv("url", "postgres://joe:secret@db/x", "card", "no 4111111111111111.", "session.TOKEN", `{"intValue":"9"}`, "fine", "a@b.org", "to", "support@example.org", "deep", nested, "other", "nothing"),
		`,"events":[{"name":"e","attributes":`+kv("m", "a@b.org")+`}],"links":[{"traceId":"5b8efff798038103d269b633813fc60c","spanId":"eee19b7ec3c1b174","attributes":`+kv("m", "a@b.org")+`}]`)
	got, _, _ := apply(t, r, otlpwire.Traces, in)
	want := span(kv("url", "postgres****db/x", "card", "no ****.", "session.TOKEN", "****", "fine", "a@b.org", "to", "support@example.org",
		"deep", `{"kvlistValue":{"values":[{"key":"mail","value":{"stringValue":"to ****"}},{"key":"list","value":{"arrayValue":{"values":[{"intValue":"1"},{"stringValue":"****"}]}}},{"key":"Token","value":{"stringValue":"****"}}]}}`, "other", "nothing"),
		`,"events":[{"name":"e","attributes":`+kv("m", "****")+`}],"links":[{"traceId":"5b8efff798038103d269b633813fc60c","spanId":"eee19b7ec3c1b174","attributes":`+kv("m", "****")+`}]`)
	if !same(t, got, normal(t, otlpwire.Traces, want)) {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for _, body := range []string{`{"stringValue":"mail a@b.org now"}`, nested} {
		if got, _, _ := apply(t, r, otlpwire.Logs, logs(body, kv("a", "b"), 9)); strings.Contains(got, "a@b.org") || !strings.Contains(got, "****") {
			t.Errorf("body: %s", got)
		}
	}
	if got, _, _ := apply(t, r, otlpwire.Metrics, metrics("m", kv("who", "a@b.org"))); strings.Contains(got, "a@b.org") || strings.Count(got, "****") != 8 {
		t.Errorf("metrics: %s", got)
	}
	if _, _, touched := apply(t, r, otlpwire.Logs, logs(`{"stringValue":"nothing here"}`, kv("a", "b"), 9)); touched {
		t.Error("what has nothing to hide was touched")
	}
	for _, value := range []string{`{"bytesValue":"` + base64.StdEncoding.EncodeToString([]byte("to a@b.org")) + `"}`} {
		if got, _, _ := apply(t, r, otlpwire.Logs, logs(value, kv("raw", value), 9)); strings.Count(got, "****") != 2 {
			t.Errorf("bytes: %s", got)
		}
	}
	// An array in two parts is one, as protobuf has it.
	element := func(text string) []byte {
		return appendBytes(nil, 5, appendBytes(nil, 1, appendBytes(nil, 1, []byte(text))))
	}
	if got, yes := r.redaction.value(append(element("a@b.org"), element("other")...)); !yes || bytes.Contains(got, []byte("a@b")) || !bytes.Contains(got, []byte("other")) {
		t.Errorf("two parts: %q", got)
	}
	// Identity is not looked at: what the credential says may well be an address.
	id := `{"resourceLogs":[{"resource":{"attributes":` + kv("instance.id", "a@b.org") + `},"scopeLogs":[{"logRecords":[{}]}]}]}`
	if _, _, touched := apply(t, r, otlpwire.Logs, id); touched {
		t.Error("identity was touched")
	}
}

func TestFilter(t *testing.T) {
	for name, tc := range map[string]struct {
		rules   string
		sig     otlpwire.Signal
		in      string
		dropped int
	}{
		"health checks":  {`filter: {spans: {exclude: {match_type: strict, span_names: [GET /x]}}}`, otlpwire.Traces, span(kv()), 1},
		"others":         {`filter: {spans: {exclude: {match_type: strict, span_names: [GET /health]}}}`, otlpwire.Traces, span(kv()), 0},
		"only one":       {`filter: {spans: {include: {match_type: strict, services: [cart]}}}`, otlpwire.Traces, span(kv()), 1},
		"debug":          {`filter: {logs: {include: {match_type: strict, log_severity_number: {min: 9}}}}`, otlpwire.Logs, logs(`{"stringValue":"x"}`, kv(), 5), 1},
		"info":           {`filter: {logs: {include: {match_type: strict, log_severity_number: {min: 9}}}}`, otlpwire.Logs, logs(`{"stringValue":"x"}`, kv(), 9), 0},
		"without number": {`filter: {logs: {include: {match_type: strict, log_severity_number: {min: 9, match_undefined: true}}}}`, otlpwire.Logs, logs(`{"stringValue":"x"}`, kv(), 0), 0},
		"body":           {`filter: {logs: {exclude: {match_type: regexp, log_bodies: ["^GET /health"]}}}`, otlpwire.Logs, logs(`{"stringValue":"GET /healthz 200"}`, kv(), 9), 1},
		"metrics":        {`filter: {metrics: {exclude: {match_type: regexp, metric_names: ["^go[.]"]}}}`, otlpwire.Metrics, metrics("go.gc", kv()), 5},
		"other signals":  {`filter: {metrics: {exclude: {match_type: regexp, metric_names: [".*"]}}}`, otlpwire.Logs, logs(`{"stringValue":"x"}`, kv(), 9), 0},
	} {
		got, dropped, touched := apply(t, rules(t, tc.rules), tc.sig, tc.in)
		if dropped != tc.dropped || touched != (tc.dropped > 0) || dropped == 0 && !same(t, got, normal(t, tc.sig, tc.in)) {
			t.Errorf("%s: %d dropped, touched %v: %s", name, dropped, touched, got)
		}
	}
	// Of several the others stay.
	two := strings.Replace(logs(`{"stringValue":"x"}`, kv(), 9), `"logRecords":[`, `"logRecords":[{"severityNumber":1,"body":{"stringValue":"debug"}},`, 1)
	got, dropped, _ := apply(t, rules(t, `filter: {logs: {include: {match_type: strict, log_severity_number: {min: 9}}}}`), otlpwire.Logs, two)
	if dropped != 1 || strings.Contains(got, "debug") || !strings.Contains(got, `"x"`) {
		t.Errorf("%d dropped: %s", dropped, got)
	}
}

func TestMistakesAreNamed(t *testing.T) {
	for text, want := range map[string]string{
		`attributes: [{actions: [{key: a, action: replace}]}]`:                                 `processing.attributes[0].actions[0].action is "replace"`,
		`attributes: [{actions: []}]`:                                                          `attributes[0].actions is empty`,
		`attributes: [{actions: [{key: a, action: insert}]}]`:                                  `needs value or from_attribute`,
		`attributes: [{actions: [{key: a, action: insert, value: [1]}]}]`:                      `value is [1], want`,
		`attributes: [{actions: [{key: a, pattern: b, action: update, value: 1}]}]`:            `needs key, and no pattern, to update`,
		`attributes: [{actions: [{key: a, action: hash, value: 1}]}]`:                          `has a value, which hash does not need`,
		`attributes: [{actions: [{action: delete}]}]`:                                          `needs key or pattern`,
		`resource: [{key: instance.id, action: delete}]`:                                       `the identity comes from the credential`,
		`resource: [{pattern: "^.*$", action: delete}]`:                                        `matches "instance.id"`,
		`redaction: {blocked_values: ["("]}`:                                                   `processing.redaction.blocked_values[0] is not a regular expression`,
		`redaction: {blocked_values: ["a*"]}`:                                                  `matches the empty text`,
		`filter: {logs: {include: {match_type: glob, services: [a]}}}`:                         `match_type is "glob"`,
		`filter: {logs: {include: {match_type: strict}}}`:                                      `has no condition`,
		`filter: {spans: {exclude: {match_type: regexp, span_names: ["("]}}}`:                  `span_names[0] is not a regular expression`,
		`filter: {spans: {exclude: {match_type: strict, span_names: [a], metric_names: [a]}}}`: `no item has both`,
		`filter: {metrics: {include: {match_type: strict, attributes: [{key: a}]}}}`:           `metrics.include.attributes is not a condition for metrics`,
		`filter: {logs: {include: {match_type: strict, span_names: [a]}}}`:                     `logs.include.span_names is not a condition for logs`,
		`filter: {spans: {exclude: {match_type: strict, attributes: [{value: 1}]}}}`:           `attributes[0].key is empty`,
	} {
		var cfg Config
		if err := yaml.Unmarshal([]byte(text), &cfg); err != nil {
			t.Fatal(err)
		}
		if _, err := New("processing", cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// TestNoItemBecomesCrowded: an item with as many attributes as there may be gets no more.
func TestNoItemBecomesCrowded(t *testing.T) {
	var full []string
	for i := range otlpwire.MaxAttributes {
		full = append(full, fmt.Sprint("a", i), "x")
	}
	r := rules(t, `attributes: [{actions: [{key: b, action: insert, value: x}, {key: a1, action: update, value: y}]}]`)
	for sig, in := range map[otlpwire.Signal]string{otlpwire.Traces: span(kv(full...)), otlpwire.Metrics: metrics("m", kv(full...))} {
		got, _, _ := apply(t, r, sig, in) // looks whether it is sound
		if strings.Contains(got, `"b"`) || !strings.Contains(got, `"y"`) {
			t.Errorf("%v: inserted, or not updated", sig)
		}
	}
}

// TestBadInput: whatever the door lets pass comes out sound.
func TestBadInput(t *testing.T) {
	r := rules(t, `
attributes: [{actions: [{key: added, action: insert, value: x}, {pattern: "^e", action: hash}]}]
resource: [{key: added, action: upsert, value: 1}]
redaction: {blocked_values: [o+]}
filter: {spans: {exclude: {match_type: strict, span_names: [nobody]}}}
`)
	for _, row := range badinput.Rows() {
		sig, err := otlpwire.ParseSignal(row.Signal)
		if err != nil || row.JSON || row.Refused {
			continue
		}
		p, err := otlpwire.Mend(sig, row.Body())
		if err != nil {
			t.Fatalf("%s: %v", row.Name, err)
		}
		out, dropped := r.Apply(sig, p)
		rep, err := otlpwire.Scan(sig, out, otlpwire.Limits{MaxElements: 1 << 30})
		if err != nil || rep.Invalid > 0 || dropped != 0 || otlpwire.Count(sig, out) != otlpwire.Count(sig, p) {
			t.Errorf("%s: %v, %+v, %d dropped, %d of %d items", row.Name, err, rep, dropped, otlpwire.Count(sig, out), otlpwire.Count(sig, p))
		}
	}
}

func FuzzApply(f *testing.F) {
	var cfg Config
	_ = yaml.Unmarshal([]byte(`{attributes: [{actions: [{key: a, action: upsert, value: x}, {pattern: b, action: hash}]}], resource: [{key: c, action: delete}], redaction: {blocked_values: [o+]}, filter: {logs: {exclude: {match_type: regexp, log_bodies: [z]}}}}`), &cfg)
	r, err := New("processing", cfg)
	if err != nil {
		f.Fatal(err)
	}
	for _, row := range badinput.Rows() {
		if !row.JSON && !row.Large {
			f.Add(uint8(0), row.Body())
		}
	}
	f.Fuzz(func(t *testing.T, n uint8, payload []byte) {
		sig := otlpwire.Signals[int(n)%len(otlpwire.Signals)]
		rep, err := otlpwire.Scan(sig, payload, otlpwire.DefaultLimits)
		out, dropped := r.Apply(sig, payload) // must not panic, whatever it is
		if err != nil || !rep.Sound() {
			return
		}
		if got, err := otlpwire.Scan(sig, out, otlpwire.Limits{MaxElements: 1 << 30}); err != nil || got.Invalid > 0 || got.Items+dropped != rep.Items {
			t.Errorf("%v, %+v, %d dropped of %+v", err, got, dropped, rep)
		}
	})
}
