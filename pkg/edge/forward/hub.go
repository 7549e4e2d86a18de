package forward

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/edge/spool"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/failpoint"
	"github.com/penstock/penstock/pkg/hold"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// window is how many messages of a signal may be in flight to the hub: at 100 ms round
// trip and 1 MiB a message it fills 640 MiB/s. After a hub has not answered in time, the
// window is halved, and it grows by one with every acknowledgement. Otherwise a hub that
// needs longer for a window than the timeout would be sent the same window for ever.
const window = 64

// fullPatience is for how long messages are sent one at a time after the hub's stream was full: of
// several in flight, a small one may find room where the larger one before it found none, and be
// stored before it.
const fullPatience = time.Minute

// room returns how many messages of a signal may be in flight now.
func (w *hubWay) room(sig otlpwire.Signal, now time.Time) int32 {
	if now.Sub(time.Unix(0, w.full[sig].Load())) < fullPatience {
		return 1
	}
	return window - w.narrowed[sig].Load()
}

// minHubPayload is the size of the largest message, with its headers.
const minHubPayload = envelope.MaxPayload + 4<<10

// hubWay publishes into the hub's JetStream.
type hubWay struct {
	instance string
	spool    *spool.Spool
	led      *ledger.Ledger
	log      *slog.Logger
	dialer   dialer
	holds    *hold.Asker
	// shared is set when the subject's last message turns out to be newer than the last that the
	// hub has acknowledged, as when others publish it, too: the next session sets no condition.
	shared [len(otlpwire.Signals)]atomic.Bool
	// narrowed is by how much the window of a signal is smaller than it may be.
	narrowed [len(otlpwire.Signals)]atomic.Int32
	// full is when a signal's stream was last full, in Unix nanoseconds.
	full [len(otlpwire.Signals)]atomic.Int64
	// denied is why the hub accepts nothing from this edge; nil when it does.
	denied [len(otlpwire.Signals)]atomic.Pointer[error]
	said   backoff.Repeats
}

func (w *hubWay) connected() bool { return w.dialer.connected() }

func (w *hubWay) close() {
	w.holds.Close()
	w.dialer.close()
}

// ready returns why the hub will accept nothing until an operator has corrected the credential.
func (w *hubWay) ready() error {
	for sig := range w.denied {
		if why := w.denied[sig].Load(); why != nil {
			return *why
		}
	}
	return nil
}

// refuses notes that the hub accepts nothing because of missing rights, and logs it once a minute.
func (w *hubWay) refuses(sig otlpwire.Signal, err error) {
	w.denied[sig].Store(&err)
	if _, due := w.said.Due("refused", time.Now()); !due {
		return
	}
	w.log.Error("the hub accepts nothing from this edge, spooling", "instance", w.instance, "err", err)
}

// flight is a message in flight to the hub.
type flight struct {
	seq     uint64 // of the spool
	items   int
	bytes   int64
	again   bool   // it may have been sent before
	missing uint64 // messages up to seq that cannot be read; nothing was sent
	pending bus.Pending
}

// session forwards on one connection until something fails.
func (w *hubWay) session(ctx context.Context, st *spool.Store, sig otlpwire.Signal, done func(arrived)) (err error) {
	conn, err := w.dialer.dial()
	if err != nil {
		if errors.Is(err, bus.ErrRefused) {
			w.refuses(sig, err)
		}
		return err
	}
	if why := w.denied[sig].Load(); why != nil && errors.Is(*why, bus.ErrRefused) {
		w.denied[sig].Store(nil) // the credential is accepted again
	}
	defer func() {
		if errors.Is(err, bus.ErrDenied) {
			w.refuses(sig, fmt.Errorf("the credential may not publish for instance %s: is it another instance's? %w", w.instance, err))
		}
		// A hub that has answered has received everything that was sent before, in order.
		// Otherwise messages may still arrive, so the connection is closed: they must not
		// mix with those of the next session.
		if !errors.Is(err, errRewind) && !errors.Is(err, errHeld) && !errors.Is(err, bus.ErrNoStream) && !errors.Is(err, bus.ErrFull) && !errors.Is(err, bus.ErrStore) {
			conn.Close()
		}
	}()
	r := st.Read(sig, w.spool.Position(spool.Hub, sig).Done)
	defer r.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	flights, acked := make(chan flight, window), make(chan struct{}, window)
	first := make(chan struct{}) // closed when the hub has acknowledged the first message
	var wg sync.WaitGroup
	wg.Go(func() { cancel(w.collect(ctx, st, sig, flights, acked, first, done)) })
	err = w.publish(ctx, conn, st, r, sig, flights, acked, first)
	close(flights)
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	if errors.Is(err, bus.ErrFull) {
		w.full[sig].Store(time.Now().UnixNano())
	}
	if errors.Is(err, bus.ErrTimeout) {
		w.narrowed[sig].Store(window - max((window-w.narrowed[sig].Load())/2, 1))
	}
	return err
}

