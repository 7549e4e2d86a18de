package bus

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestLanesForAWhile: a lane that is told of later begins where it says and reads what it
// names, has the owner of the lasting lane, goes on after an owner that stops, and ends
// when it is not wanted any more.
func TestLanesForAWhile(t *testing.T) {
	b := testBroker(t)
	hub := testHub(t, b, 2)
	publish(t, hub, "as-1", 0, 40)
	publish(t, hub, "as-2", 0, 40)
	subjects, err := hub.Subjects(t.Context(), "LOGS", "otlp.logs.>")
	if err != nil || len(subjects) != 2 {
		t.Fatalf("%v, %v", subjects, err)
	}
	var filter, part string
	for s, n := range subjects {
		if p, instance := SubjectPartition(s); instance == "as-2" && n == 40 {
			filter, part = s, p
		}
	}
	got, ended := make(chan uint64, 100), make(chan struct{})
	lane := Shared{Signal: "logs", Backend: "test", Quiet: true, Partitions: 2, LaneConfig: LaneConfig{Stream: "LOGS", Filters: []string{filter}, Name: "replay", Start: 61, Raw: true}}
	_, _ = fmt.Sscan(part, &lane.Partition)
	lane.Run = func(ctx context.Context, l *Lane) {
		defer close(ended)
		defer l.Close()
		l.Run(ctx, func(d Delivery) bool {
			if d.Seq > 0 {
				got <- d.Seq
				return l.Ack(d.Seq) == nil
			}
			return true
		})
	}
	conn := connectTo(t, b, "a")
	m := NewMembers(&Hub{Conn: conn, topology: DefaultTopology()}, "sink", "a", ledger.New(prometheus.NewRegistry()), quiet)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); m.Run(ctx, nil) }()
	m.Also([]Shared{lane})
	for want := uint64(61); want <= 80; want++ {
		select {
		case seq := <-got:
			if seq != want {
				t.Fatalf("message %d, want %d", seq, want)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("message %d does not come", want)
		}
	}
	m.Also(nil)
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("a lane that is not wanted goes on")
	}
	// Asked for again, it begins at its floor: nothing.
	ended = make(chan struct{})
	m.Also([]Shared{lane})
	select {
	case seq := <-got:
		t.Errorf("message %d again", seq)
	case <-time.After(2 * time.Second):
	}
	stop()
	<-done
	<-ended
	if _, err := hub.LaneLag(t.Context(), lane.LaneConfig); err != nil {
		t.Errorf("the floor is gone: %v", err)
	}
	for range 2 {
		if err := hub.DropLane(t.Context(), "LOGS", "replay"); err != nil {
			t.Error(err)
		}
	}
}

func TestLookingBack(t *testing.T) {
	b := testBroker(t)
	c := testHub(t, b, 3)
	before := time.Now()
	if seq, err := c.SequenceAt(t.Context(), "LOGS", before); err != nil || seq != 1 {
		t.Errorf("of an empty stream: %d, %v", seq, err)
	}
	publish(t, c, "as-1", 0, 10)
	between := time.Now()
	publish(t, c, "as-1", 10, 20)
	for at, want := range map[time.Time]uint64{before.Add(-time.Hour): 1, before: 1, between: 11, time.Now().Add(time.Hour): 21} {
		if seq, err := c.SequenceAt(t.Context(), "LOGS", at); err != nil || seq != want {
			t.Errorf("at %v: %d, %v; want %d", at, seq, err, want)
		}
	}
	if n, err := c.Partitions(t.Context()); err != nil || n != 3 {
		t.Errorf("%d partitions, %v", n, err)
	}
	r, err := c.OpenReaderOf(t.Context(), ReaderConfig{Stream: "LOGS", From: 5, Headers: true})
	if err != nil || r.Left() != 16 {
		t.Fatalf("%d left, %v", r.Left(), err)
	}
	defer r.Close()
	d, err := r.Next(t.Context())
	if err != nil || d.Err != nil || len(d.Body) != 0 || d.Size == 0 || d.Seq != 5 || r.Left() != 15 {
		t.Errorf("%+v, %v, %d left", d, err, r.Left())
	}
	for _, line := range []string{"1", "2"} {
		if err := c.Record(t.Context(), "replay.x", []byte(line)); err != nil {
			t.Fatal(err)
		}
	}
	lines, err := c.Recorded(t.Context(), "replay.x")
	if err != nil || len(lines) != 2 || string(lines[1]) != "2" {
		t.Errorf("%q, %v", lines, err)
	}
	if lines, err := c.Recorded(t.Context(), "replay.y"); err != nil || len(lines) != 0 {
		t.Errorf("%q, %v", lines, err)
	}
}

