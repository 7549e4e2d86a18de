package sink

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/sampler"
)

// rescues reads the spans of rescued traces again, many traces in one pass over the stream, beside the lane. What it
// finds goes back to the lane's goroutine, which sends it: one request at a time.
type rescues struct {
	lane *traceLane
	// last is the pass that ended last: passes take half of the time at most.
	last struct {
		ended time.Time
		took  time.Duration
	}
	waiting []envelope.Decision // recorded
	reading []envelope.Decision // by the current pass
	found   chan found          // nil: nothing is read
	stop    context.CancelFunc
	pass    sync.WaitGroup
}

// found is what a pass has found; or, done, that it has read everything, and the lane has sent it.
type found struct {
	exports []sampler.Export
	done    bool
}

const (
	// rescuePause is the shortest pause between two passes: more traces may be rescued meanwhile.
	rescuePause = time.Second

	// maxRescues is how many rescues may be unfinished; the lane reads nothing new meanwhile. Limits a minute do not bound
	// that: they are in stream time, of which a lane that catches up reads much at once.
	maxRescues = 1000

	// maxFound is how many bytes a pass holds, at about, while the lane sends.
	maxFound = 16 << 20
)

// begin starts a pass if there is something to read, and none is under way.
func (r *rescues) begin(ctx context.Context, grouping domain.Versions) {
	if r.found != nil || len(r.waiting) == 0 || len(r.waiting) < maxRescues && time.Since(r.last.ended) < max(r.last.took, rescuePause) {
		return
	}
	r.reading, r.waiting = r.waiting, nil
	ctx, r.stop = context.WithCancel(ctx)
	out := make(chan found)
	r.found = out
	p := &rescuePass{lane: r.lane, unread: slices.Clone(r.reading), rescuer: sampler.NewRescuer(r.reading, grouping), found: out}
	from, _ := p.rescuer.Range()
	p.next, r.last.ended = from, time.Now()
	r.pass.Go(func() {
		if backoff.Retry(ctx, p.log(), "read the earlier spans of rescued traces", func() error { return p.read(ctx) }) {
			// The lane sends what was found before it takes that this is all: then it records that it is sent.
			if len(p.exports) == 0 || p.give(ctx, found{exports: p.exports}) == nil {
				_ = p.give(ctx, found{done: true}) // else it has ended
			}
		}
	})
}

// busy reports whether something is left to be read.
func (r *rescues) busy() bool { return len(r.waiting) > 0 || r.found != nil }

// end ends the current pass and returns what it was for.
func (r *rescues) end() (was []envelope.Decision) {
	if r.found == nil {
		return nil
	}
	r.stop()
	r.pass.Wait()
	now := time.Now()
	r.last.took, r.last.ended = now.Sub(r.last.ended), now
	was, r.reading, r.found = r.reading, nil, nil
	return was
}

// forget ends everything: the next owner of the lane, or this one when it has claimed it again, begins with what is recorded.
func (r *rescues) forget() {
	r.end()
	r.waiting = nil
}

// rescuePass is one pass, for a goroutine of its own.
type rescuePass struct {
	lane    *traceLane
	rescuer *sampler.Rescuer
	unread  []envelope.Decision // whose spans were not known to be gone
	found   chan<- found
	next    uint64           // the sequence that is read next
	exports []sampler.Export // not given to the lane yet
	size    int              // of these
	guard   envelope.Guard
	body    []byte
}

func (p *rescuePass) log() *slog.Logger { return p.lane.exporter.Log }

// read reads to the end of the range; after an error it may be called again.
func (p *rescuePass) read(ctx context.Context) error {
	_, upto := p.rescuer.Range()
	if err := p.look(ctx); err != nil || p.next > upto {
		return err
	}
	reader, err := p.lane.exporter.Conn().OpenReaderOf(ctx, bus.ReaderConfig{Stream: p.lane.stream, From: p.next, Filters: p.lane.filters})
	if err != nil {
		return err
	}
	defer reader.Close()
	var failed error
	if err := reader.Each(ctx, func(d bus.Delivery) bool {
		if d.Seq > upto {
			return false
		}
		if failed = p.take(ctx, d); failed != nil {
			return false
		}
		p.next = d.Seq + 1
		return d.Seq < upto
	}); err != nil || failed != nil {
		return errors.Join(err, failed)
	}
	if err := p.look(ctx); err != nil || p.next > upto {
		return err
	}
	// The consumer has counted that nothing is left, perhaps by a copy that is behind: the lane has read to the end.
	if over, err := p.lane.lane.Has(ctx, p.next-1, upto); err != nil {
		return err
	} else if !over {
		return errBehind
	}
	p.next = upto + 1
	return nil
}

var errBehind = errors.New("not everything has been read")

// look counts the traces of which the stream does not have everything any more that is still to be read.
func (p *rescuePass) look(ctx context.Context) error {
	state, err := p.lane.exporter.Conn().State(ctx, p.lane.stream)
	if err != nil {
		return err
	}
	had := len(p.unread)
	p.unread = slices.DeleteFunc(p.unread, func(d envelope.Decision) bool {
		return max(d.From, p.next) <= d.Upto && max(d.From, p.next) < state.FirstSeq
	})
	if gone := had - len(p.unread); gone > 0 {
		p.lane.count.incomplete(gone)
		p.log().Warn("late spans have brought back traces of which the hub does not have everything any more", "traces", gone)
	}
	return nil
}

// take gathers what a message has, and gives it to the lane when that is a request's worth; a lane that is sending gets it later.
func (p *rescuePass) take(ctx context.Context, d bus.Delivery) error {
	if err := fault.Guard(func() error {
		d.Decompress(&p.body)
		return p.lane.frames(&p.guard, d, func(f envelope.Frame) error {
			some, err := p.rescuer.Add(d.Seq, f)
			for i := range some {
				p.size += some[i].Size()
			}
			p.exports = append(p.exports, some...)
			return err
		})
	}); err != nil {
		p.guard = envelope.Guard{}
		p.lane.caught(sampler.About{Seq: d.Seq}, err)
		p.log().Debug("message with earlier spans of rescued traces cannot be read", "seq", d.Seq, "err", err) // nor could the lane
	}
	switch {
	case p.size > maxFound:
		return p.give(ctx, found{exports: p.exports})
	case p.size > maxRequest:
		select {
		case p.found <- found{exports: p.exports}:
			p.exports, p.size = nil, 0
		default:
		}
	}
	return ctx.Err()
}

// give waits until the lane takes what was found.
func (p *rescuePass) give(ctx context.Context, f found) error {
	select {
	case p.found <- f:
		p.exports, p.size = nil, 0
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// rescued handles what a pass has found.
func (l *traceLane) rescued(f found) {
	if l.sampler == nil {
		return
	}
	exports := slices.DeleteFunc(f.exports, func(e sampler.Export) bool { return !l.feed.asks(e.Instance) })
	for i := range exports {
		l.exports = append(l.exports, exports[i])
		l.bytes += exports[i].Size()
	}
	if f.done {
		for _, d := range l.rescues.end() {
			l.note(l.sampler.Rescued(d))
			l.released = true
		}
	}
}
