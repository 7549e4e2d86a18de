package edge

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
	"syscall"
	"time"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/planted"
	"github.com/penstock/penstock/pkg/proc"
	"github.com/penstock/penstock/pkg/receive"
)

const (
	// queueLength is how many requests may wait for a group; behind them senders
	// wait in their handlers, bounded by receive.max_in_flight_bytes.
	queueLength = 256

	// watchInterval is how often disk space and spool size are looked at. The
	// reserve must be more than a disk can take in that time.
	watchInterval = time.Second

	// maxReopenPause is between attempts to open a spool whose disk does not write.
	maxReopenPause = 5 * time.Second
)

// spool is a durable first-in, first-out buffer per signal.
//
// Requests that arrive while a group is being written form the next group: many
// requests, one message, one fsync (group commit).
type spool struct {
	cfg   SpoolConfig
	led   *ledger.Ledger
	log   *slog.Logger
	now   func() time.Time // the wall clock
	marks *marks

	current atomic.Pointer[store] // nil while none is open
	broken  chan brokenStore      // capacity 1: one report is enough
	queues  [len(otlpwire.Signals)]chan *request
	held    [len(otlpwire.Signals)]holdBack

	noRoom   atomic.Bool  // less than Reserve free on the disk
	owed     atomic.Int64 // bytes that the hub does not have
	stopped  chan struct{}
	stopOnce sync.Once
}

// holdBack is what the hub has of a signal and the spool still holds.
type holdBack struct {
	sync.Mutex
	retention
}

// request waits in a queue until its group is durable.
type request struct {
	batch receive.Batch
	done  chan error // capacity 1
}

type brokenStore struct {
	*store
	err error
}

func newSpool(cfg SpoolConfig, led *ledger.Ledger, log *slog.Logger) *spool {
	s := &spool{cfg: cfg, led: led, log: log.With("component", "spool"), now: time.Now, broken: make(chan brokenStore, 1), stopped: make(chan struct{})}
	for i := range s.queues {
		s.queues[i] = make(chan *request, queueLength)
		s.held[i].keep = cfg.Retain
	}
	return s
}

func (s *spool) service() services.Service {
	return services.NewBasicService(s.start, s.run, func(error) error {
		s.stopOnce.Do(func() { close(s.stopped) })
		if s.marks != nil {
			if err := s.marks.save(); err != nil {
				s.log.Warn("the next start sends again what the hub may have", "err", err)
			}
		}
		if st := s.current.Swap(nil); st != nil {
			st.close()
		}
		return nil
	})
}

// start opens the spool. A disk that does not write today may tomorrow: meanwhile
// senders are told to retry.
func (s *spool) start(ctx context.Context) error {
	var err error
	if s.marks, err = loadMarks(filepath.Join(s.cfg.Dir, "marks")); err != nil {
		s.log.Warn("the spool will send again what the hub may have", "err", err)
	}
	if err = s.open(ctx, nil); err != nil {
		if fatal(err) || ctx.Err() != nil {
			return err
		}
		s.broken <- brokenStore{nil, err}
	} else if st := s.current.Load(); st.refusing() != nil {
		s.broken <- brokenStore{st, st.refusing()}
	}
	return nil
}

func (s *spool) open(ctx context.Context, after error) error {
	o := opener{cfg: s.cfg, marks: s.marks, log: s.log, lost: func(sig otlpwire.Signal, messages uint64) {
		s.led.SpoolLost(sig).Add(float64(messages))
	}}
	st, err := o.open(ctx, after)
	if err != nil {
		return err
	}
	for _, sig := range otlpwire.Signals {
		s.holdAgain(ctx, st, sig)
	}
	s.current.Store(st)
	s.watch(ctx)
	return nil
}

// holdAgain takes what the hub has had before this store was opened for fresh.
func (s *spool) holdAgain(ctx context.Context, st *store, sig otlpwire.Signal) {
	h := &s.held[sig]
	h.Lock()
	defer h.Unlock()
	h.forget()
	done := s.marks.get(hubReader, sig).Done
	state, err := st.conn.State(ctx, bus.SpoolStream(sig))
	if err != nil || state.Messages == 0 || done < state.FirstSeq {
		return
	}
	// How large they are is not known; by number is near enough for a gauge.
	share := float64(done-state.FirstSeq+1) / float64(state.LastSeq-state.FirstSeq+1)
	h.add(s.now(), done, int64(share*float64(state.Bytes)))
}

// await returns the open store, when there is one.
func (s *spool) await(ctx context.Context) (*store, error) {
	var st *store
	if !proc.Until(ctx, func() bool { st = s.current.Load(); return st != nil }) {
		return nil, ctx.Err()
	}
	return st, nil
}

