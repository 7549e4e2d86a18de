package bus

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/backoff"
)

// OpenHub connects, waits until the hub can be reached, and creates or checks its
// streams and the given buckets. A hub that differs from the configuration is an error.
func OpenHub(ctx context.Context, cfg Config, t Topology, log *slog.Logger, buckets ...BucketConfig) (*Conn, error) {
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
			return nil, fmt.Errorf("hub %s cannot be reached: %w", cfg.target(), ctx.Err())
		}
		err := conn.EnsureHub(ctx, t, buckets...)
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
// it waits for the hub and creates or checks the streams.
type Hub struct {
	Conn     *Conn // from the start of the stage on
	Topology Topology

	cfg     Config
	buckets []BucketConfig
	log     *slog.Logger
}

// NewHub returns a hub that is opened by its stage, with the buckets that the role works with.
func NewHub(cfg Config, t Topology, log *slog.Logger, buckets ...BucketConfig) *Hub {
	return &Hub{Topology: t, cfg: cfg, buckets: buckets, log: log}
}

// OpenBucket finds a bucket, or creates it: a hub that was restarted has lost one in memory.
func (h *Hub) OpenBucket(ctx context.Context, cfg BucketConfig) (*Bucket, error) {
	return h.Conn.OpenBucket(ctx, cfg, h.Topology.Replicas)
}

// Service opens and closes the connection.
func (h *Hub) Service() services.Service {
	return services.NewIdleService(func(ctx context.Context) (err error) {
		h.Conn, err = OpenHub(ctx, h.cfg, h.Topology, h.log, h.buckets...)
		return err
	}, func(error) error {
		if h.Conn != nil {
			h.Conn.Close()
		}
		return nil
	})
}
