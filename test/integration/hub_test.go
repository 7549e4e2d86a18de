package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/audit"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/pkg/tally"
	"github.com/penstock/penstock/test/backend/loki"
	"github.com/penstock/penstock/test/daemon"
)

// logsPipeline is a pipeline whose Loki is away, and an edge.
func logsPipeline(t *testing.T, configure func(*hub)) (*pipeline, *edgeAddrs, *loki.Server) {
	t.Helper()
	lok := loki.Start(t)
	lok.Fail(http.StatusServiceUnavailable)
	p := new(pipeline)
	p.log, p.text = newLog(t)
	p.hub = startHubWith(t, p.log, configure)
	p.startRouter(t)
	p.startSink(t, func(c *sink.Config) { c.Loki.URL = lok.URL })
	return p, p.startEdge(t, edge.InstanceConfig{ID: "as-1"}), lok
}

// lines are the numbers that came to a Loki.
func lines(t *testing.T, lok *loki.Server) map[string][]int {
	got := map[string][]int{}
	for _, e := range lok.Entries() {
		n, err := strconv.Atoi(e.Line)
		if err != nil {
			t.Fatal(err)
		}
		got["as-1 logs"] = append(got["as-1 logs"], n)
	}
	return got
}

// send sends numbered logs, and returns the numbers that were acknowledged.
func send(t *testing.T, e *edgeAddrs, from, to int) (acked []int) {
	t.Helper()
	for n := from; n < to; n++ {
		if err := post(context.Background(), e.http, otlpwire.Logs, large(otlpwire.Logs, n)); err != nil {
			t.Fatalf("%d: %v", n, err)
		}
		acked = append(acked, n)
	}
	return acked
}

// forwarded waits until the hub has everything that an edge has.
func forwarded(t *testing.T, e *edgeAddrs) {
	t.Helper()
	eventually(t, time.Minute, "the hub has everything", func() error {
		if a, f := count(t, otlpwire.Logs, "penstock_accepted_items_total", e.role), count(t, otlpwire.Logs, "penstock_forwarded_items_total", e.role); f < a {
			return fmt.Errorf("%d of %d", f, a)
		}
		return nil
	})
}

