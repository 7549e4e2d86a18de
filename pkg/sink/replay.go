package sink

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/replay"
)

// replays runs the lanes of replay jobs: it follows the bucket, asks the backends
// whether they accept data that old, and gives the lanes to the members to place.
type replays struct {
	*lanes
	writers Writers
	log     *slog.Logger
	behind  func() uint64 // the largest backlog of a live lane, in messages

	mu      sync.Mutex
	table   *replay.Table
	known   bool            // what the bucket had at the start has been read
	asking  map[string]bool // keys of what runs in the background
	running sync.WaitGroup
}

func newReplays(l *lanes, writers Writers) *replays {
	return &replays{lanes: l, writers: writers, log: l.log.With("component", "replay"), behind: l.members.Behind, table: replay.NewTable(), asking: map[string]bool{}}
}

// run follows the bucket until ctx ends.
func (r *replays) run(ctx context.Context) {
	for ctx.Err() == nil {
		b, err := r.hub.OpenBucket(ctx, replay.Bucket)
		if err == nil {
			r.forget()
			err = b.Watch(ctx, ">", func(key string, value []byte) { r.note(ctx, key, value) })
		}
		if err != nil && ctx.Err() == nil {
			r.log.Warn("replay jobs cannot be watched, will try again", "err", err)
		}
		backoff.Sleep(ctx, retryInterval)
	}
	r.running.Wait()
}

// retryInterval is the pause before a watch that has failed is started again.
const retryInterval = time.Second

// forget begins with an empty table: a new watch reports everything again.
func (r *replays) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.table, r.known = replay.NewTable(), false
}

// note handles what the watch reports of a key; "" when all existing keys have been reported.
func (r *replays) note(ctx context.Context, key string, value []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if key == "" {
		r.known = true
	} else if err := r.table.Set(key, value); err != nil {
		r.log.Error("replay job in the hub cannot be read, ignored", "key", key, "err", err)
	}
	if r.known {
		r.act(ctx)
	}
}

// act does what the jobs in the table require. r.mu is held.
func (r *replays) act(ctx context.Context) {
	var wanted []membership.Shared
	for _, job := range r.table.Jobs() {
		switch job.Phase() {
		case replay.Checking:
			if job.Plan == nil {
				r.resolve(ctx, job.PlanKey(), func() any { return r.plan(ctx, job) })
			}
			for _, name := range job.Unasked() {
				r.resolve(ctx, job.CheckKey(name), func() any { return r.check(ctx, job, name) })
			}
		case replay.Running:
			for _, l := range job.Lanes {
				if l.Done {
					continue
				}
				sig, _ := otlpwire.ParseSignal(l.Signal) // the table holds valid jobs only
				w, ok := r.writer(job, sig)
				if !ok {
					r.log.Error("replay is for a backend that this sink does not have; all sinks must have the same configuration", "job", job.ID, "backends", job.Backends)
					continue
				}
				wanted = append(wanted, r.lane(job, l, sig, w))
			}
		}
	}
	r.members.Also(wanted)
	for _, key := range r.table.Orphans() {
		r.background("sweep."+key, func() { r.sweep(ctx, key) })
	}
}

// background runs do, for each key once at a time.
func (r *replays) background(key string, do func()) {
	if r.asking[key] {
		return
	}
	r.asking[key] = true
	r.running.Go(func() {
		do()
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.asking, key)
	})
}

// sweep removes what is left of a job that was removed.
func (r *replays) sweep(ctx context.Context, key string) {
	tokens := strings.Split(key, ".") // lane.<run>.<signal>.<partition>
	if len(tokens) == 4 {
		sig, err := otlpwire.ParseSignal(tokens[2])
		p, numErr := strconv.Atoi(tokens[3])
		if err == nil && numErr == nil {
			if err := r.hub.Conn.DropLane(ctx, bus.Stream(sig), bus.ReplayLane(tokens[1], p)); err != nil {
				return // tried again at the next change of the table, or by another sink
			}
		}
	}
	if b, err := r.hub.OpenBucket(ctx, replay.Bucket); err == nil {
		_ = b.Delete(ctx, key)
	}
}

