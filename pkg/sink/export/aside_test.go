package export

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/tally"
)

// TestMain fails when the tests leave goroutines running.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// counting is a backend that counts the records that it has, and a counter.
type counting struct{ items atomic.Int64 }

func (*counting) Name() string                     { return "loki" }
func (*counting) Close() error                     { return nil }
func (*counting) Ended(tally.Outcome, string, int) {}

func (c *counting) Write(_ context.Context, _ string, payload []byte) error {
	c.items.Add(int64(otlpwire.Count(otlpwire.Logs, payload)))
	return nil
}

// world is an exporter of logs, and a lane of its.
func world(t *testing.T) (*Exporter, *counting, *bus.Lane) {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	b, err := broker.Start(broker.Config{Name: "hub", Dir: t.TempDir(), MaxPayload: 2 << 20}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	top := bus.DefaultTopology()
	top.Partitions, top.MaxBytes = 1, 64<<20
	conn, err := bus.OpenHub(t.Context(), bus.Config{Name: "sink", InProcess: b}, top, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	lane, err := conn.OpenLane(t.Context(), bus.LaneConfig{Stream: bus.Stream(otlpwire.Logs), Filter: bus.PartitionFilter(otlpwire.Logs, 0), Name: "loki-0", Raw: true})
	if err != nil {
		t.Fatal(err)
	}
	w := new(counting)
	return &Exporter{
		Signal: otlpwire.Logs, Writer: w, Conn: func() *bus.Conn { return conn }, Ledger: ledger.New(prometheus.NewRegistry()), Log: quiet, Count: w, Said: new(backoff.Repeats),
		Accepted: new(backend.Accepted), Waits: lane.Waits,
	}, w, lane
}

func lines(t *testing.T, texts ...string) []byte {
	t.Helper()
	var records []string
	for _, text := range texts {
		records = append(records, fmt.Sprintf(`{"body":{"stringValue":%q}}`, text))
	}
	payload, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[`+strings.Join(records, ",")+`]}]}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	return payload
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if !backoff.Until(ctx, ok) {
		t.Fatalf("%s: never", what)
	}
}

// waits returns how many messages of as-1 are in ASIDE.
func waits(t *testing.T, a *Aside) (n uint64) {
	t.Helper()
	there, err := a.subjects(t.Context(), "as-1")
	if err != nil {
		t.Fatal(err)
	}
	for _, messages := range there {
		n += messages
	}
	return n
}

// TestEqualHalvesAreTwo: a payload that is cut, for its size, into two halves of the same bytes is
// stored as two messages.
func TestEqualHalvesAreTwo(t *testing.T) {
	t.Parallel()
	d, w, lane := world(t)
	random := make([]byte, 700<<10)
	_, _ = rand.Read(random) // never fails
	line := "|" + base64.StdEncoding.EncodeToString(random)[:700<<10] + "|"
	a := NewAside(*d, lane, 0, 2)
	if a.exporter.Waits != nil {
		t.Error("what is delivered beside the lane holds it up")
	}
	a.exporter.Owned = func() bool { return true }
	if err := a.store(t.Context(), "as-1", lines(t, line, line), false, Origin{Stream: bus.Stream(otlpwire.Logs), Seq: 1}, new(int)); err != nil {
		t.Fatal(err)
	}
	if n := waits(t, a); n != 2 {
		t.Fatalf("%d messages", n)
	}
	if !a.Claim(t.Context()) {
		t.Fatal("no claim")
	}
	defer a.Close()
	until(t, "both", func() bool { return w.items.Load() == 2 })
}

// TestWhatNobodyKnowsOfIsFound: what was put into ASIDE without an answer, or by a previous owner that was
// slow, is delivered by the present owner of the lane.
func TestWhatNobodyKnowsOfIsFound(t *testing.T) {
	t.Parallel()
	d, w, lane := world(t)
	a := NewAside(*d, lane, 0, 2)
	var asked, owned atomic.Int64
	a.exporter.Owned = func() bool {
		asked.Add(1)
		return owned.Load() > 0
	}
	if !a.Claim(t.Context()) {
		t.Fatal("no claim")
	}
	defer a.Close()
	if err := a.store(t.Context(), "as-1", lines(t, "|000|"), false, Origin{Stream: bus.Stream(otlpwire.Logs), Seq: 1}, new(int)); err != nil {
		t.Fatal(err)
	}
	if err := a.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, "tries of one who is not the owner", func() bool { return asked.Load() > 2 })
	if n := w.items.Load(); n > 0 {
		t.Errorf("%d items of one who is not the owner", n)
	}
	owned.Store(1)
	until(t, "it", func() bool { return w.items.Load() == 1 && waits(t, a) == 0 })
}

