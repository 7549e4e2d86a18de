package spool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/penstock/penstock/pkg/edge/edgetest"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/receive"
)

var quiet = slog.New(slog.DiscardHandler)

func testConfig(t testing.TB, dir string) Config {
	t.Helper()
	c := DefaultConfig()
	c.Dir, c.MaxBytes, c.Reserve = filepath.Join(dir, "spool"), 24<<20, 0
	return c
}

func startSpool(t testing.TB, cfg Config) (*Spool, func()) {
	t.Helper()
	log := quiet
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	s := New(cfg, ledger.New(prometheus.NewRegistry()), log)
	svc := s.Service()
	if err := services.StartAndAwaitRunning(t.Context(), svc); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	stop := func() {
		once.Do(func() {
			if err := services.StopAndAwaitTerminated(context.Background(), svc); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(stop)
	return s, stop
}

// TestRequestsShareMessages sends from many goroutines at once: all are
// answered, and there are fewer messages than requests.
func TestRequestsShareMessages(t *testing.T) {
	s, _ := startSpool(t, testConfig(t, t.TempDir()))
	const n = 200
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if err := s.Accept(t.Context(), edgetest.Log(t, i, 10)); err != nil {
				t.Errorf("request %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	messages := s.current.Load().logs[otlpwire.Logs].State().Records()
	if messages == 0 || messages >= n {
		t.Errorf("%d requests became %d messages: no group was formed", n, messages)
	}
	t.Logf("%d requests in %d messages", n, messages)
}

// TestGroupIsCut: groups are bounded by bytes and items; what does not fit begins the next one.
func TestGroupIsCut(t *testing.T) {
	type cut struct{ requests, items, bytes int }
	put := func(items, bytes int) receive.Batch {
		return receive.Batch{Signal: otlpwire.Logs, Items: items, Payload: make([]byte, bytes)}
	}
	// written returns the groups that are formed of requests that arrive while one is written.
	written := func(all ...receive.Batch) (cuts []cut) {
		began, goOn := make(chan struct{}), make(chan struct{})
		q := newGroups(10, 0, func(g *group) error {
			if len(cuts) == 0 {
				close(began)
				<-goOn
			}
			cuts = append(cuts, cut{g.requests, g.items, len(g.body)})
			return nil
		})
		var wg sync.WaitGroup
		join := func(b receive.Batch) {
			g, first := q.add(b)
			wg.Go(func() {
				if first {
					q.lead(g)
				}
				<-g.done
			})
		}
		join(put(1, 1))
		<-began
		for _, b := range all {
			join(b)
		}
		close(goOn)
		wg.Wait()
		return cuts[1:]
	}
	sum := func(cuts []cut) (s cut) {
		for _, g := range cuts {
			s = cut{s.requests + g.requests, s.items + g.items, s.bytes + g.bytes}
		}
		return s
	}
	if got := written(put(4, 100), put(4, 100), put(2, 100)); !slices.Equal(got, []cut{{3, 10, 300}}) {
		t.Errorf("what fits: %v", got)
	}
	if got := written(put(4, 100), put(4, 100), put(4, 100)); len(got) != 2 || sum(got) != (cut{3, 12, 300}) {
		t.Errorf("too many items: %v", got)
	}
	if got := written(put(1, envelope.MaxPayload-10), put(1, 11)); len(got) != 2 || sum(got) != (cut{2, 2, envelope.MaxPayload + 1}) {
		t.Errorf("too many bytes: %v", got)
	}
	if got := written(put(100, 10), put(1, 10)); len(got) != 2 || sum(got) != (cut{2, 101, 20}) {
		t.Errorf("one with more items than a group: %v", got)
	}
}

// TestGroupsLinger: a request waits for others as long as linger says, or until one
// does not fit.
func TestGroupsLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const linger = 100 * time.Millisecond
		type written struct {
			requests int
			after    time.Duration
		}
		var all []written
		start := time.Now()
		q := newGroups(10, linger, func(g *group) error {
			all = append(all, written{g.requests, time.Since(start)})
			return nil
		})
		var wg sync.WaitGroup
		join := func(items int) {
			wg.Go(func() {
				_ = q.join(t.Context(), receive.Batch{Signal: otlpwire.Logs, Items: items, Payload: []byte("x")})
			})
		}
		join(1)
		time.Sleep(linger - 1)
		join(1)
		wg.Wait()
		if !slices.Equal(all, []written{{2, linger}}) {
			t.Errorf("written: %v", all)
		}
		// The second does not fit into the first one's group, which need not wait any longer.
		all, start = nil, time.Now()
		join(10)
		time.Sleep(linger / 2)
		join(10)
		wg.Wait()
		if !slices.Equal(all, []written{{1, linger / 2}, {1, linger/2 + linger}}) {
			t.Errorf("written: %v", all)
		}
	})
}

// TestGroupsBehindAWriteThatHangs: after stallTimeout they are refused; the one that hangs is not.
func TestGroupsBehindAWriteThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		answer := make(chan struct{})
		q := newGroups(10, 0, func(*group) error { <-answer; return nil })
		b := receive.Batch{Signal: otlpwire.Logs, Items: 1, Payload: []byte("x")}
		hung := make(chan error, 1)
		go func() { hung <- q.join(t.Context(), b) }()
		synctest.Wait()
		start := time.Now()
		if err := q.join(t.Context(), b); !errors.Is(err, errStalled) || time.Since(start) != stallTimeout {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		close(answer)
		if err := <-hung; err != nil {
			t.Errorf("the write that hung: %v", err)
		}
		if err := q.join(t.Context(), b); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	})
}

