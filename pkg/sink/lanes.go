package sink

import (
	"context"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/keeper"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/processor"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/pkg/sink/export"
	"github.com/penstock/penstock/pkg/sink/horizon"
	"github.com/penstock/penstock/pkg/tally"
)

// lanes shares one lane per signal and partition with the other sinks.
type lanes struct {
	cfg      Config
	policies *versions.Versions
	process  *processor.Rules
	led      *ledger.Ledger
	log      *slog.Logger
	hub      *bus.Hub
	members  *membership.Members
	horizon  *horizon.Horizon
	said     backoff.Repeats
	quota    bus.Quota
	accepted sync.Map // *backend.Accepted by the names of a signal and a backend
}

func (l *lanes) service() services.Service {
	var (
		shared  []membership.Shared
		writers Writers
	)
	start := func(context.Context) error {
		var err error
		if writers, err = l.cfg.Writers(); err != nil {
			return err
		}
		for _, sig := range otlpwire.Signals {
			for i, w := range writers[sig] {
				l.led.Know(sig, w.Name())
				for p := range l.cfg.Streams.Partitions {
					shared = append(shared, l.lane(sig, w, p, i > 0))
				}
			}
		}
		return nil
	}
	run := func(ctx context.Context) error {
		work, stop := context.WithCancel(context.WithoutCancel(ctx))
		defer stop()
		var wg sync.WaitGroup
		wg.Go(func() { l.members.Run(work, shared) })
		wg.Go(func() { l.horizon.Run(work) })
		wg.Go(func() {
			keeper.New(func() *bus.Conn { return l.hub.Conn }, l.members.First, l.cfg.Streams, shared, l.led, l.log).Run(work)
		})
		wg.Go(func() { l.policies.Watch(work, l.hub, l.members.Self()) })
		wg.Go(func() { newReplays(l, writers).run(work) })
		wg.Go(func() { l.serveJobs(work) })
		<-ctx.Done()
		l.members.Drain(work, l.cfg.Drain, func(s membership.Shared) bool { return l.cfg.DrainTraces || s.Signal != otlpwire.Traces.String() })
		stop()
		wg.Wait()
		return nil
	}
	end := func(error) error { return writers.Close() }
	return services.NewBasicService(start, run, end)
}

// serveJobs answers requests of credentials that may replay one instance, as one of the sinks.
func (l *lanes) serveJobs(ctx context.Context) {
	backoff.Retry(ctx, l.log, "answer requests for replays", func() error {
		jobs, err := replay.Open(ctx, l.hub.Conn, l.cfg.Streams)
		if err != nil {
			return err
		}
		desk := replay.NewDesk(jobs)
		stop, err := l.hub.Conn.Serve(replay.DeskSubjects, "sinks", func(subject string, body []byte) []byte {
			return desk.Answer(ctx, subject, body)
		})
		if err != nil {
			return err
		}
		<-ctx.Done()
		stop()
		return nil
	})
}

