package bus

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/failpoint"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// LaneConfig names one lane.
type LaneConfig struct {
	Stream string
	Filter string // the stored subjects of the partition; empty for all
	Name   string // the durable consumer: <backend>-<partition>

	Filters []string // subjects, instead of Filter
	// Start is where a consumer that does not exist yet begins; 0 for the first message.
	Start uint64
	// Raw leaves bodies compressed.
	Raw bool
	// Interrupted, if not nil, is called when reading goes back to the floor, with a reason
	// of package ledger.
	Interrupted func(reason string)
}

const (
	// ackWait must not end while a lane holds a message: a redelivery would come out of
	// order. A new owner does not wait for it, but resets the consumer.
	ackWait = 24 * time.Hour

	// pinTTL is how long a silent owner keeps its pin. A partition has a new
	// owner within 10 s of a kill -9 (issue: lanes).
	pinTTL = 6 * time.Second

	pinGroup = "owner"

	// claimInterval is how often a lane asks whether the previous owner's pin has ended.
	claimInterval = 500 * time.Millisecond

	// A lane without traffic asks the server now and then whether it is still the
	// owner and has seen everything: more often while it holds unacknowledged messages,
	// because then somebody waits for the answer.
	quietOwing = time.Second
	quietIdle  = 5 * time.Second

	// releaseTimeout is how long releasing a pin may take at a stop.
	releaseTimeout = time.Second
)

// Delivery is one message, which is delivered again after a restart unless the floor has
// passed it. When Seq is 0, it is no message but a change in the lane's state.
type Delivery struct {
	Seq     uint64 // of the stream, from 1
	Subject string // as stored
	Header  envelope.Header
	Body    []byte    // decompressed, unless the lane is raw or a [Reader] returns it
	Pending uint64    // messages of the partition that come after this one
	Size    int       // bytes of the body as stored
	Stored  time.Time // when the stream stored it
	Refusal *Refusal  // of a dead letter; only a [Reader] sets it
	// Restamped: the sender's arrival time is impossible, and Stored is used instead.
	Restamped bool

	// Err is set when the message is not a valid envelope: Header is empty, and Body is
	// as received. The reader dead-letters it.
	Err error
	// Claimed: this reader has become the owner of the lane, for the first time or
	// again, and begins at its floor. It must discard what it holds: everything above
	// the floor is delivered again.
	Claimed bool
	// Idle: the lane is still ours, and by the hub's count nothing is left.
	// [Lane.Has] reports up to which sequence that is certain.
	Idle bool
	// After is, when Idle, the sequence of the last message that was delivered, or the floor. When
	// Claimed, it is the sequence up to which this reader had finished before: the floor may be lower
	// if the hub has lost it.
	After uint64
}

// Instance returns the last token of the subject.
func (d Delivery) Instance() string { return d.Subject[strings.LastIndexByte(d.Subject, '.')+1:] }

// Decompress decompresses the body of a message of a raw lane into *buf, which it reuses; if it
// cannot, it sets Err.
func (d *Delivery) Decompress(buf *[]byte) {
	if d.Err != nil {
		return
	}
	body, err := envelope.Decompress(*buf, d.Body, d.Header.Encoding)
	if err != nil {
		d.Err = err
		return
	}
	if d.Header.Encoding != "" {
		*buf = body
	}
	d.Body = body
}

// Open returns the payload of a message of one instance, as [envelope.Guard.Open] does; it decompresses into *buf.
// One that cannot be read counts as one item: what it holds cannot be counted, and the sender's count is not
// trusted.
func (d *Delivery) Open(guard *envelope.Guard, sig otlpwire.Signal, buf *[]byte) (payload []byte, items int, err error) {
	if d.Decompress(buf); d.Err != nil {
		return nil, 1, d.Err
	}
	if payload, items, err = guard.Open(sig, d.Instance(), d.Body); err != nil {
		return nil, 1, err
	}
	return payload, items, nil
}

