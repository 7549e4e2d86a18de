// Package faultproxy is a TCP proxy that does to a connection what networks do:
// it is slow, drops one direction without a word, resets, or flips a byte.
package faultproxy

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Fault is what happens to the bytes of all connections.
type Fault struct {
	DropUp   bool          // from the client to the server
	DropDown bool          // from the server to the client
	Rate     int           // bytes a second and direction; 0 for no bound
	Delay    time.Duration // of every piece
	Flip     bool          // one bit of every piece
}

// Proxy forwards to one target.
type Proxy struct {
	ln     net.Listener
	target string
	fault  atomic.Pointer[Fault]

	mu    sync.Mutex
	conns map[net.Conn]bool
	shut  bool
}

// Start listens on loopback.
func Start(target string) (*Proxy, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Proxy{ln: ln, target: target, conns: map[net.Conn]bool{}}
	p.fault.Store(&Fault{})
	go p.serve()
	return p, nil
}

// Addr is where clients connect.
func (p *Proxy) Addr() string { return p.ln.Addr().String() }

// Set makes a fault begin. A connection that has lost bytes never gets them: end it
// with Reset, as a network does when it has been mended.
func (p *Proxy) Set(f Fault) { p.fault.Store(&f) }

// Reset ends all connections with RST.
func (p *Proxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = c.Close()
	}
}

// Connections is how many clients are connected.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.conns) / 2
}

// Close ends everything.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.shut = true
	p.mu.Unlock()
	_ = p.ln.Close()
	p.Reset()
}

func (p *Proxy) serve() {
	for {
		client, err := p.ln.Accept()
		if err != nil {
			return
		}
		go p.connect(client)
	}
}

// hold notes a connection, or closes it when the proxy is closed.
func (p *Proxy) hold(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shut {
		_ = c.Close()
		return false
	}
	p.conns[c] = true
	return true
}

func (p *Proxy) drop(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	_ = c.Close()
}

func (p *Proxy) connect(client net.Conn) {
	if !p.hold(client) {
		return
	}
	defer p.drop(client)
	server, err := net.Dial("tcp", p.target)
	if err != nil || !p.hold(server) {
		return
	}
	defer p.drop(server)
	ended := make(chan struct{}, 2)
	go func() { p.copy(server, client, true); ended <- struct{}{} }()
	go func() { p.copy(client, server, false); ended <- struct{}{} }()
	<-ended
}

func (p *Proxy) copy(to io.Writer, from io.Reader, up bool) {
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		f := p.fault.Load()
		if (up && f.DropUp) || (!up && f.DropDown) {
			continue
		}
		wait := f.Delay
		if f.Rate > 0 {
			wait += time.Duration(n) * time.Second / time.Duration(f.Rate)
		}
		if wait > 0 {
			<-time.After(wait)
		}
		if f.Flip {
			buf[n/2] ^= 1
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}
