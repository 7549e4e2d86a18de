package spool

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/receive"
)

// groups combines the requests that arrive while the previous message is written into
// one message (group commit): one write and one fsync for all of them. The first request
// of a group writes it, in its own goroutine; the others wait for that.
type groups struct {
	maxItems int
	linger   time.Duration
	write    func(g *group) error

	turn  chan struct{} // capacity 1: full while a group is written
	state struct {
		sync.Mutex
		open  *group // accepts requests; nil for none
		spare []byte // the body of a group that is done, for reuse
	}
}

// group is requests that are written together.
type group struct {
	body     []byte
	items    int
	requests int
	closed   chan struct{} // no more requests
	done     chan struct{} // closed when err is final
	err      error
}

// errNotWritten is the result of a group as long as no other is known.
var errNotWritten = errors.New("the group was not written")

func newGroups(maxItems int, linger time.Duration, write func(*group) error) *groups {
	return &groups{maxItems: maxItems, linger: linger, write: write, turn: make(chan struct{}, 1)}
}

// join adds b to a group and returns when the group is written. A request that does not
// write the group may leave when ctx ends: its payload is already in the group.
func (q *groups) join(ctx context.Context, b receive.Batch) error {
	g, first := q.add(b)
	if first {
		q.lead(g)
		return g.err
	}
	select {
	case <-g.done:
		return g.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// add puts a request into the open group, or into a new one when it does not fit.
func (q *groups) add(b receive.Batch) (g *group, first bool) {
	q.state.Lock()
	defer q.state.Unlock()
	g = q.state.open
	if g != nil && (len(g.body)+len(b.Payload) > envelope.MaxPayload || g.items+b.Items > q.maxItems) {
		close(g.closed)
		g = nil
	}
	if g == nil {
		g = &group{body: q.state.spare[:0], closed: make(chan struct{}), done: make(chan struct{}), err: errNotWritten}
		q.state.open, q.state.spare, first = g, nil, true
	}
	g.body = append(g.body, b.Payload...)
	g.items += b.Items
	g.requests++
	return g, first
}

// lead writes a group when the previous one has been written.
func (q *groups) lead(g *group) {
	defer close(g.done)
	select {
	case q.turn <- struct{}{}:
	default:
		stalled := time.NewTimer(stallTimeout)
		defer stalled.Stop()
		select {
		case q.turn <- struct{}{}:
		case <-stalled.C:
			q.end(g)
			g.err = errStalled
			return
		}
	}
	defer func() { <-q.turn }()
	if q.linger > 0 {
		linger := time.NewTimer(q.linger)
		defer linger.Stop()
		select {
		case <-linger.C:
		case <-g.closed:
		}
	}
	q.end(g)
	g.err = q.write(g)
	q.state.Lock()
	q.state.spare = g.body
	q.state.Unlock()
}

// end closes a group to further requests.
func (q *groups) end(g *group) {
	q.state.Lock()
	defer q.state.Unlock()
	if q.state.open == g {
		q.state.open = nil
	}
}
