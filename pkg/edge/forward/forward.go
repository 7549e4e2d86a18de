// Package forward sends what is spooled to the centre, which is the hub or a router's gateway, and
// to backends beside the edge.
//
//	f, err := forward.New(cfg, spool, led, log)
//	l := forward.NewLocal(backends, instance, spool, led, log)
//
// # Promises
//
//   - Per signal the hub gets messages in the order in which they were spooled, except
//     for one that the hub's own cluster refuses between others (docs/adr/0001).
//   - A message counts as forwarded when the centre has acknowledged it. A hub that shows that it
//     has lost messages gets all that the spool still holds again.
//   - A local backend delays nothing: it misses what the spool deletes before it has accepted it,
//     and that is counted.
//
// # Not here
//
// What is kept, and when it is deleted: package spool.
package forward

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/edge/spool"
	"github.com/penstock/penstock/pkg/failpoint"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/hold"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/stall"
	"github.com/penstock/penstock/pkg/wal"
)

// Config is where messages go.
type Config struct {
	Instance string
	Hub      bus.Config
	Central  CentralConfig // when it has an endpoint, Hub is not used
	Drain    time.Duration // how long a stop may wait for the centre to accept what is spooled
}

// Forward sends messages from the spool to the centre, each signal independently.
type Forward struct {
	cfg   Config
	spool *spool.Spool
	led   *ledger.Ledger
	log   *slog.Logger
	way   way
	// centre is the name of the destination.
	centre   string
	progress [len(otlpwire.Signals)]progress
}

// progress is the progress of forwarding a signal.
type progress struct {
	arrived atomic.Uint64         // rises with every acknowledgement of the centre
	failed  atomic.Pointer[error] // why the last session ended; nil when something has arrived since
}

// fails stores why the centre did not accept something.
func (p *progress) fails(err error) {
	if err != nil {
		p.failed.Store(&err)
	}
}

func (p *progress) why() error {
	if err := p.failed.Load(); err != nil {
		return *err
	}
	return errors.New("nothing is acknowledged")
}

// way is one kind of transport to the centre.
type way interface {
	// session sends messages of a signal, in order, from the one after the hub's position on,
	// until something fails or ctx ends. It reports to done what the centre has, also in
	// order.
	session(ctx context.Context, st *spool.Store, sig otlpwire.Signal, done func(arrived)) error
	// connected reports whether the centre could be reached last time.
	connected() bool
	// ready returns why the centre will accept nothing until an operator has corrected something.
	ready() error
	close()
}

// arrived reports that the centre has everything of a signal up to a message.
type arrived struct {
	seq   uint64 // of the spool
	hub   uint64 // of the hub's stream; 0 when it is not known
	items int    // since the last report
	bytes int64
}

func New(cfg Config, sp *spool.Spool, led *ledger.Ledger, log *slog.Logger) (*Forward, error) {
	log = log.With("component", "forward")
	f := &Forward{cfg: cfg, spool: sp, led: led, log: log, centre: "hub"}
	if cfg.Central.Endpoint == "" {
		f.way = &hubWay{instance: cfg.Instance, spool: sp, led: led, log: log, dialer: dialer{cfg: cfg.Hub, log: log}, holds: hold.NewAsker(log)}
		return f, nil
	}
	w, err := newGatewayWay(cfg.Central, sp, led, log)
	w.fails = func(sig otlpwire.Signal, err error) { f.progress[sig].fails(err) }
	f.way, f.centre = w, "gateway"
	return f, err
}

// Ready returns why the centre will accept nothing until an operator has corrected something.
func (f *Forward) Ready() error { return f.way.ready() }

func (f *Forward) Service() services.Service {
	return app.Service(func(ctx context.Context) error {
		work, stop := context.WithCancel(context.WithoutCancel(ctx))
		defer stop()
		var wg sync.WaitGroup
		for _, sig := range otlpwire.Signals {
			wg.Go(func() { f.run(work, sig) })
		}
		wg.Go(func() { f.say(work) })
		wg.Go(func() { f.follow(work) })
		<-ctx.Done()
		f.drain(work)
		stop()
		wg.Wait()
		f.way.close()
		return nil
	})
}

// drain waits until the hub has everything, at most for cfg.Drain and only while it
// answers. What is left stays in the spool.
func (f *Forward) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, f.cfg.Drain)
	defer cancel()
	backoff.Until(ctx, func() bool {
		for _, sig := range otlpwire.Signals {
			if !f.spool.Empty(sig) {
				return !f.way.connected()
			}
		}
		return true
	})
}

// run forwards one signal until ctx ends.
func (f *Forward) run(ctx context.Context, sig otlpwire.Signal) {
	p := &f.progress[sig]
	for attempt := 1; ; attempt++ {
		st, err := f.spool.Await(ctx)
		if err != nil {
			return
		}
		h := &handing{spool: f.spool, sig: sig, progress: p, counter: f.led.Of(sig).Forwarded.Add}
		if work, leave, ok := st.Enter(ctx); ok {
			purging, stop := context.WithCancel(work)
			var wg sync.WaitGroup
			wg.Go(func() { f.spool.Purge(purging, st, sig) })
			err = f.way.session(work, st, sig, h.done)
			stop()
			wg.Wait()
			leave()
			p.fails(err)
		}
		if h.any {
			attempt = 1
		}
		if !backoff.Sleep(ctx, min(fault.Pause(err, attempt, rand.Float64()), fault.MaxHubPause)) {
			return
		}
		level := slog.LevelDebug
		if errors.Is(err, wal.ErrUnreadable) {
			level = slog.LevelWarn
		}
		f.log.Log(ctx, level, "forwarding failed, trying again", "signal", sig, "err", err)
	}
}

// handing records what the centre has.
type handing struct {
	spool   *spool.Spool
	sig     otlpwire.Signal
	counter func(float64)
	any     bool

	progress *progress
}

func (h *handing) done(a arrived) {
	failpoint.Point("before-spool-ack")
	h.any = true
	h.progress.failed.Store(nil)
	h.progress.arrived.Add(1)
	h.counter(float64(a.items))
	h.spool.Forwarded(h.sig, a.seq, a.hub, a.bytes)
}

// follow reports signals of which something is spooled and nothing acknowledged, until ctx ends.
func (f *Forward) follow(ctx context.Context) {
	var (
		stalls [len(otlpwire.Signals)]*stall.Detector
		seen   [len(otlpwire.Signals)]uint64
	)
	for _, sig := range otlpwire.Signals {
		stalls[sig] = stall.New(f.led, sig.String(), "", f.centre, f.log)
		stalls[sig].Look(time.Now(), true, nil)
	}
	for backoff.Sleep(ctx, stall.Interval) {
		if f.led.HubConnected.Set(0); f.way.connected() {
			f.led.HubConnected.Set(1)
		}
		for _, sig := range otlpwire.Signals {
			p := &f.progress[sig]
			n := p.arrived.Load()
			stalls[sig].Look(time.Now(), n != seen[sig] || f.spool.Empty(sig), p.why)
			seen[sig] = n
		}
	}
}

// sayInterval is how often the backlog of an outage is logged.
const sayInterval = time.Minute

// say logs the backlog while the centre cannot be reached.
func (f *Forward) say(ctx context.Context) {
	for backoff.Sleep(ctx, sayInterval) {
		if f.way.connected() {
			continue
		}
		owed, bound := f.spool.Owes()
		f.log.Warn("hub still unreachable, spooling", "spooled_bytes", owed, "of", bound)
	}
}

// errRewind ends a session; the next one begins at another position or without a condition.
var errRewind = errors.New("sending again")
