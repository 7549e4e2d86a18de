package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// BucketConfig is how a bucket is created if the hub has none of its name.
type BucketConfig struct {
	Name        string
	Description string
	// TTL is how long a key stays that is not written again; 0: for ever.
	TTL time.Duration
	// Memory: the bucket need not survive the server, since every key is written again soon.
	Memory bool
	// Fenced: a credential that may write one key can delete no other. A bucket of the client library
	// allows rollups, by which one message deletes all keys; a fenced bucket allows none, and has no
	// [Bucket.Purge].
	Fenced bool
	// MaxBytes bounds all values together, MaxValue one, in bytes; 0 for no bound but that of messages.
	MaxBytes, MaxValue int
}

// Bucket is a small shared table in the hub: keys of tokens and dots, values of a few
// KiB. The credential determines which keys may be written: a key is the subject
// $KV.<bucket>.<key>.
type Bucket struct {
	kv   jetstream.KeyValue
	name string
	conn *Conn
}

// Errors of a bucket.
var (
	ErrExists  = errors.New("the key already exists")
	ErrMissing = errors.New("there is no such key")
	ErrChanged = errors.New("the key has been changed meanwhile")
	ErrDenied  = errors.New("the credential does not allow that")
)

// OpenBucket finds a bucket, or creates it with the given number of replicas.
func (c *Conn) OpenBucket(ctx context.Context, cfg BucketConfig, replicas int) (*Bucket, error) {
	b, began := &Bucket{name: cfg.Name, conn: c}, time.Now()
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	var err error
	b.kv, err = c.js.KeyValue(ctx, cfg.Name)
	missing := errors.Is(err, jetstream.ErrBucketNotFound)
	if missing {
		if b.kv, err = c.makeBucket(ctx, cfg, replicas); errors.Is(err, jetstream.ErrBucketExists) || errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			b.kv, err = c.js.KeyValue(ctx, cfg.Name) // another process created it at the same time
		}
	}
	if err = b.failed(began, "open", "all keys", err); err != nil && missing {
		err = fmt.Errorf("bucket %s does not exist yet and cannot be created here; routers and sinks create theirs when they start: %w", cfg.Name, err)
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

// FindBucket finds a bucket; [ErrNoStream] if the hub has none of its name.
func (c *Conn) FindBucket(ctx context.Context, cfg BucketConfig) (*Bucket, error) {
	if _, err := c.State(ctx, "KV_"+cfg.Name); err != nil {
		return nil, err
	}
	return c.OpenBucket(ctx, cfg, 1)
}

func (c *Conn) makeBucket(ctx context.Context, cfg BucketConfig, replicas int) (jetstream.KeyValue, error) {
	storage := jetstream.FileStorage
	if cfg.Memory {
		storage = jetstream.MemoryStorage
	}
	if !cfg.Fenced {
		return c.js.CreateKeyValue(ctx, jetstream.KeyValueConfig{
			Bucket: cfg.Name, Description: cfg.Description, TTL: cfg.TTL, Storage: storage, Replicas: replicas,
			MaxBytes: int64(cfg.MaxBytes), MaxValueSize: int32(cfg.MaxValue),
		})
	}
	if _, err := c.js.CreateStream(ctx, jetstream.StreamConfig{
		Name: "KV_" + cfg.Name, Description: cfg.Description, Subjects: []string{"$KV." + cfg.Name + ".>"},
		Storage: storage, Replicas: replicas, MaxMsgsPerSubject: 1, Discard: jetstream.DiscardNew, MaxAge: cfg.TTL,
		MaxBytes: int64(cfg.MaxBytes), MaxMsgSize: int32(cfg.MaxValue), DenyDelete: true, AllowDirect: true,
	}); err != nil {
		return nil, err
	}
	return c.js.KeyValue(ctx, cfg.Name)
}

// failed adds to err what failed; began is when it was tried.
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

// Create stores a key that does not exist; [ErrExists] if it does.
func (b *Bucket) Create(ctx context.Context, key string, value []byte) error {
	_, err := b.Store(ctx, key, value, 0)
	return err
}

// Store stores a key that has the given revision, 0 for one that does not exist, and returns its
// new revision; [ErrChanged] or [ErrExists] if it has another.
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

// Get returns a value and its revision; [ErrMissing] if there is none.
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

// Put stores a key, whatever revision it has.
func (b *Bucket) Put(ctx context.Context, key string, value []byte) error {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	_, err := b.kv.Put(ctx, key, value)
	return b.failed(began, "write", key, err)
}

// Purge removes a key and its earlier values; a marker stays, as with Delete. A fenced bucket refuses it.
func (b *Bucket) Purge(ctx context.Context, key string) error {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	return b.failed(began, "purge", key, b.kv.Purge(ctx, key))
}

// Watch calls seen with every existing key that a pattern matches, ">" for all, then with "", and
// then with every change; the value is nil for a key that was deleted. It returns an error when the
// watch breaks, and nil when ctx ends.
func (b *Bucket) Watch(ctx context.Context, keys string, seen func(key string, value []byte)) error {
	began := time.Now()
	w, err := b.kv.Watch(ctx, keys)
	if err != nil {
		return b.failed(began, "watch", keys, err)
	}
	defer func() { _ = w.Stop() }()
	for {
		select {
		case e, ok := <-w.Updates():
			switch {
			case !ok && ctx.Err() != nil:
				return nil
			case !ok:
				return b.failed(began, "watch", keys, errors.New("the watch has ended"))
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

// All returns all keys and their values.
func (b *Bucket) All(ctx context.Context) (map[string][]byte, error) {
	began, complete := time.Now(), false
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	all := map[string][]byte{}
	err := b.Watch(ctx, ">", func(key string, value []byte) {
		switch {
		case key == "":
			complete = true
			cancel()
		case value != nil && !complete:
			all[key] = value
		}
	})
	if err == nil && !complete {
		err = b.failed(began, "read", "all keys", ctx.Err())
	}
	return all, err
}
