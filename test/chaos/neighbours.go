package main

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/test/daemon"
)

const (
	// beside is for how long neighbours are measured, first without trouble and then beside it, where it is judged. In a
	// shorter run it is a fifth of the time of the faults, and printed only: a p99 of some seconds on a busy machine says
	// nothing.
	beside = 30 * time.Second

	// asideBound is that of ASIDE meanwhile, in bytes: it would be full before the end if the instance that floods did not
	// hold back. It is told to within ten seconds of half of that.
	asideBound = 24 << 20

	// slower is how many times the p99 of before the one beside an instance in trouble may be. A p99 counts as at
	// least leastP99: what is below it differs by what else the machine does.
	slower   = 2
	leastP99 = 250 * time.Millisecond
)

// noisy is the instance that backends refuse and that floods, while nothing else is wrong.
type noisy struct {
	instance       string
	what           string   // the backends do, for the output
	quiet, trouble interval // before it, and meanwhile
	unsteady       interval // its edge may have held spans back, as if it had been cut off

	aside float64 // bytes that were set aside, at the most
	held  float64 // seconds for which it was told to hold back
}

// neighbours measures the delays of all instances while nothing is wrong, and again for as long while all three backends refuse
// one of them, which floods meanwhile, and one payload of another one is poison. It has a generator of its own: the
// schedule of the faults is the same without it.
func (w *world) neighbours(ctx context.Context) error {
	d := beside
	if !w.judged() {
		d = w.For / 5
	}
	rng := rand.New(rand.NewPCG(w.Seed, 5))
	t := troubles[rng.IntN(len(troubles)-1)] // not the slow one
	n := &w.noisy
	n.instance, n.what = instances[len(instances)-1], t.what // its traces are its own; for spans of a domain that are held back others wait
	w.say("for %v nothing is wrong", d)
	n.quiet.from = time.Now()
	if !backoff.Sleep(ctx, d) {
		return ctx.Err()
	}
	n.quiet.to = time.Now()
	if err := w.caughtUp(ctx, n.quiet.to); err != nil {
		return err
	}
	was, err := w.resize(ctx, bus.Aside, asideBound)
	if err != nil {
		return err
	}
	w.say("for %v all backends %s %s, which floods, and a log record of %s is cursed", d, n.what, n.instance, w.cursed.instance)
	w.cursed.curse.Store(true)
	w.failTenant(n.instance, t)
	w.journal.flood.Store(&n.instance)
	n.trouble.from = time.Now()
	for time.Since(n.trouble.from) < d {
		w.watchNoisy()
		if !backoff.Sleep(ctx, min(d/10, time.Second)) {
			return ctx.Err()
		}
	}
	n.trouble.to = time.Now()
	w.journal.flood.Store(nil)
	w.failTenant(n.instance, tenantTrouble{})
	if err := w.caughtUp(ctx, n.trouble.to); err != nil {
		return err
	}
	if err := w.noneAside(ctx); err != nil {
		return err
	}
	if _, err := w.resize(ctx, bus.Aside, was); err != nil {
		return err
	}
	edges := w.of("edge")
	if err := forwarded(ctx, edges[len(edges)-1]); err != nil {
		return err
	}
	n.unsteady = interval{n.trouble.from, time.Now()}
	w.say("%s is accepted again, and nothing of it is set aside or held back %.0f s later", n.instance, time.Since(n.trouble.to).Seconds())
	return nil
}

// judged reports whether the run is long enough for delays to decide whether a promise was broken.
func (w *world) judged() bool { return w.For >= time.Minute }

// watchNoisy notes what sinks report of the instance in trouble.
func (w *world) watchNoisy() {
	for _, p := range w.of("sink") {
		read := func(metric string) float64 {
			text, err := daemon.Metric(p.admin, metric)
			if err != nil {
				return 0 // it is not the keeper
			}
			v, _ := strconv.ParseFloat(text, 64)
			return v
		}
		w.noisy.aside = max(w.noisy.aside, read(fmt.Sprintf("penstock_stream_owed_bytes{stream=%q}", bus.Aside)))
		for _, sig := range otlpwire.Signals {
			w.noisy.held = max(w.noisy.held, read(fmt.Sprintf("penstock_instance_held_seconds{instance=%q,signal=%q}", w.noisy.instance, sig)))
		}
	}
}

// fair reports whether a signal of an instance is compared. The instance in trouble is not. Nor are the log records of the
// one with the cursed record, which wait for it in ASIDE until the end of the run; nothing of its metrics and spans does.
func (w *world) fair(sig otlpwire.Signal, instance, troubled string) bool {
	return instance != troubled && (sig != otlpwire.Logs || instance != w.cursed.instance)
}