// Lane is one ordered reader of one partition for one backend, on a durable
// consumer that acknowledges all messages up to one. Next, Run and Close are for
// one goroutine; Ack, Floor, Owned and Forget may be called from others.
//
// # One owner
//
// The server serves one reader, the one to which it has given the pin. A lane that is
// opened waits until nobody has the pin, then resets the consumer to its floor and reads
// on from there. Every message carries the pin, and the consumer's delivery sequence,
// which a reset starts at 1, counts deliveries to anybody. So while the pin stays the
// same and the sequence rises by one from message to message, this reader has seen all
// of them. When one or the other changes, it claims the lane again.
//
// It has to, because an ack acknowledges all messages up to one (AckAll). A gap in the
// sequence means that a message was delivered to another reader or lost on the way;
// another pin means that another reader has become the owner. An ack past a message that
// this reader has not seen would finish that message although nobody has handled it.
//
// The server would redeliver such a message only after ackWait, and after newer ones. So
// ackWait is a day, in order not to end while a lane holds a message; if it does, the
// redelivery is recognised by its stream sequence, and the lane is claimed again. A new
// owner does not wait for it: the reset makes the server forget what it has delivered
// above the floor and deliver all of it again, in order.
//
// An owner that was paused for longer than its pin lasts has lost the lane when it
// resumes: if the pin was not renewed in time, Next asks the server before it returns a
// message, and Ack sends nothing.
type Lane struct {
	conn *Conn
	cfg  LaneConfig
	pull *pull // nil: the lane has to be claimed
	pin  string
	next uint64 // expected delivery sequence
	// after is the stream sequence of the last message, or the floor.
	after    uint64
	finished uint64    // up to where this reader had finished before it claimed the lane
	behind   int       // consecutive checks that saw deliveries which have not arrived
	free     time.Time // when the server last reported that nobody has the pin, by this process's clock
	sure     int       // up to which message taken from pull the server has confirmed that the pin was ours
	hold     func()    // stops keep, and waits until it has returned
	forget   chan string

	mu struct {
		sync.Mutex
		owed  []owed // delivered and not acknowledged, by sequence
		floor uint64
		done  uint64 // up to where the reader has finished
		last  string // reply subject of the last ack
		// held is until when nobody else can have the pin, by this process's clock.
		held time.Time
		lost bool
		// waiting is how many messages were still to be delivered, as last reported by the server.
		waiting uint64
		// highest is the sequence of the last message that was delivered, or the floor.
		highest uint64
		failed  error     // why the lane cannot be read; nil while it is read
		waits   error     // what the reader waits for
		since   time.Time // since when it waits; zero when it does not
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
	l := &Lane{conn: c, cfg: cfg, hold: func() {}, forget: make(chan string, 1)}
	if err := l.create(ctx); err != nil {
		return nil, l.failed(err)
	}
	return l, nil
}

func (l *Lane) create(ctx context.Context) error {
	cfg := jetstream.ConsumerConfig{
		Durable:        l.cfg.Name,
		FilterSubject:  l.cfg.Filter,
		DeliverPolicy:  jetstream.DeliverAllPolicy,
		AckPolicy:      jetstream.AckAllPolicy,
		AckWait:        ackWait,
		MaxAckPending:  -1,
		PriorityPolicy: jetstream.PriorityPolicyPinned,
		PriorityGroups: []string{pinGroup},
		PinnedTTL:      pinTTL,
	}
	if cfg.FilterSubjects = l.cfg.Filters; len(l.cfg.Filters) == 1 {
		// With one filter, the subject of the API request contains it, so permissions can restrict it.
		cfg.FilterSubject, cfg.FilterSubjects = l.cfg.Filters[0], nil
	}
	if l.cfg.Start > 0 {
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, l.cfg.Start
	}
	_, err := l.conn.js.CreateOrUpdateConsumer(ctx, l.cfg.Stream, cfg)
	return err
}

// Next blocks until the next delivery or until ctx ends. Errors may be temporary; Next may
// be called again after a pause.
func (l *Lane) Next(ctx context.Context) (Delivery, error) {
	for {
		select {
		case why := <-l.forget:
			l.interrupt(forgotten(why))
		default:
		}
		if l.pull == nil {
			if err := l.claim(ctx); err != nil {
				return Delivery{}, l.failed(err)
			}
			l.fails(nil)
			return Delivery{Claimed: true, After: l.finished}, nil
		}
		d, some, err := l.read(ctx)
		if some {
			return d, nil
		}
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			return Delivery{}, ctx.Err()
		}
		l.interrupt(err)
		if !errors.Is(err, errPinLost) {
			return Delivery{}, l.failed(err)
		}
		if more, due := l.conn.said.Due(l.cfg.Stream+"/"+l.cfg.Name, time.Now()); due {
			l.conn.log.Info("lost lane ownership or found a delivery gap; resuming from ack floor", "lane", l.cfg.Name, "stream", l.cfg.Stream, "more_since_last_said", more)
		}
	}
}

