package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/test/daemon"
	"github.com/penstock/penstock/test/faultproxy"
)

const (
	instance  = "as-1"
	diskBytes = "64m"
)

// world is an edge and its hub, and what happens to them.
type world struct {
	daemon.Options
	dir       string
	disk      *daemon.Disk
	small     bool // disk is a small file system of its own
	rng       *rand.Rand
	start     time.Time
	hub, edge daemon.Process
	hubAddr   string
	admin     string
	proxy     *faultproxy.Proxy
	senders   []*sender
	faults    int
}

func newWorld(ctx context.Context, o daemon.Options, dir string) (*world, error) {
	w := &world{Options: o, dir: dir, rng: rand.New(rand.NewPCG(o.Seed, 5)), start: time.Now(), hubAddr: daemon.FreeAddr(), admin: daemon.FreeAddr()}
	var err error
	if w.disk, err = daemon.NewDisk(filepath.Join(dir, "disk"), diskBytes); w.disk == nil {
		return nil, err
	}
	if w.small = err == nil; !w.small {
		w.say("no tmpfs of our own (%v): the disk is not filled", err)
	}
	hub, err := daemon.Hub(filepath.Join(dir, "hub"), w.hubAddr)
	if err != nil {
		return nil, err
	}
	w.hub = daemon.Process{Args: hub, Log: filepath.Join(dir, "hub.log")}
	if err := w.hub.Start(); err != nil {
		return nil, err
	}
	conn, err := w.connect(ctx) // makes the streams
	if err != nil {
		return nil, err
	}
	conn.Close()
	if w.proxy, err = faultproxy.Start(w.hubAddr); err != nil {
		return nil, err
	}
	grpcAddr, httpAddr := daemon.FreeAddr(), daemon.FreeAddr()
	config := fmt.Sprintf(`
log: {level: debug}
admin: {listen: %q}
hub: {url: "nats://%s"}
instance: {id: %s}
receive:
  grpc: {listen: %q}
  http: {listen: %q}
spool: {dir: %q, max_bytes: 44MiB, disk_reserve: 4MiB, retain_after_ack: 10s}
`, w.admin, w.proxy.Addr(), instance, grpcAddr, httpAddr, filepath.Join(w.disk.Dir, "spool"))
	path := filepath.Join(dir, "edge.yaml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return nil, err
	}
	w.edge = daemon.Process{Env: w.Env(), Args: []string{filepath.Join(dir, "bin", "edge"), "-config.file", path}, Log: filepath.Join(dir, "edge.log")}
	w.senders, err = newSenders(o.Seed, grpcAddr, httpAddr)
	return w, errors.Join(err, w.edge.Start())
}

func (w *world) say(format string, args ...any) {
	fmt.Fprintf(w.Out, "%6.1fs  %s\n", time.Since(w.start).Seconds(), fmt.Sprintf(format, args...))
}

// close ends what still runs.
func (w *world) close() {
	for _, p := range []*daemon.Process{&w.edge, &w.hub} {
		if p.Done != nil {
			p.Signal(syscall.SIGCONT)
			p.End(syscall.SIGKILL)
		}
	}
	if w.proxy != nil {
		w.proxy.Close()
	}
	if w.small {
		w.disk.Close()
	}
}

// run sends and injects faults, heals and drains.
func (w *world) run(ctx context.Context) error {
	if err := w.ready(ctx); err != nil {
		return err
	}
	w.say("a hub, an edge, %d senders; seed %d, faults for %v", len(w.senders), w.Seed, w.For)
	sending, stop := context.WithCancel(ctx)
	defer stop()
	var apps sync.WaitGroup
	for _, s := range w.senders {
		apps.Go(func() { s.run(sending, ctx) })
	}
	err := w.chaos(ctx)
	if err == nil {
		w.say("no more faults: everything is to arrive now")
		w.mendLink()
		err = w.ready(ctx)
	}
	stop()
	if err != nil {
		return err
	}
	apps.Wait()
	return daemon.Until(ctx, 3*time.Minute, func() error {
		n, err := daemon.Metric(w.admin, "penstock_spool_bytes")
		if err == nil && n != "0" {
			err = fmt.Errorf("the edge still owes %s bytes", n)
		}
		return err
	})
}

func (w *world) ready(ctx context.Context) error {
	return daemon.Until(ctx, time.Minute, func() error { return daemon.Fetch(w.admin, "/ready", nil) })
}

// connect opens the hub as an operator.
func (w *world) connect(ctx context.Context) (*bus.Conn, error) {
	t := bus.DefaultTopology()
	t.Partitions = 1
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return bus.OpenHub(ctx, bus.Config{URL: "nats://" + w.hubAddr, Name: "chaosedge"}, t, slog.New(slog.DiscardHandler))
}
