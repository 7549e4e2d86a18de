// Package backoff waits: for a time, for a condition, or between attempts with growing pauses; and
// it limits equal log messages to one a minute.
//
// The length of a pause after an error is not here but in package fault.
package backoff

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/penstock/penstock/pkg/fault"
)

// pollInterval is how often Until checks: often enough that a stop feels immediate, rarely enough that it
// costs nothing.
const pollInterval = 50 * time.Millisecond

// Until waits until done returns true or ctx ends, and reports which.
func Until(ctx context.Context, done func() bool) bool {
	for !done() {
		if !Sleep(ctx, pollInterval) {
			return false
		}
	}
	return true
}

// Sleep waits for d and reports false if ctx ended first.
func Sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Retry calls do, which sends something to the hub, until it succeeds, with growing pauses, and warns once.
// It returns false if ctx ended first.
func Retry(ctx context.Context, log *slog.Logger, what string, do func() error) bool {
	for attempt := 1; ; attempt++ {
		err := do()
		if err == nil {
			return true
		}
		if attempt == 1 {
			log.Warn("cannot "+what+"; retrying", "err", err)
		}
		if !Sleep(ctx, min(fault.Pause(err, attempt, rand.Float64()), fault.MaxHubPause)) {
			return false
		}
	}
}
