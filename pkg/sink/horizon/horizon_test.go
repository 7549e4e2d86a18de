package horizon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/sampling/versions"
)

// TestEachPartitionHasAHorizon: what routers have not routed holds the mark of its partition,
// and so does a router's consumer that does not exist; the marks of others advance.
func TestEachPartitionHasAHorizon(t *testing.T) {
	c, led := hub(t, 2)
	h := New(&bus.Hub{Conn: c, Topology: bus.Topology{Partitions: 2}}, versions.DefaultConfig().Late, led, slog.New(slog.DiscardHandler))
	names := make([]string, 2) // an instance in each
	for i := 0; slices.Contains(names, ""); i++ {
		name := "as-" + strconv.Itoa(i)
		names[partition.OfInstance(name, 2)] = name
	}
	// look returns, by partition, the number of the look that set its mark, from 1; 0 for none.
	var starts []time.Time
	look := func(complaint string) (at [2]int) {
		t.Helper()
		start := time.Now()
		err := h.look(t.Context())
		if (err == nil) != (complaint == "") || err != nil && !strings.Contains(err.Error(), complaint) {
			t.Fatalf("got %v, want %q", err, complaint)
		}
		starts = append(starts, start)
		for p, before := range h.Latest().Before {
			for i, start := range starts {
				if !before.Before(start) {
					at[p] = i + 1
				}
			}
		}
		return at
	}
	want := func(what string, got [2]int, first, second int) {
		t.Helper()
		if got != [2]int{first, second} {
			t.Errorf("%s: the marks are of looks %v, want %d and %d", what, got, first, second)
		}
	}
	open := func(p int) *bus.Lane {
		t.Helper()
		l, err := c.OpenLane(t.Context(), bus.LaneConfig{Stream: "TRACES", Filter: bus.PartitionFilter(otlpwire.Traces, p), Name: bus.RouterLane + strconv.Itoa(p)})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	send := func(n int) {
		t.Helper()
		for _, name := range names {
			if _, err := c.Publish(t.Context(), bus.Message{Subject: bus.Subject(otlpwire.Traces, name), Header: envelope.Header{
				ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: time.Now().UnixNano(), ID: fmt.Sprint(name, "-", n),
			}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	route := func(p int, left uint64) { // one message
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		l := open(p)
		defer l.Close()
		l.Run(ctx, func(m bus.Delivery) bool { return m.Seq == 0 || l.Ack(m.Seq) != nil })
		if !backoff.Until(ctx, func() bool { at, err := l.Progress(ctx); return err == nil && at.Lag == left }) {
			t.Fatalf("partition %d: not %d messages are left", p, left)
		}
	}

	if _, err := c.OpenLane(t.Context(), bus.LaneConfig{Stream: "TRACES", Filter: bus.PartitionFilter(otlpwire.Traces, 1), Name: bus.RouterLane + "01"}); err != nil {
		t.Fatal(err)
	}
	want("a consumer of another name", look("0 of 2 routers"), 0, 0)
	open(1)
	want("one router's consumer, and nothing sent", look("1 of 2 routers"), 0, 2)
	open(0)
	want("two", look(""), 3, 3)
	send(1)
	want("nothing is routed", look(""), 3, 3)
	route(1, 0)
	want("the second partition is routed", look(""), 3, 5)
	if got := h.Latest().Routed; !slices.Equal(got, []uint64{0, 2}) {
		t.Errorf("routed up to %d, want 0 and 2", got)
	}
	send(2)
	route(1, 0)
	want("and again", look(""), 3, 6)
	route(0, 1)
	want("one of two in the first one", look(""), 3, 7)
	route(0, 0)
	want("all", look(""), 8, 8)
	if got := h.Latest().Routed; !slices.Equal(got, []uint64{4, 4}) {
		t.Errorf("routed up to %d, want 4 and 4", got)
	}
	h.hub.Topology.Partitions = 3
	want("another number of partitions", look("2 partitions, not 3"), 8, 8)
}

// TestAHorizonThatStands: without routers their progress is not known, and that is reported.
func TestAHorizonThatStands(t *testing.T) {
	t.Parallel()
	c, led := hub(t, 1)
	var said logtest.Log
	h := New(&bus.Hub{Conn: c, Topology: bus.Topology{Partitions: 1}}, versions.DefaultConfig().Late, led, said.Logger(slog.LevelInfo))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); h.Run(ctx) }()
	defer func() { cancel(); <-done }()
	seconds, stalls := led.Stall("traces", "", "horizon")
	until := func(what string, done func() bool) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		if !backoff.Until(ctx, done) {
			t.Fatalf("%s: never", what)
		}
	}
	until("a stall", func() bool {
		return testutil.ToFloat64(stalls) == 1 && said.Says("msg=stalled", "0 of 1 routers", "idle instances")
	})
	if _, err := c.OpenLane(t.Context(), bus.LaneConfig{Stream: "TRACES", Filter: bus.PartitionFilter(otlpwire.Traces, 0), Name: bus.RouterLane + "0"}); err != nil {
		t.Fatal(err)
	}
	until("it goes on", func() bool { return testutil.ToFloat64(seconds) == 0 && said.Says("no longer stalled") })
}

// TestAFullSpansIsSeen: the watermark reports that SPANS has no room for the routers.
func TestAFullSpansIsSeen(t *testing.T) {
	t.Parallel()
	c, led := hub(t, 1)
	h := New(&bus.Hub{Conn: c, Topology: bus.Topology{Partitions: 1}}, versions.DefaultConfig().Late, led, slog.New(slog.DiscardHandler))
	if _, err := c.OpenLane(t.Context(), bus.LaneConfig{Stream: "TRACES", Filter: bus.PartitionFilter(otlpwire.Traces, 0), Name: bus.RouterLane + "0"}); err != nil {
		t.Fatal(err)
	}
	look := func(full bool) {
		t.Helper()
		if err := h.look(t.Context()); err != nil || h.Latest().Full != full {
			t.Errorf("%+v, %v", h.Latest(), err)
		}
	}
	look(false)
	var err error
	for err == nil {
		_, err = c.Publish(t.Context(), bus.Message{Subject: bus.SpansSubject(0), Header: envelope.Header{ContentType: envelope.ContentTypeFrames, Arrival: 1}, Body: make([]byte, 1000<<10)})
	}
	if !errors.Is(err, bus.ErrFull) {
		t.Fatal(err)
	}
	look(true)
	if err := c.Remove(t.Context(), bus.Spans, "", 3); err != nil {
		t.Fatal(err)
	}
	look(false)
}

// TestReach: what is about to be removed is out of reach, and more than may be read at once is.
func TestReach(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	r := &Reach{MaxBytes: 1000}
	for _, tc := range []struct {
		after time.Duration
		state bus.StreamState
		want  Readable
	}{
		{0, bus.StreamState{FirstSeq: 1}, Readable{1, 0}},
		{time.Second, bus.StreamState{FirstSeq: 1, LastSeq: 100, Messages: 100, Bytes: 5000}, Readable{1, 20}},
		{2 * time.Second, bus.StreamState{FirstSeq: 1, LastSeq: 160, Messages: 160, Bytes: 8000, Partitions: 8}, Readable{1, 160}},
		{3 * time.Second, bus.StreamState{FirstSeq: 41, LastSeq: 200, Messages: 160, Bytes: 8000, Partitions: 8}, Readable{41 + 200 + 9, 160}},
		{17 * time.Second, bus.StreamState{FirstSeq: 41, LastSeq: 201, Messages: 160, Bytes: 8000, Partitions: 8}, Readable{41 + 41 + 10, 160}},
		{60 * time.Second, bus.StreamState{FirstSeq: 41, LastSeq: 201, Messages: 160, Bytes: 8000, Partitions: 8}, Readable{41 + 10, 160}},
		{61 * time.Second, bus.StreamState{FirstSeq: 3, LastSeq: 4, Messages: 2, Bytes: 50_000}, Readable{3, 1}}, // another stream
	} {
		if got := r.Look(tc.state, now.Add(tc.after)); got != tc.want {
			t.Errorf("after %v: %+v, want %+v", tc.after, got, tc.want)
		}
	}
}

// hub returns a hub with so many partitions.
func hub(t *testing.T, partitions int) (*bus.Conn, *ledger.Ledger) {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	b, err := broker.Start(broker.Config{Name: "hub", Dir: t.TempDir(), MaxPayload: 2 << 20}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	top := bus.DefaultTopology()
	top.Partitions, top.MaxBytes = partitions, 64<<20
	conn, err := bus.OpenHub(t.Context(), bus.Config{Name: "sink", InProcess: b}, top, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn, ledger.New(prometheus.NewRegistry())
}

// TestMain fails when the tests leave goroutines running.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