// TestWhoIsSetAside: with evidence that others are accepted, anybody who is not; without it, those that are refused, one
// after the other, and one for which the backend fails or is slow, if it has accepted something of another one.
func TestWhoIsSetAside(t *testing.T) {
	d, _, lane := world(t)
	now := time.Now()
	refused, away := fault.Sender(fault.After(fmt.Errorf("429"), 0)), fmt.Errorf("connection refused")
	for name, tc := range map[string]struct {
		trouble       backend.Trouble
		accepted      string // of whom something was accepted, lately
		before        string // of whom something was accepted before the trouble began
		taken         bool   // something was accepted since the last one was set aside
		doubted, full bool
		want          bool
	}{
		"refused, others are accepted":     {trouble: backend.Trouble{Err: refused}, accepted: "as-2", want: true},
		"refused, the first":               {trouble: backend.Trouble{Err: refused}, taken: true, want: true},
		"refused, another was just before": {trouble: backend.Trouble{Err: refused}},
		"refused, another was before":      {trouble: backend.Trouble{Err: refused}, doubted: true, want: true},
		"refused, too many":                {trouble: backend.Trouble{Err: refused}, accepted: "as-2", taken: true, full: true},
		"away":                             {trouble: backend.Trouble{Err: away, Attempts: awayTries - 1}, before: "as-2", taken: true},
		"away for long":                    {trouble: backend.Trouble{Err: away, Attempts: awayTries}, before: "as-2", want: true},
		"away for this one":                {trouble: backend.Trouble{Err: away, Attempts: 3}, accepted: "as-2", want: true},
		"away for this one, it accepted":   {trouble: backend.Trouble{Err: away, Attempts: 3}, accepted: "as-1", taken: true},
		"fails":                            {trouble: backend.Trouble{Err: away, Failed: true, Attempts: doubtTries}, before: "as-2", want: true},
		"fails for the first time":         {trouble: backend.Trouble{Err: away, Failed: true, Attempts: doubtTries - 1}, before: "as-2"},
		"fails, there is nobody else":      {trouble: backend.Trouble{Err: away, Failed: true, Attempts: 100}, before: "as-1", taken: true},
		"slow":                             {trouble: backend.Trouble{Err: away, Slow: true, Attempts: 1}, before: "as-2", want: true},
		"slow, there is nobody else":       {trouble: backend.Trouble{Err: away, Slow: true, Attempts: 1}, before: "as-1", taken: true},
	} {
		d.Accepted = new(backend.Accepted)
		a := NewAside(*d, lane, 0, 1)
		a.waiting = map[string]*waiting{}
		a.taken.Store(tc.taken)
		a.last = now.Add(-doubt / 2)
		if tc.doubted {
			a.last = now.Add(-doubt)
		}
		if tc.full {
			a.waiting["as-3"] = new(waiting)
		}
		tc.trouble.Since = now.Add(-time.Second)
		if tc.before != "" {
			d.Accepted.Note(tc.before, now.Add(-2*time.Second))
		}
		if tc.accepted != "" {
			d.Accepted.Note(tc.accepted, now)
		}
		if got := a.may("as-1", tc.trouble); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestASlowOneStays set aside when nothing is left, so that it does not hold up the lane again: what comes later is delivered
// beside the lane, too. Each request is taken to be slow.
func TestASlowOneStays(t *testing.T) {
	t.Parallel()
	d, w, lane := world(t)
	d.SlowAfter = 1
	a := NewAside(*d, lane, 0, 2)
	a.exporter.Owned = func() bool { return true }
	a.waiting = map[string]*waiting{"as-1": new(waiting)}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.drain(ctx, "as-1") }()
	for n := range int64(5) {
		if err := a.store(t.Context(), "as-1", lines(t, "x"), false, Origin{Stream: bus.Stream(otlpwire.Logs), Seq: uint64(n) + 1}, new(int)); err != nil {
			t.Fatal(err)
		}
		until(t, "the next one", func() bool { return len(ended) > 0 || w.items.Load() == n+1 && waits(t, a) == 0 })
	}
	cancel()
	if err := <-ended; err == nil {
		t.Error("it is back although its last request was slow")
	}
}

// TestASlowAnswerIsNoEvidence that the backend has trouble with another instance only: it may be slow for everybody.
func TestASlowAnswerIsNoEvidence(t *testing.T) {
	d := Exporter{SlowAfter: time.Second, Accepted: new(backend.Accepted)}
	before := time.Now().Add(-time.Second)
	if d.accepts("as-1", time.Second); d.Accepted.Others("as-2", before) {
		t.Error("a slow answer")
	}
	if d.accepts("as-1", time.Second-1); !d.Accepted.Others("as-2", before) {
		t.Error("a quick answer is none")
	}
}
