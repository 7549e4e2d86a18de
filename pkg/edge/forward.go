package edge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/proc"
)

const (
	// window is how many messages of a signal may be on their way to the hub: at
	// 100 ms round trip and 1 MiB a message it fills 640 MiB/s.
	window = 64

	// purgeInterval is how often what the hub has is deleted from the spool. A
	// crash in between sends up to that again, which the hub recognises by id.
	purgeInterval = 250 * time.Millisecond
)

// forward moves messages from the spool to the hub, each signal on its own.
type forward struct {
	cfg      Config
	spool    *spool
	led      *ledger.Ledger
	log      *slog.Logger
	instance string
	dialer   dialer
}

func newForward(cfg Config, sp *spool, led *ledger.Ledger, log *slog.Logger) *forward {
	log = log.With("component", "forward")
	return &forward{cfg: cfg, spool: sp, led: led, log: log, instance: cfg.Instance.ID, dialer: dialer{cfg: cfg.Hub, log: log}}
}

func (f *forward) service() services.Service {
	return proc.Service(func(ctx context.Context) error {
		work, stop := context.WithCancel(context.WithoutCancel(ctx))
		defer stop()
		var wg sync.WaitGroup
		errs := make([]error, len(otlpwire.Signals))
		for i, sig := range otlpwire.Signals {
			wg.Go(func() {
				errs[i] = f.run(work, sig)
				stop() // one that cannot go on ends the stage
			})
		}
		select {
		case <-ctx.Done():
			f.drain(work)
		case <-work.Done():
		}
		stop()
		wg.Wait()
		f.dialer.close()
		return errors.Join(errs...)
	})
}

// drain waits until the hub has everything, for a while and only while it
// answers. What is left stays in the spool.
func (f *forward) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, f.cfg.Drain)
	defer cancel()
	proc.Until(ctx, func() bool {
		for _, sig := range otlpwire.Signals {
			if !f.spool.empty(ctx, sig) {
				return !f.dialer.connected()
			}
		}
		return true
	})
}

// run forwards one signal until ctx ends.
func (f *forward) run(ctx context.Context, sig otlpwire.Signal) error {
	lane, err := f.spool.conn.OpenLane(ctx, bus.LaneConfig{Stream: bus.SpoolStream(sig), Name: "forward", Raw: true})
	if err != nil {
		return err
	}
	defer lane.Close()
	for attempt := 1; ; attempt++ {
		conn, err := f.dialer.dial()
		if err == nil {
			var sent int
			if sent, err = f.session(ctx, conn, lane, sig); sent > 0 {
				attempt = 1
			}
			// Whatever broke, the order is only certain on a new connection.
			conn.Close()
			lane.Forget()
		}
		if !proc.Sleep(ctx, min(fault.Pause(err, attempt, rand.Float64()), fault.MaxHubPause)) {
			return nil
		}
		f.log.Debug("forwarding again", "signal", sig, "err", err)
	}
}

// sent is a message on its way to the hub.
type sent struct {
	seq     uint64 // of the spool
	items   int
	pending bus.Pending
}

// session forwards on one connection until something breaks. It publishes in
// order with a window in flight; the spool lets go of the acknowledged prefix
// only. It returns how many messages the hub acknowledged.
func (f *forward) session(ctx context.Context, conn *bus.Conn, lane *bus.Lane, sig otlpwire.Signal) (acked int, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	flight := make(chan sent, window)
	var wg sync.WaitGroup
	wg.Go(func() {
		var err error
		if acked, err = f.settle(ctx, lane, sig, flight); err != nil {
			cancel(err)
		}
	})
	err = f.publish(ctx, conn, lane, sig, flight)
	close(flight)
	cancel(err)
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	return acked, err
}

func (f *forward) publish(ctx context.Context, conn *bus.Conn, lane *bus.Lane, sig otlpwire.Signal, flight chan<- sent) error {
	for {
		d, err := lane.Next(ctx)
		if err != nil {
			return err
		}
		if d.Seq == 0 {
			continue // nothing is held here but what is in flight
		}
		if d.Err != nil {
			// Only this process writes the spool: the file is damaged.
			f.log.Error("spooled message is damaged and was left out", "signal", sig, "seq", d.Seq, "err", d.Err)
			f.led.Of(sig).Dead(ledger.DeadUndecodable).Inc()
			continue
		}
		d.Header.ID = fmt.Sprintf("%s-%d", f.spool.epoch, d.Seq)
		p := conn.PublishAsync(bus.Message{Subject: bus.Subject(sig, f.instance), Header: d.Header, Body: d.Body})
		select {
		case flight <- sent{d.Seq, d.Header.Items, p}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// settle takes the hub's acknowledgements in order and frees the spool.
func (f *forward) settle(ctx context.Context, lane *bus.Lane, sig otlpwire.Signal, flight <-chan sent) (acked int, err error) {
	var done, purged uint64
	purge := func() {
		if done == purged {
			return
		}
		purged = done
		ctx := context.WithoutCancel(ctx)
		if err := errors.Join(lane.Ack(done), f.spool.conn.PurgeBelow(ctx, bus.SpoolStream(sig), done+1)); err != nil {
			f.log.Warn("spool keeps what the hub already has", "signal", sig, "err", err)
		}
	}
	defer purge()
	tick := time.NewTicker(purgeInterval)
	defer tick.Stop()
	for {
		select {
		case s, ok := <-flight:
			if !ok {
				return acked, nil
			}
			if err := s.pending.Wait(ctx); err != nil {
				return acked, err
			}
			done = s.seq
			acked++
			f.led.Of(sig).Forwarded.Add(float64(s.items))
		case <-tick.C:
			purge()
		}
	}
}

// dialer shares one connection to the hub among the signals and makes a new one
// when it has ended.
type dialer struct {
	cfg bus.Config
	log *slog.Logger

	mu struct {
		sync.Mutex
		conn *bus.Conn
		lost bool // the last thing that was logged
	}
}

func (d *dialer) dial() (*bus.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.conn != nil && d.mu.conn.Connected() {
		return d.mu.conn, nil
	}
	conn, err := bus.Dial(d.cfg, d.log)
	if err != nil {
		if !d.mu.lost {
			d.log.Warn("hub unreachable, spooling", "err", err)
		}
		d.mu.lost = true
		return nil, err
	}
	if d.mu.lost {
		d.log.Info("hub back, draining")
	}
	d.mu.lost = false
	d.mu.conn = conn
	return conn, nil
}

func (d *dialer) connected() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mu.conn != nil && d.mu.conn.Connected()
}

func (d *dialer) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.conn != nil {
		d.mu.conn.Close()
	}
}
