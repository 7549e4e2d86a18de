package bus

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/proc"
)

// LaneConfig names one lane.
type LaneConfig struct {
	Stream string
	Filter string // the stored subjects of the partition; empty for all
	Name   string // the durable consumer: <backend>-<partition>
	// Raw leaves bodies compressed, for a reader that only passes them on.
	Raw bool
}

const (
	// ackWait must never end while a lane holds a message: a redelivery would
	// come out of order. A take-over does not wait for it, it resets.
	ackWait = 24 * time.Hour

	// pinTTL is how long a silent owner keeps its pin. A partition has a new
	// owner within 10 s of a kill -9 (issue: lanes).
	pinTTL = 8 * time.Second

	pinGroup = "owner"

	// Buffered ahead of the reader: enough to hide a round trip, little enough
	// that 64 lanes stay within half a gigabyte.
	laneMessages = 256
	laneBytes    = 8 << 20

	// silence is how long a lane is quiet before it asks whether it missed
	// anything.
	silence = 10 * time.Second

	pullExpiry    = 5 * time.Second
	pullHeartbeat = 2 * time.Second
)

// ErrReset says that the lane has gone back to its floor, because another owner
// read in between or the connection broke: everything delivered above the floor
// will come again and what the reader holds of it must be forgotten.
var ErrReset = errors.New("lane reset to its floor")

// Delivery is one message on loan: it comes again after a restart unless the
// floor has passed it.
type Delivery struct {
	Seq     uint64 // of the stream
	Subject string // as stored
	Header  envelope.Header
	Body    []byte // decompressed, unless the lane is raw
	Pending uint64 // messages behind this one; 0 means caught up

	// Err is set when the message is no envelope of ours: Header is empty, Body
	// as it came. The reader dead-letters it.
	Err error
	// Reset is set, and nothing else, when [Lane.Run] has gone back to the floor:
	// what the reader holds must be forgotten, it will come again.
	Reset bool
}

// Instance returns the last token of the subject.
func (d Delivery) Instance() string { return d.Subject[strings.LastIndexByte(d.Subject, '.')+1:] }

// Lane is one ordered reader of one partition for one backend, on a durable
// consumer that acknowledges all messages up to one. Next and Rewind are for one
// goroutine; Ack, Floor and Lag may be called from others.
//
// The consumer's delivery sequence starts at 1 with every reset and counts
// every delivery to anybody. So as long as it rises by one from message to
// message this reader has seen all of them; when it jumps, somebody else was
// served in between, and the lane resets. The server serves one
// reader, the pinned one, but a lane does not yet ask whose pin it is before it
// resets: two processes must not open the same lane.
type Lane struct {
	conn *Conn
	cfg  LaneConfig
	cons jetstream.Consumer // keeps the pin that the server has given
	it   jetstream.MessagesContext
	next uint64 // expected delivery sequence; 0: a reset is due
	// after is the stream sequence of the last message, or the floor.
	after   uint64
	skipped int  // messages from before the last reset
	read    bool // something was ever delivered

	mu struct {
		sync.Mutex
		owed  []owed // delivered and not acknowledged, by sequence
		floor uint64
	}
}

type owed struct {
	seq   uint64
	reply string
}

// OpenLane creates or finds the lane's consumer. Reading starts at its floor.
func (c *Conn) OpenLane(ctx context.Context, cfg LaneConfig) (*Lane, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	cons, err := c.consumer(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("lane %s of %s: %w", cfg.Name, cfg.Stream, err)
	}
	return &Lane{conn: c, cfg: cfg, cons: cons}, nil
}

func (c *Conn) consumer(ctx context.Context, cfg LaneConfig) (jetstream.Consumer, error) {
	return c.js.CreateOrUpdateConsumer(ctx, cfg.Stream, jetstream.ConsumerConfig{
		Durable:        cfg.Name,
		FilterSubject:  cfg.Filter,
		DeliverPolicy:  jetstream.DeliverAllPolicy,
		AckPolicy:      jetstream.AckAllPolicy,
		AckWait:        ackWait,
		MaxAckPending:  -1,
		PriorityPolicy: jetstream.PriorityPolicyPinned,
		PriorityGroups: []string{pinGroup},
		PinnedTTL:      pinTTL,
	})
}

