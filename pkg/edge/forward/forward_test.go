package forward

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/edge/edgetest"
	"github.com/penstock/penstock/pkg/edge/spool"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

var silent = slog.New(slog.DiscardHandler)

// TestForwardKeepsOrderAcrossHubRestarts forwards while the hub is stopped and
// started; the stream holds every message once, in order.
func TestForwardKeepsOrderAcrossHubRestarts(t *testing.T) {
	hubCfg := broker.Config{Name: "hub", Dir: t.TempDir(), Listen: "127.0.0.1:0", Sync: true, MaxPayload: 8 << 20}
	hub, err := broker.Start(hubCfg, silent)
	if err != nil {
		t.Fatal(err)
	}
	hubCfg.Listen = strings.TrimPrefix(hub.URL(), "nats://")
	top := bus.DefaultTopology()
	top.Partitions, top.MaxBytes = 1, 256<<20
	conn, err := bus.OpenHub(t.Context(), bus.Config{Name: "test", URL: hub.URL()}, top, silent)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	cfg := newConfig(t)
	cfg.Forward.Hub = bus.Config{URL: "nats://" + hubCfg.Listen, Name: "edge-as-1"}
	s, led, _ := runSpool(t, cfg.Spool)
	fw, err := New(cfg.Forward, s, led, silent)
	if err != nil {
		t.Fatal(err)
	}
	fwd := fw.Service()
	if err := services.StartAndAwaitRunning(t.Context(), fwd); err != nil {
		t.Fatal(err)
	}
	const n = 300
	for i := range n {
		if i%100 == 50 {
			hub.Stop()
		}
		if i%100 == 80 {
			if hub, err = broker.Start(hubCfg, silent); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Accept(t.Context(), edgetest.Log(t, i, 10)); err != nil {
			t.Fatal(err)
		}
	}
	defer func() { hub.Stop() }()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if !backoff.Until(ctx, func() bool { return s.Empty(otlpwire.Logs) && conn.Connected() }) {
		t.Error("the hub is back, but the spool is not empty")
	}
	if err := services.StopAndAwaitTerminated(context.Background(), fwd); err != nil {
		t.Fatal(err)
	}
	if got := testutil.ToFloat64(led.Of(otlpwire.Logs).Forwarded); got != n {
		t.Errorf("forwarded counter %v, want %d", got, n)
	}
	lane, err := conn.OpenLane(t.Context(), bus.LaneConfig{Stream: "LOGS", Name: "check"})
	if err != nil {
		t.Fatal(err)
	}
	defer lane.Close()
	for i := 0; i < n; {
		d, err := lane.Next(ctx)
		if err != nil {
			t.Fatalf("item %d: %v", i, err)
		}
		if d.Claimed {
			i = 0
		}
		if d.Seq == 0 {
			continue
		}
		for item := range otlpwire.Items(d.Body) {
			if !strings.Contains(string(item), fmt.Sprintf("n=%d ", i)) {
				t.Fatalf("item %d: got %q", i, item)
			}
			i++
		}
		if d.Pending == 0 && i < n {
			t.Fatalf("the stream ends after %d of %d items", i, n)
		}
	}
}

// testHub is a hub whose data can be lost.
type testHub struct {
	t      *testing.T
	cfg    broker.Config
	broker *broker.Broker
}

func newHub(t *testing.T) *testHub {
	h := &testHub{t: t, cfg: broker.Config{Name: "hub", Dir: t.TempDir(), Listen: "127.0.0.1:0", MaxPayload: 8 << 20}}
	h.start(h.cfg.Dir)
	h.cfg.Listen = strings.TrimPrefix(h.broker.URL(), "nats://")
	t.Cleanup(func() { h.broker.Stop() })
	return h
}

func (h *testHub) start(dir string) {
	h.t.Helper()
	var err error
	h.cfg.Dir = dir
	if h.broker, err = broker.Start(h.cfg, silent); err != nil {
		h.t.Fatal(err)
	}
	h.conn().Close()
}

// conn connects as an operator, and creates the streams.
func (h *testHub) conn() *bus.Conn {
	h.t.Helper()
	top := bus.DefaultTopology()
	top.Partitions, top.MaxBytes = 1, 256<<20
	conn, err := bus.OpenHub(h.t.Context(), bus.Config{Name: "test", URL: h.broker.URL()}, top, silent)
	if err != nil {
		h.t.Fatal(err)
	}
	return conn
}

// others lets another instance store n messages.
func (h *testHub) others(n int) {
	h.t.Helper()
	conn := h.conn()
	defer conn.Close()
	for i := range n {
		_, err := conn.Publish(h.t.Context(), bus.Message{Subject: bus.Subject(otlpwire.Logs, "as-2"), Header: envelope.Header{
			ContentType: envelope.ContentTypeOTLP, Arrival: 1, ID: fmt.Sprint("other-", i),
		}})
		if err != nil {
			h.t.Fatal(err)
		}
	}
}

// logs returns the numbers of the log records that the hub holds, in order.
func (h *testHub) logs() (all []int) {
	h.t.Helper()
	conn := h.conn()
	defer conn.Close()
	state, err := conn.State(h.t.Context(), "LOGS")
	if err != nil || state.Messages == 0 {
		return nil
	}
	r, err := conn.OpenReader(h.t.Context(), "LOGS", 1)
	if err != nil {
		h.t.Fatal(err)
	}
	defer r.Close()
	for {
		d, err := r.Next(h.t.Context())
		if err != nil {
			h.t.Fatal(err)
		}
		body, err := envelope.Decompress(nil, d.Body, d.Header.Encoding)
		if err != nil {
			h.t.Fatal(err)
		}
		for item := range otlpwire.Items(body) {
			all = append(all, edgetest.Number(item))
		}
		if d.Pending == 0 {
			return all
		}
	}
}

// setting is that of a spool and of what forwards from it.
type setting struct {
	Spool   spool.Config
	Forward Config
}

func newConfig(t testing.TB) (c setting) {
	t.Helper()
	c.Spool = spool.DefaultConfig()
	c.Spool.Dir, c.Spool.MaxBytes, c.Spool.Reserve = filepath.Join(t.TempDir(), "spool"), 24<<20, 0
	c.Forward.Instance, c.Forward.Drain = "as-1", 10*time.Second
	return c
}

// runSpool returns a spool that runs, and what it counts.
func runSpool(t testing.TB, cfg spool.Config) (*spool.Spool, *ledger.Ledger, func()) {
	t.Helper()
	led := ledger.New(prometheus.NewRegistry())
	s := spool.New(cfg, led, silent)
	svc := s.Service()
	if err := services.StartAndAwaitRunning(t.Context(), svc); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	stop := func() { once.Do(func() { _ = services.StopAndAwaitTerminated(context.Background(), svc) }) }
	t.Cleanup(stop)
	return s, led, stop
}

// current is the store that the spool has open.
func current(t testing.TB, s *spool.Spool) *spool.Store {
	t.Helper()
	st, err := s.Await(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// startForward forwards from s; it ends with the test or with the function returned.
func startForward(t *testing.T, cfg Config, s *spool.Spool, led *ledger.Ledger) (stop func()) {
	t.Helper()
	fw, err := New(cfg, s, led, silent)
	if err != nil {
		t.Fatal(err)
	}
	svc := fw.Service()
	if err := services.StartAndAwaitRunning(t.Context(), svc); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	stop = func() { once.Do(func() { _ = services.StopAndAwaitTerminated(context.Background(), svc) }) }
	t.Cleanup(stop)
	return stop
}

func accept(t *testing.T, s *spool.Spool, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := s.Accept(t.Context(), edgetest.Log(t, i, 10)); err != nil {
			t.Fatal(err)
		}
	}
}

func drained(t *testing.T, s *spool.Spool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if !backoff.Until(ctx, func() bool { return s.Empty(otlpwire.Logs) }) {
		t.Fatal("the hub is there, but the spool is not empty")
	}
}

// want is the numbers from 0 to n.
func want(n int) (all []int) {
	for i := range n {
		all = append(all, i)
	}
	return all
}

// TestHubThatLostDataGetsItAgain loses the hub's data in every way that it shows.
func TestHubThatLostDataGetsItAgain(t *testing.T) {
	for name, tc := range map[string]struct {
		lose   func(t *testing.T, backup string) (dir string)
		others int // messages that another instance has stored since
	}{
		"made anew":                         {func(t *testing.T, _ string) string { return t.TempDir() }, 0},
		"restored from backup":              {func(_ *testing.T, backup string) string { return backup }, 0},
		"made anew, others were faster":     {func(t *testing.T, _ string) string { return t.TempDir() }, 100},
		"restored, and others were faster,": {func(_ *testing.T, backup string) string { return backup }, 100},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHub(t)
			cfg := newConfig(t)
			cfg.Forward.Hub = bus.Config{URL: "nats://" + h.cfg.Listen, Name: "edge-as-1"}
			s, led, _ := runSpool(t, cfg.Spool)
			startForward(t, cfg.Forward, s, led)
			accept(t, s, 0, 20)
			drained(t, s)
			// A backup of now.
			h.broker.Stop()
			backup := t.TempDir()
			if err := os.CopyFS(backup, os.DirFS(h.cfg.Dir)); err != nil {
				t.Fatal(err)
			}
			h.start(h.cfg.Dir)
			accept(t, s, 20, 50)
			drained(t, s)
			h.broker.Stop()
			h.start(tc.lose(t, backup))
			h.others(tc.others)
			// One more message shows it.
			accept(t, s, 50, 51)
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			found := func() []int { got := h.logs(); slices.Sort(got); return slices.Compact(got) }
			if !backoff.Until(ctx, func() bool { return len(found()) == 51 }) {
				t.Fatalf("the hub holds %v of 0 to 50", found())
			}
			if n := testutil.ToFloat64(led.HubAlarms); n != 1 {
				t.Errorf("%v alarms, want 1", n)
			}
			// Forwarding continues in order, and a restart of the edge sends nothing again.
			drained(t, s)
			before := len(h.logs())
			accept(t, s, 51, 60)
			drained(t, s)
			if got := h.logs(); len(got) != before+9 || !slices.IsSorted(got[before:]) {
				t.Errorf("afterwards: %v", got[before:])
			}
		})
	}
}