// read waits for a message, or for the time at which the server is asked whether there is one; some is
// false when there is nothing to report.
func (l *Lane) read(ctx context.Context) (d Delivery, some bool, err error) {
	quiet := quietIdle
	if l.owing() > 0 {
		quiet = quietOwing
	}
	msg, err := l.pull.next(ctx, quiet, l.forget)
	if err != nil {
		return Delivery{}, false, err
	}
	if msg == nil || l.stale() {
		idle, err := l.check(ctx)
		if err != nil || msg == nil {
			return idle, err == nil && idle.Idle, err
		}
	}
	d, err = l.accept(ctx, msg)
	return d, err == nil, err
}

// accept returns a message as a delivery if it is the next one and the pin is ours.
func (l *Lane) accept(ctx context.Context, msg *nats.Msg) (Delivery, error) {
	meta, err := msg.Metadata()
	if err != nil {
		return Delivery{}, err
	}
	if meta.Sequence.Consumer != l.next || meta.Sequence.Stream <= l.after {
		return Delivery{}, errPinLost
	}
	if err := l.prove(ctx, msg); err != nil {
		return Delivery{}, err
	}
	l.next++
	l.after, l.behind = meta.Sequence.Stream, 0
	l.mu.Lock()
	l.mu.waiting, l.mu.highest = meta.NumPending, l.after
	l.mu.owed = append(l.mu.owed, owed{meta.Sequence.Stream, msg.Reply})
	l.mu.Unlock()
	return newDelivery(msg, meta, l.cfg.Raw, false), nil
}

// prove verifies that msg was delivered to the owner, and that this reader is the owner. A pin
// header that matches is enough. One that does not match may have been written by a sender, so
// the server is asked. It is also asked at the first message, to learn the pin.
func (l *Lane) prove(ctx context.Context, msg *nats.Msg) error {
	if l.pin != "" && (pinOf(msg) == l.pin || l.pull.taken <= l.sure) {
		return nil
	}
	asked, came := time.Now(), l.pull.taken+len(l.pull.msgs)
	info, err := l.conn.consumerInfo(ctx, l.cfg)
	if err != nil {
		return err
	}
	pin := pinned(info)
	switch {
	case pin == "":
		return errPinLost
	case l.pin == "" && time.Since(l.free) < pinTTL:
		// Granted to us with this message, too recently to have passed to another reader.
		l.pin, l.pull.pin = pin, pin
		l.keep()
	case pin != l.pin:
		return errPinLost
	}
	l.renewed(asked, false)
	l.sure = came
	return nil
}

func (l *Lane) failed(err error) error {
	return fmt.Errorf("lane %s of %s: %w", l.cfg.Name, l.cfg.Stream, err)
}

func (l *Lane) owing() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.mu.owed)
}

// stale reports whether somebody else may have the pin by now.
func (l *Lane) stale() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.lost || (l.pin != "" && time.Now().After(l.mu.held))
}

// Owned reports whether this reader is the owner.
func (l *Lane) Owned() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Now().Before(l.mu.held)
}

// renewed notes that the pin was ours at t.
func (l *Lane) renewed(t time.Time, lost bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.held, l.mu.lost = t.Add(pinTTL), lost
	if lost {
		l.mu.held = time.Time{}
	}
}

// keep renews the pin until drop, whether the reader reads or waits for its
// backend, and asks whether it is still ours.
//
// A late ack of a previous owner carries a delivery sequence from before the reset, and may
// have moved the floor's delivery sequence beyond ours: then the server accepts none of our
// acks until we have reached it (nats-server 2.15.2, processAckMsg). A reset corrects that.
func (l *Lane) keep() {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	l.hold = func() { // after this, nothing marks the pin as held any more
		cancel()
		<-ended
	}
	p, pin := l.pull, l.pin
	go func() {
		defer close(ended)
		for backoff.Sleep(ctx, pinTTL/4) {
			sent := time.Now()
			err := p.hold(ctx, pin)
			var info *jetstream.ConsumerInfo
			if err == nil {
				info, err = l.conn.consumerInfo(ctx, l.cfg)
			}
			if err == nil && pinned(info) != pin {
				err = errPinLost
			}
			switch {
			case ctx.Err() != nil:
			case errors.Is(err, errPinLost):
				l.renewed(sent, true)
				return
			case err == nil:
				l.renewed(sent, false)
				l.mu.Lock()
				done := l.mu.done
				l.mu.Unlock()
				_ = l.Ack(done)
				if l.moved(ctx, info) {
					l.Forget(ledger.InterruptedMoved)
				}
			}
		}
	}()
}

