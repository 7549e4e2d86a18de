package bus

import (
	"encoding/json"
	"testing"
	"time"
)

// FuzzRecords: a key of the members or the policies is taken only when it says what its writer
// would have said; an acknowledgement of the server's, which a sender can have published
// anywhere in its account, never is.
func FuzzRecords(f *testing.F) {
	member, _ := json.Marshal(Member{Name: "s1", Since: time.Unix(1, 0)})
	version, _ := json.Marshal(Policies{From: 1, At: time.Unix(1, 0), Text: "policies: []"})
	f.Add("s1", member)
	f.Add("1", version)
	f.Add("0", []byte(`{"stream":"LOGS","seq":5}`))
	f.Add("x", []byte(`{"stream":"LOGS","domain":"d","seq":5,"duplicate":true}`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		if m, err := parseMember(key, value); err == nil && (m.Name != key || m.Since.IsZero()) {
			t.Fatalf("member %+v under %q", m, key)
		}
		if p, err := parsePolicies(key, value); err == nil && (p.At.IsZero() || p.Number > 0 && (p.Text == "" || p.From == 0)) {
			t.Fatalf("policies %+v under %q", p, key)
		}
		var ack struct {
			Stream string
			Name   *string
			Since  *string
			At     *string
		}
		if json.Unmarshal(value, &ack) != nil || ack.Stream == "" || ack.Name != nil || ack.Since != nil || ack.At != nil {
			return
		}
		if _, err := parseMember(key, value); err == nil {
			t.Fatalf("an acknowledgement is a member: %s", value)
		}
		if _, err := parsePolicies(key, value); err == nil {
			t.Fatalf("an acknowledgement is a version of the policies: %s", value)
		}
	})
}
