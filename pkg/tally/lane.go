package tally

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
)

// Bucket has the tallies, under <stream>.<lane>.
var Bucket = bus.BucketConfig{Name: "TALLIES", Description: "what has become of the items of each instance, a key for each lane", Fenced: true}

// Config is the lane of a tally.
type Config struct {
	Conn         func() *bus.Conn
	Replicas     int // of the bucket
	Stream, Lane string
	Filter       string // the lane's
	// Items calls saw with the items of a message, as the lane's reader does. If it panics, what is left counts as one item
	// of the message's instance: its reader has dead-lettered it.
	Items func(d bus.Delivery, saw func(instance string, items int))
	// Missing, if not nil, is called with how many messages of edges never came.
	Missing func(messages float64)
	Log     *slog.Logger
}

// Lane keeps the tally of one lane. A nil Lane keeps none. Its methods may be called from several
// goroutines.
type Lane struct {
	cfg  Config
	said backoff.Repeats

	storing sync.Mutex // held while the tally is stored; taken before mu

	mu       sync.Mutex
	book     *Book // nil: not claimed, or the tally cannot be stored
	own      *Book // the last one of this process, at revision: the hub may have lost it
	bucket   *bus.Bucket
	revision uint64
	tried    []byte // a tally that may have been stored: there was no answer
	stored   time.Time
	size     int    // bytes of the last one that was stored
	missing  uint64 // messages, when that was last logged
}

const (
	// storeInterval is how often a tally is stored while it changes.
	storeInterval = time.Second
	// storeRate bounds what a lane stores in bytes a second: a tally of many instances is stored more rarely.
	storeRate = 64 << 10
	// maxStored is the largest tally that is stored with the numbers of the edges' messages, in bytes: a message
	// has room for it, and for the counts of as many instances as there may be.
	maxStored = 512 << 10
	// patience is how long a claim may read again what is unrecorded.
	patience = 10 * time.Second
	// getPatience is how long a claim waits for the tally: a hub that denies it does not answer.
	getPatience = 2 * time.Second
	// lastPatience is how long a lane's end may wait until its tally is stored.
	lastPatience = time.Second
)

// Open returns the tally of a lane, which has to be claimed.
func Open(cfg Config) *Lane { return &Lane{cfg: cfg} }

func (l *Lane) key() string { return l.cfg.Stream + "." + l.cfg.Lane }

// Claim continues the tally of the previous owner, whose storing ends with that, at the lane's floor. It
// returns the sequence up to which messages are known to be finished: the floor may be lower. After an
// error it may be called again. If the credential may not use the bucket, nothing is counted.
func (l *Lane) Claim(ctx context.Context, floor uint64) (finished uint64, err error) {
	if l == nil {
		return floor, nil
	}
	l.storing.Lock()
	defer l.storing.Unlock()
	l.mu.Lock()
	l.book, l.tried = nil, nil
	l.mu.Unlock()
	book := &Book{}
	revision, err := l.load(ctx, book)
	if l.own != nil && err == nil && revision <= l.revision { // nobody has claimed it since
		book.begin(l.own.tally.clone())
	}
	if err == nil {
		if err = l.resume(ctx, book, floor); err == nil {
			revision, err = l.put(ctx, book.tally, revision)
		}
	}
	if errors.Is(err, bus.ErrDenied) {
		if more, due := l.said.Due("denied", time.Now()); due {
			l.cfg.Log.Warn("cannot store what becomes of items; penstock audit does not know it (permissions: docs/upgrading.md)", "lane", l.key(), "err", err, "more_since_last_said", more)
		}
		return floor, nil
	}
	if err != nil {
		return floor, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	book.dirty = false
	l.book, l.own, l.revision = book, book, revision
	return max(floor, book.tally.Upto), nil
}

// load opens the bucket and reads the stored tally; it is empty if it cannot be decoded.
func (l *Lane) load(ctx context.Context, book *Book) (revision uint64, err error) {
	if l.bucket, err = l.cfg.Conn().OpenBucket(ctx, Bucket, l.cfg.Replicas); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, getPatience) // less than a pin lasts
	defer cancel()
	value, revision, err := l.bucket.Get(ctx, l.key())
	if errors.Is(err, bus.ErrMissing) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	t, err := decode(value)
	if err != nil {
		l.cfg.Log.Error("tally cannot be read; counting begins again", "lane", l.key(), "err", err)
		t = Tally{}
	}
	book.begin(t)
	return revision, nil
}

