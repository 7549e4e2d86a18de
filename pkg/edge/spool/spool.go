// Package spool keeps what an edge has accepted on its disk until the hub has it: a durable first-in,
// first-out log for each signal.
//
//	s := spool.New(cfg, led, log)
//	err := s.Accept(ctx, batch)           // durable when it returns nil
//	st, err := s.Await(ctx)               // the files while they are open
//	r := st.Read(sig, s.Position(spool.Hub, sig).Done)
//	s.Forwarded(sig, seq, hubSeq, bytes)  // the hub has everything up to seq
//
// # Promises
//
//   - A message is deleted only after the hub has it, and retain_after_ack later, unless the
//     operator has chosen on_full: drop_oldest; what is dropped is counted.
//   - If a write fails, senders are told to retry, and what was stored can still be read. Damaged
//     files are kept aside; what is undamaged in them stays, what is lost is counted.
//   - A sequence is given to one message only, or the ids of messages change: the hub never
//     mistakes two messages for one.
//
// # Not here
//
// Who sends messages, and where: package forward. What a file looks like: package wal.
package spool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/disk"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/failpoint"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/receive"
	"github.com/penstock/penstock/pkg/wal"
)

const (
	// watchInterval is how often disk space and spool size are checked. The
	// reserve must be more than can be written to a disk in that time.
	watchInterval = time.Second

	// stallTimeout is how long a write may take before senders are told to retry.
	stallTimeout = 5 * time.Second

	// maxReopenPause is the longest pause between attempts to open a spool after a write error.
	maxReopenPause = 5 * time.Second
)

// Spool is a durable first-in, first-out buffer per signal. It is safe for concurrent use.
type Spool struct {
	cfg Config
	led *ledger.Ledger
	log *slog.Logger
	now func() time.Time // the wall clock
	// clock is the time of the streams, in Unix nanoseconds. It follows the monotonic clock: a
	// step of the wall clock neither stops it nor makes it jump.
	clock     func() int64
	positions *positions

	current atomic.Pointer[Store] // nil while none is open
	broken  chan brokenStore      // capacity 1: one report is enough
	groups  [len(otlpwire.Signals)]*groups
	writers [len(otlpwire.Signals)]writer
	held    [len(otlpwire.Signals)]retained

	noRoom  atomic.Bool  // less than Reserve free on the disk
	stalled atomic.Bool  // a write takes longer than stallTimeout
	owed    atomic.Int64 // bytes that the hub does not have
}

// writer is the state that is kept from one written group to the next.
type writer struct {
	head  []byte
	out   []byte // compressed
	last  int64  // arrival of the last group: the clock of the stream never goes back
	meter envelope.Meter
	since atomic.Int64 // when the current write began, by the spool's clock; 0 for none
}

// retained is what of a signal the hub has and the spool still holds.
type retained struct {
	sync.Mutex
	retention
}

type brokenStore struct {
	*Store
	err error
}

func New(cfg Config, led *ledger.Ledger, log *slog.Logger) *Spool {
	s := &Spool{cfg: cfg, led: led, log: log.With("component", "spool"), now: time.Now, broken: make(chan brokenStore, 1)}
	for _, sig := range otlpwire.Signals {
		s.groups[sig] = newGroups(cfg.MaxItems, cfg.Linger, func(g *group) error { return s.commit(sig, g) })
		s.held[sig].keep = cfg.Retain
	}
	return s
}

func (s *Spool) Service() services.Service {
	if disk.Limits != "" {
		s.log.Warn("this system does not support everything that a spool needs", "limits", disk.Limits)
	}
	return services.NewBasicService(s.start, s.run, func(error) error {
		if s.positions != nil {
			if err := s.positions.save(); err != nil {
				s.log.Warn("could not save forward position; messages may be resent after restart", "err", err)
			}
		}
		if st := s.current.Swap(nil); st != nil {
			st.close()
		}
		return nil
	})
}

