package edge

import (
	"github.com/penstock/penstock/pkg/edge/forward"
	"strings"
	"testing"
	"time"
)

func TestConfig(t *testing.T) {
	for want, change := range map[string]func(*Config){
		"":                            func(*Config) {},
		"instance.id is not set":      func(c *Config) { c.Instance.ID = "" },
		"NATS subject":                func(c *Config) { c.Instance.ID = "a.b" },
		"spool.durability":            func(c *Config) { c.Spool.Durability = "maybe" },
		"spool.compression":           func(c *Config) { c.Spool.Compression = "lzma" },
		"spool.max_bytes":             func(c *Config) { c.Spool.MaxBytes = 1 },
		"spool.on_full":               func(c *Config) { c.Spool.OnFull = "forget" },
		"spool.shares":                func(c *Config) { c.Spool.Shares.Logs = 90 },
		"spool.linger":                func(c *Config) { c.Spool.Linger = time.Hour },
		"spool.retain_after_ack":      func(c *Config) { c.Spool.Retain = -1 },
		"hub.url":                     func(c *Config) { c.Hub.URL = "http://h:1" },
		"hub.creds":                   func(c *Config) { c.Hub.User, c.Hub.Token = "u", "t" },
		"hub.tls.ca_file":             func(c *Config) { c.Hub.TLS.CA = "nowhere" },
		"central.token":               func(c *Config) { c.Central.Endpoint = "https://h:4317" },
		"central.insecure":            func(c *Config) { c.Central.Endpoint, c.Central.Token = "http://h:4317", "t" },
		"local backends":              func(c *Config) { c.Local.File.Dir, c.Spool.Retain = "x", 0 },
		"local.loki.url":              func(c *Config) { c.Local.Loki.URL = "nonsense" },
		"central.protocol":            func(c *Config) { c.Central = forward.CentralConfig{Endpoint: "https://h:1", Token: "t", Protocol: "x"} },
		"receive.http.listen":         func(c *Config) { c.Receive.HTTP.Listen = "0.0.0.0:4318" },
		"receive.max_in_flight_bytes": func(c *Config) { c.Receive.MaxInFlight = 1 },
	} {
		c := DefaultConfig()
		c.Instance.ID = "as-1"
		change(&c)
		err := c.Validate()
		if (want == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), want)) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	c := DefaultConfig()
	c.ApplyEnv(func(k string) string {
		return map[string]string{"INSTANCE_ID": "i", "CUSTOMER_ID": "c", "HUB_URL": "nats://h:1"}[k]
	})
	if c.Instance.ID != "i" || c.Instance.Customer != "c" || c.Hub.URL != "nats://h:1" || c.Instance.Namespace != "appserver" {
		t.Errorf("got %+v", c.Instance)
	}
}
