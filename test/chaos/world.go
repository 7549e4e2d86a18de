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

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/test/backend/loki"
	"github.com/penstock/penstock/test/backend/remotewrite"
	"github.com/penstock/penstock/test/backend/tempo"
	"github.com/penstock/penstock/test/daemon"
	"github.com/penstock/penstock/test/faultproxy"
)

const partitions = 8

// instances are those of the edges: two edges are of one, and two instances are of one domain. Each trace is of that
// domain, with spans of all of its edges, or of the last instance. That one and the first share a partition, so that their metrics
// and logs are in the same lanes.
var instances = []string{"shop-1", "shop-1", "shop-2", "bank"}

// world is the pipeline under test and what happens to it.
type world struct {
	daemon.Options
	dir, bin string
	rng      *rand.Rand
	start    time.Time
	journal  journal
	hubAddr  string

	tempo      *tempo.Server
	loki       *loki.Server
	prometheus *remotewrite.Server
	stop       []func()

	mu    sync.Mutex
	procs map[string]*proc // by name
	born  int
	// disturbed are the times in which the way from an application to SPANS was
	// not as usual: the decisions about traces of then are checked for being one
	// and recorded, but not for which they are.
	disturbed  []interval
	steady     time.Time // since when decisions are checked
	apart      time.Time // since when clocks of the domain's edges differ by more than edges are waited for; zero: they do not
	let        []letGo   // of SPANS
	faults     int
	disk       *daemon.Disk  // the hub's; nil: not one of its own
	wereAway   bool          // all backends, until edges refused
	wasCut     bool          // an edge, from the hub
	wasStepped bool          // the clock of an edge
	wasApart   bool          // one instance: the backends had trouble with it only
	cursed     *sequence     // the one with a record that no backend takes
	noisy      noisy         // the instance in trouble before the faults
	poison     time.Duration // after how long a new sink takes something for poison
	filled     int           // how often an outage lasted until edges refused
	recovery   []recovery
}

// letGo is before which sequence SPANS had let everything go, or was about to.
type letGo struct {
	at     time.Time
	before uint64
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
	instance   string        // of an edge
	clock      time.Duration // by how much that of an edge is wrong
	born       int
	admin      string
	otlp       string
	stopped    bool              // by SIGSTOP, or cut off
	link       *faultproxy.Proxy // a sink's or an edge's way to the hub
	daemon.Process
}

