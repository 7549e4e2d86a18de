package sink

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/sampling/sampler"
)

// TestReach: what is about to be removed is out of reach, and more than may be read at once is.
func TestReach(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	r := &reach{maxBytes: 1000}
	for _, tc := range []struct {
		after time.Duration
		state bus.StreamState
		want  readable
	}{
		{0, bus.StreamState{FirstSeq: 1}, readable{1, 0}},
		{time.Second, bus.StreamState{FirstSeq: 1, LastSeq: 100, Messages: 100, Bytes: 5000}, readable{1, 20}},
		{2 * time.Second, bus.StreamState{FirstSeq: 1, LastSeq: 160, Messages: 160, Bytes: 8000, Partitions: 8}, readable{1, 160}},
		{3 * time.Second, bus.StreamState{FirstSeq: 41, LastSeq: 200, Messages: 160, Bytes: 8000, Partitions: 8}, readable{41 + 200 + 9, 160}},
		{17 * time.Second, bus.StreamState{FirstSeq: 41, LastSeq: 201, Messages: 160, Bytes: 8000, Partitions: 8}, readable{41 + 41 + 10, 160}},
		{60 * time.Second, bus.StreamState{FirstSeq: 41, LastSeq: 201, Messages: 160, Bytes: 8000, Partitions: 8}, readable{41 + 10, 160}},
		{61 * time.Second, bus.StreamState{FirstSeq: 3, LastSeq: 4, Messages: 2, Bytes: 50_000}, readable{3, 1}}, // another stream
	} {
		if got := r.look(tc.state, now.Add(tc.after)); got != tc.want {
			t.Errorf("after %v: %+v, want %+v", tc.after, got, tc.want)
		}
	}
}

// TestSourcesAreShown on the page and in gauges, and not any more when the lane has ended.
func TestSourcesAreShown(t *testing.T) {
	d, _ := testExporter(t, &picky{})
	told := ""
	l := &traceLane{exporter: d, gauges: "3", tell: func(text string) { told = text }}
	known, waiting := d.led.Sources("3")
	for _, tc := range []struct {
		of   sampler.Sources
		text string
	}{
		{sampler.Sources{Known: 3, Waiting: 7, For: "as-1"}, "3 sources; 7 traces wait for one that is behind, most for one of as-1"},
		{sampler.Sources{Known: 2}, "2 sources"},
		{sampler.Sources{}, ""},
	} {
		l.showSources(tc.of)
		if told != tc.text || testutil.ToFloat64(known) != float64(tc.of.Known) || testutil.ToFloat64(waiting) != float64(tc.of.Waiting) {
			t.Errorf("%+v: %q, %v known, %v wait", tc.of, told, testutil.ToFloat64(known), testutil.ToFloat64(waiting))
		}
	}
	(&traceLane{exporter: d}).showSources(sampler.Sources{Known: 1}) // of a replay
}
