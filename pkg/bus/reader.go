package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Reader reads a stream in order from a sequence on. It keeps no state on the
// server: the caller keeps its own position. Messages that were deleted are
// skipped. For one goroutine.
//
// A [Lane] is for the hub, where owners change; a Reader is for a stream that one
// process owns, or for reading without changing anything.
type Reader struct {
	conn     *Conn
	stream   string
	consumer string
	pull     *pull
	next     uint64 // expected delivery sequence
	left     uint64 // messages after the last one
	headers  bool   // bodies stay on the server
}

// readerIdle is how long the server keeps the consumer of a reader that requests nothing.
const readerIdle = time.Minute

// ReaderConfig is what a reader reads.
type ReaderConfig struct {
	Stream  string
	From    uint64   // it begins here, or at the first message after
	Filters []string // stored subjects; none for all
	// Headers leaves the bodies on the server.
	Headers bool
	// Single reads at most two messages ahead, for one of many readers.
	Single bool
}

// OpenReader reads all of a stream from sequence from on.
func (c *Conn) OpenReader(ctx context.Context, stream string, from uint64) (*Reader, error) {
	return c.OpenReaderOf(ctx, ReaderConfig{Stream: stream, From: from})
}

// OpenReaderOf returns a reader of what cfg describes.
func (c *Conn) OpenReaderOf(ctx context.Context, cfg ReaderConfig) (*Reader, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	stream := cfg.Stream
	r := &Reader{conn: c, stream: stream, next: 1, headers: cfg.Headers}
	cons, err := c.js.CreateConsumer(ctx, stream, jetstream.ConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: max(cfg.From, 1),
		FilterSubjects: cfg.Filters, HeadersOnly: cfg.Headers,
		AckPolicy: jetstream.AckNonePolicy, InactiveThreshold: readerIdle, MemoryStorage: true, Replicas: 1,
	})
	if err == nil {
		r.consumer, r.left = cons.CachedInfo().Name, cons.CachedInfo().NumPending
		r.pull, err = newPull(c, stream, r.consumer, "", "")
	}
	if err == nil {
		r.pull.single, r.pull.always = cfg.Single, cfg.Single
	}
	if err != nil {
		return nil, r.failed(err)
	}
	return r, nil
}

func (r *Reader) failed(err error) error { return fmt.Errorf("read %s: %w", r.stream, err) }

var errGap = errors.New("a message was not delivered")

// Next blocks until the next message or until ctx ends. Its body is as it was
// published, compressed. After an error the caller closes the reader and opens a new one.
func (r *Reader) Next(ctx context.Context) (Delivery, error) {
	for {
		msg, err := r.pull.next(ctx, quietIdle, nil)
		if err != nil {
			return Delivery{}, r.failed(err)
		}
		if msg == nil {
			continue // quiet
		}
		meta, err := msg.Metadata()
		if err == nil && meta.Sequence.Consumer != r.next {
			err = errGap
		}
		if err != nil {
			return Delivery{}, r.failed(err)
		}
		r.next++
		r.left = meta.NumPending
		d := newDelivery(msg, meta, true, r.headers)
		if reason := msg.Header.Get(headerReason); reason != "" {
			d.Refusal = &Refusal{Reason: reason, Detail: msg.Header.Get(headerDetail), Backend: msg.Header.Get(headerBackend), Source: msg.Header.Get(headerSource)}
		}
		return d, nil
	}
}

// gone is after how long without a message the hub is asked whether any is left.
const gone = 5 * time.Second

// Each calls visit with every message that the stream had when the reader was opened, or that
// came while it read, until none is left or visit returns false. Messages that are removed
// from the stream meanwhile are skipped.
func (r *Reader) Each(ctx context.Context, visit func(Delivery) bool) error {
	for r.left > 0 {
		wait, cancel := context.WithTimeout(ctx, gone)
		d, err := r.Next(wait)
		cancel()
		switch {
		case err == nil:
			if !visit(d) {
				return nil
			}
		case ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded):
			cons, err := r.conn.js.Consumer(ctx, r.stream, r.consumer)
			if err != nil {
				return r.failed(err)
			}
			r.left = cons.CachedInfo().NumPending
		default:
			return err
		}
	}
	return nil
}

// Left returns how many messages come after the last one that was read.
func (r *Reader) Left() uint64 { return r.left }

// Close ends reading.
func (r *Reader) Close() {
	r.pull.stop()
	ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
	defer cancel()
	_ = r.conn.js.DeleteConsumer(ctx, r.stream, r.consumer) // else it expires after readerIdle
}