func newWorld(o daemon.Options, dir, bin string) (*world, error) {
	w := &world{Options: o, dir: dir, bin: bin, rng: rand.New(rand.NewPCG(o.Seed, 4)), procs: map[string]*proc{}, start: time.Now(), poison: noPoison}
	w.journal.traces, w.journal.acked = map[[16]byte]*trace{}, map[uint64]time.Time{}
	var stop func()
	var err error
	if w.tempo, stop, err = tempo.Serve(); err != nil {
		return nil, err
	}
	w.stop = append(w.stop, stop)
	w.tempo.Slow(30 * time.Millisecond) // so that a kill finds traces on their way
	w.loki, stop = loki.Serve()
	w.stop = append(w.stop, stop)
	w.loki.Poison(curse)
	w.prometheus, stop = remotewrite.Serve()
	w.stop = append(w.stop, stop)
	w.hubAddr = daemon.FreeAddr()
	if w.disk, err = daemon.NewDisk(filepath.Join(dir, "disk"), "256m"); err != nil {
		w.disk = nil
		w.say("no tmpfs of its own (%v): the hub's disk is not filled", err)
	} else {
		w.stop = append(w.stop, w.disk.Close)
	}
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
	hub := w.hubAddr
	if role == "sink" || role == "edge" {
		var err error
		if p.link, err = faultproxy.Start(w.hubAddr); err != nil {
			return nil, err
		}
		w.stop = append(w.stop, p.link.Close)
		hub = p.link.Addr()
	}
	common := fmt.Sprintf("log: {level: debug}\nadmin: {listen: %q}\nhub: {url: %q}\n", p.admin, "nats://"+hub)
	shared := common + fmt.Sprintf("member: %s\nstreams: {partitions: %d, max_bytes: 1GiB}\n", p.name, partitions)
	config := ""
	switch role {
	case "hub":
		args, err := daemon.Hub(filepath.Join(w.dir, "disk", "hub"), w.hubAddr)
		if err != nil {
			return nil, err
		}
		p.Args = args
	case "edge":
		// The hub loses nothing here. An edge that retains something takes it for a loss when the keeper of a small stream that was
		// full has removed its last message.
		const retain = "10s"
		p.otlp, p.instance = daemon.FreeAddr(), instances[len(w.of("edge"))]
		config = common + fmt.Sprintf("instance: {id: %s}\nspool: {dir: %s, disk_reserve: 1MiB, max_bytes: 16MiB, retain_after_ack: %s}\nreceive:\n  grpc: {listen: %q}\n  http: {listen: %q}\n",
			p.instance, filepath.Join(w.dir, p.name, "spool"), retain, daemon.FreeAddr(), p.otlp)
	case "router":
		config = shared
	case "sink":
		config = shared + fmt.Sprintf("sampling: {file: %s}\ndomains: [{name: shop, instances: ['shop-*']}]\ntempo: {endpoint: %q, tenant: {from: instance}}\nloki: {url: %q, tenant: {from: instance}}\nprometheus: {url: %q, protocol: \"1.0\", tenant: {from: instance}}\npoison: {after: %v, tries: 5}\n",
			filepath.Join(w.dir, "sampling.yaml"), w.tempo.Addr, w.loki.URL, w.prometheus.URL, w.poison)
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
	p.Env = append(w.Env(), "PENSTOCK_CLOCK="+p.clock.String())
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
	for _, stop := range w.stop {
		stop()
	}
}

// run starts the pipeline, sends and injects faults, heals and drains.
func (w *world) run(ctx context.Context) error {
	for _, role := range []string{"hub", "edge", "edge", "edge", "edge", "router", "router", "sink"} {
		if _, err := w.add(role); err != nil {
			return err
		}
		if role == "hub" {
			if err := w.makeStreams(ctx); err != nil {
				return err
			}
		}
	}
	if err := daemon.Until(ctx, time.Minute, w.healthy); err != nil {
		return fmt.Errorf("the pipeline does not start: %w", err)
	}
	w.say("a hub, four edges, two routers, one sink; seed %d, faults for %v", w.Seed, w.For)
	sending, stopSending := context.WithCancel(ctx)
	giving, giveUp := context.WithCancel(ctx)
	defer giveUp()
	defer stopSending()
	go w.watchMachine(ctx)
	go w.watchSpans(sending)
	var apps sync.WaitGroup
	edges, seen := w.of("edge"), map[string]bool{}
	var logs []*sequence
	shop := edges[:len(edges)-1]
	for i, to := range [][]*proc{shop, edges[len(shop):]} {
		rng := rand.New(rand.NewPCG(w.Seed, uint64(i)))
		apps.Go(func() { w.journal.app(sending, giving, to, rng) })
	}
	for _, e := range edges {
		if seen[e.instance] {
			continue // two edges have no order between them
		}
		seen[e.instance] = true
		for _, sig := range []otlpwire.Signal{otlpwire.Metrics, otlpwire.Logs} {
			q := &sequence{sig: sig, instance: e.instance}
			w.journal.sequences = append(w.journal.sequences, q)
			if sig == otlpwire.Logs {
				logs = append(logs, q)
			}
			apps.Go(func() { q.app(sending, giving, &w.journal, e.otlp) })
		}
	}
	// An instance counts for traces of others in its domain once a span of it has come to their partition.
	err := daemon.Until(ctx, time.Minute, func() error {
		if n := len(w.tempo.Spans()); n < 1000 {
			return fmt.Errorf("%d spans have arrived", n)
		}
		return nil
	})
	w.steady = time.Now()
	w.cursed = logs[w.Seed%uint64(len(logs)-1)] // not of the noisy instance
	if err == nil {
		err = w.neighbours(ctx)
	}
	if err == nil {
		err = w.chaos(ctx)
	}
	if err == nil {
		err = w.exorcise(ctx)
	}
	stopSending()
	if err != nil {
		return err
	}
	w.say("everything is to be delivered now")
	late := time.AfterFunc(time.Minute, giveUp)
	apps.Wait()
	late.Stop()
	err = w.drain(ctx)
	for _, p := range w.of("sink") {
		for _, outcome := range []string{ledger.LateRescued, ledger.LateTooLate, ledger.LateOverLimit, ledger.LateIncomplete} {
			if n, err := daemon.Metric(p.admin, fmt.Sprintf("penstock_late_traces_total{outcome=%q}", outcome)); err == nil && n != "0" {
				w.say("%s: %s traces with late errors are %s", p.name, n, outcome)
			}
		}
	}
	return err
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
	var status membership.Partitions
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

// makeStreams makes the hub's streams, and bounds those of what is owed so that they are full soon.
func (w *world) makeStreams(ctx context.Context) error {
	var conn *bus.Conn
	if err := daemon.Until(ctx, time.Minute, func() (err error) { conn, err = w.connect(ctx); return err }); err != nil {
		return err
	}
	conn.Close()
	for name, bound := range bounds {
		if _, err := w.resize(ctx, name, bound); err != nil {
			return err
		}
	}
	return nil
}

// resize gives a stream another bound in bytes, and returns the one that it had.
func (w *world) resize(ctx context.Context, name string, bound int64) (was int64, err error) {
	nc, err := nats.Connect("nats://" + w.hubAddr)
	if err != nil {
		return 0, err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return 0, err
	}
	s, err := js.Stream(ctx, name)
	if err != nil {
		return 0, err
	}
	cfg := s.CachedInfo().Config
	was, cfg.MaxBytes = cfg.MaxBytes, bound
	if w.Failpoints == ageLeft && name != bus.Aside {
		cfg.MaxAge, cfg.Duplicates = 10*time.Second, 10*time.Second
	}
	_, err = js.UpdateStream(ctx, cfg)
	return was, err
}

// ageLeft is no failpoint of the binaries: an operator's mistake.
const ageLeft = "age_left"

// bounds are those of the streams in bytes: what is sent within some seconds, of SPANS more than
// within the policies' wait.
var bounds = map[string]int64{"TRACES": 16 << 20, "SPANS": 32 << 20, "LOGS": 16 << 20, "METRICS": 1 << 20}

// watchSpans notes what SPANS lets go, and may before a sink has read it again.
func (w *world) watchSpans(ctx context.Context) {
	const soon, beat = 40, 500 * time.Millisecond // twenty seconds
	var ends []uint64
	for ctx.Err() == nil {
		if conn, err := w.connect(ctx); err == nil {
			for ctx.Err() == nil && err == nil {
				var s bus.StreamState
				if s, err = conn.State(ctx, bus.Spans); err == nil && s.FirstSeq > 1 {
					ends = append(ends, s.LastSeq)
					ends = ends[max(0, len(ends)-soon):]
					w.mu.Lock()
					w.let = append(w.let, letGo{time.Now(), s.FirstSeq + s.LastSeq - ends[0] + (s.LastSeq-s.FirstSeq)/8})
					w.mu.Unlock()
				}
				time.Sleep(beat)
			}
			conn.Close()
		}
		time.Sleep(beat)
	}
}

// gone reports whether SPANS may have let go what began at a sequence before an error that came later could bring it back.
func (w *world) gone(t *trace, from uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(w.let, func(l letGo) bool { return l.at.After(t.sent) && from < l.before })
}

// heal wakes and starts what should run.
func (w *world) heal(ctx context.Context) error {
	w.backends("all", false)
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

const (
	// noPoison is longer than the backends have trouble with one instance, whose data is no poison. It is also longer than
	// the minute within which a backend must have accepted something of others: an outage of all is no poison, either.
	noPoison    = 61 * time.Second
	poisonAfter = 4 * time.Second
)

// exorcise ends the faults, and waits until the cursed record is a dead letter, while all send: what others send shows
// that it is the record, and one sink must see both.
func (w *world) exorcise(ctx context.Context) error {
	w.say("no more faults: the cursed record is to become a dead letter now")
	if err := w.heal(ctx); err != nil {
		return err
	}
	w.poison = poisonAfter
	if _, err := w.add("sink"); err != nil {
		return err
	}
	if err := w.recovered(ctx, "join", time.Now(), false); err != nil {
		return err
	}
	if err := w.scale(ctx, 1); err != nil {
		return err
	}
	var conn *bus.Conn
	if err := daemon.Until(ctx, time.Minute, func() (err error) { conn, err = w.connect(ctx); return err }); err != nil {
		return err
	}
	defer conn.Close()
	return daemon.Until(ctx, 2*time.Minute, func() error {
		there, err := conn.Subjects(ctx, bus.DeadLetter, "dead.logs."+w.cursed.instance)
		if err == nil && len(there) == 0 {
			err = fmt.Errorf("the cursed record of %s is no dead letter", w.cursed.instance)
		}
		return err
	})
}

// drain waits until no lane owes anything, and nothing is set aside.
func (w *world) drain(ctx context.Context) error {
	var said time.Time
	var conn *bus.Conn
	if err := daemon.Until(ctx, time.Minute, func() (err error) { conn, err = w.connect(ctx); return err }); err != nil {
		return err
	}
	defer conn.Close()
	return daemon.Until(ctx, 4*time.Minute, func() error {
		if err := w.arrivedAt(0, 0, "router"); err != nil {
			return err
		}
		err := w.arrivedAt(0, 0, "sink")
		if err == nil { // what a lane finishes may be in ASIDE from then on
			var there map[string]uint64
			if there, err = conn.Subjects(ctx, bus.Aside, ">"); err == nil && len(there) > 0 {
				err = fmt.Errorf("set aside: %v", there)
			}
		}
		if err != nil && time.Since(said) > 5*time.Second {
			said = time.Now()
			w.say("%v", err)
		}
		return err
	})
}

// arrivedAt wants the edges to have at most so many bytes that the hub does not have, and the lanes of a
// role to have most messages left.
func (w *world) arrivedAt(bytes float64, most uint64, role string) error {
	for _, e := range w.of("edge") {
		if err := spooled(e, bytes); err != nil {
			return err
		}
	}
	var status membership.Partitions
	if err := daemon.Fetch(w.of(role)[0].admin, "/partitions?format=json", &status); err != nil {
		return err
	}
	var lag uint64
	for _, l := range status.Lanes {
		if l.Error != "" {
			return errors.New(l.Error)
		}
		lag += l.Lag
	}
	if lag > most {
		return fmt.Errorf("%s lag %d", role, lag)
	}
	return nil
}

// connect opens the hub as an operator.
func (w *world) connect(ctx context.Context) (*bus.Conn, error) {
	t := bus.DefaultTopology()
	t.Partitions = partitions
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return bus.OpenHub(ctx, bus.Config{URL: "nats://" + w.hubAddr, Name: "chaos"}, t, slog.New(slog.DiscardHandler))
}
