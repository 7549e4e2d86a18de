package bus

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/envelope"
)

// Bucket is a small shared table in the hub: keys of tokens and dots, values of a few
// KiB. Who may write a key is a matter of his credential: a key stands for the subject
// $KV.<bucket>.<key>.
type Bucket struct {
	kv   jetstream.KeyValue
	name string
	conn *Conn
}

const (
	replaysBucket = "REPLAYS"

	// What all jobs together may take in the hub, and one value.
	maxReplays     = 64 << 20
	maxReplayValue = 512 << 10
)

// The answers of a bucket.
var (
	ErrExists  = errors.New("the key is there already")
	ErrMissing = errors.New("there is no such key")
	ErrChanged = errors.New("another has changed the key meanwhile")
	ErrDenied  = errors.New("the credential does not allow that")
)

// Replays returns the bucket of replay jobs; it is made when it is not there. It is
// made as a stream, for a bucket of the client library lets whoever may write one key
// delete all, by a message with Nats-Rollup.
func (c *Conn) Replays(ctx context.Context, t Topology) (*Bucket, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	kv, err := c.js.KeyValue(ctx, replaysBucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		_, err = c.js.CreateStream(ctx, jetstream.StreamConfig{
			Name: "KV_" + replaysBucket, Description: "replay jobs, and how far they are", Subjects: []string{"$KV." + replaysBucket + ".>"},
			Storage: jetstream.FileStorage, Replicas: t.Replicas, MaxMsgsPerSubject: 1, Discard: jetstream.DiscardNew,
			MaxBytes: maxReplays, MaxMsgSize: maxReplayValue, DenyDelete: true, AllowDirect: true,
		})
		if err == nil || errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // another process was just as early
			kv, err = c.js.KeyValue(ctx, replaysBucket)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", replaysBucket, err)
	}
	return &Bucket{kv, replaysBucket, c}, nil
}

// failed says what failed; began is when it was tried.
func (b *Bucket) failed(began time.Time, what, key string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, jetstream.ErrKeyExists) && what == "create":
		err = ErrExists
	case errors.Is(err, jetstream.ErrKeyExists): // a revision that is not the last one
		err = ErrChanged
	case errors.Is(err, jetstream.ErrKeyNotFound):
		err = ErrMissing
	}
	if denied, _ := b.conn.denials.since(began, "$KV."+b.name+"."+key, "KV_"+b.name); denied {
		err = fmt.Errorf("%w: %w", ErrDenied, err)
	}
	return fmt.Errorf("%s %s in bucket %s: %w", what, key, b.name, err)
}

// Create stores a key that is not there; [ErrExists] when it is.
func (b *Bucket) Create(ctx context.Context, key string, value []byte) error {
	_, err := b.Store(ctx, key, value, 0)
	return err
}

// Store stores a key that has the revision, 0 for one that is not there, and returns its
// next one; [ErrChanged] or [ErrExists] when it has another.
func (b *Bucket) Store(ctx context.Context, key string, value []byte, revision uint64) (next uint64, err error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	if revision == 0 {
		next, err = b.kv.Create(ctx, key, value)
		return next, b.failed(began, "create", key, err)
	}
	next, err = b.kv.Update(ctx, key, value, revision)
	return next, b.failed(began, "change", key, err)
}

// Get returns a value and its revision; [ErrMissing] when there is none.
func (b *Bucket) Get(ctx context.Context, key string) (value []byte, revision uint64, err error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	e, err := b.kv.Get(ctx, key)
	if err != nil {
		return nil, 0, b.failed(began, "read", key, err)
	}
	return e.Value(), e.Revision(), nil
}

// Delete removes a key.
func (b *Bucket) Delete(ctx context.Context, key string) error {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	return b.failed(began, "delete", key, b.kv.Delete(ctx, key))
}

// Watch calls seen with every key there is, with "" when those have been said, and
// then with every change, the value nil for a key that was deleted. It returns when
// the watch breaks or ctx ends.
func (b *Bucket) Watch(ctx context.Context, seen func(key string, value []byte)) error {
	began := time.Now()
	w, err := b.kv.WatchAll(ctx)
	if err != nil {
		return b.failed(began, "watch", "all keys", err)
	}
	defer func() { _ = w.Stop() }()
	for {
		select {
		case e, ok := <-w.Updates():
			switch {
			case !ok && ctx.Err() != nil:
				return nil
			case !ok:
				return b.failed(began, "watch", "all keys", errors.New("the watch has ended"))
			case e == nil:
				seen("", nil)
			case e.Operation() == jetstream.KeyValuePut:
				seen(e.Key(), e.Value())
			default:
				seen(e.Key(), nil)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// All returns the keys there are and their values.
func (b *Bucket) All(ctx context.Context) (map[string][]byte, error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	all := map[string][]byte{}
	err := b.Watch(ctx, func(key string, value []byte) {
		switch {
		case key == "":
			cancel()
		case value != nil:
			all[key] = value
		}
	})
	if err == nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = b.failed(began, "read", "all keys", ctx.Err())
	}
	return all, err
}

// WatchReplays follows the bucket of replay jobs as [Bucket.Watch] does, until ctx
// ends. begin is called before everything is said anew.
func (h *Hub) WatchReplays(ctx context.Context, begin func(), seen func(key string, value []byte)) {
	for ctx.Err() == nil {
		b, err := h.Conn.Replays(ctx, h.topology)
		if err == nil {
			begin()
			err = b.Watch(ctx, seen)
		}
		if err != nil && ctx.Err() == nil {
			h.log.Warn("replay jobs cannot be watched, will try again", "err", err)
		}
		backoff.Sleep(ctx, renewInterval)
	}
}

// Record writes a line to the stream AUDIT, under audit.<what>. body is JSON.
func (c *Conn) Record(ctx context.Context, what string, body []byte) error {
	_, err := c.Publish(ctx, Message{Subject: "audit." + what, Header: envelope.Header{ContentType: envelope.ContentTypeJSON}, Body: body})
	return err
}

// Recorded returns the lines under audit.<what>, oldest first.
func (c *Conn) Recorded(ctx context.Context, what string) (lines [][]byte, err error) {
	r, err := c.OpenReaderOf(ctx, ReaderConfig{Stream: Audit, Filters: []string{"audit." + what}})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	err = r.Each(ctx, func(d Delivery) bool {
		lines = append(lines, d.Body)
		return true
	})
	return lines, err
}

// SubjectPartition returns the partition in a subject as a signal's stream stores it,
// otlp.<signal>.<partition>.<instance>, and the instance.
func SubjectPartition(subject string) (partition, instance string) {
	tokens := strings.Split(subject, ".")
	if len(tokens) != 4 {
		return "", ""
	}
	return tokens[2], tokens[3]
}
