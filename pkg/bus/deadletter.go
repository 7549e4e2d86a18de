package bus

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Refusal is why a message is a dead letter.
type Refusal struct {
	Reason  string // of a closed set, see package ledger
	Detail  string // the backend's own words
	Backend string // the backend that has refused it
	Source  string // stream and sequence of the message it was in
}

// Headers of a dead letter, besides those of the original.
const (
	headerReason  = "Penstock-Reason"
	headerDetail  = "Penstock-Detail"
	headerBackend = "Penstock-Backend"
	headerSource  = "Penstock-Source"
)

// DeadLetter stores what a backend refused for good, with the reason. A body that
// is too large for a message, which only a hostile sender produces, is truncated.
func (c *Conn) DeadLetter(ctx context.Context, sig otlpwire.Signal, instance string, m Message) error {
	why := *m.Refusal
	if m.Body, m.Header.Encoding = envelope.Compress(nil, m.Body, envelope.S2); len(m.Body) > envelope.MaxPayload {
		why.Detail = fmt.Sprintf("cut from %d bytes: %s", len(m.Body), why.Detail)
		m.Body = m.Body[:envelope.MaxPayload]
	}
	m.Subject = deadSubject(sig.String(), instance)
	const maxDetail = 512
	why.Detail = printable(why.Detail[:min(len(why.Detail), maxDetail)])
	m.Refusal = &why
	_, err := c.Publish(ctx, m)
	return err
}

// maxGarbage is how many dead letters a minute an instance may have for unreadable messages. No
// edge sends any; a sender of nothing else must not cost the instances in its partition a write
// to the disk for each.
const maxGarbage = 100

// Quota bounds the dead letters for unreadable messages. The zero Quota is ready, and
// safe for concurrent use.
type Quota struct {
	mu    sync.Mutex
	since time.Time
	taken map[string]int // by instance
}

// Take reports whether the instance may have one more in this minute, and counts it.
func (q *Quota) Take(instance string, now time.Time) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.taken == nil || now.Sub(q.since) >= time.Minute {
		q.since, q.taken = now, map[string]int{}
	}
	q.taken[instance]++
	return q.taken[instance] <= maxGarbage
}

func deadSubject(signal, instance string) string { return "dead." + signal + "." + instance }

// printable replaces what does not fit into a header line and a terminal by spaces.
func printable(s string) string {
	b := []byte(s)
	for i, c := range b {
		if c < ' ' || c > '~' {
			b[i] = ' '
		}
	}
	return string(b)
}

// Letter is a dead letter as it is stored.
type Letter struct {
	Refusal
	Seq      uint64
	At       time.Time // when it was stored
	Signal   string
	Instance string
	Items    int
	Arrival  int64  // of the message that they were in, at its edge, in Unix nanoseconds
	Size     int    // bytes as stored
	Body     []byte // OTLP; if undecodable, as received. Only if bodies were requested
	Err      error  // the body cannot be decompressed
}

// Letters calls visit with all dead letters, oldest first, until it returns false.
// signal and instance may be empty, for all. If bodies is false, they are not transferred.
func (c *Conn) Letters(ctx context.Context, signal, instance string, bodies bool, visit func(Letter) bool) error {
	orAny := func(token string) string {
		if token == "" {
			return "*"
		}
		return token
	}
	r, err := c.OpenReaderOf(ctx, ReaderConfig{Stream: DeadLetter, Filters: []string{deadSubject(orAny(signal), orAny(instance))}, Headers: !bodies})
	if err != nil {
		return err
	}
	defer r.Close()
	return r.Each(ctx, func(d Delivery) bool {
		l := Letter{Seq: d.Seq, At: d.Stored, Items: d.Header.Items, Arrival: d.Header.Arrival, Size: d.Size}
		if d.Refusal != nil {
			l.Refusal = *d.Refusal
		}
		if tokens := strings.Split(d.Subject, "."); len(tokens) == 3 {
			l.Signal, l.Instance = tokens[1], tokens[2]
		}
		if bodies {
			l.Body, l.Err = envelope.Decompress(nil, d.Body, d.Header.Encoding)
		}
		return visit(l)
	})
}

// ErrKept reports that a stream does not allow its messages to be deleted.
var ErrKept = errors.New("the stream DEADLETTER was created with deny_delete by an older version: its messages are deleted only when it is full; to change that, recreate it")

// DropLetter deletes a dead letter.
func (c *Conn) DropLetter(ctx context.Context, seq uint64) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	s, err := c.js.Stream(ctx, DeadLetter)
	if err != nil {
		return fmt.Errorf("dead letters: %w", err)
	}
	if s.CachedInfo().Config.DenyDelete {
		return ErrKept
	}
	gone := fmt.Sprintf("err_code=%d ", jetstream.JSErrCodeMessageNotFound) // nats.go passes it on as text
	if err := s.DeleteMsg(ctx, seq); err != nil && !strings.Contains(err.Error(), gone) {
		return fmt.Errorf("delete dead letter %d: %w", seq, err)
	}
	return nil
}
