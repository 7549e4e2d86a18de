package spool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/penstock/penstock/pkg/disk"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/wal"
)

// Store is the spool while its files are open: a log for each signal. After a write
// error it is closed and a new one opened.
type Store struct {
	dir   string
	lock  *disk.Lock
	logs  [len(otlpwire.Signals)]*wal.Log
	epoch atomic.Pointer[string]
	// sent is the highest sequence of each signal that may have been sent: at first
	// the last one in the log when the store was opened.
	sent [len(otlpwire.Signals)]atomic.Uint64
	// users are the goroutines that write the store, or read it and move positions by what they
	// read. close waits for all of them: the next store may give the same sequences to other
	// messages, and an old user would move positions past those.
	users struct {
		sync.Mutex
		sync.WaitGroup
		ctx  context.Context
		stop context.CancelFunc
	}
	// refuses is why nothing is written; what is stored is still read and forwarded. nil for
	// a store that works.
	refuses atomic.Pointer[error]
}

// opener opens stores.
type opener struct {
	cfg       Config
	positions *positions
	log       *slog.Logger
	// lost is called with the number of acknowledged messages that are lost.
	lost func(sig otlpwire.Signal, messages uint64)
}

// Hub is the reader whose position is what the hub has.
const Hub = "hub"

// damagedDir is where copies of damaged files are put.
const damagedDir = "damaged"

// errOld is fatal: the messages of the earlier version must not be ignored.
var errOld = errors.New("holds a spool of an earlier version, in the directory jetstream: let that version run until its penstock_spool_bytes is 0, then remove jetstream")

// open examines the spool's files and repairs what is damaged. after is the write error
// that closed the previous store; nil at a start.
//
// If messages are missing from the end of a log, their sequences are given to the next
// messages. The hub may have some of them: the positions are written only every second, so
// it may have acknowledged more than they show. It would not store a new message under an id
// that it knows. So the ids then begin with a new nonce, before anything is sent.
func (o *opener) open(after error) (st *Store, err error) {
	st = &Store{dir: o.cfg.Dir}
	st.users.ctx, st.users.stop = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			st.close()
			st = nil
		}
	}()
	if st.lock, err = disk.Own(o.cfg.Dir); err != nil {
		return st, err
	}
	if _, err := os.Stat(filepath.Join(o.cfg.Dir, "jetstream")); err == nil {
		return st, fmt.Errorf("%s %w", o.cfg.Dir, errOld)
	}
	anew := false
	for _, sig := range otlpwire.Signals {
		missing, err := o.openLog(st, sig, after != nil)
		if err != nil {
			return st, err
		}
		if missing > 0 {
			o.log.Error("messages are missing from the end of the spool", "signal", sig, "messages", missing)
			o.lost(sig, missing)
			anew = true
		}
	}
	nonce, err := loadEpoch(o.cfg.Dir, anew)
	if st.epoch.Store(&nonce); nonce == "" {
		return st, err
	}
	if err = errors.Join(err, o.positions.save()); err != nil {
		st.refuse(err) // a full disk: what it holds can be forwarded
	}
	return st, nil
}

// openLog opens the log of a signal and reports what was found. It returns how many
// messages are missing from its end, whose sequences are given again.
func (o *opener) openLog(st *Store, sig otlpwire.Signal, distrust bool) (missing uint64, err error) {
	o.sweep(sig)
	done := o.positions.get(Hub, sig).Done
	dir := filepath.Join(o.cfg.Dir, sig.String())
	if n := size(dir); n > tellBytes {
		o.log.Info("reading the spool", "signal", sig, "bytes", n)
	}
	began := time.Now()
	l, report, err := wal.Open(wal.Config{
		Dir: dir, MaxBytes: int64(o.cfg.share(sig)),
		Sync: o.cfg.Durability == "fsync", Next: done + 1, Distrust: distrust,
		Keep: func(path string) error {
			return disk.Keep(path, filepath.Join(o.cfg.Dir, damagedDir, fmt.Sprintf("%s@%s-%s", sig, time.Now().UTC().Format("20060102T150405.000000"), filepath.Base(path))))
		},
	})
	if err != nil {
		return 0, err
	}
	st.logs[sig] = l
	o.log.Debug("spool examined", "signal", sig, "messages", report.Records, "bytes", report.Bytes, "took", time.Since(began))
	if n := len(report.Damage); n > 0 {
		o.log.Error("spool is damaged: undamaged messages stay in it, copies of the damaged files are kept", "signal", sig, "places", n, "first", report.Damage[0].String(), "aside", filepath.Join(o.cfg.Dir, damagedDir))
	}
	if report.Torn != "" {
		o.log.Warn("the spool's newest file ends with an incomplete write; a copy is kept", "signal", sig, "bytes", report.TornBytes, "aside", filepath.Join(o.cfg.Dir, damagedDir))
	}
	state := l.State()
	gone := uint64(0)
	for _, m := range report.Missing {
		if m.To > done { // else a crash while files were deleted whose messages the hub has
			gone += m.To - max(m.From-1, done)
		}
	}
	if o.positions.end(sig) > 0 && state.Records() > 0 && state.First > done+1 {
		gone += state.First - done - 1
		o.positions.advance(Hub, sig, state.First-1, 0) // so that it is reported only once
	}
	if gone > 0 {
		o.log.Error("messages are missing from the spool", "signal", sig, "messages", gone)
		o.lost(sig, gone)
	}
	st.sent[sig].Store(state.Last)
	return o.positions.reconcile(sig, state.Last), nil
}

// Nonce returns the beginning of the ids of the messages that are sent now.
func (st *Store) Nonce() string { return *st.epoch.Load() }