// resume continues a tally at the floor, and counts what is between them.
func (l *Lane) resume(ctx context.Context, book *Book, floor uint64) error {
	state, err := l.cfg.Conn().State(ctx, l.cfg.Stream)
	if err != nil {
		return err
	}
	now, t := time.Now(), &book.tally
	if !t.resume(stream{state.Created, state.FirstSeq, state.LastSeq}, floor, now) {
		return nil
	}
	err = l.recount(ctx, t.Upto+1, floor, book)
	if err != nil && ctx.Err() == nil {
		book.open = nil
		t.skip("messages that were finished while no tally was stored could not be read: "+err.Error(), floor, now)
		err = nil
	}
	return err
}

// recount counts finished messages from one sequence to another.
func (l *Lane) recount(ctx context.Context, from, to uint64, book *Book) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("too many"))
	defer cancel()
	cfg := bus.ReaderConfig{Stream: l.cfg.Stream, From: from}
	if l.cfg.Filter != "" {
		cfg.Filters = []string{l.cfg.Filter}
	}
	r, err := l.cfg.Conn().OpenReaderOf(ctx, cfg)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := r.Each(ctx, func(d bus.Delivery) bool {
		if d.Seq > to {
			return false
		}
		saw := func(instance string, items int) {
			book.Saw(d.Seq, instance, items, d.Header.ID)
			book.Ended(d.Seq, instance, Unrecorded, items)
		}
		if err := fault.Guard(func() error { l.cfg.Items(d, saw); return nil }); err != nil {
			l.cfg.Log.Debug("the items of a message cannot be counted", "lane", l.key(), "seq", d.Seq, "err", err)
			saw(d.Instance(), 1)
		}
		return true
	}); err != nil {
		return err
	}
	book.Close(to, time.Now())
	return nil
}

// Do calls change with the book, if the tally is claimed.
func (l *Lane) Do(change func(b *Book)) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.book != nil {
		change(l.book)
	}
}

// Floor moves the tally to the lane's floor.
func (l *Lane) Floor(floor uint64) {
	l.Do(func(b *Book) { b.Close(floor, time.Now()) })
}

// Again sets [Tally.Again]. Where that comes to hold more, it is stored at once; if that fails, as soon as possible.
func (l *Lane) Again(ctx context.Context, from uint64) {
	more := false
	l.Do(func(b *Book) {
		before := b.tally.Again
		b.tally.Again = from
		b.dirty = b.dirty || before != from
		if more = from > 0 && (before == 0 || from < before); more {
			l.stored = time.Time{}
		}
	})
	if more {
		ctx, cancel := context.WithTimeout(ctx, lastPatience)
		defer cancel()
		l.store(ctx)
	}
}

// Keep stores the tally while it changes, until the returned end is called: it stores it a last time, for
// the next owner. The lane must still be owned then, and its last floor noted.
func (l *Lane) Keep() (end func()) {
	if l == nil {
		return func() {}
	}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for backoff.Sleep(ctx, storeInterval) {
			l.store(ctx)
		}
	})
	return func() {
		stop()
		wg.Wait()
		l.last()
	}
}

func (l *Lane) last() {
	ctx, cancel := context.WithTimeout(context.Background(), lastPatience)
	defer cancel()
	l.mu.Lock()
	l.stored = time.Time{}
	l.mu.Unlock()
	l.store(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.book, l.missing = nil, 0
	if l.cfg.Missing != nil {
		l.cfg.Missing(0)
	}
}

// store stores the tally if it has changed and is due.
func (l *Lane) store(ctx context.Context) {
	l.storing.Lock()
	defer l.storing.Unlock()
	now := time.Now()
	l.mu.Lock()
	book, revision := l.book, l.revision
	if book == nil || !book.dirty || now.Sub(l.stored) < time.Duration(l.size)*time.Second/storeRate {
		l.mu.Unlock()
		return
	}
	value, err := encode(book.tally)
	l.stored, l.size, book.dirty = now, len(value), false
	l.watchLocked(now)
	l.mu.Unlock()
	if err == nil {
		revision, err = l.bucket.Store(ctx, l.key(), value, revision)
	}
	if errors.Is(err, bus.ErrChanged) || errors.Is(err, bus.ErrExists) {
		revision, err = l.again(ctx, value, err)
	}
	l.tried = nil
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err == nil:
		l.revision = revision
	case errors.Is(err, bus.ErrChanged), errors.Is(err, bus.ErrExists), errors.Is(err, bus.ErrDenied):
		l.book, l.own = nil, nil // another owner has claimed it, or the credential has lost the right
		l.cfg.Log.Debug("tally is not stored any more: it has another owner, or the permission is missing", "lane", l.key(), "err", err)
	default:
		book.dirty, l.tried = true, value
		l.cfg.Log.Debug("tally not stored, will try again", "lane", l.key(), "err", err)
	}
}