// errHeld ends a session: the hub has room, and not for more of this instance.
var errHeld = errors.New("the hub asks this instance to hold back")

// publish sends in order with a window in flight. The first message of a session is sent
// alone, and the window opens with its acknowledgement. A hub that has lost data shows it
// in the answer to this message, before anything newer is stored; so what is sent again
// then is still in order.
//
// The first message is sent on the condition that the subject's last message is the one
// that the hub has acknowledged last (see compare). The sequence in the acknowledgement
// (see check) does not suffice, because other instances may have filled up the stream's
// sequences since the loss. There is no condition when the spool retains nothing that
// could be sent again, nor when shared is set.
func (w *hubWay) publish(ctx context.Context, conn *bus.Conn, st *spool.Store, r spool.Reader, sig otlpwire.Signal, flights chan<- flight, acked, first <-chan struct{}) error {
	for sent, under := 0, int32(0); ; {
		m, err := r.Next(ctx)
		if err != nil {
			return err
		}
		if failpoint.ForwardSwapped && m.Seq%50 == 7 {
			m = w.swap(ctx, conn, st, r, sig, m)
		}
		if m.Seq <= w.spool.Position(spool.Hub, sig).Done {
			continue // deleted by on_full: drop_oldest since it was read
		}
		if m.Missing > 0 {
			if err := send(ctx, flights, flight{seq: m.Seq, missing: m.Missing}); err != nil {
				return err
			}
			continue
		}
		if why := w.holds.Held(conn, w.instance, sig, time.Now()); why != "" {
			return fmt.Errorf("%w: %s", errHeld, why)
		}
		after := w.after(sig, sent)
		for ; under >= w.room(sig, time.Now()); under-- {
			if err := await(ctx, acked); err != nil {
				return err
			}
		}
		under++
		m.Header.ID = fmt.Sprintf("%s-%d", st.Nonce(), m.Seq)
		again := st.Sending(sig, m.Seq)
		p := conn.PublishAsync(bus.Message{Subject: bus.Subject(sig, w.instance), Header: m.Header, Body: m.Body, After: after})
		failpoint.Point("after-forward")
		if err := send(ctx, flights, flight{seq: m.Seq, items: m.Header.Items, bytes: m.Held, again: again, pending: p}); err != nil {
			return err
		}
		if sent++; sent == 1 {
			if err := await(ctx, first); err != nil {
				return err
			}
		}
	}
}

// after is the condition of a session's message, after so many sent: the hub's sequence of the message before; 0 for none.
func (w *hubWay) after(sig otlpwire.Signal, sent int) uint64 {
	if sent == 0 && w.spool.Retains(sig) && !w.shared[sig].Swap(false) {
		return w.spool.Position(spool.Hub, sig).Hub
	}
	return 0
}

// swap sends the message after m before it: a bug for tests.
func (w *hubWay) swap(ctx context.Context, conn *bus.Conn, st *spool.Store, r spool.Reader, sig otlpwire.Signal, m spool.Message) spool.Message {
	m.Body = bytes.Clone(m.Body)
	if next, err := r.Next(ctx); err == nil {
		next.Header.ID = fmt.Sprintf("%s-%d", st.Nonce(), next.Seq)
		conn.PublishAsync(bus.Message{Subject: bus.Subject(sig, w.instance), Header: next.Header, Body: next.Body})
	}
	return m
}

