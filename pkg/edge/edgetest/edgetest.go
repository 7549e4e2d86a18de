// Package edgetest has what the tests of the edge's parts send.
package edgetest

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/receive"
)

// Log returns a request with one log record that carries a number, and size bytes that no
// compression makes much smaller.
func Log(t testing.TB, n, size int) receive.Batch {
	t.Helper()
	text := fmt.Sprintf(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"stringValue":"n=%d %s"}}]}]}]}`, n, noise()[:size])
	p, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(text), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	return receive.Batch{Signal: otlpwire.Logs, Instance: "as-1", Items: 1, Payload: p}
}

// Number returns the number of a record of [Log].
func Number(record []byte) (n int) {
	_, text, _ := strings.Cut(string(record), "n=")
	for ; text != "" && text[0] >= '0' && text[0] <= '9'; text = text[1:] {
		n = n*10 + int(text[0]-'0')
	}
	return n
}

var noise = sync.OnceValue(func() string {
	var b strings.Builder
	for x := uint64(88172645463325252); b.Len() < 1<<20; {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		fmt.Fprintf(&b, "%x", x)
	}
	return b.String()
})