// claim waits until nobody owns the lane and resets it to its floor.
func (l *Lane) claim(ctx context.Context) error {
	for waiting := false; ; {
		asked := time.Now()
		info, err := l.conn.consumerInfo(ctx, l.cfg)
		if errors.Is(err, jetstream.ErrConsumerNotFound) {
			// An operator has deleted it, or the stream was recreated: reading begins
			// at the start, which repeats messages but skips none.
			l.conn.log.Warn("durable consumer not found; recreated", "lane", l.cfg.Name, "stream", l.cfg.Stream)
			err = l.create(ctx)
			l.pin = ""
		}
		if err != nil {
			return err
		}
		pin := pinned(info)
		if pin == "" {
			l.pin, l.free = "", asked
		}
		if pin == l.pin {
			break
		}
		if !waiting {
			l.conn.log.Debug("lane is owned by another reader, waiting", "lane", l.cfg.Name, "stream", l.cfg.Stream)
			waiting = true
			l.fails(l.failed(errors.New("another reader owns it")))
		}
		if !backoff.Sleep(ctx, claimInterval) {
			return ctx.Err()
		}
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	claimed := time.Now()
	first, err := l.reset(ctx)
	if err != nil {
		return err
	}
	p, err := newPull(l.conn, l.cfg.Stream, l.cfg.Name, pinGroup, l.pin)
	if err != nil {
		return err
	}
	l.pull, l.next, l.after, l.behind, l.sure = p, 1, first-1, 0, 0
	l.mu.Lock()
	l.finished = max(l.finished, l.mu.done)
	l.mu.owed, l.mu.floor, l.mu.highest, l.mu.done, l.mu.last = l.mu.owed[:0], first-1, first-1, 0, ""
	l.mu.Unlock()
	l.renewed(claimed, false)
	if l.pin != "" {
		l.keep()
	}
	return nil
}

// consumerInfo asks the server about a lane's consumer.
func (c *Conn) consumerInfo(ctx context.Context, cfg LaneConfig) (*jetstream.ConsumerInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	cons, err := c.js.Consumer(ctx, cfg.Stream, cfg.Name)
	if err != nil {
		return nil, err
	}
	return cons.CachedInfo(), nil
}

func pinned(info *jetstream.ConsumerInfo) string {
	if info == nil || len(info.PriorityGroups) == 0 {
		return ""
	}
	return info.PriorityGroups[0].PinnedClientID
}

// check asks the server whether the lane is ours and has received everything.
func (l *Lane) check(ctx context.Context) (Delivery, error) {
	asked := time.Now()
	info, err := l.conn.consumerInfo(ctx, l.cfg)
	if err != nil {
		return Delivery{}, err
	}
	if pinned(info) != l.pin {
		if l.behind++; l.pin != "" || l.behind > 3 {
			return Delivery{}, errPinLost
		}
		return Delivery{}, nil // perhaps granted to us: the first message is on its way
	}
	if l.pin == "" {
		l.free = asked
	}
	l.renewed(asked, false)
	if l.moved(ctx, info) {
		return Delivery{}, forgotten(ledger.InterruptedMoved)
	}
	if seen := l.next - 1; info.Delivered.Consumer != seen {
		// On its way, or delivered to a reader that no longer exists.
		if l.behind++; l.behind > 3 && len(l.pull.msgs) == 0 {
			return Delivery{}, errPinLost
		}
		return Delivery{}, nil
	}
	l.mu.Lock()
	owing, last := len(l.mu.owed), l.mu.last
	l.mu.Unlock()
	if info.NumAckPending > owing && last != "" {
		_ = l.conn.nc.Publish(last, ackAll) // the last ack was lost
	}
	if info.NumPending > 0 {
		return Delivery{}, nil
	}
	return Delivery{Idle: true, After: l.after}, nil
}

// Has reports whether a reader whose last message was after has received all messages of the
// partition up to the stream's sequence seq. It asks the hub if after is less than seq. Any
// goroutine may call it.
func (l *Lane) Has(ctx context.Context, after, seq uint64) (bool, error) {
	if after >= seq {
		return true, nil
	}
	filters := l.cfg.Filters
	if len(filters) == 0 {
		filters = []string{l.cfg.Filter}
	}
	for _, filter := range filters {
		switch next, _, err := l.conn.First(ctx, l.cfg.Stream, filter, after+1); {
		case err != nil:
			return false, l.failed(err)
		case next != 0 && next <= seq:
			return false, nil
		}
	}
	return true, nil
}

// Run calls handle for one delivery after the other until ctx ends or handle
// returns false. After an error it tries again, with growing pauses.
func (l *Lane) Run(ctx context.Context, handle func(Delivery) bool) {
	for attempt := 1; ; {
		d, err := l.Next(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			l.fails(err)
			if more, due := l.conn.said.Due("stalls "+l.cfg.Stream+"/"+l.cfg.Name, time.Now()); due && attempt == 1 {
				l.conn.log.Warn("cannot read lane, will try again", "err", err, "more_since_last_said", more)
			}
			if !backoff.Until(ctx, l.conn.Connected) || !backoff.Sleep(ctx, min(fault.Pause(err, attempt, rand.Float64()), fault.MaxHubPause)) {
				return
			}
			attempt++
			continue
		}
		attempt = 1
		if !handle(d) {
			return
		}
	}
}

// headerSize is the header in which the server reports the size of a body that it does not send.
const headerSize = "Nats-Msg-Size"

// newDelivery reads a message as it is stored. Its header and body are what the sender wrote. If
// it was delivered without its body, the server has appended the body's size to the header.
func newDelivery(msg *nats.Msg, meta *nats.MsgMetadata, raw, bodiless bool) Delivery {
	body := msg.Data
	d := Delivery{Seq: meta.Sequence.Stream, Subject: msg.Subject, Pending: meta.NumPending, Body: body, Size: len(body), Stored: meta.Timestamp}
	if sizes := msg.Header.Values(headerSize); bodiless && len(sizes) > 0 {
		size, _ := strconv.Atoi(sizes[len(sizes)-1])
		d.Size = min(max(size, 0), maxMessage)
	}
	h, err := envelope.ParseHeader(msg.Header.Get)
	if err == nil {
		d.Restamped = h.Place(d.Stored)
		if !raw {
			body, err = envelope.Decompress(nil, body, h.Encoding)
		}
		if err == nil {
			d.Header, d.Body = h, body
		}
	}
	d.Err = err
	return d
}

// Ack moves the floor: everything up to seq is finished. It is sent without
// waiting; when it is lost, a later one or the next reader makes up for it. A reader that
// is no longer the owner sends no ack: its messages are finished, but the ack would carry
// a delivery sequence from before the next owner's reset.
func (l *Lane) Ack(seq uint64) error {
	l.mu.Lock()
	l.mu.done = max(l.mu.done, min(seq, l.mu.highest)) // what was delivered before the last claim says nothing about what is now
	if l.mu.lost || !time.Now().Before(l.mu.held) {
		l.mu.Unlock()
		return nil // keep sends it once the pin has been renewed, if it is
	}
	n, reply := 0, ""
	for n < len(l.mu.owed) && l.mu.owed[n].seq <= seq {
		reply = l.mu.owed[n].reply
		n++
	}
	if n > 0 {
		l.mu.last = reply
		l.mu.floor = l.mu.owed[n-1].seq
		l.mu.owed = l.mu.owed[n:] // append reallocates it from time to time
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

// Floor returns the sequence up to which everything is finished.
func (l *Lane) Floor() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.floor
}

// DropLane deletes a lane's consumer, and with it its floor. It is no error if there is none.
func (c *Conn) DropLane(ctx context.Context, stream, name string) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	err := c.js.DeleteConsumer(ctx, stream, name)
	if err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) {
		return fmt.Errorf("drop lane %s of %s: %w", name, stream, err)
	}
	return nil
}

