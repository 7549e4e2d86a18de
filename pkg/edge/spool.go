package edge

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/receive"
)

const (
	// queueLength is how many requests may wait for a group; behind them senders
	// wait in their handlers, bounded by receive.max_in_flight_bytes.
	queueLength = 256

	// watchInterval is how often disk space and spool size are looked at. The
	// reserve must be more than a disk can take in that time.
	watchInterval = time.Second
)

// spool is a durable first-in, first-out buffer per signal: an embedded
// JetStream that no socket leads to.
//
// Requests that arrive while a group is being written form the next group: many
// requests, one message, one fsync (group commit).
type spool struct {
	cfg SpoolConfig
	led *ledger.Ledger
	log *slog.Logger

	broker *broker.Broker
	conn   *bus.Conn
	epoch  string // random, of this directory: no other instance can guess it
	queues [len(otlpwire.Signals)]chan *request

	noRoom   atomic.Bool // less than Reserve free on the disk
	stopped  chan struct{}
	stopOnce sync.Once
}

// request waits in a queue until its group is durable.
type request struct {
	batch receive.Batch
	done  chan error // capacity 1
}

func newSpool(cfg SpoolConfig, led *ledger.Ledger, log *slog.Logger) *spool {
	s := &spool{cfg: cfg, led: led, log: log.With("component", "spool"), stopped: make(chan struct{})}
	for i := range s.queues {
		s.queues[i] = make(chan *request, queueLength)
	}
	return s
}

func (s *spool) service() services.Service {
	return services.NewBasicService(s.open, s.run, func(error) error {
		s.stopOnce.Do(func() { close(s.stopped) })
		if s.conn != nil {
			s.conn.Close()
		}
		if s.broker != nil {
			s.broker.Stop()
		}
		return nil
	})
}

func (s *spool) open(ctx context.Context) (err error) {
	s.broker, err = broker.Start(broker.Config{
		Name: "spool", Dir: s.cfg.Dir, Sync: s.cfg.Durability == "fsync", MaxPayload: 2 * envelope.MaxPayload,
	}, s.log)
	if err != nil {
		return err
	}
	if s.epoch, err = loadEpoch(s.cfg.Dir); err != nil {
		return err
	}
	if s.conn, err = bus.Connect(bus.Config{Name: "spool", InProcess: s.broker}, s.log); err != nil {
		return err
	}
	var shares [len(otlpwire.Signals)]int64
	for i := range shares {
		shares[i] = int64(s.cfg.MaxBytes) / int64(len(shares))
	}
	if err := s.conn.EnsureSpool(ctx, shares); err != nil {
		return err
	}
	s.watch(ctx)
	return nil
}

// loadEpoch returns the nonce of a spool directory, made with the directory. It
// is a part of message ids: a directory that was emptied counts from 1 again
// and must not look like the old one.
func loadEpoch(dir string) (string, error) {
	path := filepath.Join(dir, "epoch")
	b, err := os.ReadFile(path)
	if err == nil && len(b) == 32 {
		return string(b), nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("spool epoch: %w", err)
	}
	var nonce [16]byte
	_, _ = rand.Read(nonce[:])
	epoch := hex.EncodeToString(nonce[:])
	if err := writeSynced(path, epoch); err != nil {
		return "", fmt.Errorf("spool epoch: %w", err)
	}
	return epoch, nil
}

func writeSynced(path, text string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Sync(), f.Close())
}

// run commits groups until ctx ends. Receivers have stopped by then.
func (s *spool) run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, sig := range otlpwire.Signals {
		wg.Go(func() { s.commitLoop(ctx, sig) })
	}
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			wg.Wait()
			return nil
		case <-tick.C:
			s.watch(ctx)
		}
	}
}