// start opens the spool. If the disk cannot be written, that may be temporary: run tries
// again, and meanwhile senders are told to retry.
func (s *Spool) start(context.Context) error {
	var err error
	if s.positions, err = loadPositions(filepath.Join(s.cfg.Dir, "marks")); err != nil {
		s.log.Warn("cannot read forward positions; messages that the hub has may be sent again", "err", err)
	}
	opened := s.now().Add(failpoint.Clock)
	started := time.Now()
	s.clock = func() int64 { return opened.UnixNano() + int64(time.Since(started)) }
	if err = s.open(nil); err != nil {
		if fatal(err) {
			return err
		}
		s.broken <- brokenStore{nil, err}
	} else if st := s.current.Load(); st.refusing() != nil {
		s.broken <- brokenStore{st, st.refusing()}
	}
	return nil
}

func (s *Spool) open(after error) error {
	o := opener{cfg: s.cfg, positions: s.positions, log: s.log, lost: func(sig otlpwire.Signal, messages uint64) {
		s.led.SpoolLost(sig).Add(float64(messages))
	}}
	st, err := o.open(after)
	if err != nil {
		return err
	}
	for _, sig := range otlpwire.Signals {
		s.retainAgain(st, sig)
	}
	s.current.Store(st)
	s.watch()
	return nil
}

// retainAgain treats what the hub had before this store was opened as just acknowledged.
func (s *Spool) retainAgain(st *Store, sig otlpwire.Signal) {
	h := &s.held[sig]
	h.Lock()
	defer h.Unlock()
	h.forget()
	done := s.positions.get(Hub, sig).Done
	state := st.logs[sig].State()
	if state.Records() == 0 || done < state.First {
		return
	}
	// Their size is not known; an estimate by number is good enough for a gauge.
	share := float64(done-state.First+1) / float64(state.Records())
	h.add(s.now(), done, int64(share*float64(state.Bytes)))
}

// Await waits for an open store and returns it.
func (s *Spool) Await(ctx context.Context) (*Store, error) {
	var st *Store
	if !backoff.Until(ctx, func() bool { st = s.current.Load(); return st != nil }) {
		return nil, ctx.Err()
	}
	return st, nil
}

// run watches the disk until ctx ends. Receivers have stopped by then.
func (s *Spool) run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.watchWrites(ctx) })
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			s.watch()
			if st := s.current.Load(); st != nil && st.refusing() != nil {
				s.report(st, st.refusing())
			}
		case b := <-s.broken:
			if b.Store == s.current.Load() { // no other has been opened since
				s.log.Error("spool is read-only after a disk error; reopening it, senders are told to retry", "err", b.err)
				s.reopen(ctx, b)
			}
		}
	}
}

// reopen closes a store that cannot be written and opens new ones until one can or ctx
// ends. Meanwhile what is spooled is forwarded, and deleted after retain_after_ack.
func (s *Spool) reopen(ctx context.Context, b brokenStore) {
	st, err := b.Store, b.err
	s.led.SpoolWritable.Set(0)
	if st != nil {
		st.refuse(err)
	}
	for attempt := 1; backoff.Sleep(ctx, min(fault.Pause(nil, attempt, 0), maxReopenPause)); attempt++ {
		probeErr := s.probe()
		if st != nil && (disk.NoSpace(probeErr) || disk.NoSpace(err)) {
			for _, sig := range otlpwire.Signals { // delete what the hub has, the last file included
				_ = st.logs[sig].Close()
				if err := s.release(st, sig); err != nil {
					s.log.Debug("could not delete what the hub has", "signal", sig, "err", err)
				}
			}
		}
		if st != nil && probeErr != nil && !st.lock.Gone() {
			s.watch()
			continue // the store stays open for reading
		}
		s.led.SpoolBytes.Set(math.NaN()) // unknown
		if s.current.Store(nil); st != nil {
			st.close()
		}
		openErr := s.open(err)
		if st = s.current.Load(); openErr == nil {
			openErr = st.refusing()
		}
		if openErr == nil {
			s.log.Info("the spool can be written again")
			s.writable(st)
			return
		}
		if err = openErr; st != nil {
			st.refuse(err)
		}
		s.log.Debug("spool is read-only after a disk error", "attempt", attempt, "err", err)
	}
}

