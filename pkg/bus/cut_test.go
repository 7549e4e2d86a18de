package bus

import (
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/broker"
)

// cutter is a TCP proxy to a server that can be cut without notice to either end, as
// in a network failure.
type cutter struct {
	addr string
	mu   sync.Mutex
	open *sync.Cond
	cut  bool
}

func startCutter(t testing.TB, target string) *cutter {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{addr: ln.Addr().String()}
	c.open = sync.NewCond(&c.mu)
	t.Cleanup(func() { _ = ln.Close(); c.set(false) })
	go func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				_ = in.Close()
				continue
			}
			t.Cleanup(func() { _ = in.Close(); _ = out.Close() })
			go c.copy(in, out)
			go c.copy(out, in)
		}
	}()
	return c
}

// copy passes bytes on while the proxy is open; what arrives while it is cut waits.
func (c *cutter) copy(dst io.Writer, src io.Reader) {
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		c.mu.Lock()
		for c.cut {
			c.open.Wait()
		}
		c.mu.Unlock()
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (c *cutter) set(cut bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut = cut
	c.open.Broadcast()
}

// TestOwnerThatIsCutOff cuts the connection between an owner and the hub for longer than
// a pin lasts: another reader continues from the floor, and the owner, when it is connected
// again, delivers nothing more than what it had already handed over.
func TestOwnerThatIsCutOff(t *testing.T) {
	t.Parallel()
	b, err := broker.Start(broker.Config{Name: "test", Dir: t.TempDir(), Listen: "127.0.0.1:0", MaxPayload: 2 << 20}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	hub := testHub(t, b, 1)
	publish(t, hub, "as-1", 0, 600) // more than an owner has in its buffer
	way := startCutter(t, strings.TrimPrefix(b.URL(), "nats://"))
	conn, err := Connect(Config{Name: "cut", URL: "nats://" + way.addr}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	owner := startReader(t, conn)
	owner.claimed(t, 10*time.Second)
	owner.expect(t, 0, 50)
	if err := owner.lane.Ack(20); err != nil {
		t.Fatal(err)
	}
	waitLag(t, owner.lane, 580)

	way.set(true)
	next := startReader(t, connectTo(t, b, "next"))
	next.claimed(t, pinTTL+4*time.Second)
	next.expect(t, 20, 400)
	_ = owner.lane.Ack(50) // finished, but too late
	way.set(false)
	woken := 0
	for quiet := time.After(3 * time.Second); quiet != nil; {
		select {
		case d := <-owner.got:
			if woken++; woken > 1 || string(d.Body) != "50" {
				t.Fatalf("after the cut it hands out %+v", d)
			}
		case <-quiet:
			quiet = nil
		}
	}
	next.expect(t, 400, 600)
	if err := next.lane.Ack(600); err != nil {
		t.Fatal(err)
	}
	waitLag(t, next.lane, 0)
}
