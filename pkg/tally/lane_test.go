package tally

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// world is a hub with the stream LOGS.
type world struct {
	*testing.T
	conn *bus.Conn
	log  logtest.Log
	sent int
	// poison is a message whose items cannot be counted without a panic.
	poison uint64
}

func newWorld(t *testing.T) *world {
	b, err := broker.Start(broker.Config{Name: "test", Dir: t.TempDir(), MaxPayload: 2 << 20}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	top := bus.DefaultTopology()
	top.Partitions, top.MaxBytes = 1, 32<<20
	conn, err := bus.OpenHub(t.Context(), bus.Config{InProcess: b, Name: "test"}, top, slog.New(slog.DiscardHandler), Bucket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return &world{T: t, conn: conn}
}

// send publishes n messages of two items.
func (w *world) send(n int) {
	w.Helper()
	for range n {
		w.sent++
		if _, err := w.conn.Publish(w.Context(), bus.Message{
			Subject: bus.Subject(otlpwire.Logs, "as-1"), Body: []byte("body"),
			Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: 2, Arrival: 1, ID: id(w.sent)},
		}); err != nil {
			w.Fatal(err)
		}
	}
}

// claim returns the tally of a new owner at a floor, and what it knows to be finished.
func (w *world) claim(floor uint64) (*Lane, uint64) {
	w.Helper()
	l := Open(Config{
		Conn: func() *bus.Conn { return w.conn }, Replicas: 1, Stream: "LOGS", Lane: "loki-0", Log: w.log.Logger(slog.LevelInfo),
		Items: func(d bus.Delivery, saw func(string, int)) {
			if d.Seq == w.poison {
				panic("poison")
			}
			saw(d.Instance(), d.Header.Items)
		},
	})
	finished, err := l.Claim(w.Context(), floor)
	if err != nil {
		w.Fatal(err)
	}
	return l, finished
}

// deliver notes what an owner delivers.
func deliver(l *Lane, from, to uint64) {
	for seq := from; seq <= to; seq++ {
		l.Do(func(b *Book) {
			b.Saw(seq, "as-1", 2, id(int(seq)))
			b.Ended(seq, "as-1", Delivered, 2)
		})
		l.Floor(seq)
	}
}

// stored returns the counts of as-1 in the hub.
func (w *world) stored() (t Tally, c Counts) {
	w.Helper()
	all, err := All(w.Context(), w.conn)
	if err != nil {
		w.Fatal(err)
	}
	t = all["LOGS"]["loki-0"]
	if of := t.Instances["as-1"]; of != nil {
		c = *of
	}
	return t, c
}

func (w *world) want(what string, upto, items uint64, ended map[Outcome]uint64) {
	w.Helper()
	t, c := w.stored()
	if t.Upto != upto || c.Items != items || !maps.Equal(c.Ended, ended) || c.Missing != 0 {
		w.Errorf("%s: up to %d, %+v", what, t.Upto, c)
	}
}

// TestOwners follow each other: at an orderly end, killed, with a floor that was lost, and one that
// does not know that it was replaced.
func TestOwners(t *testing.T) {
	w := newWorld(t)
	w.send(20)
	first, _ := w.claim(0)
	end := first.Keep()
	deliver(first, 1, 4)
	w.until("the tally is stored while the lane is read", func() bool {
		_, c := w.stored()
		return c.Items == 8
	})
	deliver(first, 5, 6)
	end()
	w.want("an orderly end", 6, 12, map[Outcome]uint64{Delivered: 12})

	killed, finished := w.claim(6)
	if finished != 6 {
		t.Errorf("finished up to %d", finished)
	}
	deliver(killed, 7, 9) // not stored
	next, _ := w.claim(9)
	w.want("after a crash", 9, 18, map[Outcome]uint64{Delivered: 12, Unrecorded: 6})

	deliver(next, 10, 12)
	next.Keep()() // stores, and the floor of the hub is lost
	lost, finished := w.claim(3)
	if finished != 12 {
		t.Errorf("finished up to %d, the tally knows better than the floor", finished)
	}
	deliver(lost, 4, 14)
	slow := lost.Keep()
	if newer, _ := w.claim(14); true {
		deliver(newer, 15, 15)
		deliver(lost, 15, 20)
		slow() // it does not own the lane any more
		newer.Keep()()
	}
	w.want("with an owner that was slow", 15, 30, map[Outcome]uint64{Delivered: 12 + 6 + 2, Unrecorded: 6 + 4})
}

// TestGone: messages that cannot be counted any more are no difference, and no missing numbers; the tally
// tells of them.
func TestGone(t *testing.T) {
	w := newWorld(t)
	w.send(9)
	l, _ := w.claim(0)
	deliver(l, 1, 2)
	l.Keep()()
	if err := w.conn.Remove(t.Context(), "LOGS", "", 5); err != nil {
		t.Fatal(err)
	}
	l, _ = w.claim(7)
	deliver(l, 8, 9)
	l.Keep()()
	got, c := w.stored()
	if len(got.Breaks) != 1 || c.Items != 12 || c.Sum() != 12 || c.Ended[Unrecorded] != 4 || c.Missing != 0 {
		t.Errorf("%+v %+v", got, c)
	}
}

// TestPoison: a message that cannot be counted without a panic counts as one item, as when it was read.
func TestPoison(t *testing.T) {
	w := newWorld(t)
	w.send(4)
	w.poison = 2
	_, _ = w.claim(0)
	_, _ = w.claim(4)
	w.want("after a crash", 4, 7, map[Outcome]uint64{Unrecorded: 7})
}

// TestNone: a replay keeps no tally.
func TestNone(t *testing.T) {
	var none *Lane
	if finished, err := none.Claim(t.Context(), 7); finished != 7 || err != nil {
		t.Error(finished, err)
	}
	none.Floor(3)
	none.Keep()()
}

// TestUnreadableTally: counting begins again, and the log says so.
func TestUnreadableTally(t *testing.T) {
	w := newWorld(t)
	b, err := w.conn.OpenBucket(t.Context(), Bucket, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Put(t.Context(), "LOGS.loki-0", []byte("nonsense")); err != nil {
		t.Fatal(err)
	}
	w.send(3)
	l, _ := w.claim(1)
	deliver(l, 2, 3)
	l.Keep()()
	w.want("after nonsense", 3, 4, map[Outcome]uint64{Delivered: 4})
	if !w.log.Says("ERROR", "cannot be read") {
		t.Error("nothing is said")
	}
}

// TestMissingIsTold: as an error, and to the gauge, which is 0 when the lane goes elsewhere.
func TestMissingIsTold(t *testing.T) {
	w := newWorld(t)
	l, _ := w.claim(0)
	var gauge []float64
	l.cfg.Missing = func(n float64) { gauge = append(gauge, n) }
	end := l.Keep()
	deliver(l, 1, 1)
	deliver(l, 5, 5)
	end()
	if fmt.Sprint(gauge) != "[3 0]" || !w.log.Says("ERROR", "never came", "instance=as-1") {
		t.Error(gauge)
	}
}

// until waits for a condition.
func (w *world) until(what string, is func() bool) {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), 30*time.Second)
	defer cancel()
	if !backoff.Until(ctx, is) {
		w.Fatal(what)
	}
}

// TestAHubThatHasLostTheTally: its owner knows what it had counted, whether it claims the lane again or not.
func TestAHubThatHasLostTheTally(t *testing.T) {
	for _, claims := range []bool{false, true} {
		w := newWorld(t)
		w.send(9)
		l, _ := w.claim(0)
		deliver(l, 1, 2)
		l.store(t.Context())
		deliver(l, 3, 5)
		if !claims { // else the hub has lost it
			l.stored = time.Time{}
			l.store(t.Context())
		}
		l.revision += 5 // a server that was killed comes back with an older one
		if claims {
			if finished, err := l.Claim(t.Context(), 5); err != nil || finished != 5 {
				t.Fatal(finished, err)
			}
		}
		deliver(l, 6, 7)
		l.Keep()()
		w.want(fmt.Sprintf("claims %v", claims), 7, 14, map[Outcome]uint64{Delivered: 14})
	}
}
