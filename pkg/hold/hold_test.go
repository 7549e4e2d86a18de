package hold

import (
	"context"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestMain fails when the tests leave goroutines running.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestAsker: nobody holds back without an answer, nor for nobody; an answer holds for its instance and its signals, until a
// later one, or none: the keeper has gone.
func TestAsker(t *testing.T) {
	quiet := slog.New(slog.DiscardHandler)
	b, err := broker.Start(broker.Config{Name: "hub", Dir: t.TempDir()}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Stop()
	conn, err := bus.Dial(bus.Config{Name: "test", InProcess: b}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	a := NewAsker(quiet)
	defer a.Close()
	now, asked := time.Now(), atomic.Int64{}
	settled := func() {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if !backoff.Until(ctx, func() bool { return !a.Asks() }) {
			t.Fatal("no end of asking")
		}
	}
	// ask returns what is known after one more request.
	ask := func(instance string, sig otlpwire.Signal) string {
		t.Helper()
		now = now.Add(2 * Interval)
		a.Held(conn, instance, sig, now)
		settled()
		return a.Held(nil, instance, sig, now)
	}
	if why := ask("as-1", otlpwire.Logs); why != "" {
		t.Errorf("without a keeper: %s", why)
	}
	stop, err := Serve(conn, func(instance string) Answer {
		asked.Add(1)
		if instance != "as-1" {
			return Answer{}
		}
		return Answer{Signals: []string{"logs"}, Why: "it floods"}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	if one, other, another := ask("as-1", otlpwire.Logs), ask("as-1", otlpwire.Traces), ask("as-2", otlpwire.Logs); one != "it floods" || other != "" || another != "" {
		t.Errorf("as-1 %q, its traces %q, as-2 %q", one, other, another)
	}
	before := asked.Load()
	for range 100 {
		a.Held(conn, "as-1", otlpwire.Logs, time.Now())
	}
	settled()
	if n := asked.Load(); n != before {
		t.Errorf("asked %d times within the interval", n-before)
	}
	stop()
	if why := ask("as-1", otlpwire.Logs); why != "" {
		t.Errorf("after the keeper has gone: %s", why)
	}
	if (*Asker)(nil).Held(conn, "as-1", otlpwire.Logs, now) != "" {
		t.Error("a nil asker holds back")
	}
}

// TestAskerIsBounded: instances come and go.
func TestAskerIsBounded(t *testing.T) {
	a := NewAsker(slog.New(slog.DiscardHandler))
	defer a.Close()
	for i := range 2*maxKnown + 5 {
		a.Held(nil, time.Duration(i).String(), otlpwire.Logs, time.Now())
		if len(a.of) > maxKnown {
			t.Fatalf("%d are known", len(a.of))
		}
	}
}
