package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
)

// world is a hub of two partitions whose streams have one MiB, and a keeper of it.
type world struct {
	*testing.T
	broker *broker.Broker
	conn   *bus.Conn
	led    *ledger.Ledger
	said   logtest.Log
	names  []string // an instance of each partition
	lanes  map[string]*bus.Lane
	shared []membership.Shared
	*Keeper
}

var topology = bus.Topology{Partitions: 2, Replicas: 1, MaxAge: time.Hour, MaxBytes: 1 << 20, InstanceShare: 0.5}

// newWorld returns one with lanes of LOGS that the configuration names, a-0 and a-1 for instance.
func newWorld(t *testing.T, backends ...string) *world {
	t.Helper()
	t.Parallel()
	b, err := broker.Start(broker.Config{Name: "test", Dir: t.TempDir(), MaxPayload: 2 << 20}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	w := &world{T: t, broker: b, led: ledger.New(prometheus.NewRegistry()), lanes: map[string]*bus.Lane{}, names: make([]string, 2)}
	if w.conn, err = bus.OpenHub(t.Context(), bus.Config{Name: "test", InProcess: b}, topology, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.conn.Close)
	for i := 0; slices.Contains(w.names, ""); i++ {
		name := "as-" + strconv.Itoa(i)
		w.names[partition.OfInstance(name, 2)] = name
	}
	var shared []membership.Shared
	for _, backend := range backends {
		for p := range 2 {
			shared = append(shared, membership.Shared{LaneConfig: bus.LaneConfig{Stream: "LOGS", Filter: bus.PartitionFilter(otlpwire.Logs, p), Name: fmt.Sprintf("%s-%d", backend, p)}})
		}
	}
	for _, s := range shared {
		w.open(s.LaneConfig)
	}
	w.shared = shared
	w.Keeper = New(func() *bus.Conn { return w.conn }, func() bool { return true }, topology, shared, w.led, w.said.Logger(slog.LevelInfo))
	w.Keeper.settle = 0
	return w
}

func (w *world) open(cfg bus.LaneConfig) {
	w.Helper()
	l, err := w.conn.OpenLane(w.Context(), cfg)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(l.Close)
	w.lanes[cfg.Name] = l
}

func (w *world) stream(name string) *kept {
	return w.streams[slices.IndexFunc(w.streams, func(s *kept) bool { return s.name == name })]
}

// keep lets the keeper look once, and returns the first sequence that LOGS has then.
func (w *world) keep() uint64 {
	w.Helper()
	if err := w.look(w.Context(), w.stream("LOGS")); err != nil {
		w.Fatal(err)
	}
	return w.state("LOGS").FirstSeq
}

func (w *world) state(stream string) bus.StreamState {
	w.Helper()
	state, err := w.conn.State(w.Context(), stream)
	if err != nil {
		w.Fatal(err)
	}
	return state
}

// send publishes 10 kB of logs of an instance of a partition.
func (w *world) send(p int) error {
	_, err := w.conn.Publish(w.Context(), bus.Message{
		Subject: bus.Subject(otlpwire.Logs, w.names[p]), Body: make([]byte, 10_000),
		Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: time.Now().UnixNano()},
	})
	return err
}

// fill sends until the stream refuses, and returns how many it took.
func (w *world) fill(p int) (n int) {
	w.Helper()
	for ; n < 1000; n++ {
		if err := w.send(p); errors.Is(err, bus.ErrFull) {
			return n
		} else if err != nil {
			w.Fatal(err)
		}
	}
	w.Fatal("the stream takes everything")
	return
}

// read reads a lane and finishes what came, up to a sequence. It returns the sequences.
func (w *world) read(lane string, upTo uint64) (got []uint64) {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), time.Minute)
	defer cancel()
	l := w.lanes[lane]
	for has := false; !has; {
		d, err := l.Next(ctx)
		if err != nil {
			w.Fatalf("lane %s: %v", lane, err)
		}
		if d.Seq > 0 {
			got = append(got, d.Seq)
			if err := l.Ack(d.Seq); err != nil {
				w.Fatal(err)
			}
		}
		if d.Seq >= upTo {
			break
		}
		if d.Idle {
			if has, err = l.Has(ctx, d.After, upTo); err != nil {
				w.Fatal(err)
			}
		}
	}
	w.until("the floor of "+lane, func() bool {
		floors, _, err := w.conn.Floors(ctx, "LOGS")
		return err == nil && (len(got) == 0 || floors[lane].Done >= got[len(got)-1])
	})
	return got
}

