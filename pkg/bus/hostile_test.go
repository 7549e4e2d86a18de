package bus

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// rawPublisher sends NATS messages that no client library would send.
type rawPublisher struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Reader
}

func newRawPublisher(t *testing.T, b interface{ InProcessConn() (net.Conn, error) }) *rawPublisher {
	t.Helper()
	conn, err := b.InProcessConn()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	p := &rawPublisher{t, conn, bufio.NewReader(conn)}
	p.line("INFO")
	p.write("CONNECT {\"verbose\":false,\"headers\":true}\r\nSUB _INBOX_raw.* 1\r\nPING\r\n")
	p.line("PONG")
	return p
}

func (p *rawPublisher) write(s string) {
	if _, err := p.conn.Write([]byte(s)); err != nil {
		p.t.Fatal(err)
	}
}

// line reads up to a line with the given beginning.
func (p *rawPublisher) line(begins string) string {
	_ = p.conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	for {
		line, err := p.in.ReadString('\n')
		if err != nil {
			p.t.Fatalf("waiting for %q: %v", begins, err)
		}
		if strings.HasPrefix(line, begins) {
			return line
		}
	}
}

// publish stores a message with these bytes for a header.
func (p *rawPublisher) publish(subject, header, body string) {
	p.write(fmt.Sprintf("HPUB %s _INBOX_raw.x %d %d\r\n%s%s\r\n", subject, len(header), len(header)+len(body), header, body))
	if p.line("MSG"); !strings.Contains(p.line("{"), `"seq"`) {
		p.t.Fatalf("header %q was not stored", header)
	}
}

// envelopeHeader is the header of message n, with more lines, which may be wrong.
func envelopeHeader(n int, more string) string {
	var b strings.Builder
	b.WriteString("NATS/1.0\r\n")
	logsMessage("as-1", n).Header.Fields(func(name, value string) { b.WriteString(name + ": " + value + "\r\n") })
	return b.String() + more
}

// hostileHeaders are what a sender can write to imitate the server. Those that are
// readable are delivered, with the envelope that they also have.
var hostileHeaders = map[string]struct {
	more     string
	readable bool
}{
	"a pin of its own":             {"Nats-Pin-Id: x\r\n\r\n", true},
	"two pins":                     {"Nats-Pin-Id: x\r\nNats-Pin-Id: y\r\n\r\n", true},
	"a pin in other letters":       {"nats-pin-id: x\r\n\r\n", true},
	"a status":                     {"Status: 423\r\n\r\n", true},
	"a status that ends a request": {"Status: 409\r\nDescription: Consumer Deleted\r\n\r\n", true},
	"a heartbeat":                  {"Status: 100\r\nDescription: Idle Heartbeat\r\n\r\n", true},
	"a block without an end":       {"X: y\r\n", true}, // the server ends it
	"a line without an end":        {"X: y", false},
	"a pin that is left open":      {"Nats-Pin-Id: x", false},
	"a line without a colon":       {"no colon here\r\n\r\n", false},
	"bytes that are no text":       {"\x00\xff: \x01\r\n\r\n", false},
	"a size of its own":            {"Nats-Msg-Size: 9000000000\r\n\r\n", true},
}

// TestNoHeaderStopsALane: whatever a sender writes into a header, and wherever in it,
// the lane continues in order and without going back, and the messages of others arrive.
func TestNoHeaderStopsALane(t *testing.T) {
	t.Parallel()
	for name, hostile := range hostileHeaders {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := testBroker(t)
			c := testHub(t, b, 1)
			raw := newRawPublisher(t, b)
			send := func(n int) { raw.publish(Subject(otlpwire.Logs, "as-1"), envelopeHeader(n, hostile.more), "") }
			send(0) // the first that a lane sees
			send(1)
			publish(t, c, "as-2", 2, 4)
			send(4)
			publish(t, c, "as-2", 5, 6)
			send(6) // the last: the lane is quiet after it

			interruptions := 0
			l, err := c.OpenLane(t.Context(), LaneConfig{Stream: "LOGS", Filter: PartitionFilter(otlpwire.Logs, 0), Name: "test-0", Interrupted: func(string) { interruptions++ }})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			for n := range 7 {
				d := message(ctx, t, l)
				if d.Seq != uint64(n+1) {
					t.Fatalf("message %d comes where %d is due", d.Seq, n+1)
				}
				theirs := d.Instance() == "as-2"
				if theirs && (d.Err != nil || string(d.Body) != strconv.Itoa(n)) {
					t.Errorf("another's message: %+v", d)
				}
				if hostile.readable && d.Err != nil {
					t.Errorf("message %d: %v", n, d.Err)
				}
				if err := l.Ack(d.Seq); err != nil {
					t.Fatal(err)
				}
			}
			for { // until the server reports that nothing is left
				d, err := l.Next(ctx)
				if err != nil {
					t.Fatal(err)
				}
				if d.Idle {
					break
				}
				if d.Seq > 0 {
					t.Fatalf("message %d comes again", d.Seq)
				}
			}
			if interruptions > 0 || !l.Owned() {
				t.Errorf("%d interruptions, owned %v", interruptions, l.Owned())
			}
			waitLag(t, l, 0)
		})
	}
}

// TestTheChannelHoldsWhatMayCome: a server that answers late also serves requests that were given up.
func TestTheChannelHoldsWhatMayCome(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	c := testHub(t, b, 1)
	publish(t, c, "as-1", 0, 10)
	cons, err := c.js.CreateConsumer(t.Context(), "LOGS", jetstream.ConsumerConfig{AckPolicy: jetstream.AckNonePolicy, MemoryStorage: true})
	if err != nil {
		t.Fatal(err)
	}
	p, err := newPull(c, "LOGS", cons.CachedInfo().Name, "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	asked := 0
	for deafness := 0; ; deafness++ {
		if err := p.ask(); err != nil {
			t.Fatal(err)
		}
		asked += len(p.asked)
		p.active = time.Now().Add(-2 * deafForGood)
		if err := p.giveUp(time.Now()); err != nil {
			break
		}
		if deafness > 10 {
			t.Fatal("it goes on asking for ever")
		}
	}
	if most := asked * requestCount; most > cap(p.msgs) {
		t.Errorf("%d messages may come, and there is room for %d", most, cap(p.msgs))
	}
}
