package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/test/backend/tempo"
	"github.com/penstock/penstock/test/daemon"
)

const partitions = 8

// world is the pipeline under test and what happens to it.
type world struct {
	daemon.Options
	dir, bin string
	rng      *rand.Rand
	start    time.Time
	tempo    *tempo.Server
	stop     func()
	journal  journal
	hubAddr  string

	mu    sync.Mutex
	procs map[string]*proc // by name
	born  int
	// disturbed are the times in which the way from an application to SPANS was
	// not as usual: the decisions about traces of then are checked for being one
	// and recorded, but not for which they are.
	disturbed []interval
	faults    int
	recovery  []recovery
}

type interval struct{ from, to time.Time }

type recovery struct {
	what    string
	took    time.Duration
	planned bool // a hand-over
}

// proc is one process of the pipeline.
type proc struct {
	role, name string
	born       int
	admin      string
	otlp       string
	stopped    bool // by SIGSTOP
	daemon.Process
}

func newWorld(o daemon.Options, dir, bin string) (*world, error) {
	w := &world{Options: o, dir: dir, bin: bin, rng: rand.New(rand.NewPCG(o.Seed, 4)), procs: map[string]*proc{}, start: time.Now()}
	w.journal.traces = map[[16]byte]*trace{}
	var err error
	if w.tempo, w.stop, err = tempo.Serve(); err != nil {
		return nil, err
	}
	w.tempo.Slow(100 * time.Millisecond) // so that a kill finds traces on their way
	w.hubAddr = daemon.FreeAddr()
	if err := os.WriteFile(filepath.Join(dir, "sampling.yaml"), []byte(policies), 0o600); err != nil {
		return nil, err
	}
	return w, nil
}

func (w *world) say(format string, args ...any) {
	fmt.Fprintf(w.Out, "%6.1fs  %s\n", time.Since(w.start).Seconds(), fmt.Sprintf(format, args...))
}

// add starts a process of a role under a name of its own.
func (w *world) add(role string) (*proc, error) {
	w.born++
	p := &proc{role: role, born: w.born, name: fmt.Sprintf("%s-%d", role, w.born), admin: daemon.FreeAddr()}
	common := fmt.Sprintf("log: {level: debug}\nadmin: {listen: %q}\nhub: {url: %q}\n", p.admin, "nats://"+w.hubAddr)
	shared := common + fmt.Sprintf("member: %s\nstreams: {partitions: %d, max_bytes: 1GiB}\n", p.name, partitions)
	config := ""
	switch role {
	case "hub":
		args, err := daemon.Hub(filepath.Join(w.dir, "hub"), w.hubAddr)
		if err != nil {
			return nil, err
		}
		p.Args = args
	case "edge":
		p.otlp = daemon.FreeAddr()
		config = common + fmt.Sprintf("instance: {id: %s}\nspool: {dir: %s, disk_reserve: 1MiB}\nreceive:\n  grpc: {listen: %q}\n  http: {listen: %q}\n",
			p.name, filepath.Join(w.dir, p.name, "spool"), daemon.FreeAddr(), p.otlp)
	case "router":
		config = shared
	case "sink":
		config = shared + fmt.Sprintf("sampling: {file: %s}\ntempo: {endpoint: %q}\nfile: {dir: %s}\n",
			filepath.Join(w.dir, "sampling.yaml"), w.tempo.Addr, filepath.Join(w.dir, "files"))
	}
	if config != "" {
		path := filepath.Join(w.dir, p.name+".yaml")
		if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
			return nil, err
		}
		p.Args = []string{filepath.Join(w.bin, role), "-config.file", path}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.launch(p); err != nil {
		return nil, err
	}
	w.procs[p.name] = p
	return p, nil
}

// launch starts p, for the first time or again.
func (w *world) launch(p *proc) error {
	p.Log, p.stopped = filepath.Join(w.dir, p.name+".log"), false
	return p.Start()
}

// end kills p, or asks it to stop, and waits.
func (w *world) end(p *proc, sig syscall.Signal) {
	p.End(sig)
	w.mu.Lock()
	delete(w.procs, p.name)
	w.mu.Unlock()
}

func (w *world) of(role string) (all []*proc) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range w.procs {
		if p.role == role {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b *proc) int { return a.born - b.born })
	return all
}

