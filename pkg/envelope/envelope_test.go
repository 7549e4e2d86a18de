package envelope

import (
	"bytes"
	"errors"
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/klauspost/compress/s2"

	"github.com/penstock/penstock/pkg/otlpwire"
)

func TestInstanceIDIsOneSubjectToken(t *testing.T) {
	for _, id := range []string{"a", "as-17", "A_b-9", strings.Repeat("x", 128)} {
		if err := (Instance{ID: id}).Validate(); err != nil {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, id := range []string{"", "a.b", "*", ">", "../x", "a b", "a\r\nPUB x", "-a", "_a", "ä", "а", "a\x00", strings.Repeat("x", 129), "a\n"} {
		if err := (Instance{ID: id}).Validate(); err == nil {
			t.Errorf("%q is accepted", id)
		}
	}
}

func TestHeaderRoundTrip(t *testing.T) {
	h := Header{ContentType: ContentTypeOTLP, Encoding: EncodingS2, Items: 7, Arrival: math.MaxInt64, ID: "epoch-1"}
	m := map[string]string{}
	h.Fields(func(k, v string) { m[k] = v })
	got, err := ParseHeader(func(k string) string { return m[k] })
	if err != nil || got != h {
		t.Errorf("got %+v, %v; want %+v", got, err, h)
	}
	for _, field := range []string{HeaderContentType, HeaderItems, HeaderArrival} {
		if _, err := ParseHeader(func(k string) string {
			if k == field {
				return "-1x"
			}
			return m[k]
		}); err == nil {
			t.Errorf("bad %s is accepted", field)
		}
	}
}

func TestCompressRoundTrip(t *testing.T) {
	for _, body := range [][]byte{nil, []byte("short"), bytes.Repeat([]byte("otlp"), 10_000)} {
		out, enc := Compress(body)
		back, err := Decompress(out, enc, 1<<20)
		if err != nil || !bytes.Equal(back, body) {
			t.Errorf("%d bytes: %v", len(body), err)
		}
	}
}

func TestDecompressIsBounded(t *testing.T) {
	bomb := s2.Encode(nil, make([]byte, 64<<20))
	if _, err := Decompress(bomb, EncodingS2, 1<<20); !errors.Is(err, ErrTooLarge) {
		t.Errorf("bomb of %d bytes: %v", len(bomb), err)
	}
	claim := []byte{0xff, 0xff, 0xff, 0xff, 0x0f, 0, 0} // four gigabytes, it says
	allocated := testing.AllocsPerRun(10, func() { _, _ = Decompress(claim, EncodingS2, 1<<20) })
	if _, err := Decompress(claim, EncodingS2, 1<<20); err == nil || allocated > 5 {
		t.Errorf("claim of 4 GiB: %v, %v allocations", err, allocated)
	}
	if _, err := Decompress([]byte("x"), "br", 10); err == nil {
		t.Error("unknown encoding is accepted")
	}
}

func TestFramesRoundTrip(t *testing.T) {
	frames := []Frame{{"as-1", 1, []byte("abc")}, {"as-2", -5, nil}, {strings.Repeat("x", 128), math.MaxInt64, bytes.Repeat([]byte{1}, 300)}}
	var b []byte
	for _, f := range frames {
		b = AppendFrame(b, f)
	}
	for i := range b {
		for rest := b[:i]; len(rest) > 0; { // cut anywhere: an error or fewer frames, no panic
			var err error
			if _, rest, err = NextFrame(rest); err != nil {
				break
			}
		}
	}
	for _, want := range frames {
		got, rest, err := NextFrame(b)
		if err != nil || got.Instance != want.Instance || got.Arrival != want.Arrival || !bytes.Equal(got.Payload, want.Payload) {
			t.Fatalf("got %+v, %v; want %+v", got, err, want)
		}
		b = rest
	}
	if len(b) != 0 {
		t.Errorf("%d bytes left", len(b))
	}
	if _, _, err := NextFrame(AppendFrame(nil, Frame{Instance: "a.b"})); err == nil {
		t.Error("a frame of an impossible instance is accepted")
	}
}

func TestGuardOverwritesIdentity(t *testing.T) {
	var g Guard
	forged, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(`{"resourceLogs":[{"resource":{"attributes":[{"key":"instance.id","value":{"stringValue":"victim"}}]},"scopeLogs":[{"logRecords":[{}]}]}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	out, items, err := g.Open(otlpwire.Logs, "attacker", forged)
	if err != nil || items != 1 {
		t.Fatalf("%d items, %v", items, err)
	}
	if js := string(otlpwire.AppendJSON(nil, otlpwire.Logs, out)); strings.Contains(js, "victim") || !strings.Contains(js, "attacker") {
		t.Errorf("got %s", js)
	}
	for name, bad := range map[string][]byte{"garbage": []byte("hello"), "group": {0x0b}} {
		if _, _, err := g.Open(otlpwire.Logs, "a", bad); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	if _, _, err := g.Open(otlpwire.Logs, "a.b", nil); err == nil {
		t.Error("an impossible instance is accepted")
	}
}

func TestStampValues(t *testing.T) {
	in := Instance{ID: "i", Customer: "", Namespace: "ns", Environment: ""}
	payload, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(`{"resourceLogs":[{"resource":{"attributes":[{"key":"customer.id","value":{"stringValue":"forged"}},{"key":"service.namespace","value":{"stringValue":"own"}}]},"scopeLogs":[{"logRecords":[{}]}]}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	out, err := in.Stamp().Append(nil, payload)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	otlpwire.Walk(out, func(it otlpwire.Item) bool {
		for _, key := range []string{"instance.id", "instance.name", "customer.id", "service.namespace", "deployment.environment"} {
			if v, ok := otlpwire.Attribute(it.Resource, otlpwire.ResourceAttributes, key); ok {
				got[key] = string(v.Str)
			}
		}
		return true
	})
	want := map[string]string{"instance.id": "i", "instance.name": "i", "service.namespace": "own"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestDecisionsRoundTrip(t *testing.T) {
	want := []Decision{{"as-1", otlpwire.TraceID{1}, true}, {"as-2", otlpwire.TraceID{2}, false}}
	var b []byte
	for _, d := range want {
		b = AppendDecision(b, d)
	}
	for i := range b {
		_, _, _ = NextDecision(b[:i]) // cut anywhere: no panic
	}
	for _, w := range want {
		got, rest, err := NextDecision(b)
		if err != nil || got != w {
			t.Fatalf("got %+v, %v; want %+v", got, err, w)
		}
		b = rest
	}
}
