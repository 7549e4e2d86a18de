package bus

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"
)

// Reader reads a stream in order from a sequence on. It keeps nothing on the
// server: who reads keeps his place himself. Messages that were deleted are
// passed over. For one goroutine.
//
// A [Lane] is for the hub, where owners change; a Reader for a stream that one
// process owns.
type Reader struct {
	stream string
	it     jetstream.MessagesContext
}

const (
	// A reader asks for so much at a time; one message is at most a megabyte or so.
	readCount = 64
	readBytes = 8 << 20
)

// OpenReader begins at sequence from, or at the first message behind it.
func (c *Conn) OpenReader(ctx context.Context, stream string, from uint64) (*Reader, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	r := &Reader{stream: stream}
	cons, err := c.js.OrderedConsumer(ctx, stream, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: max(from, 1)})
	if err == nil {
		r.it, err = cons.Messages(jetstream.PullMaxMessagesWithBytesLimit(readCount, readBytes))
	}
	if err != nil {
		return nil, r.failed(err)
	}
	return r, nil
}

func (r *Reader) failed(err error) error { return fmt.Errorf("read %s: %w", r.stream, err) }

// Next blocks for the next message or until ctx ends. Its body is as it was
// published, compressed. After an error the reader is closed and a new one opened.
func (r *Reader) Next(ctx context.Context) (Delivery, error) {
	msg, err := r.it.Next(jetstream.NextContext(ctx))
	if err != nil {
		return Delivery{}, r.failed(err)
	}
	meta, err := msg.Metadata()
	if err != nil {
		return Delivery{}, r.failed(err)
	}
	return newDelivery(msg.Subject(), meta.Sequence.Stream, meta.NumPending, msg.Headers().Get, msg.Data(), true), nil
}

// Close ends reading.
func (r *Reader) Close() { r.it.Stop() }
