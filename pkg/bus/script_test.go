package bus

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/scripttest"
)

// TestScripts runs readers of the one lane of a hub with one partition; each has its own connection:
//
//	publish n=0..9            messages of LOGS; message 0 has sequence 1
//	open A                    a reader
//	read A messages=5         what it gets until it has so many messages
//	idle A                    what it gets until it hears that nothing is left
//	ack A seq=5
//	state A lag=5             waits until the lane has this many unfinished messages
//	close A
//	kill A                    ends its connection; the pin stays until it expires
//	pause A                   it renews its pin no longer
//	reset                     another reader resets the consumer to its floor
//	recreate                  somebody deletes the consumer
//
// Nothing depends on time: a command waits until what it is for has come.
func TestScripts(t *testing.T) {
	scripttest.Run(t, func(t *testing.T, s *scripttest.Script) {
		t.Parallel()
		b := testBroker(t)
		sc := &script{t: t, broker: b, hub: testHub(t, b, 1), readers: map[string]*scriptReader{}}
		s.Run(t, scripttest.Commands{
			"publish": sc.publish, "open": sc.open, "read": sc.read, "idle": sc.idle, "ack": sc.ack, "state": sc.state,
			"close": sc.close, "kill": sc.kill, "pause": sc.pause, "reset": sc.reset, "recreate": sc.recreate,
		})
	})
}

type script struct {
	t       *testing.T
	broker  *broker.Broker
	hub     *Conn
	readers map[string]*scriptReader
}

type scriptReader struct {
	*Lane
	conn *Conn
}

func (sc *script) publish(c *scripttest.Call) string {
	first, last, _ := strings.Cut(c.Text("n", ""), "..")
	from, err := strconv.Atoi(first)
	if err != nil {
		c.Fatalf("%v", err)
	}
	to, err := strconv.Atoi(last)
	if err != nil {
		c.Fatalf("%v", err)
	}
	publish(sc.t, sc.hub, "as-1", from, to+1)
	return ""
}

func (sc *script) open(c *scripttest.Call) string {
	conn := connectTo(sc.t, sc.broker, c.Word(0))
	until(sc.t, "connected", conn.Connected)
	sc.readers[c.Word(0)] = &scriptReader{openLane(sc.t, conn), conn}
	return ""
}

// reader is the one that the command's first word names.
func (sc *script) reader(c *scripttest.Call) *scriptReader {
	r := sc.readers[c.Word(0)]
	if r == nil {
		c.Fatalf("no reader %q", c.Word(0))
	}
	return r
}

// deliveries shows what a reader gets until enough says so; runs of messages in one line.
func (sc *script) deliveries(c *scripttest.Call, enough func(d Delivery) bool) string {
	r := sc.reader(c)
	ctx, cancel := context.WithTimeout(sc.t.Context(), time.Minute)
	defer cancel()
	var b strings.Builder
	first, last := 0, 0
	end := func() {
		if first > 0 {
			fmt.Fprintf(&b, "%d..%d\n", first, last)
		}
		first = 0
	}
	done := false
	r.Run(ctx, func(d Delivery) bool {
		seq := int(d.Seq)
		switch {
		case d.Claimed:
			end()
			fmt.Fprintf(&b, "claimed, floor %d, it had finished %d\n", r.Floor(), d.After)
		case seq > 0:
			if d.Err != nil || string(d.Body) != fmt.Sprint(seq-1) {
				sc.t.Errorf("message %d is %q, %v", seq, d.Body, d.Err)
			}
			if first == 0 || seq != last+1 {
				end()
				first = seq
			}
			last = seq
		}
		done = enough(d)
		return !done
	})
	if end(); !done {
		c.Fatalf("after a minute it has got only\n%s", b.String())
	}
	return b.String()
}

func (sc *script) read(c *scripttest.Call) string {
	left := c.Number("messages", 1)
	return sc.deliveries(c, func(d Delivery) bool {
		if d.Seq > 0 {
			left--
		}
		return left == 0
	})
}

func (sc *script) idle(c *scripttest.Call) string {
	after := uint64(0)
	out := sc.deliveries(c, func(d Delivery) bool { after = d.After; return d.Idle })
	return out + fmt.Sprintf("nothing is left after %d\n", after)
}

func (sc *script) ack(c *scripttest.Call) string {
	if err := sc.reader(c).Ack(uint64(c.Number("seq", 0))); err != nil {
		c.Fatalf("%v", err)
	}
	return ""
}

// state shows the floor that the reader knows, and what the hub says of the lane.
func (sc *script) state(c *scripttest.Call) string {
	r, lag := sc.reader(c), uint64(c.Number("lag", 0))
	cfg := LaneConfig{Stream: "LOGS", Filter: PartitionFilter(otlpwire.Logs, 0), Name: "test-0"}
	var at Floor
	until(sc.t, c.Text("lag", "0")+" messages are not finished", func() bool {
		var err error
		at, err = sc.hub.LaneFloor(sc.t.Context(), cfg)
		return err == nil && at.Lag == lag
	})
	return fmt.Sprintf("floor %d, the hub's %d, owned %v\n", r.Floor(), at.Done, r.Owned())
}

func (sc *script) close(c *scripttest.Call) string {
	sc.reader(c).Close()
	return ""
}

func (sc *script) kill(c *scripttest.Call) string {
	sc.reader(c).conn.nc.Close()
	return ""
}

func (sc *script) pause(c *scripttest.Call) string {
	r := sc.reader(c)
	r.hold()
	until(sc.t, "the pin has expired", func() bool { return !r.Owned() })
	return ""
}

func (sc *script) reset(c *scripttest.Call) string {
	if _, err := sc.hub.js.ResetConsumer(sc.t.Context(), "LOGS", "test-0"); err != nil {
		c.Fatalf("%v", err)
	}
	return ""
}

func (sc *script) recreate(c *scripttest.Call) string {
	if err := sc.hub.DropLane(sc.t.Context(), "LOGS", "test-0"); err != nil {
		c.Fatalf("%v", err)
	}
	return ""
}