// run commits groups until ctx ends. Receivers have stopped by then.
func (s *spool) run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, sig := range otlpwire.Signals {
		wg.Go(func() { s.commitLoop(ctx, sig) })
	}
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			s.watch(ctx)
		case b := <-s.broken:
			if b.store == s.current.Load() { // no other has been opened since
				s.log.Error("the spool does not take writes and is opened anew; senders are told to retry", "err", b.err)
				s.reopen(ctx, b)
			}
		}
	}
}

// reopenInterval is how often a store is opened anew on a disk that does not write: what
// was forwarded can be deleted then, which may be all that the disk needs.
const reopenInterval = 30 * time.Second

// reopen closes a store that does not write and opens others until one does or ctx
// ends. In between what is spooled is forwarded.
func (s *spool) reopen(ctx context.Context, b brokenStore) {
	st, err := b.store, b.err
	s.led.SpoolWritable.Set(0)
	if st != nil {
		st.refuse(err)
	}
	opened := time.Time{}
	for attempt := 1; proc.Sleep(ctx, min(fault.Pause(nil, attempt, 0), maxReopenPause)); attempt++ {
		probeErr := s.probe()
		if st != nil && probeErr != nil && !st.broker.Gone() && time.Since(opened) < reopenInterval {
			s.watch(ctx)
			continue // it is read as it is
		}
		s.led.SpoolBytes.Set(math.NaN()) // not known
		if s.current.Store(nil); st != nil {
			st.close()
		}
		openErr := s.open(ctx, err)
		opened = time.Now()
		if st = s.current.Load(); openErr == nil {
			if openErr = st.refusing(); openErr == nil {
				openErr = s.probe()
			}
		}
		if openErr == nil {
			s.log.Info("the spool takes writes again")
			s.writable(st)
			return
		}
		if err = openErr; st != nil {
			st.refuse(err)
		}
		s.log.Debug("the spool does not take writes", "attempt", attempt, "err", err)
	}
}

// probe reports whether the disk takes a write.
func (s *spool) probe() error {
	path := filepath.Join(s.cfg.Dir, "probe")
	return errors.Join(broker.WriteSynced(path, make([]byte, 64<<10)), os.Remove(path))
}

// report tells run that a store does not write.
func (s *spool) report(st *store, err error) {
	select {
	case s.broken <- brokenStore{st, err}:
	default: // it has been told
	}
}

// Accept returns when b is durable. It does not follow ctx while the group is
// being written, since the payload is in use until then; that is bounded by the
// timeout of a publish.
func (s *spool) Accept(ctx context.Context, b receive.Batch) error {
	if s.noRoom.Load() {
		return fmt.Errorf("%w: less than %v free on the spool's disk", receive.ErrFull, s.cfg.Reserve)
	}
	r := &request{batch: b, done: make(chan error, 1)}
	if planted.AnswerBeforeSpool {
		r.batch.Payload = bytes.Clone(r.batch.Payload)
	}
	select {
	case s.queues[b.Signal] <- r:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.stopped:
		return errStopping
	}
	if planted.AnswerBeforeSpool {
		return nil
	}
	select {
	case err := <-r.done:
		return err
	case <-s.stopped:
		return errStopping
	}
}

var (
	errStopping = errors.New("shutting down")
	errClosed   = errors.New("the spool does not take writes: its disk fails, see the log")
)

func (s *spool) commitLoop(ctx context.Context, sig otlpwire.Signal) {
	var (
		group []*request
		body  []byte
		out   []byte   // compressed
		next  *request // did not fit into the last group
		last  int64    // arrival of the last group: the clock of the stream never goes back
	)
	// The stream's clock runs on the monotonic one: a step of the wall clock
	// neither stops it nor makes it jump.
	opened := s.now()
	started := time.Now()
	for {
		if next == nil {
			select {
			case next = <-s.queues[sig]:
			case <-ctx.Done():
				return
			}
		}
		group, body, next = s.gather(sig, append(group[:0], next), append(body[:0], next.batch.Payload...))
		last = max(opened.UnixNano()+int64(time.Since(started)), last+1)
		var err error
		out, err = s.commit(ctx, sig, group, out, body, last)
		for _, r := range group {
			r.done <- err
		}
	}
}

// gather adds what is waiting to the group, up to the size of a message, and waits
// for more as long as cfg.Linger says.
func (s *spool) gather(sig otlpwire.Signal, group []*request, body []byte) ([]*request, []byte, *request) {
	items := group[0].batch.Items
	var linger <-chan time.Time
	for {
		var r *request
		select {
		case r = <-s.queues[sig]:
		default:
			if s.cfg.Linger == 0 {
				return group, body, nil
			}
			if linger == nil {
				linger = time.After(s.cfg.Linger)
			}
			select {
			case r = <-s.queues[sig]:
			case <-linger:
				return group, body, nil
			}
		}
		if items += r.batch.Items; len(body)+len(r.batch.Payload) > envelope.MaxPayload || items > s.cfg.MaxItems {
			return group, body, r
		}
		group, body = append(group, r), append(body, r.batch.Payload...)
	}
}

