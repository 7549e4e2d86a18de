package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync/atomic"
	"time"
)

const (
	fillConnections = 8
	fillSpans       = 512 // a request
	liveSpans       = 64  // a request
)

// backlog lets an edge take what the time without a hub brings, as fast as it does,
// then starts the hub, while live traffic goes on, and measures how long it takes
// until the hub has everything. Then it reads the hub and checks the order.
func (b *bench) backlog(ctx context.Context) error {
	hub, err := freeAddr()
	if err != nil {
		return err
	}
	r := &running{}
	defer r.stop()
	hubDir, err := r.newDir(b.dir)
	if err != nil {
		return err
	}
	if err := b.startEdge(ctx, r, true, hub); err != nil {
		return err
	}
	filled, err := b.fill(ctx, r)
	if err != nil {
		return fmt.Errorf("fill the spool: %w", err)
	}
	live, err := b.startLive(ctx, r)
	if err != nil {
		return err
	}
	kind := hubKind{whole: true, fsync: b.hubFsync}
	err = b.drain(ctx, r, filled, live, func() (*process, error) { return b.startHub(ctx, hubDir, hub, kind) })
	answers, liveErr := live.end()
	if err := errors.Join(err, liveErr); err != nil {
		return fmt.Errorf("drain the spool: %w", err)
	}
	fmt.Printf("live answers meanwhile: p50 %.2f ms, p99 %.2f ms, slowest %.2f ms, %d refused\n",
		ms(quantile(answers.answers, 0.5)), ms(quantile(answers.answers, 0.99)), ms(quantile(answers.answers, 1)), answers.refused)
	total := filled + answers.spans
	if _, err := r.drained(ctx, total); err != nil {
		return err
	}
	peak, err := r.measured.peakRSS()
	if err != nil {
		return err
	}
	fmt.Printf("edge: peak %.0f MiB\n", float64(peak)/(1<<20))

	start := time.Now()
	o, err := readBack(ctx, hub, kind, fillConnections+1)
	if err != nil {
		return fmt.Errorf("order in the hub: %w", err)
	}
	if o.spans != total {
		return fmt.Errorf("order in the hub: %d spans are there, %d were answered with success", o.spans, total)
	}
	fmt.Printf("order: %d spans read back in %.1f s; all there, rising on each of %d connections, %d twice\n", o.spans, time.Since(start).Seconds(), fillConnections+1, o.again)
	return nil
}

// fill sends what the hub misses and returns how many spans that were.
func (b *bench) fill(ctx context.Context, r *running) (spans int, err error) {
	senders, err := openSenders(b.protocol, r.otlp, fillConnections)
	defer closeAll(senders)
	if err != nil {
		return 0, err
	}
	// No two connections have the same bytes: what a group holds twice is compressed
	// to nothing.
	bodies := b.requests(fillSpans)
	each := len(bodies) / fillConnections
	var numbers [fillConnections]*numbered
	for i := range numbers {
		numbers[i] = number(i, bodies[i*each:(i+1)*each])
	}
	var left atomic.Int64
	left.Store(int64(b.away.Seconds()*float64(b.rate)) / fillSpans)
	t := traffic{senders: senders, spans: fillSpans, next: func(connection int) []byte {
		if left.Add(-1) < 0 {
			return nil
		}
		return numbers[connection].next()
	}}
	o, err := t.run(ctx)
	if err != nil {
		return 0, err
	}
	size, err := bytesIn(r.store)
	if err != nil {
		return 0, err
	}
	fmt.Printf("backlog: %d spans, %v at %d spans/s; taken in %.1f s (%.0f spans/s, fsync on), %.0f MiB on disk, %d refused\n",
		o.spans, b.away, b.rate, o.took.Seconds(), float64(o.spans)/o.took.Seconds(), float64(size)/(1<<20), o.refused)
	return o.spans, nil
}

// drain starts the hub and waits until it has everything that was answered with
// success until then.
func (b *bench) drain(ctx context.Context, r *running, filled int, live *live, startHub func() (*process, error)) error {
	used, err := r.measured.cpu()
	if err != nil {
		return err
	}
	begin, first := time.Now(), time.Time{}
	if r.behind, err = startHub(); err != nil {
		return err
	}
	for ; ; time.Sleep(50 * time.Millisecond) {
		acked := filled + int(live.acked.Load())
		n, err := r.passed()
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		if n > 0 && first.IsZero() {
			first = time.Now()
		}
		if n < acked {
			continue
		}
		whole := time.Since(begin).Seconds()
		after, err := r.measured.cpu()
		if err != nil {
			return err
		}
		fmt.Printf("the hub is started (its fsync %s): it has spans after %.1f s and all %d after %.1f s, %d of them live\n", onOff(b.hubFsync), first.Sub(begin).Seconds(), n, whole, n-filled)
		rate := float64(n) / whole
		fmt.Printf("drained %.0f spans/s, %.0f times the live rate; %.2f CPU s/M\n",
			rate, rate/float64(b.rate), (after-used).Seconds()*1e6/float64(n))
		return nil
	}
}

// live is traffic at the live rate, on a connection of its own.
type live struct {
	traffic
	quit atomic.Bool
	done chan struct{}
	sum  outcome
	err  error
}

func (b *bench) startLive(ctx context.Context, r *running) (*live, error) {
	l := &live{done: make(chan struct{})}
	var err error
	if l.senders, err = openSenders(b.protocol, r.otlp, 1); err != nil {
		return nil, err
	}
	numbers := number(fillConnections, b.requests(liveSpans))
	l.spans, l.every = liveSpans, time.Second*liveSpans/time.Duration(b.rate)
	l.next = func(int) []byte {
		if l.quit.Load() {
			return nil
		}
		return numbers.next()
	}
	go func() {
		defer close(l.done)
		l.sum, l.err = l.run(ctx)
	}()
	return l, nil
}

// end stops the traffic when its last request is answered.
func (l *live) end() (outcome, error) {
	l.quit.Store(true)
	<-l.done
	closeAll(l.senders)
	return l.sum, l.err
}

// bytesIn is the size of the files below a directory.
func bytesIn(dir string) (size int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			size += info.Size()
		}
		return err
	})
	return size, err
}
