// Package broker runs a nats-server with JetStream inside the process: the
// edge's spool (no socket at all), the hub of `penstock up`, and tests.
//
// # Promises
//
//   - One process at a time owns a directory: a second Start on it fails, with
//     [ErrOwned].
//   - With Sync an acknowledged message has been fsynced.
//
// # Not here
//
// Streams and messages: package bus.
package broker

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// Config says what kind of server it is.
type Config struct {
	Name string
	Dir  string // of the file store, made when it is not there
	// Listen is host:port for clients; empty opens no socket.
	Listen string
	// Sync makes every message durable by fsync before it is acknowledged.
	Sync bool
	// MaxPayload is the largest message in bytes.
	MaxPayload int
	// Prepare is called when the directory is ours and before the server reads it.
	// nil for nothing.
	Prepare func() error
}

// Broker is a running server.
type Broker struct {
	srv    *server.Server
	lock   *os.File
	broken <-chan struct{}
}

// startTimeout covers reading a file store back in after a crash.
const startTimeout = 60 * time.Second

// Start runs a server until Stop. It returns when clients can connect.
func Start(cfg Config, log *slog.Logger) (*Broker, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of %s: %w", cfg.Name, err)
	}
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	var b *Broker
	if cfg.Prepare != nil {
		err = cfg.Prepare()
	}
	if err == nil {
		b, err = start(cfg, log)
	}
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	b.lock = lock
	return b, nil
}

// Gone reports whether the directory is not there any more: what is written goes
// into files that nobody can open again.
func (b *Broker) Gone() bool {
	mine, err := b.lock.Stat()
	if err != nil {
		return true
	}
	there, err := os.Stat(b.lock.Name())
	return err != nil || !os.SameFile(mine, there)
}

func start(cfg Config, log *slog.Logger) (*Broker, error) {
	opts := &server.Options{
		ServerName: cfg.Name,
		JetStream:  true,
		StoreDir:   cfg.Dir,
		SyncAlways: cfg.Sync,
		MaxPayload: int32(cfg.MaxPayload),
		NoSigs:     true,
		DontListen: cfg.Listen == "",
		// The share of the disk is the streams' own byte bound.
		JetStreamMaxStore: 1 << 50,
	}
	if cfg.Listen != "" {
		host, port, err := net.SplitHostPort(cfg.Listen)
		if err != nil {
			return nil, fmt.Errorf("address of %s: %w", cfg.Name, err)
		}
		if opts.Port, err = strconv.Atoi(port); err != nil {
			return nil, fmt.Errorf("address of %s: port %q", cfg.Name, port)
		}
		if opts.Port == 0 {
			opts.Port = server.RANDOM_PORT
		}
		opts.Host = host
		if err := free(cfg.Listen); err != nil {
			return nil, err
		}
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", cfg.Name, err)
	}
	lg := &logger{log: log.With("component", cfg.Name), broken: make(chan struct{})}
	srv.SetLoggerV2(lg, false, false, false)
	srv.Start()
	for deadline := time.Now().Add(startTimeout); !srv.ReadyForConnections(100 * time.Millisecond); {
		fatal := lg.fatal.Load()
		if fatal == nil && time.Now().Before(deadline) {
			continue
		}
		srv.Shutdown()
		if fatal != nil {
			return nil, fmt.Errorf("start %s in %s: %s", cfg.Name, cfg.Dir, *fatal)
		}
		return nil, fmt.Errorf("start %s in %s: not ready after %v", cfg.Name, cfg.Dir, startTimeout)
	}
	if fatal := lg.fatal.Load(); fatal != nil || !srv.JetStreamEnabled() {
		srv.Shutdown()
		return nil, fmt.Errorf("start %s in %s: JetStream is not running", cfg.Name, cfg.Dir)
	}
	return &Broker{srv: srv, broken: lg.broken}, nil
}

// free reports an error that says what to do when the address is taken; the
// server itself would only log it.
func free(addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listen for NATS on %s: %w; is another hub running? Set another address", addr, err)
	}
	return ln.Close()
}

// ErrOwned reports that a directory has an owner.
var ErrOwned = errors.New("another process is using this directory")

// lockDir takes an advisory lock that ends with the process, however it ends.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "LOCK"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w; give each edge one of its own", dir, ErrOwned)
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

// InProcessConn connects without a socket; nats.go takes a Broker as an
// InProcessConnProvider.
func (b *Broker) InProcessConn() (net.Conn, error) { return b.srv.InProcessConn() }

// URL is where clients connect over TCP.
func (b *Broker) URL() string { return b.srv.ClientURL() }

// Broken is closed when a stream could not write its files. It stores nothing more
// until another Broker is started on the directory, and does not even answer
// (nats-server 2.15.2).
func (b *Broker) Broken() <-chan struct{} { return b.broken }

// Stop ends the server and frees the directory.
func (b *Broker) Stop() {
	b.srv.Shutdown()
	b.srv.WaitForShutdown()
	_ = b.lock.Close()
}

// logger hands the server's log lines to slog. Notices are chatter.
type logger struct {
	log    *slog.Logger
	fatal  atomic.Pointer[string]
	broken chan struct{}
	once   sync.Once
}

func (l *logger) Noticef(f string, v ...any) { l.log.Debug(fmt.Sprintf(f, v...)) }
func (l *logger) Warnf(f string, v ...any)   { l.log.Warn(fmt.Sprintf(f, v...)) }
func (l *logger) Debugf(string, ...any)      {}
func (l *logger) Tracef(string, ...any)      {}

// Errorf listens for the one sign that the server gives of a write error.
func (l *logger) Errorf(f string, v ...any) {
	text := fmt.Sprintf(f, v...)
	l.log.Error(text)
	if strings.Contains(strings.ToLower(text), "critical write error") {
		l.once.Do(func() { close(l.broken) })
	}
}

// Fatalf keeps the message for Start, which returns it.
func (l *logger) Fatalf(f string, v ...any) {
	s := fmt.Sprintf(f, v...)
	l.fatal.CompareAndSwap(nil, &s)
}