// TestRestartSendsNothingAgain: the position of what the hub has survives a stop.
func TestRestartSendsNothingAgain(t *testing.T) {
	h := newHub(t)
	cfg := newConfig(t)
	cfg.Forward.Hub = bus.Config{URL: "nats://" + h.cfg.Listen, Name: "edge-as-1"}
	for round := range 3 {
		s, led, stop := runSpool(t, cfg.Spool)
		stopForward := startForward(t, cfg.Forward, s, led)
		accept(t, s, round*10, round*10+10)
		drained(t, s)
		stopForward()
		stop()
		if got := testutil.ToFloat64(led.Of(otlpwire.Logs).Forwarded); got != 10 {
			t.Errorf("round %d: %v forwarded, want 10", round, got)
		}
	}
	if got := h.logs(); !slices.Equal(got, want(30)) {
		t.Errorf("the hub holds %v", got)
	}
}

// TestKnownIDsAreAnAlarm: the hub reports a duplicate of a message that was never sent, as
// when a copy of the spool's directory is in use.
func TestKnownIDsAreAnAlarm(t *testing.T) {
	h := newHub(t)
	cfg := newConfig(t)
	cfg.Forward.Hub = bus.Config{URL: "nats://" + h.cfg.Listen, Name: "edge-as-1"}
	s, led, _ := runSpool(t, cfg.Spool)
	conn := h.conn()
	defer conn.Close()
	nonce := current(t, s).Nonce()
	for seq := 3; seq < 6; seq++ {
		b := edgetest.Log(t, 100+seq, 10)
		_, err := conn.Publish(t.Context(), bus.Message{Subject: bus.Subject(otlpwire.Logs, "as-1"), Body: b.Payload, Header: envelope.Header{
			ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: 1, ID: fmt.Sprintf("%s-%d", nonce, seq),
		}})
		if err != nil {
			t.Fatal(err)
		}
	}
	startForward(t, cfg.Forward, s, led)
	accept(t, s, 0, 10)
	drained(t, s)
	got := h.logs()
	slices.Sort(got)
	if got = slices.Compact(got); !slices.Equal(got[:10], want(10)) {
		t.Errorf("the hub holds %v, want all of 0 to 9", got)
	}
	if n := testutil.ToFloat64(led.HubAlarms); n != 1 || current(t, s).Nonce() == nonce {
		t.Errorf("%v alarms, want 1 and a new nonce", n)
	}
}