func TestBucket(t *testing.T) {
	c := testHub(t, testBroker(t), 1)
	b, err := c.Replays(t.Context(), DefaultTopology())
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	if _, _, err := b.Get(ctx, "a.b"); !errors.Is(err, ErrMissing) {
		t.Errorf("get: %v", err)
	}
	if err := b.Create(ctx, "a.b", []byte("1")); err != nil {
		t.Error(err)
	}
	if err := b.Create(ctx, "a.b", []byte("2")); !errors.Is(err, ErrExists) {
		t.Errorf("create twice: %v", err)
	}
	v, rev, err := b.Get(ctx, "a.b")
	if err != nil || string(v) != "1" {
		t.Errorf("%q, %v", v, err)
	}
	if _, err := b.Store(ctx, "a.b", []byte("3"), rev); err != nil {
		t.Error(err)
	}
	if _, err := b.Store(ctx, "a.b", []byte("4"), rev); !errors.Is(err, ErrChanged) {
		t.Errorf("update of an old revision: %v", err)
	}
	if err := b.Create(ctx, "c", []byte("5")); err != nil {
		t.Error(err)
	}
	for range 50 { // each ends a watch
		if all, err := b.All(ctx); err != nil || len(all) != 2 || string(all["a.b"]) != "3" {
			t.Fatalf("%q, %v", all, err)
		}
	}
	seen := make(chan string, 10)
	watching, stop := context.WithCancel(ctx)
	done := make(chan error)
	go func() {
		done <- b.Watch(watching, func(key string, value []byte) { seen <- key + "=" + string(value) })
	}()
	expect := func(want ...string) {
		t.Helper()
		for _, w := range want {
			if got := <-seen; got != w {
				t.Errorf("seen %q, want %q", got, w)
			}
		}
	}
	expect("a.b=3", "c=5", "=")
	if err := b.Delete(ctx, "c"); err != nil {
		t.Error(err)
	}
	expect("c=")
	if err := b.Create(ctx, "c", []byte("6")); err != nil {
		t.Errorf("create what was deleted: %v", err)
	}
	expect("c=6")
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestRequestsShareTheConnection: lanes of a connection that all catch up ask for no
// more together than a server grants a connection.
func TestRequestsShareTheConnection(t *testing.T) {
	b := testBroker(t)
	c := testHub(t, b, 1)
	if n := c.requestBytes(); n != maxRequestBytes {
		t.Errorf("%d bytes", n)
	}
	body := make([]byte, 300<<10)
	for i := range 150 {
		if err := c.PublishAsync(Message{Subject: Subject(otlpwire.Logs, "as-1"), Body: body, Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, ID: fmt.Sprint("x", i)}}).Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	conn := connectTo(t, b, "many")
	var readers []*Reader
	for range 24 {
		r, err := conn.OpenReader(t.Context(), "LOGS", 1)
		if err != nil {
			t.Fatal(err)
		}
		readers = append(readers, r)
	}
	if n := conn.requestBytes(); n*requests*len(readers) > 64<<20 { // what a server grants
		t.Errorf("%d bytes a request", n)
	}
	// All have asked, and nobody reads on: 24 x 44 MiB would be on their way.
	for _, r := range readers {
		if _, err := r.Next(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for n := 1; n < 150; n++ {
		for _, r := range readers {
			if d, err := r.Next(t.Context()); err != nil || d.Seq != uint64(n+1) {
				t.Fatalf("%d, %v; want %d", d.Seq, err, n+1)
			}
		}
	}
	if n := conn.nc.Statistics.Reconnects; n != 0 {
		t.Errorf("the server has given the connection up %d times", n)
	}
	for _, r := range readers {
		r.Close()
	}
	if n := conn.pulls.Load(); n != 0 {
		t.Errorf("%d readers are still counted", n)
	}
}

// TestNobodyDeletesAll: whoever may write one key cannot purge the bucket.
func TestNobodyDeletesAll(t *testing.T) {
	c := testHub(t, testBroker(t), 1)
	b, err := c.Replays(t.Context(), DefaultTopology())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(b.Create(t.Context(), "job.as-1.a", []byte("1")), b.Create(t.Context(), "job.as-2.b", []byte("2"))); err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{"all", "sub"} {
		m := nats.NewMsg("$KV.REPLAYS.job.as-1.a")
		m.Header.Set("Nats-Rollup", what)
		if _, err := c.js.PublishMsg(t.Context(), m); err == nil {
			t.Errorf("rollup %s is taken", what)
		}
	}
	if err := b.Create(t.Context(), "job.as-1.c", make([]byte, maxReplayValue+1)); err == nil {
		t.Error("a value of any size is taken")
	}
	if all, err := b.All(t.Context()); err != nil || len(all) != 2 {
		t.Errorf("%d keys are left, %v", len(all), err)
	}
	next, err := b.Store(t.Context(), "lane.x", []byte("1"), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Store(t.Context(), "lane.x", []byte("2"), 0); !errors.Is(err, ErrExists) {
		t.Errorf("stored as new twice: %v", err)
	}
	if _, err := b.Store(t.Context(), "lane.x", []byte("2"), next); err != nil {
		t.Error(err)
	}
	if _, err := b.Store(t.Context(), "lane.x", []byte("3"), next); !errors.Is(err, ErrChanged) {
		t.Errorf("stored under an old revision: %v", err)
	}
}
