package allinone

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/router"
	"github.com/penstock/penstock/pkg/sink"
)

func load(t *testing.T, text string) (Config, error) {
	t.Helper()
	c := DefaultConfig()
	file := filepath.Join(t.TempDir(), "up.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := config.LoadFile(file, &c); err != nil {
		return c, err
	}
	return c, c.Validate()
}

// TestEverySectionOfTheRoles writes every role's defaults, except hub and central, as
// a configuration of up, and expects the roles to get the same.
func TestEverySectionOfTheRoles(t *testing.T) {
	e, r, s := edge.DefaultConfig(), router.DefaultConfig(), sink.DefaultConfig()
	e.Instance.ID = "as-1"
	r.Gateway.GRPC.Listen, r.Gateway.HTTP.Listen = "127.0.0.1:1", "127.0.0.1:2"
	for _, role := range []any{&e, &r, &s} {
		text, err := yaml.Marshal(role)
		if err != nil {
			t.Fatal(err)
		}
		var doc map[string]any
		if err := yaml.Unmarshal(text, &doc); err != nil {
			t.Fatal(err)
		}
		delete(doc, "hub")
		delete(doc, "central")
		if text, err = yaml.Marshal(doc); err != nil {
			t.Fatal(err)
		}
		c, err := load(t, string(text))
		if err != nil {
			t.Fatalf("%T: %v\n%s", role, err, text)
		}
		ue, ur, us := c.roles()
		got := map[any]any{&e: &ue, &r: &ur, &s: &us}[role]
		back, err := yaml.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		var again map[string]any
		if err := yaml.Unmarshal(back, &again); err != nil {
			t.Fatal(err)
		}
		for key, want := range doc {
			if !reflect.DeepEqual(again[key], want) {
				t.Errorf("%T: %s is %v, want %v", role, key, again[key], want)
			}
		}
	}
}

func TestSectionsReachTheirRoles(t *testing.T) {
	c, err := load(t, `
data_dir: d
processing: {redaction: {blocked_values: ['[0-9]{16}']}}
memory_limiter: {limit_mib: 500}
spool: {max_bytes: 1GiB}
streams: {partitions: 3}
tempo: {endpoint: "tempo:4317", tenant: {from: instance}}
loki: {url: "http://loki:3100"}
also: [{name: site-b, prometheus: {url: "http://b:9090"}}]
file: {max_bytes: 2MiB}
linger: 10ms
`)
	if err != nil {
		t.Fatal(err)
	}
	e, r, s := c.roles()
	for what, ok := range map[string]bool{
		"memory_limiter": e.Memory.LimitMiB == 500 && r.Memory.LimitMiB == 500 && s.Memory.LimitMiB == 500,
		"spool":          e.Spool.MaxBytes == 1<<30 && e.Spool.Dir == filepath.Join("d", "spool"),
		"streams":        r.Streams.Partitions == 3 && s.Streams.Partitions == 3,
		"tempo":          s.Tempo.Endpoint == "tempo:4317" && s.Tempo.Protocol == "grpc" && s.Tempo.Tenant.From == "instance",
		"loki":           s.Loki.URL == "http://loki:3100",
		"also":           len(s.Also) == 1 && s.Also[0].Prometheus.URL == "http://b:9090",
		"file":           s.File.MaxBytes == 2<<20 && s.File.Dir == "d",
		"processing":     len(e.Processing.Redaction.BlockedValues) == 1 && len(r.Gateway.Processing.Redaction.BlockedValues) == 1 && len(s.Processing.Redaction.BlockedValues) == 0,
		"linger":         r.Linger.Milliseconds() == 10,
	} {
		if !ok {
			t.Errorf("%s did not reach its role", what)
		}
	}
}

func TestWrongConfigurations(t *testing.T) {
	for text, want := range map[string]string{
		"hub: {url: 'nats://other:4222'}":       "hub: penstock up has a hub of its own",
		"central: {endpoint: 'https://g:4317'}": "central.endpoint: penstock up has a hub of its own",
		"streams: {partitions: 0}":              "streams.partitions is 0",
		"tempo: {endpoint: x:1, protocol: udp}": `tempo.protocol is "udp"`,
		"instances: {}":                         "unknown key",
		"nats: {listen: '0.0.0.0:4222'}":        "nats.listen is 0.0.0.0:4222, which others can reach",
		"report_interval: -1s":                  "report_interval",
		"spool: {dir: x, max_byts: 1GiB}":       "up.yaml:1: spool.max_byts: unknown key",
	} {
		_, err := load(t, text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		} else if strings.Count(err.Error(), want) != 1 {
			t.Errorf("%s: said more than once: %v", text, err)
		}
	}
}

// TestEnvironment: the variables of all roles apply, those of a hub do not.
func TestEnvironment(t *testing.T) {
	env := map[string]string{
		"INSTANCE_ID": "as-3", "CUSTOMER_ID": "acme", "HUB_URL": "nats://other:4222", "HUB_CREDS": "x.creds", "CENTRAL_OTEL_ENDPOINT": "https://g:4317",
		"TEMPO_ENDPOINT": "tempo:4317", "PROMETHEUS_URL": "http://p:9090", "LOKI_URL": "http://l:3100",
	}
	c := DefaultConfig()
	c.ApplyEnv(func(name string) string { return env[name] })
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	e, _, s := c.roles()
	if e.Instance.ID != "as-3" || e.Instance.Customer != "acme" || s.Tempo.Endpoint != "tempo:4317" || s.Prometheus.URL != "http://p:9090" || s.Loki.URL != "http://l:3100" {
		t.Errorf("edge %+v, backends %+v", e.Instance, s.Backends)
	}
}

// TestConfigIsWrittenOnce: /config shows each section once, with the directories in use.
func TestConfigIsWrittenOnce(t *testing.T) {
	c := DefaultConfig()
	text, err := yaml.Marshal(&c)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"\nstreams:", "\nspool:", "\ntempo:", "data_dir: penstock-data", "dir: penstock-data/spool", "\ngateway:"} {
		if n := strings.Count("\n"+string(text), line); n != 1 {
			t.Errorf("%q stands %d times", line, n)
		}
	}
}
