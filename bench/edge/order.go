package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// A span's ID tells its place: the connection, from 1, in the first byte, then the
// number among the spans of that connection, from 1.
const countBits = 56

// numbered are requests of one connection whose spans are numbered as they are sent.
type numbered struct {
	connection uint64
	sent       uint64 // spans
	turn       int
	bodies     [][]byte
	ids        [][][]byte // span IDs in each body
}

func number(connection int, bodies [][]byte) *numbered {
	q := &numbered{connection: uint64(connection + 1)}
	for _, b := range bodies {
		b = bytes.Clone(b)
		var ids [][]byte
		for span := range otlpwire.Items(b) {
			ids = append(ids, spanID(span))
		}
		q.bodies, q.ids = append(q.bodies, b), append(q.ids, ids)
	}
	return q
}

// next numbers a request. It is valid until next is called as often as there are
// requests.
func (q *numbered) next() []byte {
	i := q.turn % len(q.bodies)
	q.turn++
	for _, id := range q.ids[i] {
		q.sent++
		binary.BigEndian.PutUint64(id, q.connection<<countBits|q.sent)
	}
	return q.bodies[i]
}

// spanID finds the eight bytes of a span's ID, in place.
func spanID(span []byte) []byte {
	const field = 2 // opentelemetry.proto.trace.v1.Span.span_id
	for b := span; len(b) > 0; {
		num, typ, n := protowire.ConsumeTag(b)
		b = b[max(n, 0):]
		if num == field && typ == protowire.BytesType {
			if id, n := protowire.ConsumeBytes(b); n > 0 && len(id) == 8 {
				return id
			}
		}
		size := protowire.ConsumeFieldValue(num, typ, b)
		if n < 0 || size < 0 {
			break
		}
		b = b[size:]
	}
	panic("BUG: a generated span has no ID")
}

// order is what the hub's stream says about the spans of all connections.
type order struct {
	last  []uint64 // of each connection
	spans int
	again int // spans that came a second time
}

// see notes a span; an error says that one is missing or out of order.
func (o *order) see(id uint64) error {
	c, n := id>>countBits, id&(1<<countBits-1)
	if c < 1 || int(c) > len(o.last) {
		return fmt.Errorf("span ID %x is none of ours", id)
	}
	last := &o.last[c-1]
	switch {
	case n == *last+1:
		*last = n
		o.spans++
	case n <= *last:
		o.again++
	default:
		return fmt.Errorf("connection %d: span %d comes after span %d", c-1, n, *last)
	}
	return nil
}

// readBack reads the hub's stream of traces from its start to its end.
func readBack(ctx context.Context, hub string, k hubKind, connections int) (*order, error) {
	conn, err := bus.OpenHub(ctx, bus.Config{URL: "nats://" + hub, Name: "bench-order"}, k.topology(), slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	lane, err := conn.OpenLane(ctx, bus.LaneConfig{Stream: bus.Stream(otlpwire.Traces), Name: "bench-order"})
	if err != nil {
		return nil, err
	}
	defer lane.Close()
	o := &order{last: make([]uint64, connections)}
	for {
		d, err := lane.Next(ctx)
		if err != nil {
			return o, err
		}
		if d.Seq == 0 {
			continue
		}
		if d.Err != nil {
			return o, fmt.Errorf("message %d: %w", d.Seq, d.Err)
		}
		for span := range otlpwire.Items(d.Body) {
			if err := o.see(binary.BigEndian.Uint64(spanID(span))); err != nil {
				return o, fmt.Errorf("message %d: %w", d.Seq, err)
			}
		}
		if err := lane.Ack(d.Seq); err != nil {
			return o, err
		}
		if d.Pending == 0 {
			return o, nil
		}
	}
}
