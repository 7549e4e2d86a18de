package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// What a lane reports to goroutines other than its reader.

// fails stores why the lane cannot be read; nil while it is read.
func (l *Lane) fails(why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.failed = why
}

// Waits stores what the reader waits for outside the lane, for instance its backend; nil when
// it continues.
func (l *Lane) Waits(why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case why == nil:
		l.mu.since = time.Time{}
	case l.mu.since.IsZero():
		l.mu.since = time.Now()
	}
	l.mu.waits = why
}

// WaitsSince returns since when the reader waits for something; zero when it does not.
func (l *Lane) WaitsSince() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.since
}

// Why returns what the lane is waiting for, as far as it is known.
func (l *Lane) Why() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.mu.failed != nil:
		return l.mu.failed
	case l.mu.waits != nil:
		return l.mu.waits
	}
	return fmt.Errorf("its floor does not move from %d", l.mu.floor)
}

// lag returns how many messages of the partition are not finished.
func lag(info *jetstream.ConsumerInfo) uint64 {
	return info.NumPending + uint64(max(info.NumAckPending, 0))
}

// floorOf returns how far a lane is.
func floorOf(info *jetstream.ConsumerInfo) Floor {
	return Floor{Filter: info.Config.FilterSubject, Done: info.AckFloor.Stream, Lag: lag(info), Read: pinned(info) != "" || info.NumWaiting > 0}
}

// Progress asks the server how far the lane is, also if another reader owns it.
func (l *Lane) Progress(ctx context.Context) (Floor, error) {
	info, err := l.conn.consumerInfo(ctx, l.cfg)
	if err != nil {
		return Floor{}, l.failed(err)
	}
	l.mu.Lock()
	l.mu.waiting = info.NumPending
	l.mu.Unlock()
	return floorOf(info), nil
}

// Waiting returns how many messages are in the stream after the last one, when that was last
// known; 0 when this reader is not the owner.
func (l *Lane) Waiting() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Now().After(l.mu.held) {
		return 0
	}
	return l.mu.waiting
}

// ErrNoLane reports that the hub has no such lane.
var ErrNoLane = errors.New("the hub does not have the lane")

// LaneFloor asks the server how far a lane is, which need not be open here. [ErrNoLane]: it does
// not exist.
func (c *Conn) LaneFloor(ctx context.Context, cfg LaneConfig) (Floor, error) {
	info, err := c.consumerInfo(ctx, cfg)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		err = fmt.Errorf("%w: %w", ErrNoLane, err)
	}
	if err != nil {
		return Floor{}, fmt.Errorf("lane %s of %s: %w", cfg.Name, cfg.Stream, err)
	}
	return floorOf(info), nil
}
