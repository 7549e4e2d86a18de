package versions

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/sampling/domain"
)

// FuzzRecord: a key of the bucket counts as a version only if it has what its writer writes. An acknowledgement
// of the server, which a sender can have published anywhere in its account, never does.
func FuzzRecord(f *testing.F) {
	record, _ := json.Marshal(Record{From: 1, At: time.Unix(1, 0), Text: "policies: []"})
	f.Add("1", record)
	domains, _ := json.Marshal(Record{From: 1, At: time.Unix(1, 0), Domains: domain.Config{{Name: "acme", Instances: []string{"acme-*"}}}})
	f.Add("domains.1", domains)
	f.Add("domains.1", []byte(`{"stream":"LOGS","seq":5}`))
	f.Add("0", []byte(`{"stream":"LOGS","seq":5}`))
	f.Add("x", []byte(`{"stream":"LOGS","domain":"d","seq":5,"duplicate":true}`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		if r, err := parse(key, value); err == nil && (r.At.IsZero() || r.key() != key || r.Number > 0 && (r.Text == "" && r.Domains == nil || r.From == 0) || r.Domains.Validate("") != nil) {
			t.Fatalf("version %+v under %q", r, key)
		}
		var ack struct {
			Stream string
			At     *string
		}
		if json.Unmarshal(value, &ack) != nil || ack.Stream == "" || ack.At != nil {
			return
		}
		if _, err := parse(key, value); err == nil {
			t.Fatalf("an acknowledgement is taken: %s", value)
		}
	})
}
