package bus

import (
	"log/slog"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/ledger"
)

// Stall tells of something that has work and does not get on: by a gauge at once, and by a
// counter and the log when it has been so for long. Who has the work looks every
// [StallInterval].
type Stall struct {
	gauge interface{ Set(float64) }
	count interface{ Inc() }
	log   *slog.Logger

	mu      sync.Mutex
	since   time.Time // when it last got on
	said    time.Time // when the log was told; zero when there is nothing to tell
	counted bool
}

const (
	// StallInterval is how often one looks: seldom enough for a thousand lanes on one hub.
	StallInterval = 2 * time.Second

	// stallAfter is when a stall counts. With the time between two looks it is seen within
	// ten seconds.
	stallAfter = 8 * time.Second
)

// NewStall returns a stall that begins with its first look.
func NewStall(led *ledger.Ledger, signal, partition, backend string, log *slog.Logger) *Stall {
	gauge, count := led.Stall(signal, partition, backend)
	gauge.Set(0)
	return &Stall{gauge: gauge, count: count, log: log.With("signal", signal, "partition", partition, "backend", backend)}
}

// Look notes whether it has got on since the last look, or has nothing to do. why is asked
// when there is something to tell.
func (s *Stall) Look(now time.Time, good bool, why func() error) {
	s.mu.Lock()
	if good || s.since.IsZero() {
		s.since = now
	}
	tell := s.note(now)
	s.mu.Unlock()
	tell(why)
}

// stands notes since when it does not get on.
func (s *Stall) stands(now, since time.Time, why func() error) {
	s.mu.Lock()
	s.since = since
	tell := s.note(now)
	s.mu.Unlock()
	tell(why)
}

// note sets what is measured, and returns what writes the log: without the lock, for why may
// ask somebody who looks.
func (s *Stall) note(now time.Time) (tell func(why func() error)) {
	stood, said := max(now.Sub(s.since), 0), !s.said.IsZero()
	s.gauge.Set(stood.Seconds())
	if stood < stallAfter {
		s.counted, s.said = false, time.Time{}
		if said {
			return func(func() error) { s.log.Info("no longer stalled") }
		}
		return func(func() error) {}
	}
	if !s.counted {
		s.counted = true
		s.count.Inc()
	}
	if now.Sub(s.said) < time.Minute {
		return func(func() error) {}
	}
	s.said = now
	return func(why func() error) {
		s.log.Warn("stalled", "for", stood.Truncate(time.Second), "why", why())
	}
}
