package edge

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// store is the spool while its files are open: an embedded JetStream that no
// socket leads to. After a write error it is closed and another one opened.
type store struct {
	broker *broker.Broker
	conn   *bus.Conn
	epoch  atomic.Pointer[string]
	// sent is the highest sequence of each signal that may have been sent: at first
	// all that was there when the store was opened.
	sent [len(otlpwire.Signals)]atomic.Uint64
	// writing ends when the server says that it cannot write.
	writing context.Context
	stop    context.CancelFunc
	// users are those who read the store, and move marks by what they read. None is
	// left when it has been closed: the next one may give sequences again.
	users struct {
		sync.Mutex
		sync.WaitGroup
		ctx  context.Context
		stop context.CancelFunc
	}
	// refuses is why nothing is written, though it is read and forwarded: the
	// youngest file could not be made sure of. nil for a store that works.
	refuses atomic.Pointer[error]
}

// opener is what it takes to open a store.
type opener struct {
	cfg   SpoolConfig
	marks *marks
	log   *slog.Logger
	// lost is told how many messages are gone that were acknowledged.
	lost func(sig otlpwire.Signal, messages uint64)
}

// hubReader is the name of the mark of what the hub has.
const hubReader = "hub"

// damagedDir is where files are put that were not as they should be.
const damagedDir = "damaged"

// pendingSuffix marks what was put aside and not yet read for what is whole.
const pendingSuffix = ".pending"

// open examines the spool's files, puts aside what is damaged, starts the server
// and takes in what of the damaged files is whole. after is the write error that
// closed the store before; nil at a start.
func (o *opener) open(ctx context.Context, after error) (st *store, err error) {
	st = &store{}
	st.writing, st.stop = context.WithCancel(context.Background())
	st.users.ctx, st.users.stop = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			st.close()
			st = nil
		}
	}()
	anew := after != nil
	st.broker, err = broker.Start(broker.Config{
		Name: "spool", Dir: o.cfg.Dir, Sync: o.cfg.Durability == "fsync", MaxPayload: 2 * envelope.MaxPayload,
		Prepare: func() error { return o.prepare(st, after != nil) },
	}, o.log)
	if err != nil {
		return st, err
	}
	go func(broken <-chan struct{}, writing context.Context, stop func()) {
		select {
		case <-broken:
		case <-writing.Done():
		}
		stop()
	}(st.broker.Broken(), st.writing, st.stop)
	if st.conn, err = bus.Connect(bus.Config{Name: "spool", InProcess: st.broker}, o.log); err != nil {
		return st, err
	}
	if err = st.conn.EnsureSpool(ctx, o.cfg.shares()); err != nil {
		return st, err
	}
	for _, sig := range otlpwire.Signals {
		restored, err := o.restore(ctx, st, sig)
		if err != nil {
			return st, err
		}
		state, err := st.conn.State(ctx, bus.SpoolStream(sig))
		if err != nil {
			return st, err
		}
		missing := o.marks.reconcile(sig, state.LastSeq)
		if missing > 0 {
			o.log.Error("messages are gone from the end of the spool", "signal", sig, "messages", missing)
			o.lost(sig, missing)
		}
		anew = anew || restored || missing > 0
		st.sent[sig].Store(state.LastSeq)
	}
	nonce, err := loadEpoch(o.cfg.Dir, anew)
	if st.epoch.Store(&nonce); nonce == "" {
		return st, err
	}
	if err = errors.Join(err, o.marks.save()); err != nil {
		st.refuse(err) // a full disk: what it holds can be forwarded
	}
	return st, nil
}

// nonce begins the ids of the messages that are sent now.
func (st *store) nonce() string { return *st.epoch.Load() }

// renew makes the ids new ones.
func (st *store) renew(dir string) error {
	nonce, err := loadEpoch(dir, true)
	if err == nil {
		st.epoch.Store(&nonce)
	}
	return err
}

// refuse makes the store one that is read only.
func (st *store) refuse(err error) { st.refuses.Store(&err) }

// refusing returns why nothing is written, or nil.
func (st *store) refusing() error {
	if err := st.refuses.Load(); err != nil {
		return *err
	}
	return nil
}