// probe returns an error if the disk cannot be written.
func (s *Spool) probe() error {
	path := filepath.Join(s.cfg.Dir, "probe")
	return errors.Join(disk.WriteSynced(path, make([]byte, 64<<10)), os.Remove(path))
}

// report notifies run that a store cannot be written.
func (s *Spool) report(st *Store, err error) {
	select {
	case s.broken <- brokenStore{st, err}:
	default: // a report is pending
	}
}

// Accept returns when b is durable. The payload is not used after that.
func (s *Spool) Accept(ctx context.Context, b receive.Batch) error {
	if s.noRoom.Load() {
		return fmt.Errorf("%w: less than %v free on the spool's disk", receive.ErrFull, s.cfg.Reserve)
	}
	if s.stalled.Load() {
		return errStalled
	}
	if failpoint.AnswerBeforeSpool {
		b.Payload = bytes.Clone(b.Payload)
		go func() { _ = s.groups[b.Signal].join(context.WithoutCancel(ctx), b) }()
		return nil
	}
	return s.groups[b.Signal].join(ctx, b)
}

var (
	errClosed  = errors.New("spool is read-only after a disk error; see log")
	errStalled = fmt.Errorf("the spool's disk has not answered for %v", stallTimeout)
)

// commit stores a group. For each signal it runs once at a time.
func (s *Spool) commit(sig otlpwire.Signal, g *group) error {
	st := s.current.Load()
	if st == nil {
		return errClosed
	}
	if err := st.refusing(); err != nil {
		return fmt.Errorf("%w: %w", errClosed, err)
	}
	leave, ok := st.use()
	if !ok {
		return errClosed
	}
	defer leave()
	w := &s.writers[sig]
	w.last = max(s.clock(), w.last+1)
	w.since.Store(s.clock())
	defer w.since.Store(0)
	h := envelope.Header{Items: g.items, Arrival: w.last}
	if sig == otlpwire.Traces {
		h.Load = w.meter.Add(w.last, int64(g.items))
	}
	var body []byte
	if body, h.Encoding = envelope.Compress(w.out, g.body, s.cfg.Compression); h.Encoding != "" {
		w.out = body
	}
	w.head = appendHead(w.head[:0], h)
	failpoint.Point("before-append")
	failpoint.During("in-append")
	seq, err := st.logs[sig].Append(w.head, body)
	if errors.Is(err, wal.ErrFull) {
		seq, err = s.makeRoom(st, sig, w.head, body)
	}
	if err != nil && sig == otlpwire.Traces {
		w.meter.Add(w.last, -int64(g.items)) // the sender will try again
	}
	s.positions.appended(sig, seq)
	failpoint.Point("after-fsync")
	switch {
	case errors.Is(err, wal.ErrFull):
		return fmt.Errorf("%w: spool quota for %v (%v) exhausted; retry after the hub acknowledges messages", receive.ErrFull, sig, s.cfg.share(sig))
	case err != nil:
		s.report(st, err)
	}
	return err
}

// watch checks the disk and publishes the spool's size.
func (s *Spool) watch() {
	s.checkDisk()
	st := s.current.Load()
	if st == nil {
		return
	}
	if st.lock.Gone() && st.refusing() == nil {
		s.report(st, fmt.Errorf("the directory %s was removed or replaced", s.cfg.Dir))
		return
	}
	var owed, held int64
	for _, sig := range otlpwire.Signals {
		state := st.logs[sig].State()
		s.positions.appended(sig, state.Last)
		h := &s.held[sig]
		h.Lock()
		mine := min(h.held, state.Bytes)
		h.Unlock()
		if s.positions.get(Hub, sig).Done >= state.Last {
			mine = state.Bytes
		}
		held += mine
		owed += state.Bytes - mine
	}
	s.owed.Store(owed)
	s.led.SpoolBytes.Set(float64(owed))
	s.led.SpoolHeld.Set(float64(held))
	if err := s.positions.save(); err != nil {
		s.log.Debug("could not save forward positions", "err", err)
	}
}

