package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/grafana/dskit/services"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/receive"
	"github.com/penstock/penstock/pkg/wal"
)

// The limit is the least that an edge with this receiver and this log could do: it takes,
// checks and stamps a request, whose own goroutine compresses it and appends it to a
// log. Nothing is read back, and nothing is passed on. What an edge needs more CPU time
// than this for is its way to the hub.

// startLimit starts it.
func (b *bench) startLimit(ctx context.Context, fsync bool) (*running, error) {
	r := &running{}
	err := func() error {
		var err error
		if r.store, err = r.newDir(b.dir); err != nil {
			return err
		}
		if r.otlp, err = freeAddr(); err != nil {
			return err
		}
		r.measured, err = b.startChild(ctx, roleLimit, b.protocol, r.otlp, filepath.Join(r.store, "requests"), durability(fsync))
		return err
	}()
	if err != nil {
		r.stop()
		return nil, err
	}
	r.passed = r.measured.ask
	return r, nil
}

// runLimit is the process.
func runLimit(protocol, addr, path, durability string) error {
	l, _, err := wal.Open(wal.Config{Dir: path, MaxBytes: 1 << 40, Sync: durability == "fsync"})
	if err != nil {
		return err
	}
	cfg := receive.DefaultConfig()
	cfg.GRPC.Listen, cfg.HTTP.Listen = addr, ""
	if protocol == "http" {
		cfg.GRPC.Listen, cfg.HTTP.Listen = "", addr
	}
	var written atomic.Int64 // spans
	out := &appender{log: l}
	sender := receive.NewSender(envelope.Instance{ID: instanceID, Name: instanceName, Customer: customerID, Namespace: namespace})
	rcv, err := receive.New(cfg, receive.Deps{
		Identify: func(receive.Credentials) (*receive.Sender, error) { return sender, nil },
		Accept: func(_ context.Context, b receive.Batch) error {
			err := out.append(b.Payload)
			if err == nil {
				written.Add(int64(b.Items))
			}
			return err
		},
		MaxPayload: envelope.MaxPayload,
		Ledger:     ledger.New(prometheus.NewRegistry()),
		Log:        slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		return err
	}
	serving := rcv.Service()
	if err := services.StartAndAwaitRunning(context.Background(), serving); err != nil {
		return err
	}
	answer(func() int { return int(written.Load()) })
	return errors.Join(services.StopAndAwaitTerminated(context.Background(), serving), l.Close())
}

// appender writes to a log. Requests that come while it writes are written together,
// by the first of them.
type appender struct {
	log     *wal.Log
	writing sync.Mutex
	out     []byte // compressed

	mu struct {
		sync.Mutex
		*group
		free []byte // of the group before
	}
}

// group is requests that are written together.
type group struct {
	body []byte
	done bool
	err  error
}

// append returns when the payload is in the log.
func (a *appender) append(payload []byte) error {
	a.mu.Lock()
	if a.mu.group == nil {
		a.mu.group, a.mu.free = &group{body: a.mu.free[:0]}, nil
	}
	g := a.mu.group
	g.body = append(g.body, payload...)
	a.mu.Unlock()

	a.writing.Lock()
	defer a.writing.Unlock()
	if g.done {
		return g.err
	}
	a.mu.Lock()
	a.mu.group = nil
	a.mu.Unlock()
	out, encoding := envelope.Compress(a.out, g.body, envelope.S2)
	if encoding != "" { // else it is the body itself
		a.out = out
	}
	_, g.err = a.log.Append(out)
	g.done = true
	a.mu.Lock()
	a.mu.free = g.body
	a.mu.Unlock()
	return g.err
}