// jetStream opens a hub as an operator's tool does.
func (h *hub) jetStream(t *testing.T, as ...nats.Option) jetstream.JetStream {
	t.Helper()
	nc, err := nats.Connect(h.url, as...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

// lower sets the bound of a stream, as an operator does.
func lower(t *testing.T, js jetstream.JetStream, stream string, bytes int64) jetstream.Stream {
	t.Helper()
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	cfg.MaxBytes = bytes
	if s, err = js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	return s
}

// remembered waits until a keeper has written down that a lane is owed so many messages.
func (p *pipeline) remembered(t *testing.T, stream string, owed uint64) {
	t.Helper()
	js := p.hub.jetStream(t)
	eventually(t, time.Minute, "the keeper remembers", func() error {
		kv, err := js.KeyValue(t.Context(), "KEEPER")
		if err != nil {
			return err
		}
		e, err := kv.Get(t.Context(), stream)
		if err != nil {
			return err
		}
		var m struct{ Lanes map[string]bus.Floor }
		if err := json.Unmarshal(e.Value(), &m); err != nil {
			return err
		}
		sum := uint64(0)
		for _, f := range m.Lanes {
			sum += f.Lag
		}
		if sum != owed {
			return fmt.Errorf("%s", e.Value())
		}
		return nil
	})
}

// audit runs penstock audit -o json.
func (p *pipeline) audit(t *testing.T, args ...string) (code int, report audit.Report) {
	t.Helper()
	cmd := run(t, []string{"HUB_URL=" + p.hub.url}, "penstock", append([]string{"audit", "-o", "json"}, args...)...)
	code = cmd.exit(t, time.Minute)
	if err := json.Unmarshal([]byte(cmd.out.String()), &report); err != nil {
		t.Fatalf("%v:\n%s", err, cmd.out.String())
	}
	return code, report
}

// TestAuditTellsWhatIsMissing: what is on its way, by instance and in items; then, of what an operator
// purges, what is lost, and nothing when all has arrived.
func TestAuditTellsWhatIsMissing(t *testing.T) {
	t.Parallel()
	p, e, lok := logsPipeline(t, nil)
	for n := range 3 {
		if err := post(t.Context(), e.http, otlpwire.Traces, numbered(otlpwire.Traces, n)); err != nil {
			t.Fatal(err)
		}
	}
	send(t, e, 0, 5)
	forwarded(t, e)
	eventually(t, time.Minute, "five records are in flight and the traces are not", func() error {
		code, r := p.audit(t)
		if code != 0 || len(r.InFlight) != 1 || r.InFlight[0].Instance != "as-1" || r.InFlight[0].Signal != "logs" || r.InFlight[0].Backend != "loki" || r.InFlight[0].Items != 5 {
			return fmt.Errorf("exit code %d, %+v", code, r)
		}
		return nil
	})
	eventually(t, 20*time.Second, "what has become of all is known", func() error {
		_, r := p.audit(t)
		return errors.Join(accounted(r, "logs", "loki", 5, 5, 0, map[tally.Outcome]uint64{}), accounted(r, "traces", "file", 3, 0, 0, map[tally.Outcome]uint64{tally.Delivered: 3}))
	})
	p.remembered(t, "LOGS", 5)
	logs, err := p.hub.jetStream(t).Stream(t.Context(), "LOGS")
	if err != nil {
		t.Fatal(err)
	}
	if err := logs.Purge(t.Context(), jetstream.WithPurgeSequence(4)); err != nil { // 4 and 5 stay
		t.Fatal(err)
	}
	eventually(t, time.Minute, "three messages are lost", func() error {
		code, r := p.audit(t)
		if code != 1 || len(r.Losses) != 1 || r.Losses[0].Stream != "LOGS" || r.Losses[0].Messages != 3 {
			return fmt.Errorf("exit code %d, %+v", code, r)
		}
		return nil
	})
	lok.Fail(0)
	complete(t, map[string][]int{"as-1 logs": {3, 4}}, func() map[string][]int { return lines(t, lok) })
	eventually(t, time.Minute, "nothing is in flight, and the loss is of another time", func() error {
		if code, r := p.audit(t, "-since", "1s"); code != 0 || len(r.InFlight) > 0 || len(r.Losses) > 0 {
			return fmt.Errorf("exit code %d, %+v", code, r)
		}
		return nil
	})
	eventually(t, 20*time.Second, "what stayed, or was in the sink's memory, is delivered", func() error {
		_, r := p.audit(t)
		n := int64(len(lines(t, lok)["as-1 logs"])) // the others are missing by their numbers
		return accounted(r, "logs", "loki", n, 0, uint64(5-n), map[tally.Outcome]uint64{tally.Delivered: uint64(n)})
	})
	if text := run(t, []string{"HUB_URL=" + p.hub.url}, "penstock", "audit"); text.exit(t, time.Minute) != 1 || !strings.Contains(text.out.String(), "other than a keeper") {
		t.Errorf("the text:\n%s", text.out.String())
	}
}

// accounted wants the line of an account to be so.
func accounted(r audit.Report, signal, backend string, acked, inFlight int64, missing uint64, ended map[tally.Outcome]uint64) error {
	for _, l := range r.Ledger {
		if l.Instance != "as-1" || l.Signal != signal || l.Backend != backend {
			continue
		}
		if l.Acked != acked || l.InFlight != inFlight || l.Difference != 0 || l.Missing != missing || !maps.Equal(l.Ended, ended) {
			return fmt.Errorf("%+v", l)
		}
		return nil
	}
	return fmt.Errorf("no line of %s for %s in %+v", signal, backend, r.Ledger)
}

// TestAnOperatorLowersABound: what is owed and above the new bound stays, the hub refuses, and there is
// room when it has been delivered.
func TestAnOperatorLowersABound(t *testing.T) {
	t.Parallel()
	p, e, lok := logsPipeline(t, nil)
	acked := send(t, e, 0, 60) // 3 MB
	forwarded(t, e)
	logs := lower(t, p.hub.jetStream(t), "LOGS", 2<<20)
	if info, err := logs.Info(t.Context()); err != nil || info.State.FirstSeq != 1 || info.State.Msgs != 60 {
		t.Fatalf("behind a lower bound: %+v, %v", info.State, err)
	}
	acked = append(acked, send(t, e, 60, 70)...)
	eventually(t, time.Minute, "the hub refuses, and the edge says so", func() error {
		if !p.text.Says("edge=as-1", "stream is full") {
			return errors.New("nothing is said")
		}
		return nil
	})
	if f := count(t, otlpwire.Logs, "penstock_forwarded_items_total", e.role); f != 60 {
		t.Errorf("the hub has taken %d", f)
	}
	lok.Fail(0)
	complete(t, map[string][]int{"as-1 logs": acked}, func() map[string][]int { return lines(t, lok) })
	if code, r := p.audit(t); code != 0 {
		t.Errorf("losses: %+v", r.Losses)
	}
}

// TestABackupOfTheHub is restored while a backend is away: the edge sees that the hub has lost
// what it had, and sends again what it holds of it; the keeper counts what the lanes were owed.
func TestABackupOfTheHub(t *testing.T) {
	t.Parallel()
	p, e, lok := logsPipeline(t, nil)
	acked := send(t, e, 0, 5)
	forwarded(t, e)
	p.remembered(t, "LOGS", 5)
	backup := t.TempDir()
	p.hub.stop()
	if err := os.CopyFS(backup, os.DirFS(p.hub.cfg.Dir)); err != nil {
		t.Fatal(err)
	}
	p.hub.start(t)
	acked = append(acked, send(t, e, 5, 12)...)
	forwarded(t, e)
	p.remembered(t, "LOGS", 12)
	p.hub.stop()
	if err := os.RemoveAll(p.hub.cfg.Dir); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(p.hub.cfg.Dir, os.DirFS(backup)); err != nil {
		t.Fatal(err)
	}
	p.hub.start(t)
	acked = append(acked, send(t, e, 12, 14)...)
	lok.Fail(0)
	complete(t, map[string][]int{"as-1 logs": acked}, func() map[string][]int { return lines(t, lok) })
	if !p.text.Says("edge=as-1", "resending retained messages") {
		t.Error("nobody says that the hub has lost something")
	}
}

// TestTheHubsDiskIsFull: nothing that was acknowledged is missing when there is room again and the hub was
// started anew; nats-server stores nothing more until then.
func TestTheHubsDiskIsFull(t *testing.T) {
	t.Parallel()
	disk, err := daemon.NewDisk(filepath.Join(t.TempDir(), "disk"), "64m")
	if err != nil {
		if os.Getenv("CI") != "" && os.Getuid() == 0 {
			t.Fatal(err)
		}
		t.Skipf("no disk of its own for the hub: %v", err)
	}
	t.Cleanup(disk.Close)
	p, e, lok := logsPipeline(t, func(h *hub) { h.cfg.Dir = filepath.Join(disk.Dir, "hub") })
	acked := send(t, e, 0, 20)
	forwarded(t, e)
	free, err := disk.Fill()
	if err != nil {
		t.Fatal(err)
	}
	acked = append(acked, send(t, e, 20, 120)...)
	eventually(t, time.Minute, "the edge shows that the hub takes nothing", func() error {
		if f := count(t, otlpwire.Logs, "penstock_forwarded_items_total", e.role); f == 120 {
			t.Fatal("a full disk takes everything")
		}
		if !p.text.Says("msg=stalled", "edge=as-1", "component=forward") {
			return errors.New("nothing is said")
		}
		return nil
	})
	if err := free(); err != nil {
		t.Fatal(err)
	}
	p.hub.stop()
	p.hub.start(t)
	lok.Fail(0)
	acked = append(acked, send(t, e, 120, 125)...)
	complete(t, map[string][]int{"as-1 logs": acked}, func() map[string][]int { return lines(t, lok) })
}
