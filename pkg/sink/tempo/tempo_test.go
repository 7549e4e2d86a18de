package tempo

import "testing"

func TestEndpoints(t *testing.T) {
	for endpoint, ok := range map[string]bool{"h:4317": true, "http://h:4317": true, "https://h:4317": true, "h": false, "ftp://h:1": false, "": false, "http://h": false} {
		w, err := New(Config{Endpoint: endpoint})
		if (err == nil) != ok {
			t.Errorf("%q: %v", endpoint, err)
		}
		if err == nil {
			_ = w.Close()
		}
	}
}
