// Package stall reports work that makes no progress: by a gauge at once, by a counter and the log
// when it has lasted.
//
//	d := stall.New(led, "logs", "3", "loki", log)
//	d.Look(now, progressed, why) // every [Interval]
//
// # Promises
//
//   - What makes no progress shows within ten seconds: the gauge counts its seconds, the counter
//     counts it once, and the log says why, again each minute, and when it is over.
//
// # Not here
//
// What progress is: the one who looks decides.
package stall

import (
	"log/slog"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/ledger"
)

// Detector watches one piece of work. It is safe for concurrent use.
type Detector struct {
	gauge interface{ Set(float64) }
	count interface{ Inc() }
	log   *slog.Logger

	mu      sync.Mutex
	since   time.Time // when it last got on
	said    time.Time // when the log was told; zero when there is nothing to tell
	counted bool
}

const (
	// Interval is how often one looks: seldom enough for a thousand lanes on one hub.
	Interval = 2 * time.Second

	// After is when a stall counts. With the time between two looks it is seen within
	// ten seconds.
	After = 8 * time.Second
)

// New returns a detector that begins with its first look.
func New(led *ledger.Ledger, signal, partition, backend string, log *slog.Logger) *Detector {
	gauge, count := led.Stall(signal, partition, backend)
	gauge.Set(0)
	return &Detector{gauge: gauge, count: count, log: log.With("signal", signal, "partition", partition, "backend", backend)}
}

// Look notes whether it has got on since the last look, or has nothing to do. why is asked
// when there is something to tell.
func (d *Detector) Look(now time.Time, good bool, why func() error) {
	d.mu.Lock()
	if good || d.since.IsZero() {
		d.since = now
	}
	tell := d.note(now)
	d.mu.Unlock()
	tell(why)
}

// Since notes since when there has been no progress, where the caller knows better.
func (d *Detector) Since(now, since time.Time, why func() error) {
	d.mu.Lock()
	d.since = since
	tell := d.note(now)
	d.mu.Unlock()
	tell(why)
}

// note sets what is measured, and returns what writes the log: without the lock, for why may
// ask somebody who looks.
func (d *Detector) note(now time.Time) (tell func(why func() error)) {
	stood, said := max(now.Sub(d.since), 0), !d.said.IsZero()
	d.gauge.Set(stood.Seconds())
	if stood < After {
		d.counted, d.said = false, time.Time{}
		if said {
			return func(func() error) { d.log.Info("no longer stalled") }
		}
		return func(func() error) {}
	}
	if !d.counted {
		d.counted = true
		d.count.Inc()
	}
	if now.Sub(d.said) < time.Minute {
		return func(func() error) {}
	}
	d.said = now
	return func(why func() error) {
		d.log.Warn("stalled", "for", stood.Truncate(time.Second), "why", why())
	}
}