// send puts a flight on its way to collect.
func send(ctx context.Context, flights chan<- flight, f flight) error {
	select {
	case flights <- f:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// await waits until something comes, or the channel is closed.
func await(ctx context.Context, c <-chan struct{}) error {
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// collect handles the hub's acknowledgements in order.
func (w *hubWay) collect(ctx context.Context, st *spool.Store, sig otlpwire.Signal, flights <-chan flight, acked, first chan<- struct{}, done func(arrived)) error {
	for opened := false; ; {
		var f flight
		select {
		case m, ok := <-flights:
			if !ok {
				return nil
			}
			f = m
		case <-ctx.Done():
			return ctx.Err()
		}
		if failpoint.ForwardUnacked {
			done(arrived{seq: f.seq, items: f.items, bytes: f.bytes})
		}
		if f.missing > 0 {
			w.spool.Damaged(sig, f.missing, f.seq)
			done(arrived{seq: f.seq})
			continue
		}
		stored, err := f.pending.Stored(ctx)
		if other, is := errors.AsType[*bus.LastSequenceError](err); is {
			return w.compare(st, sig, other.Last)
		}
		if err != nil {
			return err
		}
		w.denied[sig].Store(nil)
		if err := w.check(st, sig, f, stored); err != nil {
			return err
		}
		a := arrived{seq: f.seq, items: f.items, bytes: f.bytes}
		if !stored.Duplicate {
			a.hub = stored.Seq
		}
		done(a)
		acked <- struct{}{} // never blocks: at most a window is in flight
		if n := w.narrowed[sig].Load(); n > 0 {
			w.narrowed[sig].CompareAndSwap(n, n-1)
		}
		if !opened {
			close(first)
			opened = true
		}
	}
}

// compare handles a failed condition: the last message of our subject is not the last that
// the hub has acknowledged. last is its sequence, 0 for none. If it is lower, the hub has
// lost what it acknowledged, and everything retained is sent again, before anything newer.
// If it is higher, nothing can be concluded, and the next session sets no condition. So a
// loss that another publisher of the same instance has covered up is not noticed.
func (w *hubWay) compare(st *spool.Store, sig otlpwire.Signal, last uint64) error {
	before := w.spool.Position(spool.Hub, sig).Hub
	if last > before {
		// One of ours whose acknowledgement was lost, or one of another edge or a gateway.
		w.shared[sig].Store(true)
		return errRewind
	}
	w.log.Error("hub lost acknowledged messages (stream recreated, restored or truncated); resending retained messages", "signal", sig, "acknowledged", before, "last", last)
	w.led.HubAlarms.Inc()
	w.spool.Rewind(st, sig)
	return errRewind
}

// check looks for signs that the hub does not have what it has acknowledged. Its
// sequences only rise, unless its stream was recreated or restored from a backup, or has
// lost its end in a power cut. And it cannot know an id that was never sent, unless
// another message was sent with it.
func (w *hubWay) check(st *spool.Store, sig otlpwire.Signal, f flight, stored bus.Stored) error {
	before := w.spool.Position(spool.Hub, sig).Hub
	switch {
	case stored.Duplicate && !f.again:
		w.log.Error("hub knows the id of a message that was never sent (is a copy of this spool's directory in use?); resending retained messages with new ids", "signal", sig, "seq", f.seq)
		if err := st.Renew(); err != nil {
			return err
		}
	case !stored.Duplicate && stored.Seq <= before:
		w.log.Error("hub's stream went back (recreated, restored or truncated); resending retained messages", "signal", sig, "from", before, "to", stored.Seq)
	default:
		return nil
	}
	w.led.HubAlarms.Inc()
	w.spool.Rewind(st, sig)
	return errRewind
}

// dialer shares one connection to the hub among the signals and opens a new one
// when it has ended.
type dialer struct {
	cfg bus.Config
	log *slog.Logger

	conn    atomic.Pointer[bus.Conn] // the last one; nil before the first
	dialing struct {
		sync.Mutex
		since time.Time // when dialling first failed; zero while the hub can be reached
		said  *backoff.Repeats
	}
}

func (d *dialer) dial() (*bus.Conn, error) {
	d.dialing.Lock()
	defer d.dialing.Unlock()
	if d.connected() {
		return d.conn.Load(), nil
	}
	conn, err := bus.Dial(d.cfg, d.log)
	if err == nil && conn.MaxPayload() < minHubPayload {
		err = fmt.Errorf("the hub accepts messages of up to %d bytes, and the spool may hold some of up to %d: set its max_payload to 2MB, as deploy/nats does", conn.MaxPayload(), minHubPayload)
		conn.Close()
	}
	if err != nil {
		if d.dialing.since.IsZero() {
			d.dialing.since, d.dialing.said = time.Now(), new(backoff.Repeats)
		}
		// Once a minute, and at once when the reason changes.
		if _, due := d.dialing.said.Due(bus.Kind(err), time.Now()); due {
			d.log.Warn("hub unreachable, spooling", "err", err, "away", time.Since(d.dialing.since).Truncate(time.Second))
		}
		return nil, err
	}
	if !d.dialing.since.IsZero() {
		d.log.Info("hub back, draining", "away", time.Since(d.dialing.since).Truncate(time.Millisecond))
	}
	d.dialing.since = time.Time{}
	d.conn.Store(conn)
	return conn, nil
}

// connected does not wait for a dial in progress.
func (d *dialer) connected() bool {
	conn := d.conn.Load()
	return conn != nil && conn.Connected()
}

// close must be called after the last dial.
func (d *dialer) close() {
	if conn := d.conn.Load(); conn != nil {
		conn.Close()
	}
}
