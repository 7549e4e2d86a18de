package sink

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink/export"
	"github.com/penstock/penstock/pkg/tally"
)

// directLane writes payloads in the order in which they are read, those of different instances side by side:
// metrics, logs, and spans that are not to be sampled.
type directLane struct {
	lane     *bus.Lane
	feed     feed
	exporter *export.Exporter
	count    counter
	workers  *export.Workers
	// ackEvery is after how many messages the floor is moved; so many may come twice after a crash.
	ackEvery int
	tally    *tally.Lane // nil: none is kept
	// repeats is how many of the next messages the previous owner may have written: its last
	// acks may be lost. Messages that came to the hub after the claim are not among them.
	repeats int
	// finished is up to where this reader had written everything before: a hub may lose a floor.
	finished uint64
	window   []*message // those that are read and not dealt with, or come after one that is not
	bytes    int        // of window, as stored
	done     uint64     // the last message up to which all have been dealt with
	dealt    int        // how many messages have been
	ended    bool       // everything has been read
}

// message is one that a direct lane has read.
type message struct {
	export.Job
	bus.Delivery
	items   int
	settled bool // it has been dealt with
}

// maxWindow is how many bytes may be in a window, as stored, before the last message.
const maxWindow = 8 << 20

// newDirectLane writes live traffic.
func newDirectLane(lane *bus.Lane, d *export.Exporter, count counter, t *tally.Lane) *directLane {
	return &directLane{lane: lane, feed: live{}, exporter: d, count: count, ackEvery: 1, tally: t}
}

// run reads until ctx ends, the lane is lost or everything has been read: errEnd.
func (l *directLane) run(ctx context.Context) error {
	defer l.lane.Close()
	finish, stop := membership.Finish(ctx)
	defer stop()
	defer l.tally.Keep()()
	defer l.exporter.Aside.Close()
	defer func() { _ = l.lane.Ack(l.done) }() // acks that were put off
	l.workers = export.NewWorkers(finish, l.exporter)
	defer func() { l.workers.End() }()
	deliveries, claimed, leave := l.read(ctx)
	defer leave() // a replay ends before ctx
	for {
		var err error
		more := deliveries
		if l.ended || len(l.window) >= export.MaxJobs || l.bytes >= maxWindow {
			more = nil
		}
		select {
		case <-ctx.Done():
			_ = l.workers.Finish()
			l.settled()
			return ctx.Err()
		case d := <-more:
			if err = l.take(ctx, finish, d); d.Claimed {
				claimed <- struct{}{}
			}
		case j := <-l.workers.Done:
			if !l.workers.Settle(j) {
				err = stopped(finish)
			}
		}
		l.settled()
		switch {
		case err != nil:
			l.collect()
			return err
		case l.ended && len(l.window) == 0:
			return errEnd
		}
	}
}

// read reads the lane until ctx ends or leave is called. After each claim it reads nothing before claimed says that the
// work of the claim before has ended.
func (l *directLane) read(ctx context.Context) (deliveries <-chan bus.Delivery, claimed chan<- struct{}, leave func()) {
	reading, stop := context.WithCancel(ctx)
	to, goOn := make(chan bus.Delivery, 16), make(chan struct{}, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		l.lane.Run(reading, func(d bus.Delivery) bool {
			select {
			case to <- d:
			case <-reading.Done():
				return false
			}
			if !d.Claimed {
				return true
			}
			select {
			case <-goOn:
				return true
			case <-reading.Done():
				return false
			}
		})
	})
	return to, goOn, func() {
		stop()
		wg.Wait()
	}
}

// collect settles what has ended, without waiting.
func (l *directLane) collect() {
	for {
		select {
		case j := <-l.workers.Done:
			l.workers.Settle(j)
		default:
			l.settled()
			return
		}
	}
}

