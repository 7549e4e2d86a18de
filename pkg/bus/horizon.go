package bus

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/stall"
)

// Horizon reports how far the routers have come, so that a reader of SPANS can tell
// a silent instance from one whose spans are still in a backlog. An instance has all
// its messages in one partition of TRACES, and each partition has its own time: a backlog
// holds up the instances that share it. Horizon asks the hub twice a second; while the
// hub does not answer, this time does not advance.
type Horizon struct {
	hub   *Hub
	stall *stall.Detector

	mu   sync.Mutex
	mark Watermark

	past     []traceEnd // by time
	searched []uint64   // by partition: up to where there is nothing after the routers' floor
}

// Watermark is a statement about the hub: every message that a partition of TRACES held at
// its Before has been routed, and is in SPANS up to the sequence Spans.
type Watermark struct {
	// Before is by partition, by this process's clock; zero where nothing is known. Lanes
	// share it: it is never modified.
	Before []time.Time
	Asked  time.Time // when Spans was requested, by this process's clock
	Spans  uint64
	// Full: SPANS had no room for another message. Routers wait, with the spans that they have read.
	Full bool
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

// NewHorizon returns a horizon that knows nothing until it runs.
func NewHorizon(hub *Hub, led *ledger.Ledger, log *slog.Logger) *Horizon {
	return &Horizon{hub: hub, stall: stall.New(led, otlpwire.Traces.String(), "", "horizon", log)}
}

// Watermark returns the latest mark; a zero one when there is none yet.
func (h *Horizon) Watermark() Watermark {
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
	traces, err := h.hub.Conn.js.Stream(ctx, Stream(otlpwire.Traces))
	if err != nil {
		return err
	}
	if err := h.sawEnd(at, traces.CachedInfo()); err != nil {
		return err
	}
	before, unknown := h.routed(ctx, traces)
	m := Watermark{Before: before, Asked: time.Now()}
	spans, err := h.hub.Conn.js.Stream(ctx, Spans)
	if err != nil {
		return err
	}
	state := stateOf(spans.CachedInfo())
	m.Spans, m.Full = state.LastSeq, state.Refuses && state.MaxBytes > 0 && state.Bytes+maxMessage > state.MaxBytes
	h.mu.Lock()
	h.mark = m
	h.mu.Unlock()
	return unknown
}

// sawEnd remembers where TRACES ended at a time.
func (h *Horizon) sawEnd(at time.Time, traces *jetstream.StreamInfo) error {
	partitions := h.hub.Topology.Partitions
	switch n, err := storedPartitions(traces.Config); {
	case err != nil:
		return err
	case n != partitions: // instances would be in other partitions than we assume
		return fmt.Errorf("%w: stream %s has %d partitions, not %d", errTopology, Stream(otlpwire.Traces), n, partitions)
	}
	end := traces.State.LastSeq
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

// routed returns by partition up to which time everything has been routed. An error says that it may be
// further than that.
func (h *Horizon) routed(ctx context.Context, traces jetstream.Stream) (before []time.Time, unknown error) {
	partitions, routers := h.hub.Topology.Partitions, 0
	before = make([]time.Time, partitions)
	copy(before, h.mark.Before) // only this goroutine writes it
	var infos []*jetstream.ConsumerInfo
	consumers := traces.ListConsumers(ctx)
	for info := range consumers.Info() { // to its end: the goroutine that lists blocks until it is read
		infos = append(infos, info)
	}
	unknown = consumers.Err()
	for _, info := range infos {
		p, err := strconv.Atoi(strings.TrimPrefix(info.Name, RouterLane))
		if err != nil || p < 0 || p >= partitions || info.Name != RouterLane+strconv.Itoa(p) {
			continue // another kind of consumer
		}
		routers++
		seq, err := h.routedUpTo(ctx, p, info, traces.CachedInfo().State.LastSeq)
		if err != nil {
			unknown = err
		}
		if at := h.ended(seq); at.After(before[p]) {
			before[p] = at
		}
	}
	if unknown == nil && routers < partitions {
		unknown = fmt.Errorf("%d of %d routers' consumers exist", routers, partitions)
	}
	return before, unknown
}

// routedUpTo returns the sequence of TRACES up to which a partition has been routed, end at most. Where the
// consumer counts nothing that is left, the stream's leader is asked for the next message: the count
// may be late.
func (h *Horizon) routedUpTo(ctx context.Context, p int, info *jetstream.ConsumerInfo, end uint64) (uint64, error) {
	routed := min(end, info.AckFloor.Stream)
	if lag(info) > 0 || routed == end {
		return routed, nil
	}
	next, _, err := h.hub.Conn.First(ctx, Stream(otlpwire.Traces), PartitionFilter(otlpwire.Traces, p), max(routed, h.searched[p])+1)
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
