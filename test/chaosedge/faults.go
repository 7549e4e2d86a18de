package main

import (
	"context"
	"fmt"
	"syscall"
	"time"

	"github.com/penstock/penstock/test/faultproxy"
)

// points are where the edge may be killed (package failpoint).
var points = []string{"before-append", "in-append", "after-fsync", "after-answer", "after-forward", "before-spool-ack"}

// chaos injects one fault after the other until the time is over. Those of the link
// and the disk stay while the next one happens, now and then.
func (w *world) chaos(ctx context.Context) error {
	for end := time.Now().Add(w.For); time.Now().Before(end); {
		w.pause(ctx, 200*time.Millisecond, 1500*time.Millisecond)
		w.faults++
		if err := w.fault(ctx); err != nil || ctx.Err() != nil {
			return err
		}
		if w.rng.IntN(3) > 0 {
			w.mendLink()
		}
	}
	return ctx.Err()
}

func (w *world) pause(ctx context.Context, from, to time.Duration) {
	select {
	case <-time.After(from + time.Duration(w.rng.Int64N(int64(to-from)))):
	case <-ctx.Done():
	}
}

func (w *world) fault(ctx context.Context) error {
	switch n := w.rng.IntN(20); {
	case n < 3:
		w.say("kill -9 edge")
		w.edge.End(syscall.SIGKILL)
		return w.edge.Start()
	case n < 9:
		return w.killAt(ctx, points[w.rng.IntN(len(points))], 1+w.rng.IntN(60))
	case n < 10:
		return w.stop(ctx)
	case n < 12:
		w.say("kill -9 hub")
		w.hub.End(syscall.SIGKILL)
		w.pause(ctx, 100*time.Millisecond, 4*time.Second)
		return w.hub.Start()
	case n < 14:
		f := faultproxy.Fault{DropUp: w.rng.IntN(2) == 0}
		f.DropDown = !f.DropUp
		w.say("one direction of the connection is lost: %+v", f)
		w.proxy.Set(f)
		w.pause(ctx, time.Second, 8*time.Second)
	case n < 15:
		w.say("slow link")
		w.proxy.Set(faultproxy.Fault{Rate: 64 << 10, Delay: 50 * time.Millisecond})
		w.pause(ctx, time.Second, 4*time.Second)
	case n < 17:
		w.say("connections are reset")
		w.proxy.Reset()
	case n < 18:
		w.say("SIGSTOP edge")
		w.edge.Signal(syscall.SIGSTOP)
		w.pause(ctx, 500*time.Millisecond, 5*time.Second)
		w.edge.Signal(syscall.SIGCONT)
	default:
		return w.fill(ctx)
	}
	return nil
}

// killAt starts the edge so that it dies when it comes by a point the nth time.
func (w *world) killAt(ctx context.Context, point string, nth int) error {
	w.say("kill -9 edge at %s, the %dth time", point, nth)
	w.edge.End(syscall.SIGKILL)
	w.edge.Env = append(w.Env(), fmt.Sprintf("PENSTOCK_KILL_AT=%s:%d", point, nth))
	err := w.edge.Start()
	w.edge.Env = w.Env()
	if err != nil {
		return err
	}
	select {
	case <-w.edge.Done:
	case <-time.After(6 * time.Second): // the hub may be away
		w.edge.End(syscall.SIGKILL)
	case <-ctx.Done():
	}
	return w.edge.Start()
}

// stop stops the edge as an operator does.
func (w *world) stop(ctx context.Context) error {
	w.say("SIGTERM edge")
	w.edge.Signal(syscall.SIGTERM)
	select {
	case <-w.edge.Done:
	case <-time.After(30 * time.Second):
		w.edge.End(syscall.SIGKILL)
		return fmt.Errorf("the edge does not stop")
	case <-ctx.Done():
	}
	if code := w.edge.ExitCode(); code != 0 {
		return fmt.Errorf("the edge stopped with exit code %d", code)
	}
	return w.edge.Start()
}

// fill lets a stranger take the rest of the disk.
func (w *world) fill(ctx context.Context) error {
	if !w.small {
		return nil
	}
	w.say("disk full")
	free, err := w.disk.Fill()
	if err != nil {
		return err
	}
	w.pause(ctx, 500*time.Millisecond, 4*time.Second)
	if w.rng.IntN(3) == 0 {
		w.say("kill -9 edge on the full disk")
		w.edge.End(syscall.SIGKILL)
		if err := w.edge.Start(); err != nil {
			return err
		}
		w.pause(ctx, 500*time.Millisecond, 2*time.Second)
	}
	if err := free(); err != nil {
		return err
	}
	select {
	case <-w.edge.Done: // a start on a full disk may fail; a supervisor starts it again
		w.say("the edge had ended: exit code %d", w.edge.ExitCode())
		return w.edge.Start()
	default:
		return nil
	}
}

func (w *world) mendLink() {
	w.proxy.Set(faultproxy.Fault{})
	w.proxy.Reset()
}
