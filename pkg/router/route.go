package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/tally"
)

// route reads all partitions of TRACES, splits payloads by trace ID on the wire and publishes one
// message a partition and linger to SPANS. One batch is in flight while the next is gathered, so
// that order is kept and a round trip does not cost throughput.
type route struct {
	cfg     Config
	to      target
	led     *ledger.Ledger
	log     *slog.Logger
	members *membership.Members
	hub     *bus.Hub
	inputs  chan input
	idBase  string
	seq     uint64
	said    backoff.Repeats
	quota   bus.Quota
}

// target is what a route writes to: the hub.
type target interface {
	// spread returns how SPANS has its traces.
	spread(ctx context.Context) (partition.Spread, error)
	// publish sends a message and returns at once; stored waits until it is stored.
	publish(m bus.Message) (stored func(context.Context) error)
	// deadLetter returns when the dead letter is stored.
	deadLetter(ctx context.Context, instance string, m bus.Message) error
}

type hubTarget struct{ *bus.Hub }

func (h hubTarget) spread(ctx context.Context) (partition.Spread, error) {
	state, err := h.Conn.State(ctx, bus.Spans)
	return partition.Spread{N: h.Topology.Partitions, ByInstance: !state.ByTrace}, err
}

func (h hubTarget) publish(m bus.Message) func(context.Context) error {
	return h.Conn.PublishAsync(m).Wait
}

func (h hubTarget) deadLetter(ctx context.Context, instance string, m bus.Message) error {
	return h.Conn.DeadLetter(ctx, otlpwire.Traces, instance, m)
}

// origin is the lane of an input.
type origin interface {
	// Ack settles all inputs up to seq.
	Ack(seq uint64) error
	// Waits notes what the inputs wait for; nil for nothing.
	Waits(why error)
}

// input is one message of TRACES.
type input struct {
	lane  origin
	tally *tally.Lane
	bus.Delivery
}

// inputsAhead is how many messages all lanes together may have read ahead; the
// lanes' own buffers are bounded in bytes.
const inputsAhead = 64

func newRoute(cfg Config, h *bus.Hub, led *ledger.Ledger, log *slog.Logger) *route {
	log = log.With("component", "route")
	return &route{
		cfg: cfg, to: hubTarget{h}, hub: h, led: led, log: log, members: membership.New(h, "router", cfg.Member, led, log),
		inputs: make(chan input, inputsAhead), idBase: nonce(),
	}
}

func (r *route) service() services.Service {
	return services.NewBasicService(nil, func(ctx context.Context) error {
		var shared []membership.Shared
		for p := range r.cfg.Streams.Partitions {
			read := func(ctx context.Context, lane *bus.Lane) { r.read(ctx, lane, p) }
			shared = append(shared, membership.Shared{Signal: otlpwire.Traces.String(), Partition: p, Backend: "router", Run: read, LaneConfig: bus.LaneConfig{
				Stream: bus.Stream(otlpwire.Traces), Filter: bus.PartitionFilter(otlpwire.Traces, p), Name: bus.RouterLane + strconv.Itoa(p), Raw: true,
			}})
		}
		work, stop := context.WithCancel(context.WithoutCancel(ctx))
		defer stop()
		reading, leave := context.WithCancel(work)
		defer leave()
		var readers, sender sync.WaitGroup
		readers.Go(func() { r.members.Run(reading, shared) })
		sender.Go(func() { r.run(work) })
		<-ctx.Done()
		r.members.Drain(work, r.cfg.Drain, func(membership.Shared) bool { return true })
		leave()
		readers.Wait()
		stop()
		sender.Wait()
		return nil
	}, nil)
}

