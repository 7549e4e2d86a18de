package sink

import (
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink/export"
)

// both runs a test for a direct lane and for one that samples.
func both(t *testing.T, test func(w *asideWorld)) {
	t.Parallel()
	for _, sig := range []otlpwire.Signal{otlpwire.Logs, otlpwire.Traces} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			test(newAsideWorld(t, sig))
		})
	}
}

// TestASlowInstance: an instance for which the backend does not answer is set aside while others are accepted, delays
// none of them, and comes back when it is answered; all of it, once, in order.
func TestASlowInstance(t *testing.T) {
	both(t, func(w *asideWorld) {
		w.d.SlowAfter = 200 * time.Millisecond
		stop := w.own()
		defer stop()
		w.send("as-1", "as-2", "as-3")
		w.until("all", w.arrived("as-1", "as-2", "as-3"))
		slow := make(chan struct{})
		w.w.mu.Lock()
		w.w.slow = slow
		w.w.mu.Unlock()
		for range 20 {
			w.send("as-1", "as-2", "as-3")
		}
		w.until("the others", w.arrived("as-2", "as-3"))
		w.until("it is set aside", func() bool {
			w.send("as-2")
			return testutil.ToFloat64(w.d.Ledger.Of(w.d.Signal).Aside("loki")) == 20
		})
		w.until("the floor", w.nothingOwed)
		close(slow)
		w.until("as-1", w.arrived("as-1"))
		w.send("as-1")
		w.until("as-1 again", w.arrived("as-1"))
		w.until("nothing is set aside", func() bool { return w.waiting("as-1") == 0 })
	})
}

// TestAFailureOfOne: an instance for whose payloads a backend fails is set aside while others are accepted; a backend
// that fails for everybody is away, and nobody is set aside.
func TestAFailureOfOne(t *testing.T) {
	both(t, func(w *asideWorld) {
		stop := w.own()
		defer stop()
		w.send("as-1", "as-2")
		w.until("both", w.arrived("as-1", "as-2"))
		w.w.refuse("as-1", status.Error(codes.Internal, "no"))
		w.send("as-1")
		w.until("it is set aside", func() bool {
			w.send("as-1", "as-2")
			return w.waiting("as-1") > 1
		})
		w.until("the other", w.arrived("as-2"))
		w.until("the floor", w.nothingOwed)
		w.w.refuse("as-1", nil)
		w.until("as-1", w.arrived("as-1"))
	})
}

// TestSideBySide: an instance that is not answered holds up no other one that another worker has, and the floor; after
// a crash nothing of it is lost.
func TestSideBySide(t *testing.T) {
	t.Parallel()
	w := newAsideWorld(t, otlpwire.Logs)
	stop := w.own()
	w.w.slow = make(chan struct{})
	for range 10 {
		w.send("as-1", "as-2", "as-3", "as-4")
	}
	w.until("the others", w.arrived("as-2", "as-3", "as-4"))
	if at, err := w.lane.Progress(w.Context()); err != nil || at.Done != 0 || w.waiting("as-1") != 0 {
		t.Errorf("the floor is at %d, %v", at.Done, err)
	}
	for range 2 * export.MaxJobs { // more than a lane may have read
		w.send("as-2")
	}
	w.until("what is within the window", func() bool { return len(w.w.of("as-2")) > 10 })
	stop()
	if n := len(w.w.of("as-2")); n > 10+export.MaxJobs {
		t.Errorf("%d messages are written beyond one that is not", n)
	}
	close(w.w.slow)
	stop = w.own()
	defer stop()
	w.until("all", func() bool {
		for instance, sent := range w.sent {
			got := w.w.of(instance) // from the floor on twice
			if !slices.Equal(got[max(0, len(got)-len(sent)):], sent) {
				return false
			}
		}
		return true
	})
	w.until("the floor", w.nothingOwed)
}

// panicking is a processor with a bug.
type panicking struct{}

func (panicking) Apply(_ otlpwire.Signal, payload []byte) ([]byte, int) {
	if strings.Contains(string(payload), "|bang|") {
		panic("bang")
	}
	return payload, 0
}

// TestPoison: an item on which the writer or the processor panics is dead-lettered, and counted; those around it in its
// payload, and everything else, are delivered in order. The sink lives.
func TestPoison(t *testing.T) {
	both(t, func(w *asideWorld) {
		var said logtest.Log
		w.d.Process, w.d.Log = panicking{}, said.Logger(slog.LevelInfo)
		stop := w.own()
		defer stop()
		w.send("as-2")
		w.publish("as-1", "a", "boom", "b", "bang", "c")
		w.publish("as-1", "boom")
		w.publish("as-1", "d")
		w.send("as-2")
		w.until("the other", w.arrived("as-2"))
		want := []string{"a", "b", "c", "d"}
		w.until("what is sound", func() bool { return slices.Equal(w.w.of("as-1"), want) })
		w.until("the floor", w.nothingOwed)
		dead := testutil.ToFloat64(w.d.Ledger.Of(w.d.Signal).Dead(ledger.DeadPoison))
		if writer, processor := testutil.ToFloat64(w.d.Ledger.Panics(ledger.PanicWriter)), testutil.ToFloat64(w.d.Ledger.Panics(ledger.PanicProcessor)); dead != 3 || writer < 2 || processor != 1 {
			t := w.T
			t.Errorf("%v are dead, %v panics of the writer, %v of the processor", dead, writer, processor)
		}
		by := map[string]int{}
		if err := w.conn.Letters(w.Context(), w.d.Signal.String(), "as-1", false, func(l bus.Letter) bool {
			by[l.Backend+" "+l.Reason] += l.Items
			return true
		}); err != nil || !maps.Equal(by, map[string]int{"loki poison": 2, "processor poison": 1}) {
			w.Errorf("letters %v, %v", by, err)
		}
		if !said.Says("bug:", "stage=writer", "instance=as-1", "source=", "tenants).Write") {
			w.Errorf("the log does not say where: %s", &said)
		}
	})
}

// TestABackendThatFailsOnOnePayload: it is narrowed down and dead-lettered, once it has been tried for long enough, while
// others are accepted, whether its instance is set aside or not.
func TestABackendThatFailsOnOnePayload(t *testing.T) {
	both(t, func(w *asideWorld) {
		w.d.Poison = backend.Poison{Tries: 8}
		w.w.fails = "curse"
		stop := w.own()
		defer stop()
		w.publish("as-1", "a", "curse", "b")
		w.publish("as-1", "c")
		want := []string{"a", "b", "c"}
		w.until("what is sound", func() bool {
			w.send("as-2")
			return slices.Equal(w.w.of("as-1"), want)
		})
		w.until("the other", w.arrived("as-2"))
		w.until("the floor", w.nothingOwed)
		w.until("nothing is set aside", func() bool { return w.waiting("as-1") == 0 })
		if dead := testutil.ToFloat64(w.d.Ledger.Of(w.d.Signal).Dead(ledger.DeadPoison)); dead != 1 {
			w.Errorf("%v are dead", dead)
		}
	})
}
