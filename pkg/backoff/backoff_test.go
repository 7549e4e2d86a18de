package backoff

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/penstock/penstock/pkg/fault"
)

// TestSleep ends with the time or the context, whichever is first.
func TestSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		if !Sleep(t.Context(), time.Minute) || time.Since(start) != time.Minute {
			t.Errorf("a minute took %v", time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start = time.Now()
		if Sleep(ctx, time.Minute) || time.Since(start) != time.Second {
			t.Errorf("a sleep whose context ends after a second took %v", time.Since(start))
		}
	})
}

// TestUntil notices within pollInterval that the condition holds, and at once that it did at the start.
func TestUntil(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		after := func(d time.Duration) func() bool { return func() bool { return time.Since(start) >= d } }
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if !Until(ended, after(0)) || time.Since(start) != 0 {
			t.Errorf("a condition that holds took %v", time.Since(start))
		}
		if !Until(t.Context(), after(10*time.Second-1)) || time.Since(start) != 10*time.Second {
			t.Errorf("a condition that holds after 10 s took %v", time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start = time.Now()
		if Until(ctx, after(time.Hour)) || time.Since(start) != time.Second {
			t.Errorf("a condition that never holds took %v", time.Since(start))
		}
	})
}

// TestRetry waits longer after each attempt, up to fault.MaxHubPause, warns once and ends with success or
// the context.
func TestRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var said bytes.Buffer
		log := slog.New(slog.NewTextHandler(&said, nil))
		var pauses []time.Duration
		last := time.Now()
		if !Retry(t.Context(), log, "do it", func() error {
			pauses, last = append(pauses, time.Since(last)), time.Now()
			if len(pauses) == 12 {
				return nil
			}
			return errors.New("not now")
		}) {
			t.Error("it fails")
		}
		want := 100 * time.Millisecond
		for i, p := range pauses[1:] { // a quarter of each is chance
			if longest := min(want, fault.MaxHubPause); p > longest || p < min(want*3/4, fault.MaxHubPause) {
				t.Errorf("pause %d is %v, want up to %v", i+1, p, longest)
			}
			want *= 2
		}
		if pauses[0] != 0 || strings.Count(said.String(), "cannot do it; retrying") != 1 || !strings.Contains(said.String(), "not now") {
			t.Errorf("it begins after %v and says %s", pauses[0], said.String())
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		start, attempts := time.Now(), 0
		if Retry(ctx, log, "do it", func() error {
			if attempts++; time.Since(start) > time.Hour {
				return nil
			}
			return errors.New("never")
		}) || time.Since(start) != time.Hour || attempts < 720 {
			t.Errorf("%d attempts in %v", attempts, time.Since(start))
		}
	})
}
