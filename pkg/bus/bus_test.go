package bus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func testBroker(t testing.TB) *broker.Broker {
	t.Helper()
	b, err := broker.Start(broker.Config{Name: "test", Dir: t.TempDir(), MaxPayload: 2 << 20}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	return b
}

func testHub(t testing.TB, b *broker.Broker, partitions int) *Conn {
	t.Helper()
	top := DefaultTopology()
	top.Partitions, top.MaxBytes = partitions, 64<<20
	c, err := OpenHub(t.Context(), Config{Name: "test", InProcess: b}, top, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func until(t testing.TB, what string, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if !backoff.Until(ctx, done) {
		t.Fatalf("%s: never", what)
	}
}

// began is the arrival of message 0.
var began = time.Now().UnixNano()

func logsMessage(instance string, n int) Message {
	return Message{Subject: Subject(otlpwire.Logs, instance), Body: []byte(fmt.Sprint(n)), Header: envelope.Header{
		ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: began + int64(n), ID: fmt.Sprintf("%s-%d", instance, n),
	}}
}

func publish(t testing.TB, c *Conn, instance string, from, to int) {
	t.Helper()
	for n := from; n < to; n++ {
		if err := c.PublishAsync(logsMessage(instance, n)).Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func openLane(t testing.TB, c *Conn) *Lane {
	t.Helper()
	l, err := c.OpenLane(t.Context(), LaneConfig{Stream: "LOGS", Filter: PartitionFilter(otlpwire.Logs, 0), Name: "test-0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

// expect reads the messages from to to (exclusive), in order.
func expect(t testing.TB, l *Lane, from, to int) (last Delivery) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for n := from; n < to; n++ {
		d := message(ctx, t, l)
		if string(d.Body) != fmt.Sprint(n) || d.Err != nil || d.Instance() != "as-1" || d.Header.Arrival != began+int64(n) {
			t.Fatalf("got %+v, want message %d", d, n)
		}
		last = d
	}
	return last
}

// message skips deliveries that report on the lane itself.
func message(ctx context.Context, t testing.TB, l *Lane) Delivery {
	t.Helper()
	for {
		d, err := l.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if d.Seq > 0 {
			return d
		}
	}
}

func TestLaneReadsInOrderFromItsFloor(t *testing.T) {
	c := testHub(t, testBroker(t), 1)
	publish(t, c, "as-1", 0, 100)
	l := openLane(t, c)
	expect(t, l, 0, 40)
	forty := l.Floor()
	if forty != 0 {
		t.Errorf("floor is %d before any ack", forty)
	}
	if err := l.Ack(30); err != nil {
		t.Fatal(err)
	}
	if l.Floor() != 30 {
		t.Errorf("floor is %d, want 30", l.Floor())
	}
	l.Close() // as after a kill: 40 were delivered, 30 are finished

	again := openLane(t, c)
	expect(t, again, 30, 100)
	if err := again.Ack(1000); err != nil {
		t.Fatal(err)
	}
	waitLag(t, again, 0)
}

func waitLag(t testing.TB, l *Lane, want uint64) {
	t.Helper()
	until(t, fmt.Sprint("a lag of ", want), func() bool {
		at, err := l.Progress(t.Context())
		return err == nil && at.Lag == want
	})
}

// TestLaneGoesBackWhenAnotherHasRead takes the consumer over without the reader's
// knowledge: the reader must notice before it returns a message after a gap.
func TestLaneGoesBackWhenAnotherHasRead(t *testing.T) {
	b := testBroker(t)
	c := testHub(t, b, 1)
	publish(t, c, "as-1", 0, 10)
	old := openLane(t, c)
	expect(t, old, 0, 10)
	if err := old.Ack(5); err != nil {
		t.Fatal(err)
	}
	waitLag(t, old, 5)

	// Somebody resets the consumer to the floor: what was not acknowledged is delivered again.
	if _, err := c.js.ResetConsumer(t.Context(), "LOGS", "test-0"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if d, err := old.Next(ctx); err != nil || !d.Claimed {
		t.Fatalf("got %+v, %v; want the lane claimed again", d, err)
	}
	expect(t, old, 5, 10)
}

func TestLaneGoesOnAfterTheHubWasAway(t *testing.T) {
	cfg := broker.Config{Name: "test", Dir: t.TempDir(), Listen: "127.0.0.1:0", MaxPayload: 2 << 20, Sync: true}
	b, err := broker.Start(cfg, quiet)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Listen = strings.TrimPrefix(b.URL(), "nats://")
	top := DefaultTopology()
	top.Partitions, top.MaxBytes = 1, 64<<20
	c, err := OpenHub(t.Context(), Config{Name: "test", URL: b.URL()}, top, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	publish(t, c, "as-1", 0, 10)
	l := openLane(t, c)
	expect(t, l, 0, 8)
	_ = l.Ack(3)
	waitLag(t, l, 7)
	b.Stop()
	if err := c.PublishAsync(logsMessage("as-1", 99)).Wait(t.Context()); err == nil {
		t.Error("published into nowhere")
	}
	if b, err = broker.Start(cfg, quiet); err != nil {
		t.Fatal(err)
	}
	defer b.Stop()

	// Whether the lane notices the break or not, nothing above the floor is
	// skipped: it continues with 8, or reports the break and begins again at 3.
	next, deadline := 8, time.Now().Add(30*time.Second)
	for next < 10 && time.Now().Before(deadline) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		d, err := l.Next(ctx)
		cancel()
		switch {
		case err == nil && d.Claimed:
			next = 3
		case err == nil && d.Seq > 0:
			if string(d.Body) != fmt.Sprint(next) {
				t.Fatalf("got %s, want %d", d.Body, next)
			}
			next++
		}
	}
	if next != 10 {
		t.Errorf("stopped at %d", next)
	}
}

// TestLargeMessagesFlow: a request that reaches its bytes before its number of messages is
// followed by another like it, not by requests for single messages, whose end the
// server does not report.
func TestLargeMessagesFlow(t *testing.T) {
	c := testHub(t, testBroker(t), 1)
	const n = 40
	for i := range n {
		m := logsMessage("as-1", i)
		m.Body = make([]byte, 700<<10)
		if err := c.PublishAsync(m).Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	l := openLane(t, c)
	for i := range n {
		if d := message(t.Context(), t, l); d.Header.Arrival != began+int64(i) {
			t.Fatalf("got message %d, want %d", d.Header.Arrival, i)
		}
		if asked := l.pull.asked; len(asked) > 0 && !slices.ContainsFunc(asked, func(r request) bool { return !r.single }) {
			t.Fatalf("after message %d the lane asks for single messages only", i)
		}
	}
}

// TestReader reads from a sequence on, whatever was deleted, however slow it is, and fails
// when its consumer is gone.
func TestReader(t *testing.T) {
	c := testHub(t, testBroker(t), 1)
	publish(t, c, "as-1", 0, 600)
	read := func(r *Reader, from, to int) {
		t.Helper()
		for n := from; n < to; n++ {
			d, err := r.Next(t.Context())
			if err != nil || d.Header.Arrival != began+int64(n) || d.Seq != uint64(n+1) || d.Pending > 600 {
				t.Fatalf("got %+v, %v; want message %d", d, err, n)
			}
		}
	}
	r, err := c.OpenReader(t.Context(), "LOGS", 101)
	if err != nil {
		t.Fatal(err)
	}
	read(r, 100, 101)
	// Far more is on its way than is read.
	publish(t, c, "as-2", 0, 10)
	slow, err := c.OpenReader(t.Context(), "LOGS", 1)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	for n := range 600 {
		if d, err := slow.Next(t.Context()); err != nil || d.Seq != uint64(n+1) {
			t.Fatalf("got %+v, %v; want message %d", d, err, n)
		}
	}
	if err := c.js.DeleteConsumer(t.Context(), "LOGS", r.consumer); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for err == nil {
		_, err = r.Next(ctx)
	}
	if ctx.Err() != nil {
		t.Error("a reader whose place is gone waits for ever")
	}
	r.Close()
	if _, err := c.OpenReader(t.Context(), "NOWHERE", 1); err == nil {
		t.Error("reads a stream that cannot be reached")
	}
}

func TestForeignMessagesAreMarked(t *testing.T) {
	c := testHub(t, testBroker(t), 1)
	if err := c.nc.Publish("otlp.logs.as-1", []byte("no envelope")); err != nil {
		t.Fatal(err)
	}
	bomb := logsMessage("as-1", 1)
	bomb.Header.Encoding, bomb.Body = envelope.S2, []byte{0xff, 0xff, 0xff, 0xff, 0x0f, 0, 0}
	if err := c.PublishAsync(bomb).Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	l := openLane(t, c)
	for range 2 {
		if d := message(t.Context(), t, l); d.Err == nil || d.Instance() != "as-1" {
			t.Errorf("got %+v; want a delivery that says what is wrong", d)
		}
	}
}

// TestStreamsPartitionByInstance: the server stores what an instance sends in the partition that
// [partition.OfInstance] returns, for every signal and any number of partitions.
func TestStreamsPartitionByInstance(t *testing.T) {
	names := []string{"0", "Z", "as-1", "AS-1", "a_b-c", strings.Repeat("x", 64), strings.Repeat("y", 65), strings.Repeat("z-9", 43)[:128]}
	for i := range 40 {
		names = append(names, fmt.Sprintf("as-%d", 7*i+2))
	}
	for _, n := range []int{1, 4, 7, 1024} {
		c := testHub(t, testBroker(t), n)
		for _, sig := range otlpwire.Signals {
			for i, name := range names {
				m := logsMessage(name, i)
				m.Subject = Subject(sig, name)
				if _, err := c.Publish(t.Context(), m); err != nil {
					t.Fatal(err)
				}
			}
			stored, err := c.Subjects(t.Context(), Stream(sig), ">")
			if err != nil || len(stored) != len(names) {
				t.Fatalf("%d subjects, %v; want %d", len(stored), err, len(names))
			}
			for _, name := range names {
				if want := "otlp." + sig.String() + "." + strconv.Itoa(partition.OfInstance(name, n)) + "." + name; stored[want] != 1 {
					t.Errorf("%d partitions: not stored as %s", n, want)
				}
			}
		}
	}
}

func TestSameIDIsStoredOnce(t *testing.T) {
	c := testHub(t, testBroker(t), 1)
	publish(t, c, "as-1", 0, 3)
	publish(t, c, "as-1", 0, 3)
	if st, err := c.State(t.Context(), "LOGS"); err != nil || st.Messages != 3 {
		t.Errorf("got %+v, %v; want 3 messages", st, err)
	}
}

func TestTopologyIsCheckedNotChanged(t *testing.T) {
	b := testBroker(t)
	c := testHub(t, b, 4)
	top := DefaultTopology()
	top.Partitions, top.MaxBytes = 4, 128<<20
	if err := c.EnsureHub(t.Context(), top); err != nil {
		t.Errorf("other limits: %v", err)
	}
	top.Partitions = 8
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := OpenHub(ctx, Config{Name: "x", InProcess: b}, top, quiet); err == nil || !strings.Contains(err.Error(), "partitions") || ctx.Err() != nil {
		t.Errorf("other number of partitions: %v", err)
	}
}

func TestFullStreamRefuses(t *testing.T) {
	c, err := Connect(Config{Name: "spool", InProcess: testBroker(t)}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := c.js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}, Discard: jetstream.DiscardNew, MaxBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	m := Message{Subject: "s", Body: make([]byte, 300<<10), Header: envelope.Header{ContentType: envelope.ContentTypeOTLP}}
	for i := range 5 {
		_, err = c.Publish(t.Context(), m)
		if full := errors.Is(err, ErrFull); full != (i >= 3) || (err != nil && !full) {
			t.Errorf("message %d: %v", i, err)
		}
	}
	if err := s.Purge(t.Context(), jetstream.WithPurgeSequence(3)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Publish(t.Context(), m); err != nil {
		t.Errorf("after the purge: %v", err)
	}
	if st, err := c.State(t.Context(), "S"); err != nil || st.FirstSeq != 3 || st.Messages != 2 {
		t.Errorf("got %+v, %v", st, err)
	}
}

func TestHubThatIsNotThere(t *testing.T) {
	if _, err := Dial(Config{Name: "x", URL: "nats://127.0.0.1:1"}, quiet); err == nil || !strings.Contains(err.Error(), "nats://127.0.0.1:1") {
		t.Errorf("Dial: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := OpenHub(ctx, Config{Name: "x", URL: "nats://127.0.0.1:1"}, DefaultTopology(), quiet); err == nil || !strings.Contains(err.Error(), "cannot be reached") {
		t.Errorf("OpenHub: %v", err)
	}
}

// TestLaneOutlivesItsConsumer deletes a reader's consumer: reading continues from
// the start, which repeats messages but skips none.
func TestLaneOutlivesItsConsumer(t *testing.T) {
	c := testHub(t, testBroker(t), 1)
	publish(t, c, "as-1", 0, 5)
	l := openLane(t, c)
	expect(t, l, 0, 5)
	if err := c.js.DeleteConsumer(t.Context(), "LOGS", "test-0"); err != nil {
		t.Fatal(err)
	}
	publish(t, c, "as-1", 5, 7)
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	var got []string
	l.Run(ctx, func(d Delivery) bool {
		switch {
		case d.Claimed:
			got = nil
			return true
		case d.Seq == 0:
			return true
		}
		got = append(got, string(d.Body))
		return len(got) < 7
	})
	if strings.Join(got, "") != "0123456" {
		t.Errorf("got %v", got)
	}
}

func TestDeadLettersAlwaysFit(t *testing.T) {
	c := testHub(t, testBroker(t), 1)
	random := make([]byte, 3<<20)
	for i, x := 0, uint64(88172645463325252); i < len(random); i++ {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		random[i] = byte(x)
	}
	for name, body := range map[string][]byte{"zeros": make([]byte, 16<<20), "random": random} {
		err := c.DeadLetter(t.Context(), otlpwire.Logs, "as-1", Message{Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: 1}, Body: body, Refusal: &Refusal{Reason: "refused", Detail: "too\nlarge\x1b", Backend: "loki", Source: "LOGS 7"}})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestPlainTextIsRefused on connections to other machines, unless it is configured.
func TestPlainTextIsRefused(t *testing.T) {
	for text, refused := range map[string]bool{
		"nats://10.0.0.5:4222": true, "nats://hub:4222": true, "ws://hub": true, "nats://127.0.0.1:4222,nats://hub:4222": true, "nats://[2001:db8::1]:4222": true,
		"tls://10.0.0.5:4222": false, "wss://hub": false, "nats://127.0.0.1:4222": false, "nats://localhost:4222": false, "nats://[::1]:4222": false,
	} {
		cfg := Config{URL: text, User: "edge", Pass: "s3cret"}
		err := cfg.Validate("hub")
		if (err != nil) != refused || refused && !strings.Contains(err.Error(), "hub.insecure: true") {
			t.Errorf("%s: %v", text, err)
		}
		cfg.Insecure = true
		if err := cfg.Validate("hub"); err != nil {
			t.Errorf("%s, insecure: %v", text, err)
		}
	}
}
