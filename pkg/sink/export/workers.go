package export

import (
	"context"
	"hash/maphash"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/tally"
)

// Workers write what a lane has to its backend side by side: the jobs of one instance in order, by one worker,
// so that an instance whose requests take long holds up those only that share its worker.
type Workers struct {
	all  []*Worker
	of   map[string]*Worker // by instance
	seed maphash.Seed
	Done chan *Job // those that have ended, each for Settle
	Busy int       // jobs that have not been settled
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu    sync.Mutex
	waits []error // of each worker
}

// Worker is the exporter of one worker, with a session of the writer and memory of its own.
type Worker struct {
	*Exporter
	jobs    chan *Job
	wrote   tally.Outcomes // by the current job
	Guard   envelope.Guard
	Body    []byte // of the current message
	Scratch []byte
}

// Job is something of an instance that a worker writes.
type Job struct {
	Instance string
	Do       func(ctx context.Context, w *Worker) bool // false: ctx ended first, or the lane is lost
	Then     func()                                    // the lane's own, for when that is done
	ok       bool                                      // what Do has returned
	Ended    tally.Outcomes                            // of the items that it has written
}

const (
	// MaxJobs is how many jobs may be put before one of them is settled.
	MaxJobs = 64

	// maxPlaced bounds the instances whose worker is remembered; further ones are given one by their name.
	maxPlaced = 4096

	// panicPause is for how long a worker waits after a panic that gives up its job: the same may come again.
	panicPause = time.Second
)

// NewWorkers starts as many workers as the exporter may have requests at a time; they end with End.
func NewWorkers(ctx context.Context, d *Exporter) *Workers {
	n := max(d.Requests, 1)
	s := &Workers{of: map[string]*Worker{}, seed: maphash.MakeSeed(), Done: make(chan *Job, MaxJobs), waits: make([]error, n)}
	ctx, s.stop = context.WithCancel(ctx)
	for i := range n {
		own := *d
		own.Writer = backend.Session(own.Writer)
		w := &Worker{Exporter: &own, jobs: make(chan *Job, MaxJobs)}
		w.Count = Noted{d.Count, &w.wrote}
		if d.Waits != nil {
			w.Waits = func(why error) { s.wait(d.Waits, i, why) }
		}
		s.all = append(s.all, w)
		s.wg.Go(func() {
			for j := range w.jobs {
				w.run(ctx, j)
				s.Done <- j
			}
		})
	}
	return s
}

// run does a job. A panic that nothing nearer has caught gives it up, and with it the lane, which begins again: one lane is
// worse off than its neighbours, and not the process.
func (w *Worker) run(ctx context.Context, j *Job) {
	w.wrote = tally.Outcomes{}
	if err := fault.Guard(func() error {
		j.ok = j.Do(ctx, w)
		return nil
	}); err != nil {
		j.ok = false
		w.Panicked(ledger.PanicWriter, j.Instance, Origin{}, err)
		backoff.Sleep(ctx, panicPause)
	}
	j.Ended = w.wrote
}

// wait tells what the lane waits for: one worker's reason, while one has any.
func (s *Workers) wait(tell func(why error), i int, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waits[i] = why
	for _, other := range s.waits {
		if why == nil {
			why = other
		}
	}
	tell(why)
}

// Put gives a job to the worker of its instance. No more than MaxJobs may be busy.
func (s *Workers) Put(j *Job) {
	w := s.of[j.Instance]
	if w == nil {
		w = s.all[len(s.of)%len(s.all)]
		if len(s.of) < maxPlaced {
			s.of[j.Instance] = w
		} else {
			w = s.all[maphash.String(s.seed, j.Instance)%uint64(len(s.all))]
		}
	}
	s.Busy++
	w.jobs <- j
}

// Settle handles a job that has been received from Done. It returns false if that was not done.
func (s *Workers) Settle(j *Job) bool {
	s.Busy--
	if j.ok {
		j.Then()
	}
	return j.ok
}

// Finish waits for those that are busy. It returns false as soon as one was not done.
func (s *Workers) Finish() bool {
	for s.Busy > 0 {
		if !s.Settle(<-s.Done) {
			return false
		}
	}
	return true
}

// End ends what is busy, and the workers.
func (s *Workers) End() {
	s.stop()
	for _, w := range s.all {
		close(w.jobs)
	}
	s.wg.Wait()
}