// Next blocks for the next message or until ctx ends. On ErrReset the caller
// forgets and calls again. Other errors may heal; Next may be called again
// after a pause.
func (l *Lane) Next(ctx context.Context) (Delivery, error) {
	for {
		if l.next == 0 {
			again := l.read
			if err := l.reset(ctx); err != nil {
				return Delivery{}, l.failed(err)
			}
			if again {
				return Delivery{}, ErrReset
			}
		}
		msg, err := l.receive(ctx)
		if err != nil || msg == nil {
			if ctx.Err() != nil {
				return Delivery{}, ctx.Err()
			}
			if err != nil {
				return Delivery{}, l.failed(err)
			}
			continue
		}
		meta, err := msg.Metadata()
		if err != nil {
			return Delivery{}, l.failed(err)
		}
		switch seq := meta.Sequence; {
		case l.next == 1 && (seq.Consumer > 1 || seq.Stream <= l.after):
			// On its way before the reset, as many as were asked for; more than
			// that, and the first one went to somebody else.
			if l.skipped++; l.skipped > 2*laneMessages {
				l.next = 0
			}
			continue
		case seq.Consumer != l.next || seq.Stream <= l.after:
			l.conn.log.Info("lane interrupted, going back to its floor", "lane", l.cfg.Name, "stream", l.cfg.Stream)
			l.next = 0
			continue
		}
		l.next++
		l.after, l.read = meta.Sequence.Stream, true
		l.mu.Lock()
		l.mu.owed = append(l.mu.owed, owed{meta.Sequence.Stream, msg.Reply()})
		l.mu.Unlock()
		return l.delivery(msg, meta), nil
	}
}

func (l *Lane) failed(err error) error {
	return fmt.Errorf("lane %s of %s: %w", l.cfg.Name, l.cfg.Stream, err)
}

// receive returns the next message of whatever generation, or nil when there
// was none for a while and none is missing.
func (l *Lane) receive(ctx context.Context) (jetstream.Msg, error) {
	wait, cancel := context.WithTimeout(ctx, silence)
	defer cancel()
	msg, err := l.it.Next(jetstream.NextContext(wait))
	for errors.Is(err, jetstream.ErrNoHeartbeat) {
		// The server is away, or somebody else has the pin. Asking again is all
		// there is to do: should something be missed, the sequence will tell.
		msg, err = l.it.Next(jetstream.NextContext(wait))
	}
	switch {
	case err == nil:
		return msg, nil
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case wait.Err() == nil:
		l.Rewind()
		l.it.Stop()
		l.it = nil
		return nil, err
	}
	// Silence. What was delivered to somebody who is gone shows here only.
	info, err := l.cons.Info(ctx)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	lost := info.NumAckPending > len(l.mu.owed)
	l.mu.Unlock()
	if lost {
		l.Rewind()
	}
	return nil, nil
}

// Run calls handle for one message after the other until ctx ends or handle
// returns false. What breaks is tried again with growing pauses.
func (l *Lane) Run(ctx context.Context, handle func(Delivery) bool) {
	defer l.Close()
	for attempt := 1; ; {
		d, err := l.Next(ctx)
		switch {
		case err == nil:
			attempt = 1
		case errors.Is(err, ErrReset):
			d = Delivery{Reset: true}
		case ctx.Err() != nil:
			return
		default:
			if attempt == 1 {
				l.conn.log.Warn("lane stalls, will try again", "err", err)
			}
			if !proc.Until(ctx, l.conn.Connected) || !proc.Sleep(ctx, min(fault.Pause(err, attempt, rand.Float64()), fault.MaxHubPause)) {
				return
			}
			attempt++
			continue
		}
		if !handle(d) {
			return
		}
	}
}