// TestWhoWaitsForAGroupMayLeave: a sender that has given up blocks nothing, and its
// request is written nevertheless.
func TestWhoWaitsForAGroupMayLeave(t *testing.T) {
	began, goOn := make(chan struct{}, 2), make(chan struct{})
	items := 0
	q := newGroups(10, 0, func(g *group) error { began <- struct{}{}; <-goOn; items += g.items; return nil })
	b := receive.Batch{Signal: otlpwire.Logs, Items: 1, Payload: []byte("x")}
	var wg sync.WaitGroup
	wg.Go(func() { _ = q.join(t.Context(), b) })
	<-began
	second, _ := q.add(b) // its goroutine would lead
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := q.join(ctx, b); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	wg.Go(func() { q.lead(second) })
	close(goOn)
	wg.Wait()
	if items != 3 {
		t.Errorf("%d requests were written of 3", items)
	}
}

// TestAWriterThatPanics: no request is answered with success.
func TestAWriterThatPanics(t *testing.T) {
	joined := make(chan struct{})
	q := newGroups(10, 0, func(*group) error { <-joined; panic("BUG") })
	b := receive.Batch{Signal: otlpwire.Logs, Items: 1, Payload: []byte("x")}
	g, _ := q.add(b)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer func() { _ = recover() }()
		q.lead(g)
	})
	close(joined)
	<-g.done
	if !errors.Is(g.err, errNotWritten) {
		t.Errorf("who waits is told %v", g.err)
	}
	wg.Wait()
}

// TestSpoolKeepsWhatItAcknowledged stops the spool, opens it again and reads.
func TestSpoolKeepsWhatItAcknowledged(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	s, stop := startSpool(t, cfg)
	for i := range 20 {
		if err := s.Accept(t.Context(), edgetest.Log(t, i, 10)); err != nil {
			t.Fatal(err)
		}
	}
	epoch := s.current.Load().Nonce()
	stop()
	if err := s.Accept(t.Context(), edgetest.Log(t, 99, 10)); err == nil {
		t.Error("accepted after the stop")
	}
	s, _ = startSpool(t, cfg)
	if s.current.Load().Nonce() != epoch {
		t.Error("another epoch for the same directory")
	}
	wantLogs(t, s, 0, 20)
}

// wantLogs reads the spool and expects the log records numbered from to to, in order.
func wantLogs(t testing.TB, s *Spool, from, to int) {
	t.Helper()
	r := s.current.Load().Read(otlpwire.Logs, 0)
	defer r.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for i := from; i < to; {
		d, err := r.Next(ctx)
		if err != nil {
			t.Fatalf("log record %d: %v", i, err)
		}
		body, err := envelope.Decompress(nil, d.Body, d.Header.Encoding)
		if err != nil {
			t.Fatal(err)
		}
		for item := range otlpwire.Items(body) {
			if !strings.Contains(string(item), fmt.Sprintf("n=%d ", i)) {
				t.Fatalf("log record %d: got %.40q", i, item)
			}
			i++
		}
		if d.Behind == 0 && i < to {
			t.Fatalf("the spool ends before log record %d", i)
		}
	}
}

func TestFullSpoolRefusesAndTakesAgain(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	cfg.MaxBytes = 16 << 20
	s, _ := startSpool(t, cfg)
	var err error
	accepted := 0
	for i := 0; i < 20 && err == nil; i++ {
		if err = s.Accept(t.Context(), edgetest.Log(t, i, 900<<10)); err == nil {
			accepted++
		}
	}
	if !errors.Is(err, receive.ErrFull) || accepted < 3 {
		t.Fatalf("after %d batches: %v, want %v", accepted, err, receive.ErrFull)
	}
	// Another signal has its own share.
	other := edgetest.Log(t, 0, 10)
	other.Signal = otlpwire.Traces
	if err := s.Accept(t.Context(), other); err != nil {
		t.Errorf("traces are refused because logs are full: %v", err)
	}
	if err := s.current.Load().logs[otlpwire.Logs].Release(2); err != nil {
		t.Fatal(err)
	}
	if err := s.Accept(t.Context(), edgetest.Log(t, 0, 900<<10)); err != nil {
		t.Errorf("after the hub took some: %v", err)
	}
}

func TestDiskReserveRefuses(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	cfg.Reserve = 1 << 60 // more than any disk has
	s, _ := startSpool(t, cfg)
	if err := s.Accept(t.Context(), edgetest.Log(t, 0, 10)); !errors.Is(err, receive.ErrFull) || !strings.Contains(err.Error(), "free") {
		t.Errorf("got %v", err)
	}
}

func TestTwoEdgesOnOneDirectory(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	startSpool(t, cfg)
	second := New(cfg, ledger.New(prometheus.NewRegistry()), quiet)
	if err := services.StartAndAwaitRunning(t.Context(), second.Service()); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("got %v", err)
	}
}

func accept(t *testing.T, s *Spool, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := s.Accept(t.Context(), edgetest.Log(t, i, 10)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSpoolIsForItsOwner: other users of the machine cannot read the applications'
// telemetry.
func TestSpoolIsForItsOwner(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data", "spool")
	s, stop := startSpool(t, testConfig(t, dir))
	accept(t, s, 0, 5)
	stop()
	files := 0
	if err := filepath.WalkDir(filepath.Dir(dir), func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, want nothing for others", path, info.Mode())
		}
		files++
		return err
	}); err != nil || files < 4 {
		t.Errorf("%d files, %v", files, err)
	}
}