// Accept returns when b is durable. It does not follow ctx while the group is
// being written, since the payload is in use until then; that is bounded by the
// timeout of a publish.
func (s *spool) Accept(ctx context.Context, b receive.Batch) error {
	if s.noRoom.Load() {
		return fmt.Errorf("%w: less than %v free on the spool's disk", receive.ErrFull, s.cfg.Reserve)
	}
	r := &request{batch: b, done: make(chan error, 1)}
	select {
	case s.queues[b.Signal] <- r:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.stopped:
		return errors.New("shutting down")
	}
	select {
	case err := <-r.done:
		return err
	case <-s.stopped:
		return errors.New("shutting down")
	}
}

func (s *spool) commitLoop(ctx context.Context, sig otlpwire.Signal) {
	var (
		group []*request
		body  []byte
		out   []byte   // compressed
		next  *request // did not fit into the last group
		last  int64    // arrival of the last group: the clock of the stream never goes back
	)
	// The stream's clock runs on the monotonic one: a step of the wall clock
	// neither stops it nor makes it jump.
	opened := time.Now()
	for {
		if next == nil {
			select {
			case next = <-s.queues[sig]:
			case <-ctx.Done():
				return
			}
		}
		group, body, next = s.gather(sig, append(group[:0], next), append(body[:0], next.batch.Payload...))
		last = max(opened.UnixNano()+int64(time.Since(opened)), last+1)
		var err error
		out, err = s.commit(ctx, sig, group, out, body, last)
		for _, r := range group {
			r.done <- err
		}
	}
}

// gather adds what is waiting to the group, up to the size of a message.
func (s *spool) gather(sig otlpwire.Signal, group []*request, body []byte) ([]*request, []byte, *request) {
	for {
		select {
		case r := <-s.queues[sig]:
			if len(body)+len(r.batch.Payload) > envelope.MaxPayload {
				return group, body, r
			}
			group, body = append(group, r), append(body, r.batch.Payload...)
		default:
			return group, body, nil
		}
	}
}

// commit stores a group. It returns the memory that it has compressed into, to be
// used again: the server has its own copy.
func (s *spool) commit(ctx context.Context, sig otlpwire.Signal, group []*request, out, body []byte, arrival int64) ([]byte, error) {
	items := 0
	for _, r := range group {
		items += r.batch.Items
	}
	msg := bus.Message{Subject: bus.SpoolSubject(sig), Header: envelope.Header{
		ContentType: envelope.ContentTypeOTLP, Items: items, Arrival: arrival, ID: "",
	}}
	if msg.Body, msg.Header.Encoding = envelope.Compress(out, body, s.cfg.Compression); msg.Header.Encoding != "" {
		out = msg.Body
	}
	// What was accepted is written also while the process stops.
	_, err := s.conn.Publish(context.WithoutCancel(ctx), msg)
	if errors.Is(err, bus.ErrFull) {
		err = fmt.Errorf("%w: the spool holds %v of %v, the share of %v", receive.ErrFull, s.cfg.MaxBytes/3, s.cfg.MaxBytes, sig)
	}
	return out, err
}

// watch looks at the disk and publishes the spool's size.
func (s *spool) watch(ctx context.Context) {
	var fs syscall.Statfs_t
	if err := syscall.Statfs(s.cfg.Dir, &fs); err == nil {
		free := int64(fs.Bavail) * fs.Bsize
		noRoom := free < int64(s.cfg.Reserve)
		if s.noRoom.Swap(noRoom) != noRoom {
			if noRoom {
				s.log.Warn("disk nearly full, refusing", "free_bytes", free, "reserve", s.cfg.Reserve)
			} else {
				s.log.Info("disk has room again", "free_bytes", free)
			}
		}
	}
	total := uint64(0)
	for _, sig := range otlpwire.Signals {
		st, err := s.conn.State(ctx, bus.SpoolStream(sig))
		if err != nil {
			return
		}
		total += st.Bytes
	}
	s.led.SpoolBytes.Set(float64(total))
}

// empty reports whether the hub has everything of a signal.
func (s *spool) empty(ctx context.Context, sig otlpwire.Signal) bool {
	st, err := s.conn.State(ctx, bus.SpoolStream(sig))
	return err == nil && st.Messages == 0
}
