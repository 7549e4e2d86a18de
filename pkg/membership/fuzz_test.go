package membership

import (
	"encoding/json"
	"testing"
	"time"
)

// FuzzMember: a key of the bucket counts as a member only if it has what a member writes about itself. An
// acknowledgement of the server, which a sender can have published anywhere in its account, never does.
func FuzzMember(f *testing.F) {
	member, _ := json.Marshal(Member{Name: "s1", Since: time.Unix(1, 0)})
	f.Add("s1", member)
	f.Add("0", []byte(`{"stream":"LOGS","seq":5}`))
	f.Add("x", []byte(`{"stream":"LOGS","domain":"d","seq":5,"duplicate":true}`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		if m, err := parseMember(key, value); err == nil && (m.Name != key || m.Since.IsZero()) {
			t.Fatalf("member %+v under %q", m, key)
		}
		var ack struct {
			Stream string
			Since  *string
		}
		if json.Unmarshal(value, &ack) != nil || ack.Stream == "" || ack.Since != nil {
			return
		}
		if _, err := parseMember(key, value); err == nil {
			t.Fatalf("an acknowledgement is taken: %s", value)
		}
	})
}
