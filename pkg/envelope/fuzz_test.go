package envelope

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

// FuzzHeader: what is read is within its bounds, writes back to itself, and has a place near
// when the hub got it.
func FuzzHeader(f *testing.F) {
	f.Add(ContentTypeOTLP, "s2", "12", "1790000000000000000", "nonce-1", "1,2,3,4")
	f.Add(ContentTypeFrames, "", "0", "-9223372036854775808", "", "")
	f.Add("x", "br", "-1", "9223372036854775807", strings.Repeat("i", 300), "9223372036854775807,0,0,0")
	f.Fuzz(func(t *testing.T, contentType, encoding, items, arrival, id, load string) {
		fields := map[string]string{HeaderContentType: contentType, HeaderContentEncoding: encoding, HeaderItems: items, HeaderArrival: arrival, HeaderID: id, HeaderLoad: load}
		h, err := ParseHeader(func(name string) string { return fields[name] })
		if err != nil {
			if len(err.Error()) > 1000 || h != (Header{}) {
				t.Fatalf("%+v, %v", h, err)
			}
			return
		}
		if h.Items < 0 || h.Items > MaxItems || len(h.ID) > maxID {
			t.Fatalf("%+v", h)
		}
		written := map[string]string{}
		h.Fields(func(name, value string) { written[name] = value })
		if again, err := ParseHeader(func(name string) string { return written[name] }); err != nil || again != h {
			t.Fatalf("%+v, then %+v, %v", h, again, err)
		}
		stored := time.Unix(1_790_000_000, 0)
		h.Place(stored)
		if d := h.Time().Sub(stored); d > maxAhead || d < -maxBehind {
			t.Fatalf("%v from when it was stored", d)
		}
	})
}

// FuzzFrame: what is read of a message of SPANS writes back to itself, and reading ends.
func FuzzFrame(f *testing.F) {
	f.Add(AppendFrame(AppendFrame(nil, Frame{Instance: "as-1", Arrival: 1, Seq: 7, Payload: []byte("x")}), Frame{Instance: "b", Source: 3, Load: Load{1, 2, 3, 4}}))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01})
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			frame, rest, err := NextFrame(b)
			if err != nil {
				return
			}
			if len(rest) >= len(b) {
				t.Fatal("reading does not go on")
			}
			again, none, err := NextFrame(AppendFrame(nil, frame))
			if frame.Load == (Load{}) { // of one without a load the source is not written
				frame.Source = 0
			}
			if frame.Load == (Load{}) && len(frame.Payload) > 0 && frame.Payload[0] == loadField {
				return // a field within the field: no writer makes it
			}
			if err != nil || len(none) > 0 || again.Instance != frame.Instance || again.Arrival != frame.Arrival || again.Seq != frame.Seq || again.Load != frame.Load || again.Source != frame.Source || string(again.Payload) != string(frame.Payload) {
				t.Fatalf("%+v, then %+v, %v", frame, again, err)
			}
			b = rest
		}
	})
}

// FuzzDecision likewise, of a message of DECISIONS.
func FuzzDecision(f *testing.F) {
	f.Add(AppendDecisions(nil, Decision{}, Decision{Instance: "as-1", Kept: true, Policy: "errors", Upto: 9, Spent: []Spend{{1, 5}}}))
	f.Add(AppendDecisions(nil, Decision{Instance: "as-1", Upto: 9, From: 3, At: 7}, Decision{Instance: "as-1", Upto: 9, Late: Rescued, From: 9}))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := ReadDecisions(b)
		if err != nil {
			return
		}
		whole := AppendDecisions(nil, all...) // without what is not written with some of them
		again, err := ReadDecisions(whole)
		if b := AppendDecisions(nil, again...); err != nil || len(again) != len(all) || !bytes.Equal(b, whole) {
			t.Fatalf("%+v, then %+v, %v", all, again, err)
		}
	})
}