// read passes a lane's messages on until ctx ends, and closes the lane when they are settled. A
// message that is delivered again only causes duplicates.
func (r *route) read(ctx context.Context, lane *bus.Lane, p int) {
	defer lane.Close()
	counts := r.tally(p)
	defer counts.Keep()()
	lane.Run(ctx, func(d bus.Delivery) bool {
		if d.Claimed {
			return backoff.Retry(ctx, r.log, "continue the tally", func() error {
				_, err := counts.Claim(ctx, lane.Floor())
				return err
			})
		}
		if d.Seq == 0 {
			return true
		}
		select {
		case r.inputs <- input{lane, counts, d}:
			return true
		case <-ctx.Done():
			return false
		}
	})
	finish, stop := membership.Finish(ctx)
	defer stop()
	lane.Settled(finish)
}

// tally returns the tally of the lane of a partition.
func (r *route) tally(p int) *tally.Lane {
	var (
		guard envelope.Guard
		body  []byte
	)
	return tally.Open(tally.Config{
		Conn: func() *bus.Conn { return r.hub.Conn }, Replicas: r.cfg.Streams.Replicas, Log: r.log,
		Stream: bus.Stream(otlpwire.Traces), Lane: bus.RouterLane + strconv.Itoa(p), Filter: bus.PartitionFilter(otlpwire.Traces, p),
		Missing: r.led.Missing(otlpwire.Traces.String(), p, "router"),
		Items: func(m bus.Delivery, saw func(instance string, items int)) {
			_, items, _ := m.Open(&guard, otlpwire.Traces, &body)
			saw(m.Instance(), items)
		},
	})
}

// unreadable is how many items a message counts as that cannot be read: they cannot be counted, and the
// sender's count is not trusted.
const unreadable = 1

// batch is what is published together: the inputs, and the messages made from them.
type batch struct {
	floors map[origin]uint64 // the highest sequence of every input lane
	inputs []done
	outs   [][]out // by partition; more than one where a message would be too large
	items  int
	bytes  int
	was    mark
}

// mark is what a batch has before an input is added.
type mark struct {
	items, bytes int
	outs         []int // by partition, how many messages
	last         []out // and the last of them
}

// mark remembers what b has, for undo.
func (b *batch) mark() {
	b.was = mark{b.items, b.bytes, b.was.outs[:0], b.was.last[:0]}
	for _, outs := range b.outs {
		last := out{}
		if len(outs) > 0 {
			last = outs[len(outs)-1]
		}
		b.was.outs, b.was.last = append(b.was.outs, len(outs)), append(b.was.last, last)
	}
}

// undo removes what has been added since mark.
func (b *batch) undo() {
	b.items, b.bytes = b.was.items, b.was.bytes
	for p, n := range b.was.outs {
		if b.outs[p] = b.outs[p][:n]; n > 0 {
			b.outs[p][n-1] = b.was.last[p]
		}
	}
}

// done is what becomes of an input when its batch is published.
type done struct {
	tally    *tally.Lane
	seq      uint64
	id       string
	instance string
	items    int // spans that it has
	ended    tally.Outcomes
}

// out is one message of a partition.
type out struct {
	body    []byte
	items   int
	arrival int64
}

func (r *route) newBatch() *batch {
	return &batch{floors: make(map[origin]uint64), outs: make([][]out, r.cfg.Streams.Partitions)}
}

// run gathers and publishes batches until ctx ends.
func (r *route) run(ctx context.Context) {
	batches := make(chan *batch) // no buffer: one in flight, one being gathered
	var wg sync.WaitGroup
	wg.Go(func() {
		for b := range batches {
			if !r.send(ctx, b) {
				return
			}
		}
	})
	defer wg.Wait()
	defer close(batches)

	split := &splitter{}
	if !backoff.Retry(ctx, r.log, "read how SPANS is spread", func() (err error) {
		split.spread, err = r.to.spread(ctx)
		return err
	}) {
		return
	}
	linger := time.NewTimer(0)
	defer linger.Stop()
	b := r.newBatch()
	for {
		var inputs <-chan input
		if b.bytes < int(r.cfg.MaxBatch) {
			inputs = r.inputs
		}
		select {
		case <-ctx.Done():
			return
		case in := <-inputs:
			if len(b.floors) == 0 {
				linger.Reset(r.cfg.Linger)
			}
			if !r.add(ctx, split, b, in) {
				return
			}
			continue
		case <-linger.C:
		}
		if len(b.floors) == 0 {
			continue
		}
		select {
		case batches <- b:
			b = r.newBatch()
		case <-ctx.Done():
			return
		}
	}
}

