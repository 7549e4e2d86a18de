package forward

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/edge/spool"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Local writes everything that is spooled, unsampled, to backends beside the edge: so faults
// can be diagnosed on site while the hub is unavailable. It delays nothing: a local backend
// misses what the spool deletes before the backend has accepted it.
type Local struct {
	cfg      backend.Config
	instance string
	spool    *spool.Spool
	led      *ledger.Ledger
	log      *slog.Logger
}

// localReader is the prefix of the names of local backends as readers of the spool.
const localReader = "local-"

func NewLocal(cfg backend.Config, instance string, sp *spool.Spool, led *ledger.Ledger, log *slog.Logger) *Local {
	return &Local{cfg: cfg, instance: instance, spool: sp, led: led, log: log.With("component", "local")}
}

func (l *Local) Service() services.Service {
	var writers [len(otlpwire.Signals)]backend.Writer
	start := func(context.Context) (err error) {
		for _, sig := range otlpwire.Signals {
			if writers[sig], err = l.cfg.Open(sig); err != nil {
				return err
			}
		}
		return nil
	}
	run := func(ctx context.Context) error {
		var wg sync.WaitGroup
		for _, sig := range otlpwire.Signals {
			if w := writers[sig]; w != nil {
				wg.Go(func() { l.run(ctx, sig, w) })
			}
		}
		<-ctx.Done()
		wg.Wait()
		return nil
	}
	end := func(error) error {
		var errs []error
		for _, w := range writers {
			if w != nil {
				errs = append(errs, w.Close())
			}
		}
		return errors.Join(errs...)
	}
	return services.NewBasicService(start, run, end)
}

// run writes one signal until ctx ends.
func (l *Local) run(ctx context.Context, sig otlpwire.Signal, w backend.Writer) {
	log := l.log.With("signal", sig, "backend", w.Name())
	for attempt := 1; ; attempt++ {
		st, err := l.spool.Await(ctx)
		if err != nil {
			return
		}
		if work, leave, ok := st.Enter(ctx); ok {
			var wrote bool
			if wrote, err = l.session(work, st, sig, w, log); wrote {
				attempt = 1
			}
			leave()
		}
		if !backoff.Sleep(ctx, min(fault.Pause(err, attempt, rand.Float64()), fault.MaxHubPause)) {
			return
		}
		log.Debug("reading the spool again", "err", err)
	}
}

func (l *Local) session(ctx context.Context, st *spool.Store, sig otlpwire.Signal, w backend.Writer, log *slog.Logger) (wrote bool, err error) {
	name := localReader + w.Name()
	r := st.Read(sig, l.spool.Position(name, sig).Done)
	defer r.Close()
	count := l.led.Local(sig, w.Name())
	d := backend.Deliverer{
		Signal: sig, Writer: w, Log: log, Delivered: func(items int) { count(ledger.LocalDelivered).Add(float64(items)) },
		Paused:       l.led.Paused(sig, w.Name()),
		Deduplicated: func(items int) { l.led.Of(sig).Deduplicated(w.Name()).Add(float64(items)) },
		GiveUp: func(_ context.Context, _ string, payload []byte, reason string, why error) bool {
			log.Warn("local backend refuses an item for good", "reason", reason, "err", why)
			count(ledger.LocalRefused).Add(float64(otlpwire.Count(sig, payload)))
			return true
		},
	}
	for {
		m, err := r.Next(ctx)
		if err != nil {
			return wrote, err
		}
		d.Arrival = m.Header.Arrival
		begins := m.Seq - max(m.Missing, 1) // the sequence before the first of them
		if done := l.spool.Position(name, sig).Done; done > 0 && begins > done {
			log.Warn("spool deleted messages before the local backend accepted them", "messages", begins-done)
			count(ledger.LocalMissed).Add(float64(begins - done))
		}
		body, err := envelope.Decompress(nil, m.Body, m.Header.Encoding)
		if m.Header.Encoding == "" {
			body = bytes.Clone(body) // a transport may read it after an attempt has failed
		}
		if err != nil || m.Missing > 0 {
			log.Error("spooled messages are damaged and were skipped", "messages", max(m.Missing, 1), "last", m.Seq, "err", err)
		} else if !d.Write(ctx, l.instance, body, otlpwire.Count(sig, body), !wrote) {
			return wrote, ctx.Err()
		}
		wrote = true
		l.spool.Advance(name, sig, m.Seq, 0)
	}
}
