package sink

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/versions"
)

// taking is a backend that calls a function for each request.
type taking func(ctx context.Context) error

func (taking) Name() string                                          { return "tempo" }
func (taking) Close() error                                          { return nil }
func (w taking) Write(ctx context.Context, _ string, _ []byte) error { return w(ctx) }

// TestABackendThatTakesNothing: a backend that refuses a trace, or does not answer, is reported as a
// stall, also if traces wait for their decision for an hour.
func TestABackendThatTakesNothing(t *testing.T) {
	t.Parallel()
	for why, write := range map[string]taking{
		"503 over capacity":           func(context.Context) error { return errors.New("503 over capacity") },
		"the backend gives no answer": func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
	} {
		t.Run(why, func(t *testing.T) {
			t.Parallel()
			d, conn := testExporter(t, write)
			var said logtest.Log
			log := said.Logger(slog.LevelInfo)
			hub := bus.NewHub(bus.Config{}, bus.Topology{Partitions: 1, Replicas: 1}, log)
			hub.Conn = conn
			members := membership.New(hub, "sink", "one", d.Ledger, log)
			cfg := DefaultConfig()
			cfg.Streams.Partitions = 1
			l := &lanes{cfg: cfg, policies: versions.Fixed(policy.KeepAll(time.Second)), led: d.Ledger, log: log, hub: hub, members: members}
			lane := l.lane(otlpwire.Traces, write, 0, false)
			if hold := lane.Hold(); hold != time.Second+cfg.Sampling.SourceLag {
				t.Errorf("the lane holds for %v", hold)
			}
			lane.Hold = func() time.Duration { return time.Hour }
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			defer wg.Wait()
			defer cancel()
			wg.Go(func() { members.Run(ctx, []membership.Shared{lane}) })
			now := time.Now()
			for i, arrival := range []time.Time{now.Add(-time.Minute), now} { // the second one closes the first one's window
				payload, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, []byte(strings.ReplaceAll(`{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"0000000000000000000000000000000N","spanId":"000000000000000N","name":"x"}]}]}]}`, "N", string(rune('1'+i)))), otlpwire.DefaultLimits)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := conn.Publish(t.Context(), bus.Message{
					Subject: bus.SpansSubject(0), Header: envelope.Header{ContentType: envelope.ContentTypeFrames, Items: 1, Arrival: arrival.UnixNano()},
					Body: envelope.AppendFrame(nil, envelope.Frame{Instance: "as-1", Arrival: arrival.UnixNano(), Seq: uint64(i + 1), Payload: payload}),
				}); err != nil {
					t.Fatal(err)
				}
			}
			seconds, stalls := d.Ledger.Stall("traces", "0", "tempo")
			wait, stop := context.WithTimeout(t.Context(), 2*time.Minute)
			defer stop()
			if !backoff.Until(wait, func() bool {
				return testutil.ToFloat64(seconds) >= 8 && testutil.ToFloat64(stalls) == 1 && said.Says("msg=stalled", why)
			}) {
				t.Errorf("it stands for %v s, %v stalls:\n%s", testutil.ToFloat64(seconds), testutil.ToFloat64(stalls), &said)
			}
		})
	}
}
