package membership

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/stall"
)

// watched is a member that reads lanes of LOGS, with its metrics and its log.
type watched struct {
	*Members
	led  *ledger.Ledger
	said *logtest.Log
}

func startWatched(t *testing.T, b *broker.Broker, name string, lanes int, change func(p int, s *Shared)) watched {
	t.Helper()
	w := watched{led: ledger.New(prometheus.NewRegistry()), said: new(logtest.Log)}
	w.Members = New(connectTo(t, b, name, w.said.Logger(slog.LevelInfo)), "sink", name, w.led, w.said.Logger(slog.LevelInfo))
	var all []Shared
	for p := range lanes {
		s := Shared{Signal: "logs", Partition: p, Backend: "test", LaneConfig: bus.LaneConfig{
			Stream: "LOGS", Filter: bus.PartitionFilter(otlpwire.Logs, p), Name: fmt.Sprint("test-", p),
		}, Run: func(ctx context.Context, l *bus.Lane) {
			defer l.Close()
			l.Run(ctx, func(d bus.Delivery) bool { return l.Ack(d.Seq) == nil })
		}}
		if change != nil {
			change(p, &s)
		}
		all = append(all, s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); w.Run(ctx, all) }()
	t.Cleanup(func() { cancel(); <-done })
	return w
}

// seconds returns the gauge of a partition, and how often lanes have stalled.
func (w watched) seconds(p int) (seconds, stalls float64) {
	gauge, count := w.led.Stall("logs", fmt.Sprint(p), "test")
	return testutil.ToFloat64(gauge), testutil.ToFloat64(count)
}

// stalled waits until a partition is reported as stalled, and the log has the reason.
func (w watched) stalled(t *testing.T, p int, why string) {
	t.Helper()
	until(t, "a stall: "+why, func() bool {
		seconds, stalls := w.seconds(p)
		return seconds >= stall.After.Seconds() && stalls > 0 && w.said.Says("msg=stalled", fmt.Sprint("partition=", p), why)
	})
}

func (w watched) goesOn(t *testing.T, p int) {
	t.Helper()
	until(t, "it goes on", func() bool {
		seconds, _ := w.seconds(p)
		return seconds == 0 && w.said.Says("no longer stalled", fmt.Sprint("partition=", p))
	})
}

// TestAReaderThatHangs: a backend that does not answer is reported, and the lane beside it
// does not count as stalled.
func TestAReaderThatHangs(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	c := testHub(t, b, 2)
	answer := make(chan struct{})
	w := startWatched(t, b, "one", 2, func(_ int, s *Shared) {
		s.Run = func(ctx context.Context, l *bus.Lane) {
			defer l.Close()
			l.Run(ctx, func(d bus.Delivery) bool {
				if d.Seq > 0 {
					select {
					case <-answer:
					case <-ctx.Done():
					}
				}
				return l.Ack(d.Seq) == nil
			})
		}
	})
	publish(t, c, "as-1", 0, 1)
	stuck := 0
	until(t, "a stall", func() bool {
		for p := range 2 {
			if s, _ := w.seconds(p); s >= stall.After.Seconds() {
				stuck = p
				return true
			}
		}
		return false
	})
	w.stalled(t, stuck, "its floor does not move from 0")
	if s, stalls := w.seconds(1 - stuck); s > 0 || stalls != 1 {
		t.Errorf("the other one stands for %v s, %v stalls", s, stalls)
	}
	close(answer)
	w.goesOn(t, stuck)
}

