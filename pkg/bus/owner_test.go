package bus

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
)

// reader reads a lane in its own goroutine, as a sink does, and passes on
// what it receives.
type reader struct {
	got  chan Delivery
	lane *Lane
	stop context.CancelFunc
	done chan struct{}
}

func startReader(t testing.TB, c *Conn) *reader {
	t.Helper()
	l, err := c.OpenLane(t.Context(), LaneConfig{Stream: "LOGS", Filter: PartitionFilter(otlpwire.Logs, 0), Name: "test-0"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r := &reader{got: make(chan Delivery), lane: l, stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		defer l.Close()
		l.Run(ctx, func(d Delivery) bool {
			select {
			case r.got <- d:
				return true
			case <-ctx.Done():
				return false
			}
		})
	}()
	t.Cleanup(func() { cancel(); <-r.done })
	return r
}

// claimed waits until the reader owns the lane.
func (r *reader) claimed(t testing.TB, within time.Duration) {
	t.Helper()
	for timeout := time.After(within); ; {
		select {
		case d := <-r.got:
			if d.Claimed {
				return
			}
		case <-timeout:
			t.Fatalf("not the owner after %v", within)
		}
	}
}

// expect reads messages from to to, which must come next.
func (r *reader) expect(t testing.TB, from, to int) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for n := from; n < to; {
		select {
		case d := <-r.got:
			if d.Claimed || (d.Seq > 0 && string(d.Body) != fmt.Sprint(n)) {
				t.Fatalf("got %+v, want message %d", d, n)
			}
			if d.Seq > 0 {
				n++
			}
		case <-timeout:
			t.Fatalf("message %d does not come", n)
		}
	}
}

// nothing fails if the reader receives anything within the given time.
func (r *reader) nothing(t testing.TB, d time.Duration) {
	t.Helper()
	select {
	case d := <-r.got:
		t.Fatalf("a reader that is not the owner got %+v", d)
	case <-time.After(d):
	}
}

func connectTo(t testing.TB, b *broker.Broker, name string) *Conn {
	t.Helper()
	c, err := Connect(Config{Name: name, InProcess: b}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// TestOneOwnerAtATime has two readers on one lane: the second receives nothing while
// the first lives, continues from the floor as soon as it stops, and after a kill as
// soon as the pin has expired.
func TestOneOwnerAtATime(t *testing.T) {
	for name, end := range map[string]struct {
		how    func(*reader, *Conn)
		within time.Duration
	}{
		"stopped": {func(r *reader, _ *Conn) { r.stop(); <-r.done }, 2 * time.Second},
		"killed":  {func(_ *reader, c *Conn) { c.nc.Close() }, 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := testBroker(t)
			hub := testHub(t, b, 1)
			conn := connectTo(t, b, "first")
			publish(t, hub, "as-1", 0, 100)
			first := startReader(t, conn)
			first.claimed(t, 5*time.Second)
			first.expect(t, 0, 60)
			second := startReader(t, connectTo(t, b, "second"))
			second.nothing(t, pinTTL+time.Second) // the first reads nothing meanwhile, and stays the owner
			first.expect(t, 60, 80)
			if err := first.lane.Ack(50); err != nil {
				t.Fatal(err)
			}
			waitLag(t, first.lane, 50)

			start := time.Now()
			end.how(first, conn)
			second.claimed(t, end.within)
			second.expect(t, 50, 100)
			publish(t, hub, "as-1", 100, 300)
			second.expect(t, 100, 300)
			t.Logf("owned again after %v", time.Since(start))
		})
	}
}

// TestPausedOwnerHasLostTheLane stops an owner's renewals as SIGSTOP does, with
// messages in its buffer: when it resumes it delivers none of them.
func TestPausedOwnerHasLostTheLane(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	hub := testHub(t, b, 1)
	publish(t, hub, "as-1", 0, 100)
	paused := startReader(t, connectTo(t, b, "paused"))
	paused.claimed(t, 5*time.Second)
	paused.expect(t, 0, 10)
	paused.lane.hold() // one delivery waits to be handed over, the others are in the buffer

	next := startReader(t, connectTo(t, b, "next"))
	next.claimed(t, pinTTL+2*time.Second)
	next.expect(t, 0, 50)

	// Resumed: what was handed over before the pause may still come, nothing else.
	woken := 0
	for quiet := time.After(2 * time.Second); quiet != nil; {
		select {
		case d := <-paused.got:
			if woken++; woken > 1 || string(d.Body) != "10" {
				t.Fatalf("woken up it hands out %+v", d)
			}
		case <-quiet:
			quiet = nil
		}
	}
	// Its late ack does no harm.
	if err := paused.lane.Ack(9); err != nil {
		t.Fatal(err)
	}
	next.expect(t, 50, 100)
	if err := next.lane.Ack(100); err != nil {
		t.Fatal(err)
	}
	waitLag(t, next.lane, 0)
}

// TestRivalsSettle starts many readers at once: one owns the lane, and each
// message comes to the owner in order.
func TestRivalsSettle(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	hub := testHub(t, b, 1)
	all := make(chan Delivery)
	for i := range 5 {
		r := startReader(t, connectTo(t, b, fmt.Sprint("rival", i)))
		go func() {
			for {
				select {
				case d := <-r.got:
					select {
					case all <- d:
					case <-r.done:
						return
					}
				case <-r.done:
					return
				}
			}
		}()
	}
	publish(t, hub, "as-1", 0, 500)
	seen := map[string]int{}
	for timeout := time.After(30 * time.Second); len(seen) < 500; {
		select {
		case d := <-all:
			if d.Seq > 0 {
				seen[string(d.Body)]++
			}
		case <-timeout:
			t.Fatalf("%d of 500 messages after 30 s", len(seen))
		}
	}
	again := 0
	for _, n := range seen {
		again += n - 1
	}
	t.Logf("%d deliveries again", again)
	if again > 5*requests*requestCount {
		t.Errorf("%d deliveries again", again)
	}
}

// TestIdleIsSaidByTheHub: a lane is reported idle only when nothing is left.
func TestIdleIsSaidByTheHub(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	hub := testHub(t, b, 1)
	publish(t, hub, "as-1", 0, 3)
	r := startReader(t, connectTo(t, b, "one"))
	r.claimed(t, 5*time.Second)
	r.expect(t, 0, 3)
	select {
	case d := <-r.got:
		if !d.Idle {
			t.Errorf("got %+v", d)
		}
	case <-time.After(10 * time.Second):
		t.Error("never said to be caught up")
	}
}

// TestALaneSaysWhatItHas: messages of other partitions do not count, messages that have not arrived do.
func TestALaneSaysWhatItHas(t *testing.T) {
	t.Parallel()
	hub := testHub(t, testBroker(t), 2)
	names := make([]string, 2) // an instance in each partition
	for i := 0; slices.Contains(names, ""); i++ {
		name := "as-" + strconv.Itoa(i)
		names[partition.OfInstance(name, 2)] = name
	}
	open := func(cfg LaneConfig) *Lane {
		t.Helper()
		cfg.Stream = "LOGS"
		l, err := hub.OpenLane(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(l.Close)
		return l
	}
	first := PartitionFilter(otlpwire.Logs, 0)
	lanes := map[string]*Lane{
		"of a partition": open(LaneConfig{Filter: first, Name: "one"}),
		"of subjects":    open(LaneConfig{Filters: []string{"otlp.logs.0.nobody", "otlp.logs.0." + names[0]}, Name: "two"}),
	}
	all := open(LaneConfig{Name: "all"})
	has := func(l *Lane, seq uint64, want bool) {
		t.Helper()
		if got, err := l.Has(t.Context(), l.after, seq); err != nil || got != want {
			t.Errorf("lane %s has all up to %d: %v, %v", l.cfg.Name, seq, got, err)
		}
	}
	for _, l := range lanes {
		has(l, 1, true) // a stream that has nothing
	}
	publish(t, hub, names[1], 0, 2)
	publish(t, hub, names[0], 0, 1)
	publish(t, hub, names[1], 2, 3)
	has(all, 1, false)
	for what, l := range lanes {
		t.Log(what)
		has(l, 2, true)
		has(l, 3, false)
		message(t.Context(), t, l)
		has(l, 3, true)
		has(l, 4, true)
	}
	if err := hub.js.DeleteStream(t.Context(), "LOGS"); err != nil {
		t.Fatal(err)
	}
	if _, err := all.Has(t.Context(), 0, 4); err == nil {
		t.Error("a stream that is gone has everything")
	}
}

// TestLateAckOfALongOwner: an ack in the delivery sequence of an owner that has read
// much more moves the floor's delivery sequence far ahead, and the server accepts no ack
// of the next owner. It notices, and continues from the floor.
func TestLateAckOfALongOwner(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	hub := testHub(t, b, 1)
	publish(t, hub, "as-1", 0, 800)
	conn := connectTo(t, b, "first")
	first := startReader(t, conn)
	first.claimed(t, 5*time.Second)
	first.expect(t, 0, 760)
	if err := first.lane.Ack(700); err != nil {
		t.Fatal(err)
	}
	waitLag(t, first.lane, 100)
	first.lane.mu.Lock()
	late := first.lane.mu.owed[49] // message 750
	first.lane.mu.Unlock()
	first.stop()
	<-first.done

	next := startReader(t, connectTo(t, b, "next"))
	next.claimed(t, 5*time.Second)
	next.expect(t, 700, 780)
	if late.seq != 750 {
		t.Fatalf("the late ack is of %d", late.seq)
	}
	if err := conn.nc.Publish(late.reply, ackAll); err != nil { // as it was sent before; a lane that is closed sends none
		t.Fatal(err)
	}
	waitLag(t, next.lane, 50)
	before := first.lane.owing()
	if err := first.lane.Ack(760); err != nil || first.lane.owing() != before {
		t.Errorf("a closed lane acknowledges: %v, %d of %d owed", err, first.lane.owing(), before)
	}
	_ = next.lane.Ack(780)
	next.claimed(t, 5*time.Second)
	next.expect(t, 750, 800)
	_ = next.lane.Ack(800)
	waitLag(t, next.lane, 0)
}

// TestGapsAreNotPassedOn: a message that is not the next one, or has another pin, is
// not delivered: the lane goes back to its floor.
func TestGapsAreNotPassedOn(t *testing.T) {
	t.Parallel()
	for name, harm := range map[string]func(*Lane){
		"one is missing": func(l *Lane) { l.next-- },
		"another pin":    func(l *Lane) { l.pin = "of somebody else" },
	} {
		c := testHub(t, testBroker(t), 1)
		publish(t, c, "as-1", 0, 10)
		l := openLane(t, c)
		expect(t, l, 0, 4)
		harm(l)
		ctx, cancel := context.WithTimeout(t.Context(), pinTTL+10*time.Second)
		defer cancel()
		if d, err := l.Next(ctx); err != nil || !d.Claimed {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
		expect(t, l, 0, 10)
	}
}

// TestAnAckOfBeforeTheClaim: what a reader finishes of the claim before says nothing about what it has read since: the
// stream may be another one, with the same sequences.
func TestAnAckOfBeforeTheClaim(t *testing.T) {
	t.Parallel()
	c := testHub(t, testBroker(t), 1)
	publish(t, c, "as-1", 0, 10)
	l := openLane(t, c)
	expect(t, l, 0, 6)
	l.Forget("test")
	if d, err := l.Next(t.Context()); err != nil || !d.Claimed {
		t.Fatalf("%+v, %v", d, err)
	}
	if err := l.Ack(6); err != nil {
		t.Fatal(err)
	}
	expect(t, l, 0, 4)
	l.mu.Lock()
	done, owed := l.mu.done, len(l.mu.owed)
	l.mu.Unlock()
	if done != 0 || owed != 4 || l.Floor() != 0 {
		t.Errorf("done up to %d, %d owed, the floor is %d", done, owed, l.Floor())
	}
	if err := l.Ack(4); err != nil || l.Floor() != 4 {
		t.Errorf("%v, the floor is %d", err, l.Floor())
	}
}
