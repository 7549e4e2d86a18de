package stall

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/ledger"
)

// TestStall looks every two seconds.
func TestStall(t *testing.T) {
	led := ledger.New(prometheus.NewRegistry())
	seconds, stalls := led.Stall("logs", "3", "loki")
	var text bytes.Buffer
	s := New(led, "logs", "3", "loki", slog.New(slog.NewTextHandler(&text, nil)))
	now := time.Unix(1000, 0)
	for i, step := range []struct {
		good            bool
		seconds, stalls float64
		says            string
	}{
		{false, 0, 0, ""}, {false, 2, 0, ""}, {true, 0, 0, ""}, {false, 2, 0, ""}, {false, 4, 0, ""}, {false, 6, 0, ""},
		{false, 8, 1, "msg=stalled"}, {false, 10, 1, ""}, {true, 0, 1, "no longer stalled"}, {true, 0, 1, ""},
		{false, 2, 1, ""}, {false, 4, 1, ""}, {false, 6, 1, ""}, {false, 8, 2, "for=8s why=\"no room\""},
	} {
		text.Reset()
		s.Look(now, step.good, func() error { return errors.New("no room") })
		now = now.Add(Interval)
		if a, b := testutil.ToFloat64(seconds), testutil.ToFloat64(stalls); a != step.seconds || b != step.stalls {
			t.Errorf("step %d: %v s, %v stalls, want %v and %v", i, a, b, step.seconds, step.stalls)
		}
		if said := text.String(); (said == "") != (step.says == "") || !strings.Contains(said, step.says) {
			t.Errorf("step %d says %q, want %q", i, said, step.says)
		}
	}
	text.Reset()
	for range 35 {
		s.Look(now, false, func() error { return errors.New("no room") })
		now = now.Add(Interval)
	}
	if n := strings.Count(text.String(), "msg=stalled"); n != 1 || testutil.ToFloat64(stalls) != 2 {
		t.Errorf("another 70 s: said %d times, %v stalls", n, testutil.ToFloat64(stalls))
	}
	if s.Since(now, now.Add(-time.Second), nil); testutil.ToFloat64(seconds) != 1 {
		t.Errorf("one that stands for a second: %v", testutil.ToFloat64(seconds))
	}
}

// TestWhyMayLook: why is called without the lock.
func TestWhyMayLook(t *testing.T) {
	s := New(ledger.New(prometheus.NewRegistry()), "logs", "3", "loki", slog.New(slog.DiscardHandler))
	now := time.Unix(1000, 0)
	s.Look(now, true, nil)
	asked := false
	s.Look(now.Add(time.Minute), false, func() error {
		asked = true
		s.Look(now.Add(time.Minute), true, nil)
		return nil
	})
	if !asked {
		t.Error("nobody has asked why")
	}
}
