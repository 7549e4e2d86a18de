package bus

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/proc"
)

// Horizon says how far the routers have come, so that a reader of SPANS knows
// that an instance is silent, and not only behind. It asks the hub twice a
// second; while the hub does not answer, time stands still.
type Horizon struct {
	hub *Hub
	log *slog.Logger

	mu   sync.Mutex
	mark Mark

	past []traceEnd // by time
}

// Mark is a statement about the hub: every message that TRACES held at Before has
// been routed, and is in SPANS up to the sequence Spans.
type Mark struct {
	Before time.Time // on this process's clock
	Asked  time.Time // likewise: when Spans was asked for
	Spans  uint64
}

// traceEnd is the last sequence of TRACES at a time.
type traceEnd struct {
	at  time.Time
	seq uint64
}

const (
	horizonInterval = 500 * time.Millisecond

	// horizonPatience is how often the hub may give no answer before that is worth a
	// warning.
	horizonPatience = 20

	// maxPast bounds what is known about the past: ten minutes. Routers that are
	// further behind hold the mark until they have caught up.
	maxPast = 1200
)

// NewHorizon returns a horizon that knows nothing until it runs.
func NewHorizon(hub *Hub, log *slog.Logger) *Horizon { return &Horizon{hub: hub, log: log} }

// Mark returns the latest mark; a zero one when there is none yet.
func (h *Horizon) Mark() Mark {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mark
}

// Run keeps the mark up to date until ctx ends.
func (h *Horizon) Run(ctx context.Context) {
	for failed := 0; proc.Sleep(ctx, horizonInterval); {
		switch err := h.look(ctx); {
		case ctx.Err() != nil:
		case err == nil:
			failed = 0
		default:
			if failed++; failed == horizonPatience {
				h.log.Warn("the hub does not say how far the routers are: traces of instances that are silent wait", "err", err)
			}
		}
	}
}

func (h *Horizon) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	conn, at := h.hub.Conn, time.Now()
	traces, err := conn.js.Stream(ctx, Stream(otlpwire.Traces))
	if err != nil {
		return err
	}
	end := traces.CachedInfo().State.LastSeq
	if n := len(h.past); n > 0 && end < h.past[n-1].seq {
		h.past = h.past[:0] // the stream was made anew
	}
	if h.past = append(h.past, traceEnd{at, end}); len(h.past) > maxPast {
		h.past = h.past[1:]
	}
	routed, routers := end, 0
	consumers := traces.ListConsumers(ctx)
	for info := range consumers.Info() {
		n, err := strconv.Atoi(strings.TrimPrefix(info.Name, RouterLane))
		if err != nil || !strings.HasPrefix(info.Name, RouterLane) || n < 0 || n >= h.hub.topology.Partitions {
			continue // somebody else's
		}
		if routers++; lag(info) > 0 {
			routed = min(routed, info.AckFloor.Stream)
		}
	}
	if err := consumers.Err(); err != nil {
		return err
	}
	if routers < h.hub.topology.Partitions {
		return fmt.Errorf("%d of %d routers' consumers are there", routers, h.hub.topology.Partitions)
	}
	m := Mark{Asked: time.Now()}
	spans, err := conn.js.Stream(ctx, Spans)
	if err != nil {
		return err
	}
	m.Spans = spans.CachedInfo().State.LastSeq
	// Everything that TRACES held at the latest time at which it ended no later than
	// what is routed now.
	for i := len(h.past) - 1; i >= 0 && m.Before.IsZero(); i-- {
		if h.past[i].seq <= routed {
			m.Before = h.past[i].at
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if m.Before.After(h.mark.Before) {
		h.mark = m
	}
	return nil
}
