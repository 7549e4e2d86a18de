package receive

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/ledger"
)

// idle opens n connections that say nothing, from an address of the machine's own.
func idle(t *testing.T, from, to string, n int) []net.Conn {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conns := make([]net.Conn, 0, n)
	for range n {
		c, err := dialer.DialContext(t.Context(), "tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		conns = append(conns, c)
	}
	return conns
}

// gates returns those of gRPC and HTTP.
func (d *door) gates() [2]*gate { return [2]*gate{d.r.lns[0].(*gate), d.r.lns[1].(*gate)} }

func (g *gate) state() (open int, from map[netip.Prefix]int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	from = map[netip.Prefix]int{}
	for p, n := range g.byAddress {
		from[p] = n
	}
	return g.open, from
}

// TestIdleConnectionsHoldUpNobody opens more silent connections than there may be: a good
// request passes while as many as may be are open, rather than when they have been closed
// for their silence.
func TestIdleConnectionsHoldUpNobody(t *testing.T) {
	const most, more = 1000, 200
	d := open(t, false, func(c *Config) { c.MaxConnections = most })
	idle(t, "127.0.0.1", d.grpc, most+more)
	idle(t, "127.0.0.1", strings.TrimPrefix(d.http, "http://"), most+more)
	d.probe(t)
	for i, g := range d.gates() {
		if open, _ := g.state(); open < most-1 { // all, but the probe's
			t.Errorf("%d: only %d connections were open when the good request had been answered", i, open)
		}
	}
	if n := testutil.ToFloat64(d.led.ClosedConnections(ledger.ClosedFull)); n < 2*more || n > 2*more+2 {
		t.Errorf("%v connections made room, want %d and those for the good requests", n, 2*more)
	}
}

// TestAddressIsBounded: one address has its share of the connections and no more, and
// others' requests pass.
func TestAddressIsBounded(t *testing.T) {
	const most, share = 100, 20
	d := open(t, false, func(c *Config) { c.MaxConnections, c.Limits.Address.Connections = most, share })
	addr := strings.TrimPrefix(d.http, "http://")
	if c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).Dial("tcp", addr); err != nil {
		t.Skip("this machine has one loopback address: ", err)
	} else {
		_ = c.Close()
	}
	others := idle(t, "127.0.0.3", addr, 10)
	idle(t, "127.0.0.2", addr, 5*most)
	d.probe(t)
	g := d.gates()[1]
	g.mu.Lock()
	for e := g.silent[0].Front(); e != nil; e = e.Next() {
		e.Value.(*conn).since = time.Time{} // they have had their time
	}
	g.mu.Unlock()
	next := idle(t, "127.0.0.2", addr, 1)[0] // takes the place of one of its address
	if _, err := io.WriteString(next, "POST /v1/traces HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(next); err != nil || len(answer) == 0 {
		t.Errorf("the next of the address: %q, %v", answer, err)
	}
	_, from := g.state()
	if n := from[netip.MustParsePrefix("127.0.0.2/32")]; n != share && n != share-1 {
		t.Errorf("%d connections of one address are open, want %d, and one less when the last has ended", n, share)
	}
	if n := from[netip.MustParsePrefix("127.0.0.3/32")]; n != len(others) {
		t.Errorf("%d connections of another address are open, want %d", n, len(others))
	}
	if n := testutil.ToFloat64(d.led.ClosedConnections(ledger.ClosedAddress)); n < 4*most {
		t.Errorf("%v connections over the bound of their address were counted", n)
	}
}

// TestRequestsAtHandAreNotClosed floods a receiver while requests are at hand on all
// connections it may have but one, then on all: they are answered, and so are those that wait.
func TestRequestsAtHandAreNotClosed(t *testing.T) {
	const most = 6
	d := open(t, false, func(c *Config) { c.MaxConnections = most })
	entered, release := make(chan struct{}, 64), make(chan struct{})
	d.hold = func() { entered <- struct{}{}; <-release }
	var wg sync.WaitGroup
	send := func() {
		wg.Go(func() {
			if res, body := d.do(t, req{body: good(t)}); res.StatusCode != 200 {
				t.Errorf("%s %q", res.Status, body)
			}
		})
		wg.Go(func() {
			if err := d.export(t, good(t)); err != nil {
				t.Error(err)
			}
		})
	}
	for range most - 1 {
		send()
	}
	for range 2 * (most - 1) {
		<-entered
	}
	for _, addr := range []string{d.grpc, strings.TrimPrefix(d.http, "http://")} {
		for i, c := range idle(t, "127.0.0.1", addr, 3) {
			if i == 2 {
				continue // has the one place
			}
			_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
			if _, err := io.Copy(io.Discard, c); err != nil && !strings.Contains(err.Error(), "reset") {
				var timeout net.Error
				if errors.As(err, &timeout) && timeout.Timeout() {
					t.Fatalf("silent connection %d was not closed", i)
				}
			}
		}
	}
	for range 4 {
		send() // one has the last place, the others wait
	}
	<-entered
	<-entered
	close(release)
	wg.Wait()
	if n := d.items(); n != 2*(most+3) {
		t.Errorf("%d items, want %d", n, 2*(most+3))
	}
}

// TestAddressWithRequestsAtHand: where all that an address may have is at work, the next
// connection of it is closed, and another address has its place.
func TestAddressWithRequestsAtHand(t *testing.T) {
	d := open(t, false, func(c *Config) { c.Limits.Address.Connections = 1 })
	entered, release := make(chan struct{}), make(chan struct{})
	d.hold = func() { entered <- struct{}{}; <-release }
	done := make(chan int)
	go func() {
		res, _ := d.do(t, req{body: good(t)})
		done <- res.StatusCode
	}()
	<-entered
	c := idle(t, "127.0.0.1", strings.TrimPrefix(d.http, "http://"), 1)[0]
	if _, err := io.Copy(io.Discard, c); err != nil && !strings.Contains(err.Error(), "reset") {
		t.Errorf("the second connection: %v", err)
	}
	close(release)
	if code := <-done; code != 200 {
		t.Errorf("the first: %d", code)
	}
}

func TestPrefix(t *testing.T) {
	for addr, want := range map[string]string{
		"1.2.3.4": "1.2.3.4/32", "::ffff:1.2.3.4": "1.2.3.4/32", "2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64", "fe80::1%eth0": "fe80::/64",
	} {
		ip := netip.MustParseAddr(addr)
		if got := prefix(net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip, 1))); got.String() != want {
			t.Errorf("%s: %v, want %s", addr, got, want)
		}
	}
}
