package sink

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

// horizon reports how far the routers have come, so that a reader of SPANS can tell
// a silent instance from one whose spans are still in a backlog. An instance has all
// its messages in one partition of TRACES, and each partition has its own time: a backlog
// holds up the instances that share it. It asks the hub twice a second; while the
// hub does not answer, this time does not advance.
type horizon struct {
	hub   *bus.Hub
	reach reach
	stall *stall.Detector

	mu   sync.Mutex
	mark watermark

	past     []traceEnd // by time
	searched []uint64   // by partition: up to where there is nothing after the routers' floor
}

// watermark is a statement about the hub: every message that a partition of TRACES held at
// its Before, and every one up to its Routed, has been routed, and is in SPANS up to the sequence spans.
type watermark struct {
	// By this process's clock. Lanes share it: it is never modified.
	sampler.Mark
	asked time.Time // when spans was requested, by this process's clock
	spans uint64
	// full: SPANS had no room for another message. Routers wait, with the spans that they have read.
	full     bool
	readable readable // what of SPANS can be read again
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

// newHorizon returns a horizon that knows nothing until it runs.
func newHorizon(hub *bus.Hub, late versions.Late, led *ledger.Ledger, log *slog.Logger) *horizon {
	return &horizon{hub: hub, reach: reach{maxBytes: uint64(late.MaxBytes)}, stall: stall.New(led, otlpwire.Traces.String(), "", "horizon", log)}
}

// latest returns the latest mark; a zero one when there is none yet.
func (h *horizon) latest() watermark {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mark
}

// run keeps the mark up to date until ctx ends.
func (h *horizon) run(ctx context.Context) {
	h.stall.Look(time.Now(), true, nil)
	for backoff.Sleep(ctx, horizonInterval) {
		if err := h.look(ctx); ctx.Err() == nil {
			h.stall.Look(time.Now(), err == nil, func() error {
				return fmt.Errorf("cannot read router progress; sampling of idle instances is delayed: %w", err)
			})
		}
	}
}

func (h *horizon) look(ctx context.Context) error {
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
	m := watermark{Mark: mark, asked: time.Now()}
	spans, err := h.hub.Conn.State(ctx, bus.Spans)
	if err != nil {
		return err
	}
	m.spans, m.full, m.readable = spans.LastSeq, spans.Full(), h.reach.look(spans, m.asked)
	h.mu.Lock()
	h.mark = m
	h.mu.Unlock()
	return unknown
}

// sawEnd remembers where TRACES ended at a time.
func (h *horizon) sawEnd(at time.Time, traces bus.StreamState) error {
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

// nothing is what is known before anything has been asked.
func nothing(partitions int) sampler.Mark {
	return sampler.Mark{Before: make([]time.Time, partitions), Routed: make([]uint64, partitions)}
}

// routed returns by partition up to which time, and which sequence, everything has been routed. An error says that it
// may be further than that.
func (h *horizon) routed(ctx context.Context, floors map[string]bus.Floor, end uint64) (mark sampler.Mark, unknown error) {
	partitions, routers := h.hub.Topology.Partitions, 0
	mark = nothing(partitions)
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
func (h *horizon) routedUpTo(ctx context.Context, p int, floor bus.Floor, end uint64) (uint64, error) {
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
func (h *horizon) ended(seq uint64) time.Time {
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