// drop stops reading. The pin stays until it expires or Close.
func (l *Lane) drop() {
	l.hold()
	if l.pull != nil {
		l.pull.stop()
		l.pull = nil
	}
}

// Settled waits until everything delivered is acknowledged, or ctx ends.
func (l *Lane) Settled(ctx context.Context) {
	backoff.Until(ctx, func() bool { return l.owing() == 0 })
}

// Close stops reading and releases the pin, so that the next owner need not wait.
// What is not acknowledged is delivered to it again.
func (l *Lane) Close() {
	pin := l.pin
	if p := l.pull; p != nil && pin == "" {
		// The lane is claimed, and its first message may be on its way: it would leave
		// a pin that nobody knows.
		_ = l.conn.nc.FlushTimeout(releaseTimeout / 2)
		pin = p.unread()
	}
	l.drop()
	owned := l.Owned()
	defer l.renewed(time.Time{}, true) // a closed lane acknowledges nothing
	if pin == "" || !owned || failpoint.PinKept {
		return
	}
	_ = l.conn.nc.FlushTimeout(releaseTimeout / 2) // the last acks
	ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
	defer cancel()
	s, err := l.conn.js.Stream(ctx, l.cfg.Stream)
	if err == nil {
		err = s.UnpinConsumer(ctx, l.cfg.Name, pinGroup)
	}
	if err != nil {
		l.conn.log.Debug("unpin failed; pin will expire", "lane", l.cfg.Name, "err", err)
	}
	l.pin = ""
}
