// Package broker runs a nats-server with JetStream inside the process: the hub of
// `penstock up`, and tests.
//
// # Promises
//
//   - One process at a time owns a directory: a second Start on it fails, with
//     [disk.ErrOwned].
//   - With Sync an acknowledged message has been fsynced.
//
// # Not here
//
// Streams and messages: package bus.
package broker

import (
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/penstock/penstock/pkg/disk"
)

// Config configures the server.
type Config struct {
	Name string
	Dir  string // of the file store, created if it does not exist
	// Listen is host:port for clients; empty opens no socket.
	Listen string
	// Sync makes every message durable by fsync before it is acknowledged.
	Sync bool
	// MaxPayload is the largest message in bytes.
	MaxPayload int
}

// Broker is a running server.
type Broker struct {
	srv  *server.Server
	lock *disk.Lock
}

// startTimeout allows for reading the file store after a crash.
const startTimeout = 60 * time.Second

// Start runs a server until Stop. It returns when clients can connect.
func Start(cfg Config, log *slog.Logger) (*Broker, error) {
	lock, err := disk.Own(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("directory of %s: %w", cfg.Name, err)
	}
	b, err := start(cfg, log)
	if err != nil {
		lock.Free()
		return nil, err
	}
	b.lock = lock
	return b, nil
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
		// The disk is bounded by the streams' own byte bounds.
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
	lg := &logger{log: log.With("component", cfg.Name)}
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
	return &Broker{srv: srv}, nil
}

// free returns an error that says what to do if the address is in use; the server itself would only log it.
func free(addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listen for NATS on %s: %w; is another hub running? Set another address", addr, err)
	}
	return ln.Close()
}

// InProcessConn connects without a socket; a Broker is an InProcessConnProvider of nats.go.
func (b *Broker) InProcessConn() (net.Conn, error) { return b.srv.InProcessConn() }

// URL is the address for clients over TCP.
func (b *Broker) URL() string { return b.srv.ClientURL() }

// Stop ends the server and frees the directory.
func (b *Broker) Stop() {
	b.srv.Shutdown()
	b.srv.WaitForShutdown()
	b.lock.Free()
}

// logger passes the server's log lines to slog. Notices are logged at debug level.
type logger struct {
	log   *slog.Logger
	fatal atomic.Pointer[string]
}

func (l *logger) Noticef(f string, v ...any) { l.log.Debug(fmt.Sprintf(f, v...)) }
func (l *logger) Warnf(f string, v ...any) {
	s := fmt.Sprintf(f, v...)
	if strings.Contains(s, "will rebuild") { // its index is older than the messages, after kill -9 or a power cut
		l.log.Info("rebuilding a stream's index from its messages after an unclean stop; nothing is lost", "server_says", s)
		return
	}
	l.log.Warn(s)
}
func (l *logger) Errorf(f string, v ...any) { l.log.Error(fmt.Sprintf(f, v...)) }
func (l *logger) Debugf(string, ...any)     {}
func (l *logger) Tracef(string, ...any)     {}

// Fatalf keeps the message for Start, which returns it.
func (l *logger) Fatalf(f string, v ...any) {
	s := fmt.Sprintf(f, v...)
	l.fatal.CompareAndSwap(nil, &s)
}