// add splits one input into b. A message that is not a valid envelope, or that makes the splitter panic, goes to DEADLETTER
// at once, and nothing of it is in b.
func (r *route) add(ctx context.Context, split *splitter, b *batch, in input) bool {
	if in.Restamped {
		r.led.Of(otlpwire.Traces).Restamped.Inc()
	}
	end := done{tally: in.tally, seq: in.Seq, id: in.Header.ID, instance: in.Instance()}
	b.mark()
	err := fault.Guard(func() (err error) {
		if in.Decompress(&split.body); in.Err != nil {
			return in.Err
		}
		end.items, end.ended[tally.Routed], err = split.add(b, in)
		return err
	})
	if err != nil {
		end.items, end.ended = unreadable, tally.Outcomes{}
		reason := ledger.DeadUndecodable
		if p, panicked := errors.AsType[*fault.Panic](err); panicked {
			reason = ledger.DeadPoison
			b.undo()
			*split = splitter{spread: split.spread}
			r.panicked(in, p)
		} else if more, due := r.said.Due(in.Subject, time.Now()); due {
			r.log.Warn("message is not a valid traces request; dead-lettered", "subject", in.Subject, "seq", in.Seq, "err", err, "letters_since_last_said", more)
		}
		how, ok := r.deadLetter(ctx, in, reason, err)
		if !ok {
			return false
		}
		end.ended[how] = unreadable
	}
	b.inputs = append(b.inputs, end)
	b.floors[in.lane] = in.Seq
	return true
}

// panicked notes that a message made the splitter panic.
func (r *route) panicked(in input, p *fault.Panic) {
	r.led.Panics(ledger.PanicRouter).Inc()
	if more, due := r.said.Due("panic", time.Now()); due {
		r.log.Error("bug: a message made the router panic; it is dead-lettered as poison", "subject", in.Subject, "seq", in.Seq, "err", p, "stack", p.Stack, "more_since_last_said", more)
	}
}

func (r *route) deadLetter(ctx context.Context, in input, reason string, why error) (how tally.Outcome, ok bool) {
	if reason != ledger.DeadPoison && !r.quota.Take(in.Instance(), time.Now()) { // what is our fault is kept
		r.led.Of(otlpwire.Traces).Dropped(ledger.DroppedUndecodable).Add(unreadable)
		return tally.Dropped, true
	}
	ok = backoff.Retry(ctx, r.log, "store a dead letter", func() error {
		return r.to.deadLetter(ctx, in.Instance(), bus.Message{
			Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: unreadable, Arrival: in.Header.Arrival, ID: fmt.Sprintf("dead-%s-%d", bus.Stream(otlpwire.Traces), in.Seq)},
			Body:   in.Body, Refusal: &bus.Refusal{Reason: reason, Detail: why.Error(), Backend: "router", Source: fmt.Sprintf("%s %d", bus.Stream(otlpwire.Traces), in.Seq)},
		})
	})
	if ok {
		r.led.Of(otlpwire.Traces).Dead(reason).Add(unreadable)
	}
	return tally.Dead, ok
}

// send publishes a batch, with as many attempts as it takes, and settles its inputs. It returns false
// if ctx ended first. A partition's messages are published one at a time, each after the previous one
// is stored: a message that was refused and sent again would otherwise be stored after a later one,
// and the sampler would take it for a repetition.
func (r *route) send(ctx context.Context, b *batch) bool {
	waits := func(why error) {
		for lane := range b.floors {
			lane.Waits(why)
		}
	}
	defer waits(nil)
	for round, more := 0, true; more; round++ {
		more = false
		var msgs []bus.Message
		for p, outs := range b.outs {
			if round < len(outs) {
				msgs = append(msgs, r.message(p, outs[round]))
			}
			more = more || round+1 < len(outs)
		}
		if !r.publish(ctx, msgs, waits) {
			return false
		}
	}
	r.led.Of(otlpwire.Traces).Routed.Add(float64(b.items))
	for i := range b.inputs { // before the floors move: a lane that ends then stores its tally
		in := &b.inputs[i]
		in.tally.Do(func(book *tally.Book) {
			book.Saw(in.seq, in.instance, in.items, in.id)
			book.EndedTogether([]tally.Part{{Seq: in.seq, Instance: in.instance, Items: in.items}}, &in.ended)
		})
		in.tally.Floor(in.seq)
	}
	for lane, seq := range b.floors {
		if err := lane.Ack(seq); err != nil {
			r.log.Debug("ack lost; a later one covers it", "err", err)
		}
	}
	return true
}

