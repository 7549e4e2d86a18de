package bus

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// What a lane tells those who watch it; they are other goroutines than its reader.

// fails keeps why the lane is not read; nil when it is.
func (l *Lane) fails(why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.failed = why
}

// Waits says what the reader waits for, beyond the lane: its backend, for instance; nil when
// it goes on.
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

// waits returns since when the reader waits for something; zero when it does not.
func (l *Lane) waits() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.since
}

// why says what holds the lane up, as far as it is known.
func (l *Lane) why() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.mu.failed != nil:
		return l.mu.failed
	case l.mu.waits != nil:
		return l.mu.waits
	}
	return fmt.Errorf("its floor stands at %d", l.mu.floor)
}

// lag returns how many messages of the partition are not finished.
func lag(info *jetstream.ConsumerInfo) uint64 {
	return info.NumPending + uint64(max(info.NumAckPending, 0))
}

// Lag asks the server how many messages of the partition are not finished.
func (l *Lane) Lag(ctx context.Context) (uint64, error) {
	info, err := l.info(ctx)
	if err != nil {
		return 0, err
	}
	return lag(info), nil
}

func (l *Lane) info(ctx context.Context) (*jetstream.ConsumerInfo, error) {
	info, err := l.conn.consumerInfo(ctx, l.cfg)
	if err != nil {
		return nil, l.failed(err)
	}
	l.mu.Lock()
	l.mu.waiting = info.NumPending
	l.mu.Unlock()
	return info, nil
}

// Waiting returns how many messages stood behind the last one, when that was last
// said; 0 when this reader is not the owner.
func (l *Lane) Waiting() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Now().After(l.mu.held) {
		return 0
	}
	return l.mu.waiting
}

// LaneLag returns how many messages of a lane are not finished, whoever owns it.
func (c *Conn) LaneLag(ctx context.Context, cfg LaneConfig) (uint64, error) {
	info, err := c.consumerInfo(ctx, cfg)
	if err != nil {
		return 0, fmt.Errorf("lag of lane %s of %s: %w", cfg.Name, cfg.Stream, err)
	}
	return lag(info), nil
}