// again stores a tally whose revision is not the one in the hub: an attempt without an answer was successful, or
// the hub has lost the last ones. Otherwise another owner has stored since, and it returns err.
func (l *Lane) again(ctx context.Context, value []byte, err error) (uint64, error) {
	there, revision, why := l.bucket.Get(ctx, l.key())
	switch {
	case errors.Is(why, bus.ErrMissing):
		revision = 0
	case why != nil:
		return 0, why
	case revision > l.revision && !bytes.Equal(there, l.tried):
		return 0, err
	}
	return l.bucket.Store(ctx, l.key(), value, revision)
}

func (l *Lane) put(ctx context.Context, t Tally, revision uint64) (uint64, error) {
	value, err := encode(t)
	if err != nil {
		return 0, err
	}
	return l.bucket.Store(ctx, l.key(), value, revision)
}

// watchLocked tells of messages that never came.
func (l *Lane) watchLocked(now time.Time) {
	var all, worst uint64
	whose := ""
	for instance, c := range l.book.tally.Instances {
		if all += c.Missing; c.Missing > worst {
			worst, whose = c.Missing, instance
		}
	}
	if l.cfg.Missing != nil {
		l.cfg.Missing(float64(all))
	}
	if all > l.missing {
		if more, due := l.said.Due("missing", now); due {
			l.cfg.Log.Error("messages that an edge has numbered never came: they were lost at the edge or in the hub, or are still to come", "lane", l.key(), "messages", all, "instance", whose, "more_since_last_said", more)
		}
	}
	l.missing = all
}

func encode(t Tally) ([]byte, error) {
	text, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	value, _ := envelope.Compress(nil, text, envelope.S2)
	if len(value) > maxStored { // without the numbers, which are followed anew
		t.Instances = maps.Clone(t.Instances)
		for name, c := range t.Instances {
			c := *c
			c.Sources = nil
			t.Instances[name] = &c
		}
		if text, err = json.Marshal(t); err != nil {
			return nil, err
		}
		value, _ = envelope.Compress(nil, text, envelope.S2)
	}
	return value, nil
}

func decode(value []byte) (t Tally, err error) {
	if !json.Valid(value) {
		if value, err = envelope.Decompress(nil, value, envelope.S2); err != nil {
			return t, err
		}
	}
	err = json.Unmarshal(value, &t)
	maps.DeleteFunc(t.Instances, func(_ string, c *Counts) bool { return c == nil })
	for _, c := range t.Instances {
		if c.Ended == nil {
			c.Ended = map[Outcome]uint64{}
		}
	}
	return t, err
}

// All returns the stored tallies, by stream and lane. A hub of an earlier version has none.
func All(ctx context.Context, conn interface {
	FindBucket(ctx context.Context, cfg bus.BucketConfig) (*bus.Bucket, error)
}) (map[string]map[string]Tally, error) {
	b, err := conn.FindBucket(ctx, Bucket)
	if errors.Is(err, bus.ErrNoStream) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	values, err := b.All(ctx)
	if err != nil {
		return nil, err
	}
	all := map[string]map[string]Tally{}
	for key, value := range values {
		stream, lane, _ := strings.Cut(key, ".")
		t, err := decode(value)
		if err != nil {
			return nil, fmt.Errorf("tally %s: %w", key, err)
		}
		if all[stream] == nil {
			all[stream] = map[string]Tally{}
		}
		all[stream][lane] = t
	}
	return all, nil
}
