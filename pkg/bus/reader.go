package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Reader reads a stream in order from a sequence on. It keeps nothing on the
// server: who reads keeps his place himself. Messages that were deleted are
// passed over. For one goroutine.
//
// A [Lane] is for the hub, where owners change; a Reader for a stream that one
// process owns.
type Reader struct {
	conn     *Conn
	stream   string
	consumer string
	pull     *pull
	next     uint64 // expected delivery sequence
}

// readerIdle is how long the server keeps the place of a reader that asks for nothing.
const readerIdle = time.Minute

// OpenReader begins at sequence from, or at the first message behind it.
func (c *Conn) OpenReader(ctx context.Context, stream string, from uint64) (*Reader, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	r := &Reader{conn: c, stream: stream, next: 1}
	cons, err := c.js.CreateConsumer(ctx, stream, jetstream.ConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: max(from, 1),
		AckPolicy: jetstream.AckNonePolicy, InactiveThreshold: readerIdle, MemoryStorage: true, Replicas: 1,
	})
	if err == nil {
		r.consumer = cons.CachedInfo().Name
		r.pull, err = newPull(c.nc, stream, r.consumer, "", "")
	}
	if err != nil {
		return nil, r.failed(err)
	}
	return r, nil
}

func (r *Reader) failed(err error) error { return fmt.Errorf("read %s: %w", r.stream, err) }

var errGap = errors.New("a message was not delivered")

// Next blocks for the next message or until ctx ends. Its body is as it was
// published, compressed. After an error the reader is closed and a new one opened.
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
		return newDelivery(msg.Subject, meta.Sequence.Stream, meta.NumPending, msg.Header.Get, msg.Data, true), nil
	}
}

// Close ends reading.
func (r *Reader) Close() {
	r.pull.stop()
	ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
	defer cancel()
	_ = r.conn.js.DeleteConsumer(ctx, r.stream, r.consumer) // or it ends by itself
}