// publish returns when msg is durable, with its sequence, or the store is found not to
// write.
func (st *store) publish(ctx context.Context, msg bus.Message) (seq uint64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(st.writing, func() { cancel(bus.ErrStore) })()
	seq, err = st.conn.Publish(ctx, msg)
	if err != nil && st.writing.Err() != nil {
		err = bus.ErrStore
	}
	return seq, err
}

// enter makes the caller a user, until leave. The context that it works under ends
// with ctx, and when the store is to be closed; ok is false when it is already.
func (st *store) enter(ctx context.Context) (work context.Context, leave func(), ok bool) {
	st.users.Lock()
	defer st.users.Unlock()
	if st.users.ctx.Err() != nil {
		return nil, nil, false
	}
	st.users.Add(1)
	work, cancel := context.WithCancel(ctx)
	unlink := context.AfterFunc(st.users.ctx, cancel)
	return work, func() { unlink(); cancel(); st.users.Done() }, true
}

// close waits until nobody uses the store.
func (st *store) close() {
	st.stop()
	st.users.Lock()
	st.users.stop()
	st.users.Unlock()
	st.users.Wait()
	if st.conn != nil {
		st.conn.Close()
	}
	if st.broker != nil {
		st.broker.Stop()
	}
}

// prepare looks at the files while no server has them open.
func (o *opener) prepare(st *store, renew bool) error {
	for _, sig := range otlpwire.Signals {
		if err := o.sweep(sig); err != nil {
			return err
		}
		dir := broker.StreamDir(o.cfg.Dir, bus.SpoolStream(sig))
		if len(o.pending(sig)) > 0 {
			// The last start ended while it took in what was whole: what it has taken in
			// is there still, and nothing else has been added.
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			continue
		}
		began := time.Now()
		c, err := broker.Examine(dir, nil)
		if err != nil {
			return err
		}
		o.log.Debug("spool examined", "signal", sig, "messages", c.Records, "bytes", c.Bytes, "took", time.Since(began))
		if end, done := o.marks.end(sig), o.marks.get(hubReader, sig).Done; end > 0 && c.First > done+1 {
			o.log.Error("messages are gone from the start of the spool", "signal", sig, "messages", c.First-done-1)
			o.lost(sig, c.First-done-1)
			o.marks.advance(hubReader, sig, c.First-1, 0) // told once
		}
		switch damage := o.serious(sig, c); {
		case len(damage) > 0:
			aside := o.aside(sig) + pendingSuffix
			o.log.Error("spool is damaged: its files are put aside, what is whole is taken over", "signal", sig, "files", aside, "places", len(damage), "first", damage[0].String())
			if err := os.MkdirAll(filepath.Dir(aside), 0o700); err != nil {
				return err
			}
			if err := os.Rename(dir, aside); err != nil {
				return err
			}
		case c.Torn != "":
			aside := o.aside(sig) + ".blk"
			o.log.Warn("the spool's youngest file ends with a write that was cut off; a copy is kept", "signal", sig, "bytes", c.TornBytes, "copy", aside)
			if err := errors.Join(keep(c.Torn, aside), forgetIndex(dir)); err != nil {
				return err
			}
		case o.short(sig, c):
			if err := forgetIndex(dir); err != nil {
				return err
			}
		case renew:
			if err := broker.Renew(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				st.refuse(err)
			}
		}
	}
	return nil
}

// serious leaves out what is missing among messages that the hub has: a crash while
// they were deleted.
func (o *opener) serious(sig otlpwire.Signal, c broker.Condition) (all []broker.Damage) {
	done := o.marks.get(hubReader, sig).Done
	for _, d := range c.Damage {
		if d.To == 0 || d.To > done {
			all = append(all, d)
		}
	}
	return all
}

// short reports whether messages that the hub does not have are gone from the end.
func (o *opener) short(sig otlpwire.Signal, c broker.Condition) bool {
	end := o.marks.end(sig)
	return c.Last < end && o.marks.get(hubReader, sig).Done < end
}