// resolve determines something about a job and records it; the result of the first sink
// counts.
func (r *replays) resolve(ctx context.Context, key string, find func() any) {
	r.background(key, func() {
		value, _ := json.Marshal(find()) // cannot fail
		if ctx.Err() != nil {
			return
		}
		backoff.Retry(ctx, r.log, "record the plan or a check of a replay job", func() error {
			b, err := r.hub.OpenBucket(ctx, replay.Bucket)
			if err == nil {
				err = b.Create(ctx, key, value)
			}
			if errors.Is(err, bus.ErrExists) {
				return nil
			}
			return err
		})
	})
}

// askTimes is how often a backend that does not answer is asked.
const askTimes = 4

// plan determines which lanes a job has.
func (r *replays) plan(ctx context.Context, job replay.Status) (plan *replay.Plan) {
	if !r.policies.Await(ctx) {
		return nil
	}
	backoff.Retry(ctx, r.log, "plan replay job "+job.ID, func() (err error) {
		policies, err := r.policies.Replayed(job.Policies, job.Alone())
		if err == nil {
			plan, err = replay.MakePlan(ctx, r.hub.Conn, job.Request, policies.Wait(), policies.Domains(), time.Now())
		} else {
			err = &replay.Refusal{Text: err.Error()}
		}
		if why, final := errors.AsType[*replay.Refusal](err); final {
			plan, err = &replay.Plan{At: time.Now().UTC(), Error: why.Text}, nil
		}
		return err
	})
	return plan
}

// check asks the backend of a signal whether it accepts data as old as a job's.
func (r *replays) check(ctx context.Context, job replay.Status, name string) replay.Check {
	sig, _ := otlpwire.ParseSignal(name) // the table holds valid jobs only
	w, ok := r.writer(job, sig)
	c := replay.Check{OK: true, Backend: w.Name(), At: time.Now().UTC()}
	if !ok {
		var names []string
		for _, w := range r.writers[sig] {
			names = append(names, w.Name())
		}
		c.OK, c.Wrong, c.Text = false, true, fmt.Sprintf("the sinks write %s to %s, not to %s", name, strings.Join(names, ", "), strings.Join(job.Backends, ", "))
		return c
	}
	for attempt := 1; ; attempt++ {
		ok, text, err := backend.Takes(ctx, w, job.Plan.Oldest, time.Now())
		if err == nil {
			c.OK, c.Text = ok, text
			return c
		}
		if attempt == askTimes || !backoff.Sleep(ctx, time.Second) {
			c.OK, c.Text = false, fmt.Sprintf("%s does not answer whether it accepts data that old: %v", w.Name(), err)
			return c
		}
	}
}

// writer returns the backend that a job's data of a signal goes to: the first of those that the
// job names, or if it names none, the first of the signal. ok is false if this sink has none of
// those that are named.
func (r *replays) writer(job replay.Status, sig otlpwire.Signal) (w backend.Writer, ok bool) {
	for _, w := range r.writers[sig] {
		if len(job.Backends) == 0 || slices.Contains(job.Backends, w.Name()) {
			return w, true
		}
	}
	return r.writers[sig][0], false
}

// lane returns a lane of a job, for the members to place.
func (r *replays) lane(job replay.Status, l replay.LaneStatus, sig otlpwire.Signal, w backend.Writer) membership.Shared {
	return membership.Shared{
		LaneConfig: bus.LaneConfig{Stream: bus.Stream(sig), Name: bus.ReplayLane(job.Run(), l.Partition), Filters: l.Filters(), Start: max(l.First, 1), Raw: true},
		Signal:     l.Signal, Partition: l.Partition, Partitions: r.cfg.Streams.Partitions, Backend: w.Name(), Quiet: true,
		Run: func(ctx context.Context, lane *bus.Lane) {
			e := &excerpt{replays: r, job: job, lane: l.Lane, sig: sig, backend: w.Name()}
			e.run(ctx, lane, w)
		},
	}
}
