package envelope

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"math"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/otlpwire/badinput"
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
	h := Header{ContentType: ContentTypeOTLP, Encoding: S2, Items: 7, Arrival: math.MaxInt64, ID: "epoch-1"}
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
	repeats := bytes.Repeat([]byte("otlp"), 10_000)
	random := make([]byte, 1000)
	_, _ = rand.Read(random)
	for _, enc := range []Encoding{S2, Zstd} {
		for _, tc := range []struct {
			body []byte
			want Encoding
		}{{nil, ""}, {[]byte("short"), ""}, {random, ""}, {repeats, enc}, {make([]byte, 400<<10), ""}} { // what grows too much is not believed
			out, got := Compress(nil, tc.body, enc)
			back, err := Decompress(nil, out, got)
			if err != nil || got != tc.want || !bytes.Equal(back, tc.body) {
				t.Errorf("%s, %d bytes: encoding %q, want %q, %v", enc, len(tc.body), got, tc.want, err)
			}
		}
		buf := make([]byte, 0, s2.MaxEncodedLen(len(repeats)))
		if n := testing.AllocsPerRun(20, func() { Compress(buf, repeats, enc) }); n > 0 {
			t.Errorf("%s: %v allocations in steady state", enc, n)
		}
	}
}

func TestDecompressIsBounded(t *testing.T) {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	huge := make([]byte, 64<<20)
	var streamed bytes.Buffer // without the size in its header
	enc.Reset(&streamed)
	_, _ = enc.Write(huge)
	_ = enc.Close()
	for name, tc := range map[string]struct {
		body []byte
		enc  Encoding
	}{
		"s2 bomb":                  {s2.Encode(nil, huge), S2},
		"a small s2 bomb":          {s2.Encode(nil, huge[:400<<10]), S2},
		"a small zstd bomb":        {enc.EncodeAll(huge[:400<<10], nil), Zstd},
		"s2 claims 4 GiB":          {[]byte{0xff, 0xff, 0xff, 0xff, 0x0f, 0, 0}, S2},
		"s2 cut short":             {s2.Encode(nil, bytes.Repeat([]byte("otlp"), 1000))[:20], S2},
		"zstd bomb":                {enc.EncodeAll(huge, nil), Zstd},
		"zstd bomb without a size": {streamed.Bytes(), Zstd},
		"zstd window of 2 GiB":     {[]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00}, Zstd},
		"zstd garbage":             {[]byte("hello"), Zstd},
		"not compressed":           {make([]byte, MaxBody+1), ""},
		"unknown encoding":         {[]byte("x"), "br"},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Decompress(nil, tc.body, tc.enc)
		runtime.ReadMemStats(&after)
		// In all, garbage included: growing to the bound takes some times its bytes,
		// growing to the bomb's 64 MiB would take more.
		if allocated := after.TotalAlloc - before.TotalAlloc; err == nil || allocated > 7*MaxBody {
			t.Errorf("%s: %v, %d bytes allocated", name, err, allocated)
		}
		if bomb := strings.Contains(name, "bomb"); bomb && !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: %v, want %v", name, err, ErrTooLarge)
		}
	}
}

func TestFramesRoundTrip(t *testing.T) {
	frames := []Frame{{Instance: "as-1", Arrival: 1, Seq: 7, Payload: []byte("abc")}, {Instance: "as-2", Arrival: -5}, {Instance: strings.Repeat("x", 128), Arrival: math.MaxInt64, Seq: math.MaxInt64, Payload: bytes.Repeat([]byte{1}, 300)}}
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
	forged, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(`{"resourceLogs":[{"resource":{"attributes":[{"key":"instance.id","value":{"stringValue":"victim"}}]},"scopeLogs":[{"logRecords":[{}]}]}]}`), otlpwire.DefaultLimits)
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
	// A message of 100 KB whose resources all want an identity, and one that is
	// larger than any edge sends.
	many := bytes.Repeat([]byte{0x0a, 0x00}, 50_000)
	for name, large := range map[string][]byte{"by the identity": many, "from the start": badinput.Request(make([]byte, 0), bytes.Repeat([]byte{0x62, 0x01, 'x'}, MaxPayload/3))} {
		if _, _, err := g.Open(otlpwire.Logs, "an-instance", large); err == nil || !strings.Contains(err.Error(), "at most") {
			t.Errorf("too large %s: %v", name, err)
		}
	}
	if _, _, err := g.Open(otlpwire.Logs, "a.b", nil); err == nil {
		t.Error("an impossible instance is accepted")
	}
}

