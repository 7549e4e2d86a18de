package main

import (
	"encoding/json"
	"strings"
	"testing"
)

// TestNothingObeysASender: what others have written reaches a terminal as text.
func TestNothingObeysASender(t *testing.T) {
	evil := "a\x1b[2J\u009b31m\u202e\x7f\u200b\r\u2066z"
	if got := plain(evil + "\tx\n"); strings.ContainsFunc(strings.TrimSuffix(got, "\n"), func(r rune) bool { return obeyed(r) }) || !strings.HasSuffix(got, "\tx\n") {
		t.Errorf("%q", got)
	}
	text, err := json.Marshal(map[string]string{"body": evil})
	if err != nil {
		t.Fatal(err)
	}
	out := escaped(text)
	if strings.ContainsFunc(string(out), obeyed) {
		t.Errorf("%q", out)
	}
	var back map[string]string
	if err := json.Unmarshal(out, &back); err != nil || back["body"] != evil {
		t.Errorf("%q, %v", back, err)
	}
}