// TestDroppedIsNotForwarded drops messages while the hub is unavailable.
func TestDroppedIsNotForwarded(t *testing.T) {
	h := newHub(t)
	cfg := newConfig(t)
	cfg.Forward.Hub = bus.Config{URL: "nats://" + h.cfg.Listen, Name: "edge-as-1"}
	cfg.Spool.OnFull = spool.DropOldest
	s, led, _ := runSpool(t, cfg.Spool)
	for i := range 20 {
		if err := s.Accept(t.Context(), edgetest.Log(t, i, 900<<10)); err != nil {
			t.Fatal(err)
		}
	}
	startForward(t, cfg.Forward, s, led)
	drained(t, s)
	dropped := int(testutil.ToFloat64(led.Of(otlpwire.Logs).Dropped(ledger.DroppedFull)))
	if got := h.logs(); dropped == 0 || !slices.Equal(got, want(20)[dropped:]) {
		t.Errorf("%d dropped, the hub holds %v", dropped, got)
	}
}

// lateWay reports what the centre has after its store should have been closed.
type lateWay struct {
	spool   *spool.Spool
	entered chan struct{}
	once    sync.Once
}

func (w *lateWay) session(ctx context.Context, st *spool.Store, _ otlpwire.Signal, done func(arrived)) error {
	w.once.Do(func() { close(w.entered) })
	<-ctx.Done()
	late, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	another := func() bool { now, err := w.spool.Await(late); return err == nil && now != st }
	backoff.Until(late, another)
	done(arrived{seq: 500})
	return ctx.Err()
}