// watchWrites looks for a write that does not end. It does not access the disk, because it
// would have to wait, too.
func (s *Spool) watchWrites(ctx context.Context) {
	for backoff.Sleep(ctx, watchInterval) {
		stalled := false
		for i := range s.writers {
			since := s.writers[i].since.Load()
			stalled = stalled || since > 0 && s.clock()-since > int64(stallTimeout)
		}
		if s.stalled.Swap(stalled) == stalled {
			continue
		}
		if stalled {
			s.log.Error("a write to the spool has not finished; senders are told to retry", "after", stallTimeout)
		} else {
			s.log.Info("the spool's disk answers again")
		}
		s.writable(s.current.Load())
	}
}

func (s *Spool) checkDisk() {
	free, err := disk.Free(s.cfg.Dir)
	if err != nil {
		return
	}
	noRoom := free < int64(s.cfg.Reserve)
	defer func() { s.writable(s.current.Load()) }()
	if s.noRoom.Swap(noRoom) == noRoom {
		return
	}
	if noRoom {
		s.log.Warn("disk nearly full, refusing requests", "free_bytes", free, "reserve", s.cfg.Reserve)
	} else {
		s.log.Info("disk has room again", "free_bytes", free)
	}
}

// writable sets the gauge that shows whether the spool accepts writes.
func (s *Spool) writable(st *Store) {
	ok := 0.0
	if st != nil && st.refusing() == nil && !s.noRoom.Load() && !s.stalled.Load() {
		ok = 1
	}
	s.led.SpoolWritable.Set(ok)
}

// Empty reports whether the hub has everything of a signal.
func (s *Spool) Empty(sig otlpwire.Signal) bool {
	st := s.current.Load()
	if st == nil {
		return false
	}
	state := st.logs[sig].State()
	return state.Records() == 0 || s.positions.get(Hub, sig).Done >= state.Last
}

// Damaged reports messages, up to a sequence, that were undamaged when the spool was opened and
// cannot be read now, though only this process writes it.
func (s *Spool) Damaged(sig otlpwire.Signal, messages, upto uint64) {
	s.log.Error("spooled messages are damaged and were skipped", "signal", sig, "messages", messages, "last", upto)
	s.led.Of(sig).Dropped(ledger.DroppedDamaged).Add(float64(messages))
}

// Position returns how far a reader is with a signal.
func (s *Spool) Position(reader string, sig otlpwire.Signal) Position {
	return s.positions.get(reader, sig)
}

// Advance moves a reader's position forward; hub is for the hub's reader alone.
func (s *Spool) Advance(reader string, sig otlpwire.Signal, done, hub uint64) {
	s.positions.advance(reader, sig, done, hub)
}

// Owes returns how many bytes the hub does not have, and how many the spool may hold.
func (s *Spool) Owes() (owed int64, bound config.Bytes) { return s.owed.Load(), s.cfg.MaxBytes }

// Retains reports whether the spool holds anything that could be sent again.
func (s *Spool) Retains(sig otlpwire.Signal) bool {
	h := &s.held[sig]
	h.Lock()
	defer h.Unlock()
	return h.held > 0
}

// Rewind makes forwarding begin again with the oldest message that the spool holds.
func (s *Spool) Rewind(st *Store, sig otlpwire.Signal) {
	h := &s.held[sig]
	h.Lock()
	h.forget()
	h.Unlock()
	s.positions.rewind(Hub, sig, Position{Done: st.logs[sig].State().First - 1})
}