// forgetIndex makes the server look at the blocks: it believes its index without.
func forgetIndex(streamDir string) error {
	err := os.Remove(filepath.Join(streamDir, "msgs", "index.db"))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return err
}

func (o *opener) aside(sig otlpwire.Signal) string {
	return filepath.Join(o.cfg.Dir, damagedDir, bus.SpoolStream(sig)+"@"+time.Now().UTC().Format("20060102T150405.000000"))
}

// pending returns what was put aside and not yet taken over.
func (o *opener) pending(sig otlpwire.Signal) []string {
	all, _ := filepath.Glob(filepath.Join(o.cfg.Dir, damagedDir, bus.SpoolStream(sig)+"@*"+pendingSuffix))
	return all
}

// sweep bounds what is kept of a signal's damaged files by twice the signal's share;
// the oldest goes first. What is not taken over yet stays.
func (o *opener) sweep(sig otlpwire.Signal) error {
	all, err := filepath.Glob(filepath.Join(o.cfg.Dir, damagedDir, bus.SpoolStream(sig)+"@*")) // in order of time
	kept := int64(0)
	for _, path := range slices.Backward(all) {
		if strings.HasSuffix(path, pendingSuffix) {
			continue
		}
		if kept += size(path); kept > 2*int64(o.cfg.share(sig)) {
			o.log.Warn("damaged files from long ago are removed", "files", path)
			err = errors.Join(err, os.RemoveAll(path))
		}
	}
	return err
}

// size adds up the files of a directory, in bytes.
func size(path string) (total int64) {
	_ = filepath.WalkDir(path, func(_ string, e fs.DirEntry, err error) error {
		if err == nil {
			if info, err := e.Info(); err == nil && info.Mode().IsRegular() {
				total += info.Size()
			}
		}
		return nil
	})
	return total
}

// restore takes over what is whole in the files put aside, and reports the rest. What
// it takes over has new sequences.
func (o *opener) restore(ctx context.Context, st *store, sig otlpwire.Signal) (restored bool, err error) {
	pending := o.pending(sig)
	if len(pending) > 0 {
		// What was taken is not refused now, though max_bytes may have become less.
		if err := st.conn.EnsureSpool(ctx, [len(otlpwire.Signals)]int64{1 << 40, 1 << 40, 1 << 40}); err != nil {
			return false, err
		}
		defer func() { err = errors.Join(err, st.conn.EnsureSpool(ctx, o.cfg.shares())) }()
	}
	for _, dir := range pending {
		was := o.marks.get(hubReader, sig)
		next, missing, n := was.Done+1, uint64(0), uint64(0)
		_, err := broker.Examine(dir, func(r broker.Record) error {
			if r.Seq <= was.Done {
				return nil // the hub has it
			}
			if known := next > 1 || o.marks.end(sig) > 0; known && r.Seq > next {
				missing += r.Seq - next
			}
			next = r.Seq + 1
			n++
			return st.conn.Restore(ctx, bus.SpoolSubject(sig), r.Header, r.Body)
		})
		if err != nil {
			return restored, fmt.Errorf("take over damaged spool %s: %w", dir, err)
		}
		if end := o.marks.end(sig); end >= next {
			missing += end - next + 1
		}
		o.marks.begin(sig, n)
		if err := o.marks.save(); err != nil {
			return restored, err
		}
		kept := strings.TrimSuffix(dir, pendingSuffix)
		if err := os.Rename(dir, kept); err != nil {
			return restored, err
		}
		o.log.Error("damaged spool: what was whole is taken over", "signal", sig, "messages", n, "lost", missing, "files", kept)
		o.lost(sig, missing)
		restored = true
	}
	return restored, nil
}

// fatal reports whether a person has to mend the configuration before a spool can
// be opened: then the process ends with the reason instead of trying again.
func fatal(err error) bool {
	return errors.Is(err, broker.ErrOwned) || errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.EROFS)
}

// keep copies a file, one block at the most, to where it can be looked at.
func keep(from, to string) error {
	body, err := os.ReadFile(from)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(to), 0o700)
	}
	if err != nil {
		return err
	}
	return broker.WriteSynced(to, body)
}
