// Package horizon reports how far the routers have come, so that a reader of SPANS can tell
// a silent instance from one whose spans are still in a backlog, and what of a stream can be read again.
//
// An instance has all its messages in one partition of TRACES, and each partition has its own time: a backlog
// holds up the instances that share it.
//
// # Promises
//
//   - What a Mark says of a partition stays true: it never goes back.
//
// # Not here
//
// What follows from it for a trace: package sampler.
package horizon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/sampler"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/pkg/stall"
)

// Horizon is for the lanes of a process, which share it. It asks the hub twice a second; while the hub does not answer,
// time does not advance.
type Horizon struct {
	hub   *bus.Hub
	reach Reach
	stall *stall.Detector

	mu   sync.Mutex
	mark Mark

	past     []traceEnd // by time
	searched []uint64   // by partition: up to where there is nothing after the routers' floor
}

// Mark is a statement about the hub: every message that a partition of TRACES held at
// its Before, and every one up to its Routed, has been routed, and is in SPANS up to the sequence Spans.
type Mark struct {
	// By this process's clock. Lanes share it: it is never modified.
	sampler.Mark
	Asked time.Time // when Spans was requested, by this process's clock
	Spans uint64
	// Full: SPANS had no room for another message. Routers wait, with the spans that they have read.
	Full     bool
	Readable Readable // what of SPANS can be read again
}

// traceEnd is the last sequence of TRACES at a time.
type traceEnd struct {
	at  time.Time
	seq uint64
}

const (
	horizonInterval = 500 * time.Millisecond

	// horizonTimeout is how long one look may take: two failures are noticed within ten seconds.
	horizonTimeout = 4 * time.Second

	// maxPast bounds the history that is kept: ten minutes. A router that is further
	// behind holds its partition's mark until it has caught up.
	maxPast = 1200
)

// New returns a horizon that knows nothing until it runs.
func New(hub *bus.Hub, late versions.Late, led *ledger.Ledger, log *slog.Logger) *Horizon {
	return &Horizon{hub: hub, reach: Reach{MaxBytes: uint64(late.MaxBytes)}, stall: stall.New(led, otlpwire.Traces.String(), "", "horizon", log)}
}

// Latest returns the latest mark; a zero one when there is none yet.
func (h *Horizon) Latest() Mark {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mark
}

// Run keeps the mark up to date until ctx ends.
func (h *Horizon) Run(ctx context.Context) {
	h.stall.Look(time.Now(), true, nil)
	for backoff.Sleep(ctx, horizonInterval) {
		if err := h.look(ctx); ctx.Err() == nil {
			h.stall.Look(time.Now(), err == nil, func() error {
				return fmt.Errorf("cannot read router progress; sampling of idle instances is delayed: %w", err)
			})
		}
	}
}

func (h *Horizon) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, horizonTimeout)
	defer cancel()
	at := time.Now()
	floors, traces, listed := h.hub.Conn.Floors(ctx, bus.Stream(otlpwire.Traces))
	if floors == nil {
		return listed
	}
	if err := h.sawEnd(at, traces); err != nil {
		return err
	}
	mark, unknown := h.routed(ctx, floors, traces.LastSeq)
	if unknown != nil {
		unknown = errors.Join(unknown, listed) // a list without other consumers is enough
	}
	m := Mark{Mark: mark, Asked: time.Now()}
	spans, err := h.hub.Conn.State(ctx, bus.Spans)
	if err != nil {
		return err
	}
	m.Spans, m.Full, m.Readable = spans.LastSeq, spans.Full(), h.reach.Look(spans, m.Asked)
	h.mu.Lock()
	h.mark = m
	h.mu.Unlock()
	return unknown
}

// sawEnd remembers where TRACES ended at a time.
func (h *Horizon) sawEnd(at time.Time, traces bus.StreamState) error {
	partitions := h.hub.Topology.Partitions
	if traces.Partitions != partitions { // instances would be in other partitions than we assume
		return fmt.Errorf("stream %s has %d partitions, not %d", bus.Stream(otlpwire.Traces), traces.Partitions, partitions)
	}
	end := traces.LastSeq
	if n := len(h.past); n > 0 && end < h.past[n-1].seq {
		h.past, h.searched = h.past[:0], nil // the stream was recreated
	}
	if len(h.searched) != partitions {
		h.searched = make([]uint64, partitions)
	}
	if h.past = append(h.past, traceEnd{at, end}); len(h.past) > maxPast {
		h.past = h.past[1:]
	}
	return nil
}