func TestStampValues(t *testing.T) {
	in := Instance{ID: "i", Customer: "", Namespace: "ns", Environment: ""}
	payload, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(`{"resourceLogs":[{"resource":{"attributes":[{"key":"customer.id","value":{"stringValue":"forged"}},{"key":"service.namespace","value":{"stringValue":"own"}}]},"scopeLogs":[{"logRecords":[{}]}]}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	out, err := in.Stamp().Append(nil, payload)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for r := range otlpwire.Resources(out) {
		for _, key := range []string{"instance.id", "instance.name", "customer.id", "service.namespace", "deployment.environment"} {
			if v, ok := otlpwire.ResourceAttribute(r.Resource(), key); ok {
				got[key] = string(v.Str)
			}
		}
	}
	want := map[string]string{"instance.id": "i", "instance.name": "i", "service.namespace": "own"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestStampDoesNotContradict: the environment has two names, and an application may set either.
func TestStampDoesNotContradict(t *testing.T) {
	in := Instance{ID: "i", Environment: "edge"}
	const old, stable = "deployment.environment", "deployment.environment.name"
	for _, tc := range []struct{ attributes, old, stable string }{
		{``, "edge", ""},
		{`{"key":"deployment.environment","value":{"stringValue":"app"}}`, "app", ""},
		{`{"key":"deployment.environment.name","value":{"stringValue":"app"}}`, "", "app"},
		{`{"key":"deployment.environment.name","value":{"stringValue":"new"}},{"key":"deployment.environment","value":{"stringValue":"app"}}`, "app", "new"},
		{`{"key":"deployment.environment.names","value":{"stringValue":"other"}}`, "edge", ""},
	} {
		payload, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(`{"resourceLogs":[{"resource":{"attributes":[`+tc.attributes+`]},"scopeLogs":[{"logRecords":[{}]}]}]}`), otlpwire.DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		out, err := in.Stamp().Append(nil, payload)
		if err != nil {
			t.Fatal(err)
		}
		for r := range otlpwire.Resources(out) {
			a, _ := otlpwire.ResourceAttribute(r.Resource(), old)
			b, _ := otlpwire.ResourceAttribute(r.Resource(), stable)
			if string(a.Str) != tc.old || string(b.Str) != tc.stable {
				t.Errorf("%s: %q and %q, want %q and %q", tc.attributes, a.Str, b.Str, tc.old, tc.stable)
			}
		}
	}
}

func TestDecisionsRoundTrip(t *testing.T) {
	want := []Decision{
		{Domain: "as-1", Instance: "as-1", TraceID: otlpwire.TraceID{1}, Kept: true, Upto: math.MaxInt64, Policy: "slow", Threshold: otlpwire.Unknown},
		{},
		{Domain: "as-2", Instance: "as-2", TraceID: otlpwire.TraceID{2}, Upto: 77},
		{Domain: "@acme", Instance: "as-1", TraceID: otlpwire.TraceID{3}, Kept: true, Begun: 7, Due: math.MaxInt64, Version: 300, Spent: []Spend{{0, 8}, {300, math.MaxInt64}}},
	}
	for _, d := range want[:2] {
		whole := AppendDecision(nil, d)
		for i := 1; i < len(whole); i++ { // cut anywhere
			if got, err := ReadDecisions(whole[:i]); err == nil || len(got) > 0 {
				t.Errorf("%d of %d bytes are %+v", i, len(whole), got)
			}
		}
	}
	late := append(want, Decision{Domain: "as-1", Instance: "as-1", TraceID: otlpwire.TraceID{4}, Upto: 1 << 50, From: 1, At: 5, Due: 9, Version: 2, Spent: []Spend{{1, 2}}},
		Decision{Domain: "as-1", Instance: "as-1", TraceID: otlpwire.TraceID{4}, Kept: true, Policy: "errors", Upto: 900, From: 900, At: math.MaxInt64, Late: RescueSent})
	for _, all := range [][]Decision{want, late} {
		b := AppendDecisions(nil, all...)
		if got, err := ReadDecisions(b); err != nil || !reflect.DeepEqual(got, all) {
			t.Fatalf("got %+v, %v; want %+v", got, err, all)
		}
		if got, err := ReadDecisions(append(b, 0xff)); err == nil || len(got) != len(all) {
			t.Errorf("with a byte that is none: %+v, %v", got, err)
		}
	}
	if got, err := ReadDecisions(append(binary.AppendUvarint(AppendDecision(nil, want[0]), originsMark), byte(RescueSent))); err == nil {
		t.Errorf("a rescue without a beginning is %+v", got)
	}
	b := AppendDecisions(nil, late...)
	for i := len(AppendDecisions(nil, want...)) + 60; i < len(b); i++ {
		if got, err := ReadDecisions(b[:i]); err == nil && i > len(b)-20 {
			t.Errorf("%d of %d bytes are %+v", i, len(b), got)
		}
	}
}
