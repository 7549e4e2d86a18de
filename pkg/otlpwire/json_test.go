package otlpwire

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/proto"
)

func TestJSONRoundTrip(t *testing.T) {
	for _, sig := range Signals {
		p := marshal(t, sample(sig))
		text := AppendJSON(nil, sig, p)
		if bytes.ContainsAny(text, "\n\r") {
			t.Errorf("%v: the line has a break: %s", sig, text)
		}
		back, _, err := FromJSON(nil, sig, text, DefaultLimits)
		if err != nil {
			t.Fatalf("%v: %v\n%s", sig, err, text)
		}
		if got, want := decode(t, sig, back), decode(t, sig, p); !proto.Equal(got, want) {
			t.Errorf("%v: got %v\nwant %v", sig, got, want)
		}
	}
}
