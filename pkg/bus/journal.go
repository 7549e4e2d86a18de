package bus

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strconv"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/envelope"
)

// Journal is a subject with one writer at a time. Taking it over fences the previous
// writer: a publish is stored only when its subject's last message is the last one
// that this writer knows. So a writer that was paused, and has been replaced without
// noticing, can record nothing any more.
type Journal struct {
	conn    *Conn
	stream  string
	subject string
	id      string
	count   uint64
	last    uint64 // sequence of the last message of the subject
}

// ErrSuperseded reports that another writer has taken the journal.
var ErrSuperseded = errors.New("another writer has taken over")

// TakeJournal makes this process the writer of a subject and reads what was
// written before, oldest first. mark is the message that it writes to take over.
// A message that visit cannot read is reported and skipped.
func (c *Conn) TakeJournal(ctx context.Context, stream string, mark Message, visit func(body []byte) error) (*Journal, error) {
	j := &Journal{conn: c, stream: stream, subject: mark.Subject, id: rand.Text()}
	mark.Header.ID = j.nextID()
	seq, err := c.Publish(ctx, mark)
	if err != nil {
		return nil, err
	}
	j.last = seq
	if err := j.recall(ctx, visit); err != nil {
		return nil, fmt.Errorf("recall %s: %w", j.subject, err)
	}
	return j, nil
}

func (j *Journal) nextID() string {
	j.count++
	return j.id + "-" + strconv.FormatUint(j.count, 10)
}

// recall reads up to our mark: no previous writer can write after it.
func (j *Journal) recall(ctx context.Context, visit func(body []byte) error) error {
	cons, err := j.conn.js.OrderedConsumer(ctx, j.stream, jetstream.OrderedConsumerConfig{FilterSubjects: []string{j.subject}})
	if err != nil {
		return err
	}
	it, err := cons.Messages()
	if err != nil {
		return err
	}
	defer it.Stop()
	for {
		wait, cancel := context.WithTimeout(ctx, apiTimeout)
		msg, err := it.Next(jetstream.NextContext(wait))
		cancel()
		if err != nil {
			return err
		}
		meta, err := msg.Metadata()
		if err != nil {
			return err
		}
		if meta.Sequence.Stream >= j.last {
			return nil
		}
		body, err := envelope.Decompress(nil, msg.Data(), envelope.Encoding(msg.Headers().Get(envelope.HeaderContentEncoding)))
		if err == nil {
			err = visit(body)
		}
		if err != nil {
			j.conn.log.Error("journal message cannot be read; skipped", "subject", j.subject, "seq", meta.Sequence.Stream, "err", err)
		}
	}
}

// Entry makes m the next message of the journal. The same entry may be published
// again after an error: it is stored once.
func (j *Journal) Entry(m Message) Message {
	m.Subject, m.Header.ID = j.subject, j.nextID()
	return m
}

// Append returns when an entry is stored. [ErrSuperseded] is permanent.
func (j *Journal) Append(ctx context.Context, entry Message) error {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	ack, err := j.conn.js.PublishMsg(ctx, entry.nats(), jetstream.WithRetryAttempts(0), jetstream.WithExpectLastSequencePerSubject(j.last))
	if api, ok := errors.AsType[*jetstream.APIError](err); ok && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence {
		return fmt.Errorf("publish to %s: %w", j.subject, ErrSuperseded)
	}
	if err != nil {
		return publishError(j.subject, err)
	}
	j.last = ack.Sequence
	return nil
}