// Sending notes that a message is about to be sent, and reports whether it may have been before.
func (st *Store) Sending(sig otlpwire.Signal, seq uint64) (again bool) {
	before := st.sent[sig].Load()
	st.sent[sig].Store(max(before, seq))
	return seq <= before
}

// Renew replaces the nonce, and thus all ids.
func (st *Store) Renew() error {
	nonce, err := loadEpoch(st.dir, true)
	if err == nil {
		st.epoch.Store(&nonce)
	}
	return err
}

// refuse makes the store read-only.
func (st *Store) refuse(err error) { st.refuses.Store(&err) }

// refusing returns why nothing is written, or nil.
func (st *Store) refusing() error {
	if err := st.refuses.Load(); err != nil {
		return *err
	}
	for _, l := range st.logs {
		if err := l.Err(); err != nil {
			return err
		}
	}
	return nil
}

// use makes the caller a user, until leave; ok is false when the store is being closed.
func (st *Store) use() (leave func(), ok bool) {
	st.users.Lock()
	defer st.users.Unlock()
	if st.users.ctx.Err() != nil {
		return nil, false
	}
	st.users.Add(1)
	return st.users.Done, true
}

// Enter is use for longer work: the returned context ends with ctx and when the store
// is being closed.
func (st *Store) Enter(ctx context.Context) (work context.Context, leave func(), ok bool) {
	done, ok := st.use()
	if !ok {
		return nil, nil, false
	}
	work, cancel := context.WithCancel(ctx)
	unlink := context.AfterFunc(st.users.ctx, cancel)
	return work, func() { unlink(); cancel(); done() }, true
}

// close waits until nobody uses the store, and closes its files.
func (st *Store) close() {
	st.users.Lock()
	st.users.stop()
	st.users.Unlock()
	st.users.Wait()
	for _, l := range st.logs {
		if l != nil {
			_ = l.Close()
		}
	}
	if st.lock != nil {
		st.lock.Free()
	}
}

// Message is a group as the spool holds it: what the hub gets, and its sequence.
type Message struct {
	wal.Record // without the head of the body
	Header     envelope.Header
	Held       int64 // bytes that it takes in the spool
}

// A record of the log is arrival(8) items(4) encoding(1) body, in little endian; if
// hasLoad is set in encoding, the load comes before the body.
const (
	messageHead = 13
	hasLoad     = 0x80
)

var le = binary.LittleEndian

var encodings = []envelope.Encoding{"", envelope.S2, envelope.Zstd}

func appendHead(b []byte, h envelope.Header) []byte {
	b = le.AppendUint64(b, uint64(h.Arrival))
	b = le.AppendUint32(b, uint32(min(h.Items, math.MaxUint32)))
	encoding := byte(slices.Index(encodings, h.Encoding))
	if h.Load == (envelope.Load{}) {
		return append(b, encoding)
	}
	return h.Load.Append(append(b, encoding|hasLoad))
}

// parse reads a record. One that no edge can have written counts as missing.
func parse(r wal.Record) Message {
	m := Message{Record: r, Header: envelope.Header{ContentType: envelope.ContentTypeOTLP}, Held: r.Size()}
	switch {
	case r.Missing > 0:
	case len(r.Body) < messageHead || int(r.Body[12]&^hasLoad) >= len(encodings):
		m.Missing, m.Body = 1, nil
	default:
		m.Header.Arrival, m.Header.Items, m.Header.Encoding = int64(le.Uint64(r.Body)), int(le.Uint32(r.Body[8:])), encodings[r.Body[12]&^hasLoad]
		m.Body = r.Body[messageHead:]
		ok := true
		if r.Body[12]&hasLoad != 0 {
			m.Header.Load, m.Body, ok = envelope.NextLoad(m.Body)
		}
		if !ok {
			m.Missing, m.Body = 1, nil
		}
	}
	return m
}

// Reader reads messages of a signal.
type Reader struct{ *wal.Reader }

// readPause is how long a reader waits for more when it has read everything: at thousands of
// requests a second, each a message, waking it for each would cost more than reading.
const readPause = 10 * time.Millisecond

// Read returns a reader that begins after done, what has been read before.
func (st *Store) Read(sig otlpwire.Signal, done uint64) Reader {
	r := st.logs[sig].Read(done + 1)
	r.Pause = readPause
	return Reader{r}
}

// Next returns the next message; it waits for one until ctx ends.
func (r Reader) Next(ctx context.Context) (Message, error) {
	rec, err := r.Reader.Next(ctx)
	return parse(rec), err
}

// sweep bounds the copies of a signal's damaged files by twice the signal's share;
// the oldest is removed first.
func (o *opener) sweep(sig otlpwire.Signal) {
	all, _ := filepath.Glob(filepath.Join(o.cfg.Dir, damagedDir, sig.String()+"@*")) // in order of time
	kept := int64(0)
	for _, path := range slices.Backward(all) {
		info, err := os.Stat(path)
		if err != nil {
			continue
		}
		if kept += info.Size(); kept > 2*int64(o.cfg.share(sig)) {
			o.log.Warn("old copy of a damaged file removed", "file", path)
			_ = os.Remove(path)
		}
	}
}

// tellBytes is the size from which reading a log is logged: it takes seconds.
const tellBytes = 512 << 20

// size adds up the files in a directory, in bytes.
func size(dir string) (total int64) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			total += info.Size()
		}
	}
	return total
}

// fatal reports whether an operator has to correct the configuration before a spool can
// be opened: then the process ends with the reason instead of trying again.
func fatal(err error) bool {
	return errors.Is(err, disk.ErrOwned) || errors.Is(err, errOld) || errors.Is(err, wal.ErrVersion) ||
		errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) || disk.ReadOnly(err)
}