func (w *world) until(what string, done func() bool) {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), time.Minute)
	defer cancel()
	if !backoff.Until(ctx, done) {
		w.Fatalf("%s: never", what)
	}
}

func gauge(of func(string) (owed, room, left prometheus.Gauge), stream string) (owed, room, left float64) {
	a, b, c := of(stream)
	return testutil.ToFloat64(a), testutil.ToFloat64(b), testutil.ToFloat64(c)
}

// TestWhatIsOwedStays: one of two backends is away until the stream is full. It refuses, the keeper
// removes what both have and nothing else, and the backend gets everything when it is back.
func TestWhatIsOwedStays(t *testing.T) {
	w := newWorld(t, "a", "b")
	n := w.fill(0)
	if n < 90 {
		t.Fatalf("a stream of %v takes %d messages of 10 kB", topology.MaxBytes, n)
	}
	w.read("a-0", uint64(n))
	if first := w.keep(); first != 1 {
		t.Fatalf("the first message of %d is %d, and b has none", n, first)
	}
	if owed, room, _ := gauge(w.led.Stream, "LOGS"); owed < 900_000 || room > 100_000 {
		t.Errorf("%v bytes are owed, there is room for %v", owed, room)
	}
	if err := w.send(1); !errors.Is(err, bus.ErrFull) {
		t.Fatalf("a full stream: %v", err)
	}
	got := w.read("b-0", 3)
	if first := w.keep(); first != 4 { // to b-1 nothing is owed
		t.Errorf("b has 3 messages, and the first one is %d", first)
	}
	n += w.fill(0)
	w.read("a-0", uint64(n))
	got = append(got, w.read("b-0", uint64(n))...)
	for i, seq := range got {
		if seq != uint64(i+1) {
			t.Fatalf("b has got %v", got)
		}
	}
	if len(got) != n {
		t.Errorf("b has got %d of %d", len(got), n)
	}
	w.keep()
	state := w.state("LOGS")
	if left := uint64(topology.MaxBytes) - state.Bytes; left < uint64(topology.MaxBytes)/leastRoom || state.Messages < 40 {
		t.Errorf("%d bytes of room, %d messages of the past", left, state.Messages)
	}
	if removed := testutil.ToFloat64(w.led.Removed("LOGS")); removed != float64(state.FirstSeq-1) {
		t.Errorf("%v removed, the first one is %d", removed, state.FirstSeq)
	}
	if err := w.send(0); err != nil {
		t.Error(err)
	}
}

// miscounting is a hub that has counted nothing for any lane.
type miscounting struct{ *bus.Conn }

func (m miscounting) Floors(ctx context.Context, stream string) (map[string]bus.Floor, bus.StreamState, error) {
	floors, state, err := m.Conn.Floors(ctx, stream)
	for name, f := range floors {
		f.Lag = 0
		floors[name] = f
	}
	return floors, state, err
}

// TestCountsAreNotBelieved: a lane that the hub has counted nothing for may have a message.
func TestCountsAreNotBelieved(t *testing.T) {
	w := newWorld(t, "a")
	for range 3 {
		if err := w.send(1); err != nil {
			t.Fatal(err)
		}
	}
	w.fill(0)
	s := w.stream("LOGS")
	s.age = time.Nanosecond
	w.Keeper.conn = func() hub { return miscounting{w.conn} }
	if first := w.keep(); first != 1 {
		t.Fatalf("the first one is %d", first)
	}
	w.read("a-1", 3)
	s.agedAt = time.Time{}
	if first := w.keep(); first != 4 {
		t.Errorf("the first one is %d, want that of a-0", first)
	}
	w.read("a-0", 5)
	s.agedAt = time.Time{}
	if first := w.keep(); first != 6 {
		t.Errorf("the first one is %d, want 6", first)
	}
}

// unreadable is a hub that finds no message of a lane, though it has counted some.
type unreadable struct{ *bus.Conn }

