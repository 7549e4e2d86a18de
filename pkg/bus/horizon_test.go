package bus

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
)

// TestEachPartitionHasAHorizon: what routers have not routed holds the mark of its partition,
// and so does a router's consumer that does not exist; the marks of others advance.
func TestEachPartitionHasAHorizon(t *testing.T) {
	c := testHub(t, testBroker(t), 2)
	h := NewHorizon(&Hub{Conn: c, Topology: Topology{Partitions: 2}}, ledger.New(prometheus.NewRegistry()), quiet)
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
		for p, before := range h.Watermark().Before {
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
	open := func(p int) *Lane {
		t.Helper()
		l, err := c.OpenLane(t.Context(), LaneConfig{Stream: "TRACES", Filter: PartitionFilter(otlpwire.Traces, p), Name: RouterLane + strconv.Itoa(p)})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	send := func(n int) {
		t.Helper()
		for _, name := range names {
			m := logsMessage(name, n)
			m.Subject = Subject(otlpwire.Traces, name)
			if _, err := c.Publish(t.Context(), m); err != nil {
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
		if err := l.Ack(message(ctx, t, l).Seq); err != nil {
			t.Fatal(err)
		}
		waitLag(t, l, left)
	}

	if _, err := c.js.CreateConsumer(t.Context(), "TRACES", jetstream.ConsumerConfig{Durable: RouterLane + "01", AckPolicy: jetstream.AckAllPolicy}); err != nil {
		t.Fatal(err)
	}
	want("somebody else's consumer", look("0 of 2 routers"), 0, 0)
	open(1)
	want("one router's consumer, and nothing sent", look("1 of 2 routers"), 0, 2)
	open(0)
	want("two", look(""), 3, 3)
	send(1)
	want("nothing is routed", look(""), 3, 3)
	route(1, 0)
	want("the second partition is routed", look(""), 3, 5)
	send(2)
	route(1, 0)
	want("and again", look(""), 3, 6)
	route(0, 1)
	want("one of two in the first one", look(""), 3, 7)
	route(0, 0)
	want("all", look(""), 8, 8)
	h.hub.Topology.Partitions = 3
	want("another number of partitions", look("2 partitions, not 3"), 8, 8)
}

// TestAHorizonThatStands: without routers their progress is not known, and that is reported.
func TestAHorizonThatStands(t *testing.T) {
	t.Parallel()
	c := testHub(t, testBroker(t), 1)
	var said logtest.Log
	led := ledger.New(prometheus.NewRegistry())
	h := NewHorizon(&Hub{Conn: c, Topology: Topology{Partitions: 1}}, led, said.Logger(slog.LevelInfo))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); h.Run(ctx) }()
	defer func() { cancel(); <-done }()
	seconds, stalls := led.Stall("traces", "", "horizon")
	until(t, "a stall", func() bool {
		return testutil.ToFloat64(stalls) == 1 && said.Says("msg=stalled", "0 of 1 routers", "idle instances")
	})
	if _, err := c.OpenLane(t.Context(), LaneConfig{Stream: "TRACES", Filter: PartitionFilter(otlpwire.Traces, 0), Name: RouterLane + "0"}); err != nil {
		t.Fatal(err)
	}
	until(t, "it goes on", func() bool { return testutil.ToFloat64(seconds) == 0 && said.Says("no longer stalled") })
}

// TestAFullSpansIsSeen: the watermark reports that SPANS has no room for the routers.
func TestAFullSpansIsSeen(t *testing.T) {
	t.Parallel()
	top := DefaultTopology()
	top.Partitions, top.MaxBytes = 1, 16<<20
	c, err := OpenHub(t.Context(), Config{Name: "test", InProcess: testBroker(t)}, top, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	h := NewHorizon(&Hub{Conn: c, Topology: top}, ledger.New(prometheus.NewRegistry()), quiet)
	if _, err := c.OpenLane(t.Context(), LaneConfig{Stream: "TRACES", Filter: PartitionFilter(otlpwire.Traces, 0), Name: RouterLane + "0"}); err != nil {
		t.Fatal(err)
	}
	look := func(full bool) {
		t.Helper()
		if err := h.look(t.Context()); err != nil || h.Watermark().Full != full {
			t.Errorf("%+v, %v", h.Watermark(), err)
		}
	}
	look(false)
	for err == nil {
		m := logsMessage("as-1", 0)
		m.Subject, m.Header.ID, m.Body = SpansSubject(0), "", make([]byte, 1000<<10)
		_, err = c.Publish(t.Context(), m)
	}
	if !errors.Is(err, ErrFull) {
		t.Fatal(err)
	}
	look(true)
	if err := c.Remove(t.Context(), Spans, "", 3); err != nil {
		t.Fatal(err)
	}
	look(false)
}