// Nothing is what is known before anything has been asked.
func (h *Horizon) Nothing() sampler.Mark {
	partitions := h.hub.Topology.Partitions
	return sampler.Mark{Before: make([]time.Time, partitions), Routed: make([]uint64, partitions)}
}

// routed returns by partition up to which time, and which sequence, everything has been routed. An error says that it
// may be further than that.
func (h *Horizon) routed(ctx context.Context, floors map[string]bus.Floor, end uint64) (mark sampler.Mark, unknown error) {
	partitions, routers := h.hub.Topology.Partitions, 0
	mark = h.Nothing()
	copy(mark.Before, h.mark.Before) // only this goroutine writes it
	for p := range partitions {
		floor, exists := floors[bus.RouterLane+strconv.Itoa(p)]
		if !exists {
			continue
		}
		routers++
		seq, err := h.routedUpTo(ctx, p, floor, end)
		if err != nil {
			unknown = err
		}
		mark.Routed[p] = seq
		if at := h.ended(seq); at.After(mark.Before[p]) {
			mark.Before[p] = at
		}
	}
	if unknown == nil && routers < partitions {
		unknown = fmt.Errorf("%d of %d routers' consumers exist", routers, partitions)
	}
	return mark, unknown
}

// routedUpTo returns the sequence of TRACES up to which a partition has been routed, end at most. Where the
// lane counts nothing that is left, the stream's leader is asked for the next message: the count
// may be late.
func (h *Horizon) routedUpTo(ctx context.Context, p int, floor bus.Floor, end uint64) (uint64, error) {
	routed := min(end, max(floor.Done, h.searched[p]))
	if floor.Lag > 0 || routed == end {
		return routed, nil
	}
	next, _, err := h.hub.Conn.First(ctx, bus.Stream(otlpwire.Traces), bus.PartitionFilter(otlpwire.Traces, p), max(routed, h.searched[p])+1)
	if err != nil {
		return routed, err
	}
	if routed = end; next != 0 {
		routed = min(end, next-1)
	}
	h.searched[p] = routed
	return routed, nil
}

// ended returns the latest time at which the last sequence of TRACES was at most seq; zero when
// that is no longer known.
func (h *Horizon) ended(seq uint64) time.Time {
	i, _ := slices.BinarySearchFunc(h.past, seq, func(e traceEnd, seq uint64) int {
		if e.seq <= seq {
			return -1
		}
		return 1
	})
	if i == 0 {
		return time.Time{}
	}
	return h.past[i-1].at
}

// Reach tells what of a stream may be read again: from which sequence on, because a keeper may remove what is before
// meanwhile, and how many sequences at most, for max_bytes of one partition.
type Reach struct {
	MaxBytes uint64
	past     []traceEnd // of the last reachTime
}

// reachTime is how long it may take to read something again: so much as comes in that time may be removed meanwhile, and
// a keeper removes about as much at once.
const reachTime = 15 * time.Second

// Look is for the state of the stream now.
func (r *Reach) Look(s bus.StreamState, now time.Time) Readable {
	if n := len(r.past); n > 0 && r.past[n-1].seq > s.LastSeq {
		r.past = nil // it was recreated
	}
	r.past = slices.DeleteFunc(append(r.past, traceEnd{now, s.LastSeq}), func(e traceEnd) bool { return now.Sub(e.at) > reachTime })
	if s.Messages == 0 {
		return Readable{From: s.LastSeq + 1}
	}
	from := s.FirstSeq
	if from > 1 { // something has been removed before
		from += s.LastSeq - r.past[0].seq + (s.LastSeq-from)/16
	}
	each := max(s.Bytes/s.Messages, 1)
	return Readable{from, max(r.MaxBytes/each*uint64(max(s.Partitions, 1)), 1)}
}

// Readable is for [sampler.Samplers.Readable].
type Readable struct{ From, Most uint64 }
