// Package stall reports work that makes no progress: by a gauge at once, by a counter and the log
// after some seconds.
//
//	d := stall.New(led, "logs", "3", "loki", log)
//	d.Look(now, progressed, why) // every [Interval]
//
// # Promises
//
//   - Work that makes no progress is reported within ten seconds: the gauge shows for how many
//     seconds, the counter counts it once, and the log gives the reason, again each minute, and
//     reports the end.
//
// # Not here
//
// What progress is: the caller decides.
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
	since   time.Time // when it last made progress
	said    time.Time // when a stall was last logged; zero when there is none
	counted bool
}

const (
	// Interval is how often the caller should look: seldom enough for a thousand lanes on one hub.
	Interval = 2 * time.Second

	// After is after how long a stall counts. With the time between two looks it is noticed
	// within ten seconds.
	After = 8 * time.Second
)

// New returns a detector that counts from its first look.
func New(led *ledger.Ledger, signal, partition, backend string, log *slog.Logger) *Detector {
	gauge, count := led.Stall(signal, partition, backend)
	gauge.Set(0)
	return &Detector{gauge: gauge, count: count, log: log.With("signal", signal, "partition", partition, "backend", backend)}
}

// Look notes whether the work has made progress since the last look, or has nothing to do. why
// is called when a stall is logged.
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

// note sets the metrics, and returns a function that logs: it is called without the lock,
// because why may look, too.
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
