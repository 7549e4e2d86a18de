package bus

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
)

// interruptedLane is a lane that is read, and acknowledges what it reads; it keeps why it was
// interrupted.
type interruptedLane struct {
	*Lane
	said    *logtest.Log
	mu      sync.Mutex
	reasons []string
	read    map[string]int // how often, by body
}

func (l *interruptedLane) interrupted(reason string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Contains(l.reasons, reason)
}

func (l *interruptedLane) times(n int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.read[fmt.Sprint(n)]
}

// openInterrupted opens the lane.
func openInterrupted(t *testing.T) (*interruptedLane, *Conn) {
	t.Helper()
	b := testBroker(t)
	hub := testHub(t, b, 1)
	l := &interruptedLane{said: new(logtest.Log), read: map[string]int{}}
	conn, err := Connect(Config{Name: "reader", InProcess: b}, l.said.Logger(slog.LevelInfo))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	until(t, "connected", conn.Connected)
	l.Lane, err = conn.OpenLane(t.Context(), LaneConfig{Stream: "LOGS", Name: "test-0", Interrupted: func(reason string) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.reasons = append(l.reasons, reason)
	}})
	if err != nil {
		t.Fatal(err)
	}
	return l, hub
}

// begin reads the lane until the test ends.
func (l *interruptedLane) begin(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer l.Close()
		l.Run(ctx, func(d Delivery) bool {
			if d.Seq > 0 {
				l.mu.Lock()
				l.read[string(d.Body)]++
				l.mu.Unlock()
			}
			return l.Ack(d.Seq) == nil
		})
	}()
	t.Cleanup(func() { cancel(); <-done })
}

const far = 1 << 40

// TestAFloorFarAway: somebody moves the floor of a lane beyond the end of its stream. The lane
// reports it and reads everything from the first message on, instead of skipping it with a lag of 0.
func TestAFloorFarAway(t *testing.T) {
	t.Parallel()
	move := func(t *testing.T, hub *Conn) {
		if _, err := hub.js.ResetConsumerToSequence(t.Context(), "LOGS", "test-0", far); err != nil {
			t.Fatal(err)
		}
	}
	for name, when := range map[string]func(*testing.T, *interruptedLane, *Conn){
		"before it is read": func(t *testing.T, l *interruptedLane, hub *Conn) {
			move(t, hub)
			l.begin(t)
		},
		"while nothing came yet": func(t *testing.T, l *interruptedLane, hub *Conn) {
			l.begin(t)
			until(t, "it is owned", l.Owned)
			move(t, hub)
			until(t, "seen", func() bool { return l.said.Says("ERROR", "somebody else has moved the floor") })
		},
		"while it is read": func(t *testing.T, l *interruptedLane, hub *Conn) {
			l.begin(t)
			publish(t, hub, "as-1", 100, 101)
			until(t, "it is read", func() bool { return l.times(100) > 0 })
			move(t, hub)
			until(t, "seen", func() bool { return l.said.Says("ERROR", "somebody else has moved the floor") })
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, hub := openInterrupted(t)
			when(t, l, hub)
			publish(t, hub, "as-1", 0, 1)
			until(t, "what comes is read", func() bool { return l.times(0) > 0 })
			if !l.said.Says("ERROR", "beyond the end of its stream") || !l.interrupted(ledger.InterruptedMoved) {
				t.Errorf("it is not told: %s", l.said)
			}
		})
	}
}

// TestReasonsOfInterruptions: each has its own.
func TestReasonsOfInterruptions(t *testing.T) {
	t.Parallel()
	for reason, interrupt := range map[string]func(*testing.T, *interruptedLane, *Conn) error{
		ledger.InterruptedFull: func(_ *testing.T, l *interruptedLane, _ *Conn) error {
			l.Forget(ledger.InterruptedFull)
			return nil
		},
		ledger.InterruptedGone: func(t *testing.T, _ *interruptedLane, hub *Conn) error {
			return hub.js.DeleteConsumer(t.Context(), "LOGS", "test-0")
		},
		ledger.InterruptedPin: func(t *testing.T, _ *interruptedLane, hub *Conn) error {
			s, err := hub.js.Stream(t.Context(), "LOGS")
			if err != nil {
				return err
			}
			return s.UnpinConsumer(t.Context(), "test-0", pinGroup)
		},
		ledger.InterruptedHub: func(_ *testing.T, l *interruptedLane, _ *Conn) error {
			l.conn.nc.Close()
			return nil
		},
	} {
		t.Run(reason, func(t *testing.T) {
			t.Parallel()
			l, hub := openInterrupted(t)
			l.begin(t)
			publish(t, hub, "as-1", 0, 1)
			until(t, "it is read", func() bool { return l.times(0) > 0 })
			if err := interrupt(t, l, hub); err != nil {
				t.Fatal(err)
			}
			until(t, "counted", func() bool { return l.interrupted(reason) })
		})
	}
}

// TestALaneThatStallsIsSaidOnce: it is logged once a minute, however often reading fails.
func TestALaneThatStallsIsSaidOnce(t *testing.T) {
	t.Parallel()
	l, hub := openInterrupted(t)
	l.begin(t)
	gone := func() (n int) {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, reason := range l.reasons {
			if reason == ledger.InterruptedGone {
				n++
			}
		}
		return n
	}
	for n := range 3 {
		publish(t, hub, "as-1", n, n+1)
		until(t, "it is read", func() bool { return l.times(n) > 0 })
		if err := hub.js.DeleteConsumer(t.Context(), "LOGS", "test-0"); err != nil {
			t.Fatal(err)
		}
		until(t, "it breaks", func() bool { return gone() == n+1 })
	}
	publish(t, hub, "as-1", 3, 4)
	until(t, "it goes on", func() bool { return l.times(3) > 0 })
	if n := strings.Count(l.said.String(), "cannot read lane"); n != 1 {
		t.Errorf("it is said %d times", n)
	}
}

// TestOthersMessagesMoveNoFloor: messages of other partitions are not mistaken for somebody
// who moves the floor.
func TestOthersMessagesMoveNoFloor(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	hub := testHub(t, b, 2)
	var here, there string // an instance of each partition
	for i := 0; here == "" || there == ""; i++ {
		if name := fmt.Sprint("as-", i); partition.OfInstance(name, 2) == 0 {
			here = name
		} else {
			there = name
		}
	}
	l, err := hub.OpenLane(t.Context(), LaneConfig{Stream: "LOGS", Filter: PartitionFilter(otlpwire.Logs, 0), Name: "test-0", Interrupted: func(reason string) { t.Errorf("interrupted: %s", reason) }})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	next := func(want func(Delivery) bool) {
		t.Helper()
		for {
			d, err := l.Next(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if d.Seq > 0 {
				if err := l.Ack(d.Seq); err != nil {
					t.Fatal(err)
				}
			}
			if want(d) {
				return
			}
		}
	}
	for n := range 3 {
		publish(t, hub, here, n, n+1)
		next(func(d Delivery) bool { return d.Seq > 0 })
		publish(t, hub, there, 100*n, 100*n+100)
		next(func(d Delivery) bool { return d.Idle })
		// When a keeper removes messages, the floor moves past those of other partitions.
		if err := hub.Remove(t.Context(), "LOGS", "", uint64(101*n+60)); err != nil {
			t.Fatal(err)
		}
		next(func(d Delivery) bool { return d.Idle })
	}
}
