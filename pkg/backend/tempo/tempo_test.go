package tempo

import (
	"strings"
	"testing"
)

func TestEndpoints(t *testing.T) {
	for endpoint, ok := range map[string]bool{"h:4317": true, "http://h:4317": true, "https://h:4317": true, "h": false, "ftp://h:1": false, "": false, "http://h": false} {
		cfg := DefaultConfig()
		cfg.Endpoint = endpoint
		w, err := New(cfg)
		if (err == nil) != ok {
			t.Errorf("%q: %v", endpoint, err)
		}
		if err == nil {
			_ = w.Close()
		}
	}
	for _, wrong := range []Config{{Endpoint: "h:1", Protocol: "udp", Compression: "none"}, {Endpoint: "h:1", Protocol: "http", Compression: "zip"}} {
		if _, err := New(wrong); err == nil {
			t.Errorf("%+v is taken", wrong)
		}
	}
}

// TestHosts: whose name a certificate must have.
func TestHosts(t *testing.T) {
	for endpoint, want := range map[string]string{"https://tempo.example/otlp": "tempo.example", "https://tempo.example:4318/": "tempo.example", "https://[::1]:4317": "::1", "h:4317": ""} {
		if got := hostOf(endpoint); got != want {
			t.Errorf("%s: %q, want %q", endpoint, got, want)
		}
	}
}

// TestNothingIsLeftOfAWriterThatIsRefused: with a status page that cannot be asked there is no writer, and
// the connection to Tempo is closed (TestMain looks for its goroutines).
func TestNothingIsLeftOfAWriterThatIsRefused(t *testing.T) {
	cfg := DefaultConfig()
	cfg.Endpoint, cfg.StatusURL = "localhost:4317", "tempo:3200"
	if w, err := New(cfg); err == nil || !strings.Contains(err.Error(), "tempo.status_url") || w != nil {
		t.Errorf("%v, %v", w, err)
	}
}
