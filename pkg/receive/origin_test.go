package receive

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestOrigin: the headers of an edge count where they are allowed, sensible ones only,
// and the pieces of a request that is cut have ids of their own.
func TestOrigin(t *testing.T) {
	now := time.Now().UnixNano()
	send := func(d *door, id, arrival string, body []byte) []Origin {
		t.Helper()
		before := len(d.taken)
		res, text := d.do(t, req{body: body, header: http.Header{"Penstock-Id": {id}, "Penstock-Arrival": {arrival}}})
		if res.StatusCode != 200 {
			t.Fatalf("%s %s", res.Status, text)
		}
		var all []Origin
		for _, b := range d.taken[before:] {
			all = append(all, b.Origin)
		}
		return all
	}
	d := open(t, false, nil)
	if got := send(d, "a-1", strconv.FormatInt(now, 10), good(t)); got[0] != (Origin{}) {
		t.Errorf("honoured where it is not allowed: %+v", got)
	}
	d = openFor(t, false, true, nil)
	for _, tc := range []struct {
		id, arrival string
		want        Origin
	}{
		{"a-1", strconv.FormatInt(now, 10), Origin{ID: "a-1", Arrival: now}},
		{strings.Repeat("x", 129), "-5", Origin{}},
		{"a-1", strconv.FormatInt(now+int64(time.Hour), 10), Origin{ID: "a-1"}},
		{"", "soon", Origin{}},
	} {
		if got := send(d, tc.id, tc.arrival, good(t)); got[0] != tc.want {
			t.Errorf("%+v: got %+v", tc, got)
		}
	}
	var large []byte
	for len(large) < 600<<10 { // more than two messages
		large = append(large, good(t)...)
	}
	got := send(d, "a-2", "", large)
	seen := map[string]bool{}
	for _, o := range got {
		seen[o.ID] = true
	}
	if len(got) < 3 || len(seen) != len(got) || !seen["a-2"] {
		t.Errorf("%d pieces with the ids %v", len(got), seen)
	}
	if again := send(d, "a-2", "", large); !slices.Equal(again, got) {
		t.Errorf("sent again, the pieces have other ids: %v", again)
	}
}
