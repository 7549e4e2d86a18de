package sink

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"sync"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/proc"
	"github.com/penstock/penstock/pkg/sink/policy"
)

// lanes runs one lane per signal and partition.
type lanes struct {
	cfg      Config
	policies *policy.Set
	led      *ledger.Ledger
	log      *slog.Logger
	hub      *bus.Hub
}

// runner reads one lane until ctx ends.
type runner interface {
	run(ctx context.Context)
}

func (l *lanes) service() services.Service {
	var (
		runners []runner
		opened  []*bus.Lane
		writers []Writer
	)
	work, stop := context.WithCancel(context.Background())
	start := func(ctx context.Context) error {
		for _, sig := range otlpwire.Signals {
			w, err := l.cfg.writer(sig)
			if err != nil {
				return err
			}
			writers = append(writers, w)
			for p := range l.cfg.Streams.Partitions {
				lc := bus.LaneConfig{Stream: bus.Stream(sig), Filter: bus.PartitionFilter(sig, p), Name: w.Name() + "-" + strconv.Itoa(p)}
				if sig == otlpwire.Traces {
					lc.Stream, lc.Filter = bus.Spans, bus.SpansSubject(p)
				}
				lane, err := l.hub.Conn.OpenLane(ctx, lc)
				if err != nil {
					return err
				}
				opened = append(opened, lane)
				runners = append(runners, l.runner(sig, lane, w, p))
			}
		}
		return nil
	}
	run := func(ctx context.Context) error {
		var wg sync.WaitGroup
		for i, r := range runners {
			wg.Go(func() { r.run(work) })
			sig := otlpwire.Signals[i/l.cfg.Streams.Partitions]
			wg.Go(func() {
				bus.WatchLag(work, opened[i], l.led, sig.String(), strconv.Itoa(i%l.cfg.Streams.Partitions), writers[sig].Name())
			})
		}
		<-ctx.Done()
		l.drain(work, opened)
		stop()
		wg.Wait()
		return nil
	}
	end := func(error) error {
		stop()
		var errs []error
		for _, w := range writers {
			errs = append(errs, w.Close())
		}
		return errors.Join(errs...)
	}
	return services.NewBasicService(start, run, end)
}

func (l *lanes) runner(sig otlpwire.Signal, lane *bus.Lane, w Writer, p int) runner {
	d := &delivery{sig: sig, w: w, conn: l.hub.Conn, led: l.led, log: l.log.With("signal", sig.String(), "partition", p, "backend", w.Name())}
	if sig == otlpwire.Traces {
		return &traceLane{lane: lane, delivery: d, partition: p, policies: l.policies, maxBytes: int(l.cfg.Sampling.MaxBytes), alive: l.hub.Conn.Connected}
	}
	return &directLane{lane: lane, delivery: d}
}

// drain waits until the lanes have nothing left, for a while.
func (l *lanes) drain(ctx context.Context, opened []*bus.Lane) {
	ctx, cancel := context.WithTimeout(ctx, l.cfg.Drain)
	defer cancel()
	if !l.cfg.DrainTraces {
		opened = opened[l.cfg.Streams.Partitions:]
	}
	proc.Until(ctx, func() bool {
		for _, lane := range opened {
			if n, err := lane.Lag(ctx); err == nil && n > 0 {
				return false
			}
		}
		return true
	})
}

// directLane writes metrics or logs as they come, one message after the other.
type directLane struct {
	lane     *bus.Lane
	delivery *delivery
	guard    envelope.Guard
}

func (l *directLane) run(ctx context.Context) {
	l.lane.Run(ctx, func(d bus.Delivery) bool {
		if d.Reset {
			return true
		}
		err := d.Err
		if err == nil {
			var payload []byte
			if payload, _, err = l.guard.Open(l.delivery.sig, d.Instance(), d.Body); err == nil {
				if !l.delivery.write(ctx, d.Instance(), payload, origin{d.Seq, d.Header.Arrival}) {
					return false
				}
			}
		}
		if err != nil && !l.delivery.undecodable(ctx, d, err) {
			return false
		}
		if err := l.lane.Ack(d.Seq); err != nil {
			l.delivery.log.Debug("ack lost, a later one makes up for it", "err", err)
		}
		return true
	})
}

// delivery brings payloads to one backend, whatever it takes.
type delivery struct {
	sig  otlpwire.Signal
	w    Writer
	conn *bus.Conn
	led  *ledger.Ledger
	log  *slog.Logger
}

// origin is where a payload came from, for the id of its dead letters.
type origin struct {
	seq     uint64
	arrival int64
}

// write returns true when every item of the payload is stored or dead-lettered,
// and false when ctx ended first. What may heal is tried again for ever; what
// will not is halved until the culprits are found, and they alone are put into
// DEADLETTER.
func (d *delivery) write(ctx context.Context, instance string, payload []byte, from origin) bool {
	for attempt := 1; ; attempt++ {
		err := d.w.Write(ctx, instance, payload)
		if err == nil {
			if attempt > 1 {
				d.log.Info("backend takes data again", "attempts", attempt)
			}
			d.led.Of(d.sig).Delivered(d.w.Name()).Add(float64(otlpwire.Count(d.sig, payload)))
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		if reason, permanent := fault.Reason(err); permanent {
			first, second, ok := otlpwire.Halve(d.sig, payload)
			if ok {
				return d.write(ctx, instance, first, from) && d.write(ctx, instance, second, from)
			}
			return d.deadLetter(ctx, instance, payload, from, reason, err)
		}
		switch {
		case fault.IsConfiguration(err) && attempt == 1:
			d.log.Error("lane paused: the backend's address or credential is wrong; the data is kept", "err", err)
		case attempt == 1:
			d.log.Warn("backend does not take data, will try again", "err", err)
		}
		if !proc.Sleep(ctx, fault.Pause(err, attempt, rand.Float64())) {
			return false
		}
	}
}

func (d *delivery) deadLetter(ctx context.Context, instance string, payload []byte, from origin, reason string, why error) bool {
	items := otlpwire.Count(d.sig, payload)
	d.log.Warn("backend refuses an item for good, dead-lettered", "instance", instance, "reason", reason, "err", why)
	return d.store(ctx, instance, items, reason, bus.Message{
		Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: items, Arrival: from.arrival},
		Body:   payload, Reason: reason, Detail: why.Error(),
	})
}

// undecodable dead-letters a message that is no envelope of ours.
func (d *delivery) undecodable(ctx context.Context, m bus.Delivery, why error) bool {
	items := max(m.Header.Items, 1)
	d.log.Warn("message is no telemetry, dead-lettered", "subject", m.Subject, "seq", m.Seq, "err", why)
	return d.store(ctx, m.Instance(), items, ledger.DeadUndecodable, bus.Message{
		Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: items, Arrival: m.Header.Arrival, ID: fmt.Sprintf("dead-%s-%d", d.sig, m.Seq)},
		Body:   m.Body, Reason: ledger.DeadUndecodable, Detail: why.Error(),
	})
}

func (d *delivery) store(ctx context.Context, instance string, items int, reason string, m bus.Message) bool {
	ok := proc.Retry(ctx, d.log, "store a dead letter", func() error { return d.conn.DeadLetter(ctx, d.sig, instance, m) })
	if ok {
		d.led.Of(d.sig).Dead(reason).Add(float64(items))
	}
	return ok
}