func (*lateWay) connected() bool { return false }
func (*lateWay) close()          {}
func (*lateWay) ready() error    { return nil }

// TestLateAcksDoNotMoveANewStore: a session of a store that was closed reports sequences
// of that store; in the next one they belong to other messages.
func TestLateAcksDoNotMoveANewStore(t *testing.T) {
	cfg := newConfig(t)
	s, led, _ := runSpool(t, cfg.Spool)
	accept(t, s, 0, 5)
	w := &lateWay{spool: s, entered: make(chan struct{})}
	fw := &Forward{cfg: cfg.Forward, spool: s, led: led, log: silent, way: w}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { fw.run(ctx, otlpwire.Logs) })
	<-w.entered
	first := current(t, s)
	if err := os.RemoveAll(cfg.Spool.Dir); err != nil {
		t.Fatal(err)
	}
	patience, stop := context.WithTimeout(ctx, 30*time.Second)
	defer stop()
	if !backoff.Until(patience, func() bool { return current(t, s) != first }) {
		t.Fatal("the store was not opened anew")
	}
	accept(t, s, 0, 3)
	r := current(t, s).Read(otlpwire.Logs, 0)
	defer r.Close()
	done := s.Position(spool.Hub, otlpwire.Logs).Done
	for n := range uint64(3) {
		m, err := r.Next(patience)
		if err != nil || done >= m.Seq || m.Behind != 2-n {
			t.Errorf("the hub is said to have messages up to %d of a store that holds 3 new ones: %d, with %d after it, %v", done, m.Seq, m.Behind, err)
		}
	}
	cancel()
	wg.Wait()
}

