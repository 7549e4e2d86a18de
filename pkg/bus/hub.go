package bus

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"time"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/backoff"
)

// OpenHub connects, waits until the hub is there and makes or checks its
// streams. A hub that is not there yet is waited for; a hub that differs from
// the configuration is an error.
func OpenHub(ctx context.Context, cfg Config, t Topology, log *slog.Logger) (*Conn, error) {
	conn, err := Connect(cfg, log)
	if err != nil {
		return nil, err
	}
	if !conn.Connected() {
		log.Warn("waiting for the hub", "server", cfg.target(), "err", reason(conn.nc.LastError()))
	}
	var said backoff.Repeats
	for {
		if !backoff.Until(ctx, conn.Connected) {
			conn.Close()
			return nil, fmt.Errorf("hub %s is not there: %w", cfg.target(), ctx.Err())
		}
		err := conn.EnsureHub(ctx, t)
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil || conn.settled(err) {
			conn.Close()
			return nil, err
		}
		if more, due := said.Due(Kind(err), time.Now()); due {
			log.Warn("hub is not ready, will try again", "err", err, "more_since_last_said", more)
		}
		if !backoff.Sleep(ctx, time.Second) {
			conn.Close()
			return nil, err
		}
	}
}

// Hub is the connection that the stages of a role share. Its stage comes first:
// it waits for the hub and makes or checks the streams.
type Hub struct {
	Conn *Conn // from the start of the stage on

	cfg      Config
	topology Topology
	log      *slog.Logger
}

// NewHub returns a hub that is opened by its stage.
func NewHub(cfg Config, t Topology, log *slog.Logger) *Hub {
	return &Hub{cfg: cfg, topology: t, log: log}
}

// Service opens and closes the connection.
func (h *Hub) Service() services.Service {
	return services.NewIdleService(func(ctx context.Context) (err error) {
		h.Conn, err = OpenHub(ctx, h.cfg, h.topology, h.log)
		return err
	}, func(error) error {
		if h.Conn != nil {
			h.Conn.Close()
		}
		return nil
	})
}

// pace tells from how many messages waited a while ago when none will.
type pace struct{ past []waited }

type waited struct {
	at       time.Time
	messages uint64
}

// left takes in how many messages wait, and returns the seconds until none does.
func (p *pace) left(now time.Time, waiting uint64) float64 {
	if p.past = append(p.past, waited{now, waiting}); len(p.past) > 6 { // ten seconds
		p.past = p.past[1:]
	}
	first := p.past[0]
	switch {
	case waiting == 0:
		return 0
	case first.messages <= waiting:
		return math.Inf(1)
	}
	return float64(waiting) * now.Sub(first.at).Seconds() / float64(first.messages-waiting)
}
