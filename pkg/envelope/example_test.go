package envelope_test

import (
	"bytes"
	"fmt"

	"github.com/penstock/penstock/pkg/envelope"
)

// A body travels compressed, and its header says how.
func ExampleCompress() {
	body := bytes.Repeat([]byte("telemetry "), 100)
	small, encoding := envelope.Compress(nil, body, envelope.S2)
	again, err := envelope.Decompress(nil, small, encoding)
	fmt.Println(encoding, len(small) < len(body), bytes.Equal(again, body), err)
	// Output: s2 true true <nil>
}

// An instance's id becomes one token of a NATS subject.
func ExampleInstance_Validate() {
	fmt.Println(envelope.Instance{ID: "as-17"}.Validate())
	fmt.Println(envelope.Instance{ID: "as.*"}.Validate() != nil)
	// Output:
	// <nil>
	// true
}