func (l *Lane) delivery(msg jetstream.Msg, meta *jetstream.MsgMetadata) Delivery {
	d := Delivery{Seq: meta.Sequence.Stream, Subject: msg.Subject(), Pending: meta.NumPending, Body: msg.Data()}
	h, err := envelope.ParseHeader(msg.Headers().Get)
	if err == nil {
		body := msg.Data()
		if !l.cfg.Raw {
			body, err = envelope.Decompress(body, h.Encoding)
		}
		if err == nil {
			d.Header, d.Body = h, body
		}
	}
	d.Err = err
	return d
}

// reset takes the consumer back to its floor. The iterator stays: its inbox
// also gets what older pull requests bring, so nothing is sent to nobody.
func (l *Lane) reset(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	if l.it == nil {
		it, err := l.cons.Messages(
			jetstream.PullPriorityGroup(pinGroup),
			jetstream.PullMaxMessagesWithBytesLimit(laneMessages, laneBytes),
			jetstream.PullExpiry(pullExpiry),
			jetstream.PullHeartbeat(pullHeartbeat),
		)
		if err != nil {
			return err
		}
		l.it = it
	}
	res, err := l.conn.js.ResetConsumer(ctx, l.cfg.Stream, l.cfg.Name)
	if err != nil && l.gone(ctx) {
		// An operator has deleted it, or the stream was made anew: reading begins
		// at the start, which repeats but does not skip.
		l.conn.log.Warn("lane's consumer is gone, made anew", "lane", l.cfg.Name, "stream", l.cfg.Stream)
		anew, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*apiTimeout)
		defer cancel()
		var cons jetstream.Consumer
		if cons, err = l.conn.consumer(anew, l.cfg); err == nil {
			l.it.Stop()
			l.it, l.cons = nil, cons
			return l.reset(anew)
		}
	}
	if err != nil {
		return err
	}
	l.next, l.after, l.skipped = 1, res.ResetSeq-1, 0
	l.mu.Lock()
	l.mu.owed = l.mu.owed[:0]
	l.mu.floor = res.ResetSeq - 1
	l.mu.Unlock()
	return nil
}

// gone reports whether the consumer has been deleted. A reset of it is then not
// answered at all.
func (l *Lane) gone(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), apiTimeout)
	defer cancel()
	_, err := l.cons.Info(ctx)
	return errors.Is(err, jetstream.ErrConsumerNotFound)
}

// Ack moves the floor: everything up to seq is finished. It is sent without
// waiting; when it is lost, a later one or the next reader makes up for it.
func (l *Lane) Ack(seq uint64) error {
	l.mu.Lock()
	n, reply := 0, ""
	for n < len(l.mu.owed) && l.mu.owed[n].seq <= seq {
		reply = l.mu.owed[n].reply
		n++
	}
	if n > 0 {
		l.mu.floor = l.mu.owed[n-1].seq
		l.mu.owed = append(l.mu.owed[:0], l.mu.owed[n:]...)
	}
	l.mu.Unlock()
	if n == 0 {
		return nil
	}
	if err := l.conn.nc.Publish(reply, ackAll); err != nil {
		return fmt.Errorf("ack %d on lane %s of %s: %w", seq, l.cfg.Name, l.cfg.Stream, err)
	}
	return nil
}

var ackAll = []byte("+ACK")

// Floor returns the sequence up to which nothing is owed.
func (l *Lane) Floor() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.floor
}

// Lag asks the server how many messages of the partition are not finished.
func (l *Lane) Lag(ctx context.Context) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	cons, err := l.conn.js.Consumer(ctx, l.cfg.Stream, l.cfg.Name)
	if err != nil {
		return 0, fmt.Errorf("lag of lane %s of %s: %w", l.cfg.Name, l.cfg.Stream, err)
	}
	info := cons.CachedInfo()
	return info.NumPending + uint64(max(info.NumAckPending, 0)), nil
}

// Rewind makes the next call of Next go back to the floor.
func (l *Lane) Rewind() { l.next = 0 }

// Close stops reading. What is not acknowledged comes again to the next reader.
func (l *Lane) Close() {
	l.Rewind()
	if l.it != nil {
		l.it.Stop()
		l.it = nil
	}
}
