package envelope

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"github.com/penstock/penstock/pkg/otlpwire"
)

func TestMeter(t *testing.T) {
	var m Meter
	for _, tc := range []struct {
		second, items int64
		want          [4]int64
	}{
		{100, 5, [4]int64{5, 5, 5, 5}}, {100, 1, [4]int64{6, 6, 6, 6}}, {102, 2, [4]int64{2, 8, 8, 8}}, {104, 1, [4]int64{1, 3, 9, 9}},
		{118, 1, [4]int64{1, 1, 2, 10}}, {164, 1, [4]int64{1, 1, 1, 5}}, {163, 1, [4]int64{1, 1, 1, 11 - 6}}, {1000, 7, [4]int64{7, 7, 7, 7}},
	} {
		if got := m.Add(tc.second*1e9+5, tc.items); got != Load(tc.want) {
			t.Errorf("second %d: %v, want %v", tc.second, got, tc.want)
		}
	}
	before := m.Add(2000*1e9, 3)
	m.Add(2000*1e9, 5)
	if m.Add(2000*1e9, -5) != before {
		t.Error("what was not taken counts")
	}
}

// TestLoadTravels in a header and in a frame, where readers of OTLP pass over it.
func TestLoadTravels(t *testing.T) {
	l := Load{1, 2, 3, 8e12}
	if got, err := ParseLoad(l.String()); got != l || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	for _, text := range []string{"1", "1,2,3,x", "-1,2,3,4", strings.Repeat("9223372036854775807,", 3) + "9"} {
		if got, err := ParseLoad(text); err == nil {
			t.Errorf("%q is %v", text, got)
		}
	}
	payload := []byte{1<<3 | 2, 2, 2<<3 | 2, 0} // a resource with an empty scope
	f := Frame{Instance: "as-1", Arrival: 7, Seq: 9, Source: SourceOf("nonce-17"), Load: l, Payload: payload}
	b := AppendFrame(nil, f)
	got, rest, err := NextFrame(b)
	if err != nil || len(rest) != 0 || got.Load != l || got.Source != f.Source || !bytes.Equal(got.Payload, payload) {
		t.Errorf("%+v, %v", got, err)
	}
	plain, _, err := NextFrame(AppendFrame(nil, Frame{Instance: "as-1", Payload: payload}))
	if err != nil || plain.Load != (Load{}) || !bytes.Equal(plain.Payload, payload) {
		t.Errorf("%+v, %v", plain, err)
	}
	if n := otlpwire.Count(otlpwire.Traces, b[bytes.Index(b, []byte{loadField}):]); n != 0 {
		t.Errorf("a reader that does not know the field sees %d items", n)
	}
	for cut := range b {
		if _, _, err := NextFrame(b[:cut]); err == nil {
			t.Errorf("cut at %d it is a frame", cut)
		}
	}
	if SourceOf("as-1/nonce-17-18") != f.Source || SourceOf("other-17") == f.Source {
		t.Error("an edge is another source through a gateway, or two are one")
	}
}

// TestNumbered: only what an edge gives its messages to the hub is numbered.
func TestNumbered(t *testing.T) {
	const nonce = "0123456789abcdef0123456789abcdef"
	if spool, n, ok := Numbered(nonce + "-17"); spool != nonce || n != 17 || !ok {
		t.Errorf("%q %d %v", spool, n, ok)
	}
	for _, id := range []string{"", nonce, nonce + "-0", nonce + "-g17", nonce + "-17-2", "as-1/" + nonce + "-17", "short-17", nonce + "--1", nonce + "-99999999999999999999"} {
		if _, _, ok := Numbered(id); ok {
			t.Errorf("%q is numbered", id)
		}
	}
}

// TestSources: what is appended is read, what is cut short is an error, and neither is a decision of an earlier version.
func TestSources(t *testing.T) {
	all := []Sources{{"as-1", "as-1", map[uint32]int64{7: 1, 1 << 31: 1 << 62}}, {"as-2", "as-2", map[uint32]int64{}}, {"@acme", "as-3", map[uint32]int64{7: 1}}}
	b := AppendSources(nil, all)
	got, is, err := ReadSources(b)
	if !is || err != nil || !reflect.DeepEqual(got, all) {
		t.Errorf("%+v %v %v", got, is, err)
	}
	for n := len(AppendSources(nil, nil)) + 1; n < len(b); n++ {
		if got, is, err := ReadSources(b[:n]); !is || err == nil && len(got) == len(all) {
			t.Errorf("%d bytes of %d: %+v %v", n, len(b), got, err)
		}
	}
	if _, err := ReadDecisions(b); err == nil {
		t.Error("a sink of an earlier version takes it for a decision")
	}
	for _, d := range []Decision{{}, {Instance: "as-1", Kept: true}} {
		if _, is, _ := ReadSources(AppendDecision(nil, d)); is {
			t.Errorf("%+v is taken for sources", d)
		}
	}
}