// close ends what still runs.
func (w *world) close() {
	for _, role := range []string{"edge", "router", "sink", "hub"} {
		for _, p := range w.of(role) {
			p.Signal(syscall.SIGCONT)
			w.end(p, syscall.SIGKILL)
		}
	}
	w.stop()
}

// run starts the pipeline, sends and injects faults, heals and drains.
func (w *world) run(ctx context.Context) error {
	for _, role := range []string{"hub", "edge", "edge", "router", "router", "sink"} {
		if _, err := w.add(role); err != nil {
			return err
		}
	}
	if err := daemon.Until(ctx, time.Minute, w.healthy); err != nil {
		return fmt.Errorf("the pipeline does not start: %w", err)
	}
	w.say("a hub, two edges, two routers, one sink; seed %d, faults for %v", w.Seed, w.For)
	sending, stopSending := context.WithCancel(ctx)
	giving, giveUp := context.WithCancel(ctx)
	defer giveUp()
	defer stopSending()
	go w.watchMachine(ctx)
	var apps sync.WaitGroup
	for i, e := range w.of("edge") {
		rng := rand.New(rand.NewPCG(w.Seed, uint64(i)))
		apps.Go(func() { w.journal.app(sending, giving, e.name, e.otlp, rng) })
	}
	err := w.chaos(ctx)
	stopSending()
	if err != nil {
		return err
	}
	w.say("no more faults: everything is to be delivered now")
	if err := w.heal(ctx); err != nil {
		return err
	}
	late := time.AfterFunc(time.Minute, giveUp)
	apps.Wait()
	late.Stop()
	return w.drain(ctx)
}

// healthy wants every running edge ready, and every lane owned by one member that
// runs.
func (w *world) healthy() error {
	for _, e := range w.of("edge") {
		if !e.stopped && daemon.Fetch(e.admin, "/ready", nil) != nil {
			return fmt.Errorf("%s is not ready", e.name)
		}
	}
	return errors.Join(w.owned("router"), w.owned("sink"))
}

// owned wants every lane of a role to have one owner, which runs.
func (w *world) owned(role string) error {
	alive := map[string]bool{}
	var ask *proc
	for _, p := range w.of(role) {
		if !p.stopped {
			alive[p.name] = true
			ask = p
		}
	}
	if ask == nil {
		return fmt.Errorf("no %s runs", role)
	}
	var status bus.Partitions
	if err := daemon.Fetch(ask.admin, "/partitions?format=json", &status); err != nil {
		return err
	}
	if len(status.Lanes) < partitions {
		return fmt.Errorf("%s knows %d lanes", ask.name, len(status.Lanes))
	}
	for _, l := range status.Lanes {
		if len(l.Owners) != 1 || !alive[l.Owners[0]] {
			return fmt.Errorf("%s lane %d of %s is owned by %v", l.Signal, l.Partition, l.Backend, l.Owners)
		}
	}
	return nil
}

// heal wakes and starts what should run.
func (w *world) heal(ctx context.Context) error {
	w.tempo.Fail(nil)
	w.mu.Lock()
	for _, p := range w.procs {
		if p.stopped {
			p.Signal(syscall.SIGCONT)
			p.stopped = false
		}
	}
	w.mu.Unlock()
	return daemon.Until(ctx, time.Minute, w.healthy)
}

// drain waits until no lane owes anything.
func (w *world) drain(ctx context.Context) error {
	last := ""
	return daemon.Until(ctx, 2*time.Minute, func() error {
		for _, e := range w.of("edge") {
			if err := emptySpool(e); err != nil {
				return err
			}
		}
		for _, role := range []string{"router", "sink"} {
			p := w.of(role)[0]
			var status bus.Partitions
			if err := daemon.Fetch(p.admin, "/partitions?format=json", &status); err != nil {
				return err
			}
			var lag uint64
			for _, l := range status.Lanes {
				if l.Error != "" {
					return errors.New(l.Error)
				}
				lag += l.Lag
			}
			if say := fmt.Sprintf("%s lag %d", role, lag); lag > 0 {
				if say != last {
					w.say("%s", say)
					last = say
				}
				return errors.New("not drained: " + say)
			}
		}
		return nil
	})
}

// connect opens the hub as an operator.
func (w *world) connect(ctx context.Context) (*bus.Conn, error) {
	t := bus.DefaultTopology()
	t.Partitions = partitions
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return bus.OpenHub(ctx, bus.Config{URL: "nats://" + w.hubAddr, Name: "chaos"}, t, slog.New(slog.DiscardHandler))
}