// TestFullDiskIsForwarded: a spool that was opened on a full disk takes nothing, and what it holds is
// forwarded.
func TestFullDiskIsForwarded(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: mounting a tmpfs needs root")
	}
	cfg := newConfig(t)
	disk := t.TempDir()
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=24m"); err != nil {
		t.Skipf("SKIPPED: mounting a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(disk, syscall.MNT_DETACH) })
	cfg.Spool.Dir = filepath.Join(disk, "spool")
	s, _, stop := runSpool(t, cfg.Spool)
	accept(t, s, 0, 4)
	stop()
	f, err := os.Create(filepath.Join(disk, "stranger"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for buf := make([]byte, 64<<10); err == nil; _, err = f.Write(buf) {
	}
	h := newHub(t)
	cfg.Forward.Hub = bus.Config{URL: "nats://" + h.cfg.Listen, Name: "edge-as-1"}
	s, led, _ := runSpool(t, cfg.Spool)
	if err := s.Accept(t.Context(), edgetest.Log(t, 4, 100<<10)); err == nil {
		t.Error("taken, though the disk is full")
	}
	startForward(t, cfg.Forward, s, led)
	drained(t, s)
	if got := slices.Compact(h.logs()); !slices.Equal(got, want(4)) {
		t.Errorf("the hub holds %v", got)
	}
}

// TestDropReachesWhatIsRead drops messages that the forwarder has read already and not
// sent: they are not sent, because they count as lost.
func TestDropReachesWhatIsRead(t *testing.T) {
	h := newHub(t)
	cfg := newConfig(t)
	s, led, _ := runSpool(t, cfg.Spool)
	accept(t, s, 0, 20)
	st := current(t, s)
	r := st.Read(otlpwire.Logs, 0)
	defer r.Close()
	s.Advance(spool.Hub, otlpwire.Logs, 15, 0) // dropped meanwhile
	conn, err := bus.Dial(bus.Config{URL: "nats://" + h.cfg.Listen, Name: "edge-as-1"}, silent)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	w := &hubWay{instance: "as-1", spool: s, led: led, log: silent}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	flights, first := make(chan flight, window), make(chan struct{})
	close(first)
	var wg sync.WaitGroup
	wg.Go(func() { _ = w.publish(ctx, conn, st, r, otlpwire.Logs, flights, make(chan struct{}), first) })
	for range 5 {
		if f := <-flights; f.seq <= 15 {
			t.Errorf("message %d was sent", f.seq)
		}
	}
	cancel()
	wg.Wait()
}

// TestASlowHubGetsASmallerWindow: after answers that did not come in time the window is
// halved, and it grows by one with every answer.
func TestASlowHubGetsASmallerWindow(t *testing.T) {
	h := newHub(t)
	cfg := newConfig(t)
	s, led, _ := runSpool(t, cfg.Spool)
	for range 12 {
		accept(t, s, 0, 1) // a message each
	}
	w := &hubWay{instance: "as-1", spool: s, led: led, log: silent, dialer: dialer{cfg: bus.Config{URL: "nats://" + h.cfg.Listen, Name: "edge-as-1"}, log: silent}}
	defer w.close()
	w.narrowed[otlpwire.Logs].Store(window - 3)
	conn, err := w.dialer.dial()
	if err != nil {
		t.Fatal(err)
	}
	st := current(t, s)
	r := st.Read(otlpwire.Logs, 0)
	defer r.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	flights, acked, first := make(chan flight, window), make(chan struct{}, window), make(chan struct{})
	close(first)
	var wg sync.WaitGroup
	wg.Go(func() { _ = w.publish(ctx, conn, st, r, otlpwire.Logs, flights, acked, first) })
	sent := func(n int) {
		t.Helper()
		if !backoff.Until(ctx, func() bool { return len(flights) >= n }) || len(flights) != n {
			t.Fatalf("%d are on their way, want %d", len(flights), n)
		}
	}
	sent(3)
	acked <- struct{}{}
	sent(4)
	w.narrowed[otlpwire.Logs].Store(window - 5)
	acked <- struct{}{}
	sent(4 + 3)
	cancel()
	wg.Wait()

	// A whole session opens the window again, up to what there is.
	w.narrowed[otlpwire.Logs].Store(window - 1)
	session, stop := context.WithCancel(t.Context())
	var items atomic.Int64
	wg.Go(func() { _ = w.session(session, st, otlpwire.Logs, func(a arrived) { items.Add(int64(a.items)) }) })
	if !backoff.Until(t.Context(), func() bool { return items.Load() == 12 }) {
		t.Fatal("not all arrive")
	}
	if n := window - w.narrowed[otlpwire.Logs].Load(); n != 13 {
		t.Errorf("the window is %d after 12 answers, want 13", n)
	}
	stop()
	wg.Wait()
}

// TestTwoPublishersOfASubject: the gateway, or another edge, publishes for the same
// instance. That does not count as an alarm.
func TestTwoPublishersOfASubject(t *testing.T) {
	h := newHub(t)
	cfg := newConfig(t)
	cfg.Forward.Hub = bus.Config{URL: "nats://" + h.cfg.Listen, Name: "edge-as-1"}
	s, led, _ := runSpool(t, cfg.Spool)
	conn := h.conn()
	defer conn.Close()
	for round := range 4 {
		stop := startForward(t, cfg.Forward, s, led)
		accept(t, s, round*10, round*10+10)
		drained(t, s)
		stop()
		b := edgetest.Log(t, 1000+round, 10)
		if _, err := conn.Publish(t.Context(), bus.Message{Subject: bus.Subject(otlpwire.Logs, "as-1"), Body: b.Payload, Header: envelope.Header{
			ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: 1, ID: fmt.Sprint("gateway-", round),
		}}); err != nil {
			t.Fatal(err)
		}
	}
	if n := testutil.ToFloat64(led.HubAlarms); n != 0 {
		t.Errorf("%v alarms", n)
	}
	mine := slices.DeleteFunc(h.logs(), func(n int) bool { return n >= 1000 })
	if !slices.Equal(mine, want(40)) {
		t.Errorf("the hub holds %v", mine)
	}
}
