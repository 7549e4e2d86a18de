package spool

import (
	"context"
	"encoding/json"
	"errors"
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
	"github.com/penstock/penstock/pkg/edge/edgetest"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/receive"
)

// numbers reads what a spool holds of logs: the numbers of the records, in order.
func numbers(t *testing.T, s *Spool) (all []int) {
	t.Helper()
	st := s.current.Load()
	if st.logs[otlpwire.Logs].State().Records() == 0 {
		return nil
	}
	r := st.Read(otlpwire.Logs, 0)
	defer r.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		d, err := r.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		body, err := envelope.Decompress(nil, d.Body, d.Header.Encoding)
		if err != nil {
			t.Fatal(err)
		}
		for item := range otlpwire.Items(body) {
			all = append(all, edgetest.Number(item))
		}
		if d.Behind == 0 {
			return all
		}
	}
}

// TestASpoolOfAnEarlierVersion: it is not ignored, because its messages have not been forwarded.
func TestASpoolOfAnEarlierVersion(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	if err := os.MkdirAll(filepath.Join(cfg.Dir, "jetstream"), 0o700); err != nil {
		t.Fatal(err)
	}
	s := New(cfg, ledger.New(prometheus.NewRegistry()), quiet)
	if err := services.StartAndAwaitRunning(t.Context(), s.Service()); err == nil || !strings.Contains(err.Error(), "penstock_spool_bytes") {
		t.Errorf("got %v", err)
	}
}