// claim begins again. The sessions of the writer are new: another owner may have continued the series since.
func (l *directLane) claim(ctx context.Context) error {
	first, err := l.feed.claim(ctx)
	if err != nil {
		return err
	}
	if !l.exporter.Aside.Claim(ctx) {
		return stopped(ctx)
	}
	if !l.exporter.Retry(ctx, "continue the tally", func() error {
		finished, err := l.tally.Claim(ctx, l.lane.Floor())
		l.finished = max(l.finished, finished)
		return err
	}) {
		return stopped(ctx)
	}
	if l.repeats = export.MaxRepeated; first {
		l.repeats = 0
	}
	return nil
}

// take handles what the lane has read; what has begun when ctx ends is completed under finish.
func (l *directLane) take(ctx, finish context.Context, d bus.Delivery) error {
	if d.Claimed {
		// Another owner may have continued meanwhile: what waits for a worker must not be written after that.
		l.workers.End()
		l.window, l.bytes, l.finished = nil, 0, max(d.After, l.done)
		l.workers = export.NewWorkers(finish, l.exporter)
		return l.claim(finish)
	}
	switch err := l.feed.next(ctx, d); {
	case errors.Is(err, errEnd):
		l.ended = true
		return nil
	case err != nil:
		return err
	case d.Seq == 0:
		if d.Idle {
			l.repeats = 0
		}
		return nil
	}
	if d.Restamped {
		l.count.restamped()
	}
	m := &message{Delivery: d, settled: true}
	m.Job.Instance = d.Instance()
	l.window, l.bytes = append(l.window, m), l.bytes+d.Size
	if l.feed.admits(d) {
		m.settled = false
		again := l.repeats > 0 || d.Seq <= l.finished
		l.repeats--
		m.Then = func() { m.settled = true }
		m.Do = func(ctx context.Context, w *export.Worker) bool { return l.write(ctx, w, m, again) }
		l.workers.Put(&m.Job)
	}
	if d.Pending == 0 {
		l.repeats = 0 // nothing came after it: the previous owner has not seen what comes now
	}
	l.ended = l.feed.last(d)
	return nil
}

// settled moves the floor past the first messages of the window that have been dealt with.
func (l *directLane) settled() {
	n := 0
	for ; n < len(l.window) && l.window[n].settled; n++ {
		m := l.window[n]
		if m.Do != nil {
			l.count.saw(m)
			l.tally.Do(func(b *tally.Book) {
				b.Saw(m.Seq, m.Job.Instance, m.items, m.Header.ID)
				b.EndedTogether([]tally.Part{{Seq: m.Seq, Instance: m.Job.Instance, Items: m.items}}, &m.Ended)
			})
		}
		l.done, l.bytes = m.Seq, l.bytes-m.Size
	}
	if n == 0 {
		return
	}
	l.window = slices.Delete(l.window, 0, n)
	before := l.dealt / l.ackEvery
	if l.dealt += n; l.dealt/l.ackEvery > before {
		if err := l.lane.Ack(l.done); err != nil {
			l.exporter.Log.Debug("ack lost, a later one makes up for it", "err", err)
		}
		l.tally.Floor(l.done)
	}
	l.feed.finished(l.done)
}

// write writes a message to the backend, and to DEADLETTER what the backend refuses for good. It runs in a worker.
func (l *directLane) write(ctx context.Context, w *export.Worker, m *message, again bool) bool {
	if w.Signal == otlpwire.Traces {
		w.Body = nil // a transport may still read the one before
	}
	from := export.Origin{Stream: bus.Stream(w.Signal), Seq: m.Seq, Arrival: m.Header.Arrival, Stored: m.Stored, Again: again}
	var payload []byte
	items := 1 // where it cannot be read
	err := fault.Guard(func() (err error) {
		payload, items, err = m.Open(&w.Guard, w.Signal, &w.Body)
		return err
	})
	if _, panicked := errors.AsType[*fault.Panic](err); panicked {
		w.Guard = envelope.Guard{}
		w.Panicked(ledger.PanicReader, m.Job.Instance, from, err)
	}
	if m.items = items; err != nil {
		return l.feed.unreadable(ctx, w.Exporter, m.Delivery, err) == nil
	}
	return w.Write(ctx, m.Job.Instance, payload, items, from)
}