// caughtUp waits until something has come of each signal that is compared that was acknowledged a second after a time: what was
// acknowledged before that time has come, too, and nothing later can delay it.
func (w *world) caughtUp(ctx context.Context, since time.Time) error {
	return daemon.Until(ctx, time.Minute, func() error {
		for _, sig := range otlpwire.Signals {
			came, ackedAt := w.arrived(sig), w.acks(sig)
			for _, instance := range slices.Compact(slices.Clone(instances)) {
				if w.fair(sig, instance, w.noisy.instance) && !slices.ContainsFunc(came[instance], func(a arrival) bool { return ackedAt(instance, a.n).After(since.Add(time.Second)) }) {
					return fmt.Errorf("%v of %s that were acknowledged after %.0f s have not arrived", sig, instance, since.Sub(w.start).Seconds())
				}
			}
		}
		return nil
	})
}

// noneAside waits until nothing is set aside but the log records that wait for the cursed one.
func (w *world) noneAside(ctx context.Context) error {
	conn, err := w.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return daemon.Until(ctx, 2*time.Minute, func() error {
		there, err := conn.Subjects(ctx, bus.Aside, ">")
		for subject := range there {
			if !strings.HasPrefix(subject, "aside.logs.") || !strings.HasSuffix(subject, "."+w.cursed.instance) {
				err = fmt.Errorf("set aside: %v", there)
			}
		}
		return err
	})
}

// acks returns when an item of a signal was acknowledged; the zero time for one that was not.
func (w *world) acks(sig otlpwire.Signal) func(instance string, n uint64) time.Time {
	if sig == otlpwire.Traces {
		return func(_ string, n uint64) time.Time {
			w.journal.mu.Lock()
			defer w.journal.mu.Unlock()
			return w.journal.acked[n]
		}
	}
	return func(instance string, n uint64) (at time.Time) {
		for _, q := range w.journal.sequences {
			if q.sig == sig && q.instance == instance {
				at = q.ackedAt(n)
			}
		}
		return at
	}
}

// delays returns, in ascending order, for how long items of a signal were under way that are compared and were acknowledged within a
// time: from the edge's acknowledgement until they came to the backend first. What was under way while the machine itself stood
// still does not count.
func (w *world) delays(sig otlpwire.Signal, within interval, troubled string) (all []time.Duration) {
	w.mu.Lock()
	disturbed := slices.Clone(w.disturbed)
	w.mu.Unlock()
	ackedAt := w.acks(sig)
	for instance, came := range w.arrived(sig) {
		if !w.fair(sig, instance, troubled) {
			continue
		}
		seen := map[uint64]bool{}
		for _, a := range came {
			at := ackedAt(instance, a.n)
			if seen[a.n] || at.Before(within.from) || at.After(within.to) || slices.ContainsFunc(disturbed, func(i interval) bool {
				return at.After(i.from.Add(-wait-time.Second)) && at.Before(i.to)
			}) {
				continue
			}
			seen[a.n] = true
			all = append(all, max(a.at.Sub(at), 0)) // the acknowledgement may be the slower one
		}
	}
	slices.Sort(all)
	return all
}

// judgeNeighbours compares the delays, once everything has come. That the delay of spans includes the policies' wait is so in both.
func (w *world) judgeNeighbours(s *Summary) {
	n := &w.noisy
	for _, sig := range otlpwire.Signals {
		before, meanwhile := w.delays(sig, n.quiet, n.instance), w.delays(sig, n.trouble, n.instance)
		ratio := math.Inf(1)
		if len(before) > 0 && len(meanwhile) > 0 {
			ratio = float64(max(quantile(meanwhile, 99), leastP99)) / float64(max(quantile(before, 99), leastP99))
		}
		w.say("%v of the others: p50 %v, p99 %v of %d when nothing is wrong; p50 %v, p99 %v of %d while backends %s %s; p99_ratio=%.1f",
			sig, quantile(before, 50), quantile(before, 99), len(before), quantile(meanwhile, 50), quantile(meanwhile, 99), len(meanwhile), n.what, n.instance, ratio)
		s.P99Ratio = max(s.P99Ratio, ratio)
	}
	w.say("of %s %.1f MiB were set aside, and it was told to hold back for %.0f s", n.instance, n.aside/(1<<20), n.held)
	s.Slowed, s.NoFlood = w.judged() && s.P99Ratio > slower, w.judged() && n.held == 0
}

// quantile is a percentile of sorted delays, to the millisecond; 0 if there are none.
func quantile(sorted []time.Duration, percent int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[len(sorted)*percent/100].Round(time.Millisecond)
}