// TestCopiedDirectoryHasOtherIDs: two edges on copies of one spool must not look like
// one to the hub.
func TestCopiedDirectoryHasOtherIDs(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	s, stop := startSpool(t, cfg)
	if err := s.Accept(t.Context(), edgetest.Log(t, 0, 10)); err != nil {
		t.Fatal(err)
	}
	mine := s.current.Load().Nonce()
	stop()
	clone := cfg
	clone.Dir = filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(clone.Dir, os.DirFS(cfg.Dir)); err != nil {
		t.Fatal(err)
	}
	c, _ := startSpool(t, clone)
	if c.current.Load().Nonce() == mine {
		t.Error("the copy uses the ids of the original")
	}
	if got := numbers(t, c); len(got) != 1 {
		t.Errorf("the copy holds %v", got)
	}
	s, stop = startSpool(t, cfg)
	if s.current.Load().Nonce() != mine {
		t.Error("the original has other ids after a restart: what it sends again is not known by id")
	}
	stop()
	// As after a power cut.
	path := filepath.Join(cfg.Dir, "epoch")
	text, err := os.ReadFile(path)
	var e epoch
	if err == nil {
		err = json.Unmarshal(text, &e)
	}
	e.Boot = "another"
	if text, _ = json.Marshal(e); err == nil {
		err = os.WriteFile(path, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	s, _ = startSpool(t, cfg)
	if s.current.Load().Nonce() == mine {
		t.Error("after a boot a sequence may be given twice: the ids must change")
	}
}

// TestWriteErrorsOpenTheStoreAnew reports a write error as commit does.
func TestWriteErrorsOpenTheStoreAnew(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	s, _ := startSpool(t, cfg)
	if err := s.Accept(t.Context(), edgetest.Log(t, 0, 10)); err != nil {
		t.Fatal(err)
	}
	first := s.current.Load()
	path := filepath.Join(cfg.Dir, "logs", "00000000000000000001.seg")
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	s.report(first, errors.New("input/output error"))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if !backoff.Until(ctx, func() bool { st := s.current.Load(); return st != nil && st != first }) {
		t.Fatal("the store was not opened anew")
	}
	if !backoff.Until(ctx, func() bool { return s.Accept(ctx, edgetest.Log(t, 1, 10)) == nil }) {
		t.Fatal("nothing is taken after the store was opened anew")
	}
	if s.current.Load().Nonce() != first.Nonce() {
		t.Error("what was refused was never sent: nobody has its sequence, and the ids may stay")
	}
	if after, err := os.Stat(path); err != nil || os.SameFile(before, after) {
		t.Errorf("the file is the one that was not written: %v", err)
	}
	if got := numbers(t, s); !slices.Equal(got, []int{0, 1}) {
		t.Errorf("got %v", got)
	}
}

// TestARefusingStoreIsReopened: also if the error was not reported.
func TestARefusingStoreIsReopened(t *testing.T) {
	s, _ := startSpool(t, testConfig(t, t.TempDir()))
	accept(t, s, 0, 1)
	if err := s.current.Load().logs[otlpwire.Logs].Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if !backoff.Until(ctx, func() bool { return s.Accept(ctx, edgetest.Log(t, 1, 10)) == nil }) {
		t.Fatal("it refuses for ever")
	}
}

// TestWhatIsNotMarkedIsDeletedLater: as long as positions cannot be written, nothing that the
// hub has is deleted; after that it is.
func TestWhatIsNotMarkedIsDeletedLater(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	cfg.Retain = 0
	s, _ := startSpool(t, cfg)
	accept(t, s, 0, 3)
	st := s.current.Load()
	obstacle := filepath.Join(cfg.Dir, "marks.tmp")
	if err := os.Mkdir(obstacle, 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { s.Purge(ctx, st, otlpwire.Logs) })
	s.Forwarded(otlpwire.Logs, 2, 2, 100)
	patience, stop := context.WithTimeout(t.Context(), 20*time.Second)
	defer stop()
	held := &s.held[otlpwire.Logs]
	if !backoff.Until(patience, func() bool { held.Lock(); defer held.Unlock(); return len(held.points) == 0 }) {
		t.Fatal("nothing was to be deleted")
	}
	if first := st.logs[otlpwire.Logs].State().First; first != 1 {
		t.Errorf("deleted up to %d, and it is not marked", first-1)
	}
	if err := os.Remove(obstacle); err != nil {
		t.Fatal(err)
	}
	if !backoff.Until(patience, func() bool { return st.logs[otlpwire.Logs].State().First == 3 }) {
		t.Error("what the hub has is never deleted")
	}
	cancel()
	wg.Wait()
}

// TestRemovedDirectoryIsNoticed: what is written to files that cannot be opened again is lost.
func TestRemovedDirectoryIsNoticed(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	s, _ := startSpool(t, cfg)
	if err := s.Accept(t.Context(), edgetest.Log(t, 0, 10)); err != nil {
		t.Fatal(err)
	}
	s.watch()
	first := s.current.Load()
	if err := os.RemoveAll(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	s.watch()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if !backoff.Until(ctx, func() bool { st := s.current.Load(); return st != nil && st != first }) {
		t.Fatal("nobody noticed")
	}
	if n := testutil.ToFloat64(s.led.SpoolLost(otlpwire.Logs)); n != 1 {
		t.Errorf("%v messages reported as lost, want 1", n)
	}
}

// TestDropOldest drops the oldest, counts them and accepts the newest.
func TestDropOldest(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	cfg.OnFull = DropOldest
	s, _ := startSpool(t, cfg)
	const n = 20
	for i := range n {
		if err := s.Accept(t.Context(), edgetest.Log(t, i, 900<<10)); err != nil {
			t.Fatalf("batch %d: %v", i, err)
		}
	}
	got := numbers(t, s)
	dropped := int(testutil.ToFloat64(s.led.Of(otlpwire.Logs).Dropped(ledger.DroppedFull)))
	if len(got)+dropped != n || dropped == 0 || got[len(got)-1] != n-1 || !slices.IsSorted(got) {
		t.Errorf("holds %v, %d dropped of %d", got, dropped, n)
	}
}

// TestLowerBoundKeepsWhatIsThere: a max_bytes below what the spool holds deletes nothing.
func TestLowerBoundKeepsWhatIsThere(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	cfg.MaxBytes = 48 << 20
	s, stop := startSpool(t, cfg)
	for i := range 12 {
		if err := s.Accept(t.Context(), edgetest.Log(t, i, 900<<10)); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	cfg.MaxBytes = 14 << 20
	s, _ = startSpool(t, cfg)
	if got := numbers(t, s); len(got) != 12 {
		t.Errorf("the spool holds %v of 12", got)
	}
	if err := s.Accept(t.Context(), edgetest.Log(t, 12, 10)); !errors.Is(err, receive.ErrFull) {
		t.Errorf("got %v, want %v", err, receive.ErrFull)
	}
}

// TestHeldBackGoesFirst: what the hub has is deleted before any request is refused.
func TestHeldBackGoesFirst(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	s, _ := startSpool(t, cfg)
	for i := range 40 {
		if err := s.Accept(t.Context(), edgetest.Log(t, i, 900<<10)); err != nil {
			t.Fatalf("batch %d: %v", i, err)
		}
		s.positions.advance(Hub, otlpwire.Logs, uint64(i+1), 0) // the hub has it
	}
	s.watch()
	if owed, held := testutil.ToFloat64(s.led.SpoolBytes), testutil.ToFloat64(s.led.SpoolHeld); owed != 0 || held == 0 {
		t.Errorf("%v bytes owed, %v held; want none owed, some held", owed, held)
	}
}

// TestOnItsWay: of messages that the hub has nothing counts as owed, while another is on its way.
func TestOnItsWay(t *testing.T) {
	s, _ := startSpool(t, testConfig(t, t.TempDir()))
	for i := range 5 {
		if err := s.Accept(t.Context(), edgetest.Log(t, i, 100)); err != nil {
			t.Fatal(err)
		}
	}
	r := s.current.Load().Read(otlpwire.Logs, 0)
	defer r.Close()
	for i := range 5 {
		m, err := r.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if i == 4 {
			s.watch()
			if owed := testutil.ToFloat64(s.led.SpoolBytes); owed != float64(m.Held) {
				t.Errorf("%v bytes owed, and the last message takes %d", owed, m.Held)
			}
			return
		}
		s.Forwarded(otlpwire.Logs, m.Seq, 0, m.Held)
	}
}

// TestClockSteps: neither an hour forward nor an hour back deletes, reorders or stops
// anything, and the stream's clock rises.
func TestClockSteps(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	var last int64
	for i, step := range []time.Duration{0, time.Hour, -time.Hour, 24 * 365 * 10 * time.Hour} {
		s := New(cfg, ledger.New(prometheus.NewRegistry()), quiet)
		var offset atomic.Int64
		offset.Store(int64(step))
		s.now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
		svc := s.Service()
		if err := services.StartAndAwaitRunning(t.Context(), svc); err != nil {
			t.Fatal(err)
		}
		for n := range 3 {
			if err := s.Accept(t.Context(), edgetest.Log(t, i*3+n, 10)); err != nil {
				t.Fatal(err)
			}
			offset.Add(-int64(time.Hour)) // while it runs
		}
		s.watch()
		if got := numbers(t, s); len(got) != (i+1)*3 || !slices.IsSorted(got) {
			t.Errorf("clock at %v: the spool holds %v", step, got)
		}
		r := s.current.Load().Read(otlpwire.Logs, uint64(i*3))
		last = 0
		for range 3 {
			d, err := r.Next(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if d.Header.Arrival <= last {
				t.Errorf("the stream's clock went from %d to %d", last, d.Header.Arrival)
			}
			last = d.Header.Arrival
		}
		r.Close()
		if err := services.StopAndAwaitTerminated(context.Background(), svc); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFullDisk fills a small file system from outside: senders are told to retry, what
// was acknowledged stays, and the spool continues when there is room again.
func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: mounting a tmpfs needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=24m"); err != nil {
		t.Skipf("SKIPPED: mounting a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	cfg := testConfig(t, dir)
	s, stop := startSpool(t, cfg)
	defer func() { stop() }()
	acked := 0
	for i := range 4 {
		if err := s.Accept(t.Context(), edgetest.Log(t, i, 100<<10)); err != nil {
			t.Fatal(err)
		}
		acked++
	}
	stranger := filepath.Join(dir, "stranger")
	f, err := os.Create(stranger)
	if err != nil {
		t.Fatal(err)
	}
	for buf := make([]byte, 64<<10); err == nil; _, err = f.Write(buf) {
	}
	_ = f.Close()
	refused := 0
	for range 50 {
		if s.Accept(t.Context(), edgetest.Log(t, acked, 100<<10)) == nil {
			acked++ // there was a little room in a file
		} else if refused++; refused == 3 {
			break
		}
	}
	if refused == 0 {
		t.Fatal("a full disk takes everything")
	}
	// A start on the full disk: what is stored can be read, nothing is accepted.
	stop()
	s, stop = startSpool(t, cfg)
	if got := slices.Compact(numbers(t, s)); len(got) != acked {
		t.Errorf("started on a full disk, the spool holds %v, want %d", got, acked)
	}
	if s.Accept(t.Context(), edgetest.Log(t, acked, 100<<10)) == nil {
		t.Error("taken after a start, though the disk is full")
	}
	// What it holds can be forwarded meanwhile, and what the hub has makes room.
	s.Forwarded(otlpwire.Logs, s.current.Load().logs[otlpwire.Logs].State().Last, 0, 100)
	taken := func(what string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if !backoff.Until(ctx, func() bool { return s.Accept(ctx, edgetest.Log(t, acked, 100<<10)) == nil }) {
			t.Fatalf("%s, and the spool does not go on", what)
		}
		acked++
	}
	first := acked // what it holds from here on
	taken("the hub has all")
	for err = nil; err == nil; {
		if err = s.Accept(t.Context(), edgetest.Log(t, acked, 100<<10)); err == nil {
			acked++
		}
	}
	if err := os.Remove(stranger); err != nil {
		t.Fatal(err)
	}
	taken("there is room")
	check := func(when string) {
		got := slices.Compact(numbers(t, s)) // one that was refused may have been stored
		got = slices.DeleteFunc(got, func(n int) bool { return n < first })
		if len(got) != acked-first || !slices.IsSorted(got) {
			t.Errorf("%s: %d to %d were acknowledged, the spool holds %v", when, first, acked, got)
		}
	}
	check("afterwards")
	stop()
	s, _ = startSpool(t, cfg)
	check("after a restart")
}
