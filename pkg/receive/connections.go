package receive

import (
	"container/list"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/ledger"
)

// gate is a listener that bounds the open connections, in total and from one address. At either
// bound a new connection replaces one without a request in progress: first one that has sent no
// request yet, then one of the others, in both cases the one that has been idle longest. Where
// every connection has a request, a new one waits; over the bound of its address it is closed.
type gate struct {
	net.Listener
	max, perAddress int // perAddress 0 for no bound
	led             *ledger.Ledger

	mu        sync.Mutex
	room      sync.Cond // of mu: a connection has ended, or waits for its next request
	open      int
	closed    bool
	byAddress map[netip.Prefix]int
	silent    [2]list.List // of *conn without a request in progress: those that never had one, and the others
}

// grace is how long a connection is not replaced: after it was accepted, so that under load those
// that send a request get their turn, and after an answer, which may still be in transit.
const grace = time.Second / 2

func newGate(ln net.Listener, cfg Config, led *ledger.Ledger) *gate {
	g := &gate{Listener: ln, max: cfg.MaxConnections, perAddress: cfg.Limits.Address.Connections, led: led, byAddress: map[netip.Prefix]int{}}
	g.room.L = &g.mu
	return g
}

// conn is an accepted connection. Its remote address refers to it, so that servers can find it.
type conn struct {
	net.Conn
	gate *gate
	from netip.Prefix

	// Guarded by the gate's mu:
	requests int // in progress
	place    *list.Element
	list     *list.List // the list that has place
	since    time.Time  // when it was put there
	gone     bool
}

// address is a remote address that refers to its connection: it is what servers know of it.
type address struct {
	net.Addr
	conn *conn
}

func (c *conn) RemoteAddr() net.Addr { return address{c.Conn.RemoteAddr(), c} }

// Accept returns the next accepted connection.
func (g *gate) Accept() (net.Conn, error) {
	for {
		raw, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &conn{Conn: raw, gate: g, from: prefix(raw.RemoteAddr())}
		if g.enter(c) {
			return c, nil
		}
		_ = raw.Close()
	}
}

// Close stops listening; connections stay open.
func (g *gate) Close() error {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.room.Broadcast()
	return g.Listener.Close()
}

func (g *gate) enter(c *conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.perAddress > 0 && g.byAddress[c.from] >= g.perAddress {
		g.led.ClosedConnections(ledger.ClosedAddress).Inc()
		if !g.makeRoomLocked(func(other *conn) bool { return other.from == c.from }) {
			return false
		}
	}
	for g.open >= g.max && !g.closed {
		if g.makeRoomLocked(func(*conn) bool { return true }) {
			g.led.ClosedConnections(ledger.ClosedFull).Inc()
		} else {
			young := time.AfterFunc(grace, g.room.Signal)
			g.room.Wait()
			young.Stop()
		}
	}
	if g.closed {
		return false
	}
	g.open++
	g.byAddress[c.from]++
	g.placeLocked(c, 0)
	return true
}

// makeRoomLocked closes a connection without a request, one of those that may be closed.
func (g *gate) makeRoomLocked(may func(*conn) bool) bool {
	for i := range g.silent {
		for e := g.silent[i].Front(); e != nil; e = e.Next() {
			c := e.Value.(*conn)
			if time.Since(c.since) < grace {
				break // those after it are even younger
			}
			if may(c) {
				c.leaveLocked()
				_ = c.Conn.Close()
				return true
			}
		}
	}
	return false
}

func (g *gate) placeLocked(c *conn, which int) {
	c.list, c.since = &g.silent[which], time.Now()
	c.place = c.list.PushBack(c)
	g.room.Signal()
}

func (c *conn) unplaceLocked() {
	if c.place != nil {
		c.list.Remove(c.place)
		c.place = nil
	}
}

func (c *conn) leaveLocked() {
	if c.gone {
		return
	}
	c.gone = true
	c.unplaceLocked()
	g := c.gate
	if g.open--; g.byAddress[c.from] > 1 {
		g.byAddress[c.from]--
	} else {
		delete(g.byAddress, c.from)
	}
	g.room.Signal()
}

// Close closes the connection.
func (c *conn) Close() error {
	c.gate.mu.Lock()
	c.leaveLocked()
	c.gate.mu.Unlock()
	return c.Conn.Close()
}

// began records that a connection has one more request in progress; of is its remote address.
func began(of net.Addr) { count(of, 1) }

// answered records that it has one less.
func answered(of net.Addr) { count(of, -1) }

func count(of net.Addr, n int) {
	a, is := of.(address)
	if !is {
		return
	}
	c := a.conn
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	if c.requests += n; c.requests > 0 {
		c.unplaceLocked()
	} else if !c.gone && c.place == nil {
		c.gate.placeLocked(c, 1)
	}
}

// httpState receives net/http's changes of a connection's state.
func httpState(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateActive: // its header was read
		began(c.RemoteAddr())
	case http.StateIdle:
		answered(c.RemoteAddr())
	default: // when it ends, it is closed
	}
}

// prefix returns the range of addresses that counts as one sender: one IPv4 address, or one /64
// network of IPv6.
func prefix(addr net.Addr) netip.Prefix {
	tcp, is := addr.(*net.TCPAddr)
	if !is {
		return netip.Prefix{}
	}
	ip, bits := tcp.AddrPort().Addr().Unmap().WithZone(""), 64
	if ip.Is4() {
		bits = 32
	}
	p, _ := ip.Prefix(bits)
	return p
}