// lane returns the lane of a backend and a partition. The lane of a further backend of a signal
// has its own sampler, which makes the same decisions, and its own floor: a backend that was
// unavailable may be further back than the others.
func (l *lanes) lane(sig otlpwire.Signal, w backend.Writer, p int, further bool) membership.Shared {
	s := membership.Shared{Signal: sig.String(), Partition: p, Backend: w.Name(), LaneConfig: bus.LaneConfig{
		Stream: bus.Stream(sig), Filter: bus.PartitionFilter(sig, p), Name: w.Name() + "-" + strconv.Itoa(p), Raw: true,
	}}
	var count counter = liveCounter{l.led, sig, w.Name()}
	journal, gauges := bus.DecisionsSubject(p), strconv.Itoa(p)
	if further {
		count = furtherCounter{liveCounter{l.led, sig, w.Name()}}
		journal, gauges = journal+"-"+w.Name(), ""
	}
	d := l.exporter(sig, w, p, count)
	var told told
	s.Tell = told.text
	if sig == otlpwire.Traces {
		s.Stream, s.Filter, s.Journal = bus.Spans, bus.SpansSubject(p), journal
		s.Hold = func() time.Duration { return l.policies.Wait() + l.cfg.Sampling.SourceLag }
		s.Run = func(ctx context.Context, lane *bus.Lane) {
			own := *d
			own.Waits, own.Aside = lane.Waits, export.NewAside(own, lane, p, l.cfg.Aside.MaxInstances)
			told.aside.Store(own.Aside)
			t := newTraceLane(lane, &own, count, l.policies, journal, l.horizon, l.tally(d, s))
			t.filters, t.tell = []string{s.Filter}, func(text string) { told.sources.Store(&text) }
			t.maxBytes, t.attribute, t.gauges = int(l.cfg.Sampling.MaxBytes), l.cfg.Sampling.PolicyAttribute, gauges
			ended(ctx, own.Log, t.run(ctx))
		}
		return s
	}
	s.Run = func(ctx context.Context, lane *bus.Lane) {
		own := *d
		own.Owned, own.Waits, own.Aside = lane.Owned, lane.Waits, export.NewAside(own, lane, p, l.cfg.Aside.MaxInstances)
		told.aside.Store(own.Aside)
		ended(ctx, own.Log, newDirectLane(lane, &own, count, l.tally(d, s)).run(ctx))
	}
	return s
}

// told is what a lane has to tell on /partitions.
type told struct {
	sources atomic.Pointer[string]
	aside   atomic.Pointer[export.Aside] // of the last owner here
}

func (t *told) text() string {
	text := t.aside.Load().Text()
	if sources := t.sources.Load(); sources != nil && *sources != "" {
		return strings.TrimPrefix(text+"; "+*sources, "; ")
	}
	return text
}

// tally returns the tally of a lane.
func (l *lanes) tally(d *export.Exporter, s membership.Shared) *tally.Lane {
	var (
		guard envelope.Guard
		body  []byte
	)
	cfg := tally.Config{
		Conn: d.Conn, Replicas: l.cfg.Streams.Replicas, Stream: s.Stream, Lane: s.Name, Filter: s.Filter, Log: d.Log,
		Items: func(m bus.Delivery, saw func(instance string, items int)) {
			if s.Stream != bus.Spans {
				_, items, _ := m.Open(&guard, d.Signal, &body)
				saw(m.Instance(), items)
				return
			}
			m.Decompress(&body)
			if routed(nil, m, func(f envelope.Frame) error {
				saw(f.Instance, otlpwire.Count(otlpwire.Traces, f.Payload))
				return nil
			}) != nil {
				saw(m.Instance(), 1)
			}
		},
	}
	if s.Stream != bus.Spans { // the lanes of routers follow the numbers of traces
		cfg.Missing = l.led.Missing(s.Signal, s.Partition, s.Backend)
	}
	return tally.Open(cfg)
}

func (l *lanes) exporter(sig otlpwire.Signal, w backend.Writer, p int, count export.Counter) *export.Exporter {
	accepted, _ := l.accepted.LoadOrStore(sig.String()+" "+w.Name(), new(backend.Accepted))
	d := &export.Exporter{
		Signal: sig, Writer: w, Conn: func() *bus.Conn { return l.hub.Conn }, Ledger: l.led, Count: count, Said: &l.said, Quota: &l.quota,
		Accepted: accepted.(*backend.Accepted), Poison: l.cfg.Poison, SlowAfter: l.cfg.Aside.SlowAfter, Requests: l.cfg.Requests,
		Log: l.log.With("signal", sig.String(), "partition", p, "backend", w.Name()),
	}
	if l.process != nil {
		d.Process = l.process
	}
	return d
}

// ended logs why a lane ended by itself; the members start it again while it is still placed here.
func ended(ctx context.Context, log *slog.Logger, why error) {
	if ctx.Err() == nil {
		log.Debug("lane ended, will be started again", "err", why)
	}
}
