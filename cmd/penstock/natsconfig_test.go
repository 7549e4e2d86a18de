package main

import (
	"bytes"
	"os"
	"strings"
	"testing"
)

// TestShippedInstance: the instance in deploy/nats is what add-instance writes, but for the
// passwords, which come from the environment.
func TestShippedInstance(t *testing.T) {
	text, err := os.ReadFile("../../deploy/nats/instances/as-1.conf")
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := instanceConf.Execute(&b, map[string]string{"ID": "as-1", "Edge": "EDGE", "Replay": "REPLAY"}); err != nil {
		t.Fatal(err)
	}
	account := func(s string) string { return s[strings.Index(s, `"instance-`):] }
	want := strings.NewReplacer(`"EDGE"`, "$EDGE_AS_1_PASSWORD", `"REPLAY"`, "$REPLAY_AS_1_PASSWORD").Replace(account(b.String()))
	if account(string(text)) != want {
		t.Errorf("deploy/nats/instances/as-1.conf differs from what penstock nats-config writes:\n%s", want)
	}
}