func (u unreadable) First(ctx context.Context, stream, filter string, seq uint64) (uint64, time.Time, error) {
	if filter != "" {
		return 0, time.Time{}, nil
	}
	return u.Conn.First(ctx, stream, filter, seq)
}

// TestWhatCannotBeReadStays: a server whose disk fails says that there is no message.
func TestWhatCannotBeReadStays(t *testing.T) {
	w := newWorld(t, "a")
	w.fill(0)
	w.Keeper.conn = func() hub { return unreadable{w.conn} }
	if err := w.look(t.Context(), w.stream("LOGS")); err == nil || !strings.Contains(err.Error(), "a-0") {
		t.Errorf("got %v", err)
	}
	if first := w.state("LOGS").FirstSeq; first != 1 {
		t.Errorf("the first one is %d", first)
	}
}

// TestLanesOfOthersHold: one that has not begun holds everything, and so does one of no backend
// that is configured, until its consumer is deleted.
func TestLanesOfOthersHold(t *testing.T) {
	w := newWorld(t, "a")
	n := uint64(w.fill(0))
	w.read("a-0", n)
	s := w.stream("LOGS")
	s.lanes["late-0"] = bus.PartitionFilter(otlpwire.Logs, 0)
	if first := w.keep(); first != 1 || !w.said.Says("have not read anything yet", "late-0") {
		t.Errorf("the first one is %d", first)
	}
	delete(s.lanes, "late-0")
	w.open(bus.LaneConfig{Stream: "LOGS", Filter: bus.PartitionFilter(otlpwire.Logs, 0), Name: "gone-0"})
	w.open(bus.LaneConfig{Stream: "LOGS", Filter: bus.PartitionFilter(otlpwire.Logs, 0), Name: bus.ReplayLane("x", 0)}) // holds nothing
	if first := w.keep(); first != 1 || !w.said.Says("not configured", "gone-0") || testutil.ToFloat64(w.led.Unread("LOGS")) != 1 {
		t.Errorf("the first one is %d, %v lanes are unread", first, testutil.ToFloat64(w.led.Unread("LOGS")))
	}
	if err := w.conn.DropLane(w.Context(), "LOGS", "gone-0"); err != nil {
		t.Fatal(err)
	}
	if first := w.keep(); first < 5 || testutil.ToFloat64(w.led.Unread("LOGS")) != 0 {
		t.Errorf("the first one is %d, %v lanes are unread", first, testutil.ToFloat64(w.led.Unread("LOGS")))
	}
	if lost := testutil.ToFloat64(w.led.Abandoned("LOGS")); lost != float64(n) || !w.said.Says("ERROR", "gone-0", "abandoned") {
		t.Errorf("%v messages were given up, want %d", lost, n)
	}
}

// TestAQuietLaneHoldsWhatItIsOwed, and nothing that stands before: its floor is far behind.
func TestAQuietLaneHoldsWhatItIsOwed(t *testing.T) {
	w := newWorld(t, "a")
	for range 60 {
		if err := w.send(0); err != nil {
			t.Fatal(err)
		}
	}
	w.read("a-0", 60)
	if err := w.send(1); err != nil { // 61
		t.Fatal(err)
	}
	n := 61 + uint64(w.fill(0))
	w.read("a-0", n)
	for range 3 { // told when the floor has stood for a look
		w.stream("LOGS").looked = time.Now() // as if all of it had come long ago
		if first := w.keep(); first < 40 || first > 61 {
			t.Errorf("of %d the first one is %d, and 61 is owed", n, first)
		}
	}
	if owed, _, _ := gauge(w.led.Stream, "LOGS"); owed < 300_000 || owed > 500_000 {
		t.Errorf("%v bytes are owed", owed)
	}
}