func (r *route) message(partition int, o out) bus.Message {
	r.seq++
	m := bus.Message{Subject: bus.SpansSubject(partition), Header: envelope.Header{
		ContentType: envelope.ContentTypeFrames, Items: o.items, Arrival: o.arrival, ID: r.idBase + "-" + strconv.FormatUint(r.seq, 10),
	}}
	m.Body, m.Header.Encoding = envelope.Compress(nil, o.body, envelope.S2)
	return m
}

// publish returns when all messages, one a partition, are stored. It calls waits with the reason
// while they are not.
func (r *route) publish(ctx context.Context, msgs []bus.Message, waits func(why error)) bool {
	return backoff.Retry(ctx, r.log, "publish spans", func() error {
		stored := make([]func(context.Context) error, len(msgs))
		for i, m := range msgs {
			stored[i] = r.to.publish(m)
		}
		var failed error
		left := msgs[:0]
		for i, wait := range stored {
			if err := wait(ctx); err != nil {
				failed = err
				left = append(left, msgs[i])
			}
		}
		waits(failed)
		msgs = left // with the same id: the hub stores it once
		return failed
	})
}

// splitter turns the payload of one instance into frames by partition.
type splitter struct {
	spread partition.Spread
	guard  envelope.Guard
	wire   otlpwire.Splitter
	body   []byte   // of the current message
	parts  [][]byte // payload by partition, of the current message
}

// add splits an input into b, and returns how many spans it has, and how many of them are in b.
func (s *splitter) add(b *batch, in input) (items, routed int, err error) {
	instance := in.Instance()
	payload, items, err := s.guard.Open(otlpwire.Traces, instance, in.Body)
	if err != nil {
		return 0, 0, err
	}
	if s.parts == nil {
		s.parts = make([][]byte, s.spread.N)
	}
	for i := range s.parts {
		s.parts[i] = s.parts[i][:0]
	}
	err = s.wire.Split(payload, func(item []byte) int {
		id, _ := otlpwire.SpanTrace(item)
		return s.spread.Of(instance, id)
	}, func(p int, piece []byte) {
		s.parts[p] = append(s.parts[p], piece...)
	})
	if err != nil {
		return 0, 0, err
	}
	for p, part := range s.parts {
		routed += b.addPart(p, envelope.Frame{Instance: instance, Arrival: in.Header.Arrival, Seq: in.Seq, Source: envelope.SourceOf(in.Header.ID), Load: in.Header.Load, Payload: part})
	}
	b.items += items
	return items, routed, nil
}

// addPart adds a frame to a partition: to its last message, or to a new one where
// that would become larger than a payload may be. A part is never larger than the
// payload it comes from. It returns how many spans the frame has.
func (b *batch) addPart(p int, f envelope.Frame) (items int) {
	if len(f.Payload) == 0 {
		return 0
	}
	n := len(b.outs[p])
	if n == 0 || len(b.outs[p][n-1].body)+len(f.Payload) > envelope.MaxPayload {
		b.outs[p] = append(b.outs[p], out{})
		n++
	}
	o := &b.outs[p][n-1]
	before := len(o.body)
	o.body = envelope.AppendFrame(o.body, f)
	items = otlpwire.Count(otlpwire.Traces, f.Payload)
	o.items += items
	o.arrival = f.Arrival
	b.bytes += len(o.body) - before
	return items
}