// TestALaneThatHolds: a floor need not move for the time that Hold returns, unless the lane
// waits for its backend.
func TestALaneThatHolds(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	c := testHub(t, b, 1)
	refused, read := make(chan struct{}), make(chan struct{}, 10)
	w := startWatched(t, b, "one", 1, func(_ int, s *Shared) {
		s.Hold = func() time.Duration { return time.Hour }
		s.Run = func(ctx context.Context, l *bus.Lane) {
			defer l.Close()
			l.Run(ctx, func(d bus.Delivery) bool {
				select {
				case <-refused:
					l.Waits(errors.New("429 too much"))
				default:
				}
				if d.Seq > 0 {
					read <- struct{}{}
				}
				return true
			})
		}
	})
	publish(t, c, "as-1", 0, 1)
	lag, _, _ := w.led.Lane("logs", "0", "test")
	<-read
	until(t, "it is owed", func() bool { return testutil.ToFloat64(lag) == 1 })
	look := func() float64 { s, _ := w.seconds(0); return s }
	if s := look(); s > 0 {
		t.Errorf("a lane that holds stands for %v s", s)
	}
	close(refused)
	publish(t, c, "as-1", 1, 2)
	w.stalled(t, 0, "429 too much")
}

// TestALaneThatDoesNotOpen: a lane is watched before it is open.
func TestALaneThatDoesNotOpen(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	testHub(t, b, 1)
	w := startWatched(t, b, "one", 1, func(_ int, s *Shared) { s.Stream = "NOWHERE" })
	w.stalled(t, 0, "stream not found")
}

// TestAMemberThatReadsNothing: something renews the key of a member, and reads no lane.
func TestAMemberThatReadsNothing(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	c := testHub(t, b, 4)
	w := startWatched(t, b, "one", 4, nil)
	bucket, err := c.OpenBucket(t.Context(), Bucket, 1)
	if err != nil {
		t.Fatal(err)
	}
	ghost, _ := json.Marshal(Member{Name: "ghost", Since: time.Now()})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for backoff.Sleep(ctx, renewInterval/2) {
			_ = bucket.Put(ctx, "sink.ghost", ghost)
		}
	}()
	defer func() { stop(); <-done }()
	until(t, "the ghost has lanes", func() bool {
		for p, owner := range w.owners()["LOGS"] {
			if owner == "ghost" {
				w.stalled(t, p, "nobody reads the lane; it is placed on ghost")
				return true
			}
		}
		return false
	})
	stop()
	<-done
	for p := range 4 {
		until(t, "all are read", func() bool { s, _ := w.seconds(p); return s == 0 })
	}
}

// TestLanesElsewhereAreRead: a lane that another member reads does not count as stalled.
func TestLanesElsewhereAreRead(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	testHub(t, b, 4)
	w := startWatched(t, b, "one", 4, nil)
	startWatched(t, b, "two", 4, nil)
	var elsewhere []*run
	until(t, "the lanes are shared", func() bool {
		elsewhere, _ = w.elsewhere()
		return len(elsewhere) == 2
	})
	for _, r := range elsewhere {
		until(t, "it is read", func() bool {
			w.lookElsewhere(t.Context(), r, time.Now())
			s, _ := w.seconds(r.Partition)
			return s == 0
		})
		for wait := time.Minute; wait < 5*time.Minute; wait += time.Minute {
			w.lookElsewhere(t.Context(), r, time.Now().Add(wait))
		}
		if s, stalls := w.seconds(r.Partition); s != 0 || stalls != 0 {
			t.Errorf("lane %d has stood for %v s, %v times", r.Partition, s, stalls)
		}
	}
}

func TestPace(t *testing.T) {
	var p pace
	now := time.Unix(1000, 0)
	for i, step := range []struct {
		waiting uint64
		want    float64
	}{{0, 0}, {100, math.Inf(1)}, {200, math.Inf(1)}, {200, math.Inf(1)}, {150, math.Inf(1)}, {100, math.Inf(1)}, {50, 10}, {0, 0}, {10, 0.8}} {
		got := p.left(now.Add(time.Duration(i)*2*time.Second), step.waiting)
		if math.Abs(got-step.want) > 0.5 && got != step.want {
			t.Errorf("step %d, %d wait: %v s, want %v", i, step.waiting, got, step.want)
		}
	}
}