// commit stores a group. It returns the memory that it has compressed into, to be
// used again: the server has its own copy.
func (s *spool) commit(ctx context.Context, sig otlpwire.Signal, group []*request, out, body []byte, arrival int64) ([]byte, error) {
	st := s.current.Load()
	if st == nil {
		return out, errClosed
	}
	if err := st.refusing(); err != nil {
		return out, fmt.Errorf("%w: %w", errClosed, err)
	}
	items := 0
	for _, r := range group {
		items += r.batch.Items
	}
	msg := bus.Message{Subject: bus.SpoolSubject(sig), Header: envelope.Header{
		ContentType: envelope.ContentTypeOTLP, Items: items, Arrival: arrival, ID: "",
	}}
	if msg.Body, msg.Header.Encoding = envelope.Compress(out, body, s.cfg.Compression); msg.Header.Encoding != "" {
		out = msg.Body
	}
	// What was accepted is written also while the process stops.
	ctx, leave, ok := st.enter(context.WithoutCancel(ctx))
	if !ok {
		return out, errClosed
	}
	defer leave()
	planted.Point("before-append")
	planted.During("in-append")
	seq, err := st.publish(ctx, msg)
	if errors.Is(err, bus.ErrFull) {
		seq, err = s.makeRoom(ctx, st, sig, msg)
	}
	s.marks.appended(sig, seq)
	planted.Point("after-fsync")
	switch {
	case errors.Is(err, bus.ErrFull):
		err = fmt.Errorf("%w: the spool's share of %v, %v, is taken; it goes on when the hub has taken some", receive.ErrFull, sig, s.cfg.share(sig))
	case err != nil:
		s.report(st, err)
	}
	return out, err
}

// watch looks at the disk and publishes the spool's size.
func (s *spool) watch(ctx context.Context) {
	s.checkDisk()
	st := s.current.Load()
	if st == nil {
		return
	}
	if st.broker.Gone() && st.refusing() == nil {
		s.report(st, fmt.Errorf("the directory %s was removed or replaced", s.cfg.Dir))
		return
	}
	var owed, held int64
	for _, sig := range otlpwire.Signals {
		state, err := st.conn.State(ctx, bus.SpoolStream(sig))
		if err != nil {
			return
		}
		s.marks.appended(sig, state.LastSeq)
		h := &s.held[sig]
		h.Lock()
		mine := min(h.held, int64(state.Bytes))
		h.Unlock()
		if s.marks.get(hubReader, sig).Done >= state.LastSeq {
			mine = int64(state.Bytes)
		}
		held += mine
		owed += int64(state.Bytes) - mine
	}
	s.owed.Store(owed)
	s.led.SpoolBytes.Set(float64(owed))
	s.led.SpoolHeld.Set(float64(held))
	if err := s.marks.save(); err != nil {
		s.log.Debug("not saved", "err", err)
	}
}

func (s *spool) checkDisk() {
	var fs syscall.Statfs_t
	if err := syscall.Statfs(s.cfg.Dir, &fs); err != nil {
		return
	}
	free := int64(fs.Bavail) * fs.Bsize
	noRoom := free < int64(s.cfg.Reserve)
	defer func() { s.writable(s.current.Load()) }()
	if s.noRoom.Swap(noRoom) == noRoom {
		return
	}
	if noRoom {
		s.log.Warn("disk nearly full, refusing", "free_bytes", free, "reserve", s.cfg.Reserve)
	} else {
		s.log.Info("disk has room again", "free_bytes", free)
	}
}

// writable says whether the spool takes writes.
func (s *spool) writable(st *store) {
	ok := 0.0
	if st != nil && st.refusing() == nil && !s.noRoom.Load() {
		ok = 1
	}
	s.led.SpoolWritable.Set(ok)
}

// empty reports whether the hub has everything of a signal.
func (s *spool) empty(ctx context.Context, sig otlpwire.Signal) bool {
	st := s.current.Load()
	if st == nil {
		return false
	}
	state, err := st.conn.State(ctx, bus.SpoolStream(sig))
	return err == nil && (state.Messages == 0 || s.marks.get(hubReader, sig).Done >= state.LastSeq)
}

// holds reports whether there is anything that could be sent again.
func (s *spool) holds(sig otlpwire.Signal) bool {
	h := &s.held[sig]
	h.Lock()
	defer h.Unlock()
	return h.held > 0
}

// rewind makes forwarding begin again with the oldest message there is.
func (s *spool) rewind(sig otlpwire.Signal) {
	h := &s.held[sig]
	h.Lock()
	h.forget()
	h.Unlock()
	s.marks.rewind(hubReader, sig, mark{})
}