// TestAnotherKeeperStandsIn where the first one of the sinks does nothing for long.
func TestAnotherKeeperStandsIn(t *testing.T) {
	w := newWorld(t, "a")
	w.read("a-0", uint64(w.fill(0)))
	s := w.stream("LOGS")
	for _, step := range []struct {
		ago   time.Duration
		frees bool
	}{{0, false}, {0, false}, {standIn, true}, {standIn, false}} {
		s.tight = s.tight.Add(-step.ago)
		before := w.state("LOGS").FirstSeq
		if err := w.standIn(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		if frees := w.state("LOGS").FirstSeq > before; frees != step.frees || frees != w.said.Says("made room", "LOGS") && step.frees {
			t.Errorf("%v: %v", step, frees)
		}
	}
}

// TestOldMessagesGo: beyond the age, when they are finished.
func TestOldMessagesGo(t *testing.T) {
	w := newWorld(t, "a")
	s := w.stream("LOGS")
	for range 6 {
		if err := w.send(0); err != nil {
			t.Fatal(err)
		}
	}
	w.read("a-0", 4)
	if first := w.keep(); first != 1 {
		t.Errorf("within the age, and the first one is %d", first)
	}
	s.age, s.agedAt = time.Nanosecond, time.Time{}
	if first := w.keep(); first != 5 {
		t.Errorf("the first one is %d, want 5", first)
	}
}

// TestAStreamMadeAgain: what was known of the one before is forgotten.
func TestAStreamMadeAgain(t *testing.T) {
	w := newWorld(t, "a")
	n := w.fill(1)
	w.read("a-1", uint64(n))
	if w.keep() == 1 {
		t.Fatal("nothing was removed")
	}
	w.api("STREAM.DELETE.LOGS", "")
	if err := w.conn.EnsureHub(w.Context(), topology); err != nil {
		t.Fatal(err)
	}
	w.open(bus.LaneConfig{Stream: "LOGS", Filter: bus.PartitionFilter(otlpwire.Logs, 0), Name: "a-0"})
	w.open(bus.LaneConfig{Stream: "LOGS", Filter: bus.PartitionFilter(otlpwire.Logs, 1), Name: "a-1"})
	w.fill(0)
	if first := w.keep(); first != 1 {
		t.Errorf("the first one is %d", first)
	}
}

// TestDecisionsStay: as long as a span that was stored before them is not finished.
func TestDecisionsStay(t *testing.T) {
	w := newWorld(t)
	cfg := bus.LaneConfig{Stream: bus.Spans, Filter: bus.SpansSubject(0), Name: "tempo-0"}
	w.Keeper = New(func() *bus.Conn { return w.conn }, func() bool { return true }, topology, []membership.Shared{{LaneConfig: cfg, Journal: bus.DecisionsSubject(0)}}, w.led, w.said.Logger(slog.LevelInfo))
	w.decisionsAge = 0
	publish := func(subject string) {
		t.Helper()
		if _, err := w.conn.Publish(t.Context(), bus.Message{Subject: subject, Body: []byte("x"), Header: envelope.Header{Items: 1, Arrival: time.Now().UnixNano()}}); err != nil {
			t.Fatal(err)
		}
	}
	first := func(want uint64) {
		t.Helper()
		w.decided = time.Time{}
		if err := w.decisions(t.Context(), true); err != nil {
			t.Fatal(err)
		}
		if got := w.state(bus.Decisions).FirstSeq; got != want {
			t.Errorf("the first decision is %d, want %d", got, want)
		}
	}
	publish(bus.DecisionsSubject(0))
	publish(bus.SpansSubject(0))
	publish(bus.DecisionsSubject(0))
	first(2) // the lane has not begun
	w.open(cfg)
	first(2)
	d, err := w.lanes["tempo-0"].Next(t.Context())
	for ; err == nil && d.Seq == 0; d, err = w.lanes["tempo-0"].Next(t.Context()) {
	}
	if err != nil {
		t.Fatal(err)
	}
	first(2)
	if err := w.lanes["tempo-0"].Ack(d.Seq); err != nil {
		t.Fatal(err)
	}
	w.until("the floor", func() bool {
		floors, _, err := w.conn.Floors(t.Context(), bus.Spans)
		return err == nil && floors["tempo-0"].Done == d.Seq
	})
	first(3)
}

// TestFullDecisions: when decisions fill their stream older ones go, at each look younger ones, but for what a lane that stands
// may ask for; that writes none.
func TestFullDecisions(t *testing.T) {
	w := newWorld(t)
	var shared []membership.Shared
	for p := range 2 {
		cfg := bus.LaneConfig{Stream: bus.Spans, Filter: bus.SpansSubject(p), Name: fmt.Sprint("tempo-", p)}
		shared = append(shared, membership.Shared{LaneConfig: cfg, Journal: bus.DecisionsSubject(p)})
		w.open(cfg)
	}
	w.Keeper = New(func() *bus.Conn { return w.conn }, func() bool { return true }, topology, shared, w.led, w.said.Logger(slog.LevelInfo))
	publish := func(subject string, size int) error {
		_, err := w.conn.Publish(t.Context(), bus.Message{Subject: subject, Body: make([]byte, size), Header: envelope.Header{Items: 1, Arrival: time.Now().UnixNano()}})
		return err
	}
	for _, subject := range []string{bus.SpansSubject(0), bus.DecisionsSubject(0), bus.DecisionsSubject(0)} { // the span is not finished
		if err := publish(subject, 100); err != nil {
			t.Fatal(err)
		}
	}
	w.until("the stream is full", func() bool {
		return errors.Is(publish(bus.DecisionsSubject(1), 1000), bus.ErrFull)
	})
	before := w.state(bus.Decisions)
	after := before
	for look := 0; after.Bytes > after.MaxBytes/16*15; look++ { // a sink that is not the first, too
		if err := w.decisions(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		if after = w.state(bus.Decisions); look > 40 {
			t.Fatalf("no room after %d looks: %+v", look, after)
		}
	}
	if after.FirstSeq != 1 || after.Messages < 2 {
		t.Errorf("what the lane that stands may ask for is gone: %+v", after)
	}
	for _, first := range []bool{false, true} { // now it has room
		if err := w.decisions(t.Context(), first); err != nil {
			t.Fatal(err)
		}
	}
	if w.state(bus.Decisions).Messages != after.Messages {
		t.Error("decisions were removed for which there is room")
	}
	if _, room, _ := gauge(w.led.Stream, bus.Decisions); room == 0 {
		t.Error("nobody tells of its room")
	}
	if err := publish(bus.DecisionsSubject(1), 1000); err != nil {
		t.Error(err)
	}
}

// TestOneKeeper: whoever is not the first of the sinks removes nothing and tells nothing.
func TestOneKeeper(t *testing.T) {
	w := newWorld(t, "a")
	n := w.fill(0)
	w.read("a-0", uint64(n))
	var first atomic.Bool
	k := New(func() *bus.Conn { return w.conn }, first.Load, topology, []membership.Shared{{LaneConfig: bus.LaneConfig{Stream: "LOGS", Filter: bus.PartitionFilter(otlpwire.Logs, 0), Name: "a-0"}}}, w.led, w.said.Logger(slog.LevelInfo))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); k.Run(ctx) }()
	defer func() { cancel(); <-done }()
	w.led.Keeper.Set(7)
	w.until("a look that is none", func() bool { return testutil.ToFloat64(w.led.Keeper) == 0 })
	if first := w.state("LOGS").FirstSeq; first != 1 {
		t.Errorf("the first one is %d", first)
	}
	first.Store(true)
	w.until("it works", func() bool { return testutil.ToFloat64(w.led.Keeper) == 1 && w.state("LOGS").FirstSeq > 1 })
	w.until("room", func() bool { _, room, _ := gauge(w.led.Stream, "LOGS"); return room > 1_000_000 })
	first.Store(false)
	w.until("it does not", func() bool { return testutil.ToFloat64(w.led.Keeper) == 0 })
	if _, room, _ := gauge(w.led.Stream, "LOGS"); room != 0 {
		t.Errorf("it tells of %v bytes of room", room)
	}
}

// TestStreamsOfBefore: one that throws its oldest away, or allows nobody to remove anything, is told.
func TestStreamsOfBefore(t *testing.T) {
	w := newWorld(t, "a")
	nc, err := nats.Connect("", nats.InProcessServer(w.broker))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), "LOGS")
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	cfg.Discard, cfg.MaxAge, cfg.DenyPurge = jetstream.DiscardOld, time.Hour, true
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	for range 200 {
		if err := w.send(0); err != nil {
			t.Fatal(err)
		}
	}
	w.keep()
	if !w.said.Says("ERROR", "LOGS", "discard: old, max_age, deny_purge", "docs/upgrading.md") {
		t.Error("nobody says so")
	}
}
