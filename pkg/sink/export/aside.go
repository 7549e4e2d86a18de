package export

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/failpoint"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// AsideConfig says how a backend may have trouble with one instance without holding up the others.
type AsideConfig struct {
	// How many instances of each lane may be set aside at a time because the backend refuses them, fails for
	// them or is slow for them, and accepts others. With more the lane waits. 0: none is set aside.
	MaxInstances int `yaml:"max_instances"`
	// For how long a request of one instance may have no answer, while the backend answers to others, before
	// the instance is set aside. 0: as long as it takes.
	SlowAfter time.Duration `yaml:"slow_after"`
}

// Aside lets a lane continue although its backend does not take the data of an instance: it refuses its
// tenant, or how much it sends (401, 403, 404, 429), fails (5xx) or is slow, for this one only. The
// instance's data is put into the stream ASIDE, and delivered from there, in order and beside the lane.
//
// Its messages in ASIDE are the record that an instance is set aside: the next owner of the lane
// finds them. While one is left there, newer data is put after it, which keeps the instance's
// order; when none is left, the instance is back in the lane. The lane's floor passes what
// ASIDE has acknowledged, and nothing of it counts as delivered before the backend has it.
//
// An owner that stops removes what was delivered. After a crash what was delivered within the
// last [removeInterval] is delivered again, and what the floor had not passed may be in ASIDE
// twice. The writer is told what may be a repetition.
//
// Whether it concerns one instance or all shows what others send: when the backend has accepted
// something of another one meanwhile, in any lane of this process, the instance is set aside. Without that one
// is set aside to find out, and a further one only when the backend has accepted something since (where it has not
// refused anybody: of another instance), or, for a refusal, after [doubt]: with a backend that refuses
// everything, one instance each [doubt], and with one that is away, one.
type Aside struct {
	exporter  *Exporter
	partition int
	most      int
	gauge     func(instances, since float64)
	waits     func(why error) // of the lane: what happens beside it does not hold it up

	taken atomic.Bool // the backend has accepted something since an instance was set aside

	mu      sync.Mutex // held while an instance is set aside
	waiting map[string]*waiting
	last    time.Time // when an instance was set aside
	drains  sync.WaitGroup
	work    context.Context // of the drains, since the claim
	stop    context.CancelFunc
}

// waiting is an instance that is set aside.
type waiting struct {
	mu   sync.Mutex // held while something is put there
	puts int        // how often that was, since the claim
	back bool       // it is no longer set aside

	since time.Time // when it was set aside, as far as it is known; of a.mu
	why   error     // what the backend said last; nil: it is not known; of a.mu
	left  uint64    // messages that wait, at least; of a.mu
}

const (
	// doubt is after how long another instance is set aside although nothing was accepted.
	doubt = 30 * time.Second

	// doubtTries is how often a backend must have failed without refusing anybody, for about three seconds, before an
	// instance is set aside to find out.
	doubtTries = 6

	// awayTries is the same, for about a minute, where it did not answer.
	awayTries = 10

	// linger is for how long an instance for which the backend is slow stays set aside without data.
	linger = time.Minute

	// removeInterval is how often what was delivered is removed from ASIDE, while more is there.
	removeInterval = time.Second

	// lookInterval is how often the hub is asked what is in ASIDE: nothing else shows what was put
	// there without an answer, or by a previous owner that was slow.
	lookInterval = time.Minute

	// MaxRepeated is how many messages of a lane, or of an instance that is set aside, an owner that died may have
	// written beyond what it has acknowledged: those that workers have, and those whose acks are lost.
	MaxRepeated = 2 * MaxJobs

	// mayRepeat is the reason of a message that may have been written before it was set aside.
	mayRepeat = "again"
)

// NewAside is for the owner of a lane. d is copied: its writer is the lane's.
func NewAside(d Exporter, lane *bus.Lane, partition, most int) *Aside {
	d.Owned, d.Waits = lane.Owned, nil
	instances, first := d.Ledger.Aside(d.Signal.String(), partition, d.Writer.Name()), d.Ledger.AsideSince(d.Signal.String(), partition, d.Writer.Name())
	return &Aside{exporter: &d, waits: lane.Waits, partition: partition, most: most, stop: func() {}, gauge: func(n, since float64) {
		instances.Set(n)
		first.Set(since)
	}}
}

func (a *Aside) subject(instance string) string {
	return bus.AsideSubject(a.exporter.Signal, a.exporter.Writer.Name(), a.partition, instance)
}

// Claim begins with what the previous owner has set aside. It returns false when ctx ended first.
// A nil aside sets nothing aside.
func (a *Aside) Claim(ctx context.Context) bool {
	if a == nil {
		return true
	}
	a.Close()
	a.work, a.stop = context.WithCancel(ctx)
	a.mu.Lock()
	a.waiting = map[string]*waiting{}
	a.mu.Unlock()
	a.taken.Store(true)
	if !retry(ctx, a.exporter.Log, a.waits, "look for what was set aside", func() error { return a.look(a.work) }) {
		return false
	}
	work := a.work
	a.drains.Go(func() {
		for backoff.Sleep(work, lookInterval) {
			_ = a.look(work) // after an error, the next time
		}
	})
	return true
}

// look delivers what is in ASIDE of instances that are not known to wait.
func (a *Aside) look(ctx context.Context) error {
	there, err := a.subjects(ctx, "*")
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	defer a.showLocked()
	for subject := range there {
		if instance := subject[strings.LastIndexByte(subject, '.')+1:]; a.waiting[instance] == nil {
			a.waiting[instance] = &waiting{since: time.Now()}
			a.begin(instance)
		}
	}
	return nil
}

// subjects returns those of instances that have something in ASIDE: nothing in a hub without
// that stream.
func (a *Aside) subjects(ctx context.Context, instance string) (map[string]uint64, error) {
	there, err := a.exporter.Conn().Subjects(ctx, bus.Aside, a.subject(instance))
	if errors.Is(err, bus.ErrNoStream) {
		err = nil
	}
	return there, err
}

// begin delivers what an instance has in ASIDE, until nothing is left or Close.
func (a *Aside) begin(instance string) {
	work := a.work
	log := a.exporter.Log.With("instance", instance)
	a.drains.Go(func() {
		backoff.Retry(work, log, "deliver what was set aside", func() (err error) {
			if caught := fault.Guard(func() error {
				err = a.drain(work, instance)
				return nil
			}); caught != nil {
				a.exporter.Panicked(ledger.PanicWriter, instance, Origin{}, caught)
				err = caught
			}
			return err
		})
	})
}

// showLocked sets the gauges.
func (a *Aside) showLocked() {
	first := 0.0
	for _, w := range a.waiting {
		if at := float64(w.since.UnixMilli()) / 1000; first == 0 || at < first {
			first = at
		}
	}
	a.gauge(float64(len(a.waiting)), first)
}

// maxTold is of how many instances Text has the reason.
const maxTold = 3

// Text says who is set aside, since when and why; empty when nobody is.
func (a *Aside) Text() string {
	if a == nil {
		return ""
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	names := slices.SortedFunc(maps.Keys(a.waiting), func(x, y string) int {
		return cmp.Or(a.waiting[x].since.Compare(a.waiting[y].since), cmp.Compare(x, y))
	})
	var told []string
	for i, name := range names {
		if i == maxTold {
			told = append(told, fmt.Sprintf("and %d more", len(names)-i))
			break
		}
		w := a.waiting[name]
		text := fmt.Sprintf("%s is set aside since %s", name, w.since.UTC().Format(time.RFC3339))
		if w.left > 0 {
			text += fmt.Sprintf(", %d messages wait", w.left)
		}
		if w.why != nil {
			text += ": " + w.why.Error()
		}
		told = append(told, text)
	}
	return strings.Join(told, "; ")
}

// Close ends the delivery beside the lane; what is in ASIDE stays there.
func (a *Aside) Close() {
	if a == nil {
		return
	}
	a.stop()
	a.drains.Wait()
	a.gauge(0, 0)
}

// may is [backend.Deliverer.MayAside].
func (a *Aside) may(instance string, t backend.Trouble) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.mayLocked(instance, t)
}

func (a *Aside) mayLocked(instance string, t backend.Trouble) bool {
	others := func(since time.Time) bool {
		return a.exporter.Accepted != nil && a.exporter.Accepted.Others(instance, since)
	}
	switch {
	case len(a.waiting) >= a.most, a.waiting[instance] != nil:
		return false
	case others(t.Since):
		return true
	case fault.IsSender(t.Err):
		return a.taken.Load() || time.Since(a.last) >= doubt
	}
	return others(a.last) && (t.Slow || t.Failed && t.Attempts >= doubtTries || t.Attempts >= awayTries)
}

// set is [backend.Deliverer.Aside] for payloads from an origin, of which there are part messages in ASIDE.
func (a *Aside) set(ctx context.Context, instance string, payload []byte, again bool, from Origin, part *int, t backend.Trouble) (put, goOn bool) {
	a.mu.Lock()
	w := a.waiting[instance]
	a.mu.Unlock()
	if w != nil {
		goOn = retry(ctx, a.exporter.Log.With("instance", instance), a.waits, "set data aside", func() error {
			w.mu.Lock()
			defer w.mu.Unlock()
			if put = !w.back; !put {
				return nil
			}
			if w.puts++; failpoint.AsideForgotten {
				return nil
			}
			return a.store(ctx, instance, payload, again, from, part)
		})
		failpoint.Point("aside-behind")
		if put || !goOn {
			return put, goOn
		}
	}
	if t.Err == nil {
		return false, true
	}
	a.mu.Lock()
	if !a.mayLocked(instance, t) {
		a.mu.Unlock()
		return false, true
	}
	w = &waiting{since: time.Now(), why: t.Err}
	w.mu.Lock() // whoever finds it waits for what becomes of it; nobody does but the page, before it is delivered from ASIDE
	defer w.mu.Unlock()
	last, taken := a.last, a.taken.Swap(false)
	a.last = w.since
	a.waiting[instance] = w
	a.showLocked()
	a.mu.Unlock()
	more, due := a.exporter.Said.Due("aside "+a.subject(instance), w.since)
	err := a.store(ctx, instance, payload, again, from, part)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		w.back, a.last = true, last
		if taken {
			a.taken.Store(true)
		}
		delete(a.waiting, instance)
		a.showLocked()
		if due {
			a.exporter.Log.Error("cannot set aside an instance that the backend does not take: the lane waits", "instance", instance, "err", err, "more_since_last_said", more)
		}
		return false, ctx.Err() == nil
	}
	failpoint.Point("aside-begun")
	if due {
		a.exporter.Log.Warn("instance set aside: the backend does not take it; its data is kept and sent again later, the lane continues", "instance", instance, "err", t.Err, "more_since_last_said", more)
	}
	a.begin(instance)
	return true, true
}

// store publishes a payload, in several messages where one is too small.
func (a *Aside) store(ctx context.Context, instance string, payload []byte, again bool, from Origin, part *int) (err error) {
	before := *part
	defer func() {
		if err != nil {
			*part = before // it is tried again with the same ids
		}
	}()
	d := a.exporter
	body, encoding := envelope.Compress(nil, payload, envelope.S2)
	if len(body) > envelope.MaxPayload {
		if first, second, several := otlpwire.Halve(d.Signal, payload); several {
			if err := a.store(ctx, instance, first, again, from, part); err != nil {
				return err
			}
			return a.store(ctx, instance, second, again, from, part)
		} // else the stream's limit has some room above MaxPayload, for what the sink has added
	}
	items := otlpwire.Count(d.Signal, payload)
	// By its content, too: a payload that is cut differently next time is another message.
	hash := sha256.Sum256(payload)
	why := bus.Refusal{Reason: "refused", Backend: d.Writer.Name(), Source: from.source()}
	if again {
		why.Reason = mayRepeat
	}
	m := bus.Message{Subject: a.subject(instance), Body: body, Refusal: &why, Header: envelope.Header{
		ContentType: envelope.ContentTypeOTLP, Encoding: encoding, Items: items, Arrival: from.dated(d.Signal),
		ID: fmt.Sprintf("aside-%s-%s-%d-%d-%x", d.Writer.Name(), from.Stream, from.Seq, *part, hash[:12]),
	}}
	stored, err := d.Conn().PublishAsync(m).Stored(ctx)
	if err != nil {
		return err
	}
	*part++
	if !stored.Duplicate {
		d.Ledger.Of(d.Signal).Aside(d.Writer.Name()).Add(float64(items))
	}
	return nil
}

var (
	errNotOwner = errors.New("the lane is not owned by this process now")
	errLingered = errors.New("nothing has come of an instance for which the backend is slow")
)

// drain delivers what an instance has in ASIDE and returns nil when nothing is left, and the
// instance is back in the lane. After an error it may be called again.
func (a *Aside) drain(ctx context.Context, instance string) error {
	d, subject := a.exporter, a.subject(instance)
	r, err := d.Conn().OpenReaderOf(ctx, bus.ReaderConfig{Stream: bus.Aside, Filters: []string{subject}, Single: true})
	if err != nil {
		if back, _ := a.back(ctx, instance); back { // the stream is gone
			return nil
		}
		return err
	}
	defer r.Close()
	p := a.drained(instance)
	defer p.close(ctx)
	for n := 0; ; n++ {
		if err := p.remove(ctx, r.Left() == 0); err != nil {
			return err
		}
		slow := d.SlowAfter > 0 && p.exporter.took >= d.SlowAfter
		if (r.Left() == 0 || failpoint.BackTooSoon) && !slow {
			if back, err := a.back(ctx, instance); back || err != nil {
				return err
			}
		}
		m, err := p.next(ctx, r, slow)
		if errors.Is(err, errLingered) {
			continue
		} else if err != nil {
			return err
		}
		a.tell(instance, func(w *waiting) {
			w.left = r.Left() + 1
			if m.Stored.Before(w.since) {
				w.since = m.Stored
			}
		})
		if err := p.deliver(ctx, instance, m, n < MaxRepeated); err != nil {
			return err
		}
	}
}

// drained is for the delivery of what an instance has in ASIDE, which is another goroutine than the lane's.
func (a *Aside) drained(instance string) *drained {
	own := *a.exporter
	own.Writer, own.Log = backend.Session(own.Writer), own.Log.With("instance", instance)
	own.Waits = func(why error) {
		if why != nil && !errors.Is(why, backend.ErrNoAnswer) {
			a.tell(instance, func(w *waiting) { w.why = why })
		}
	}
	return &drained{exporter: &own, subject: a.subject(instance), removed: time.Now()}
}

// tell notes something about an instance that is set aside.
func (a *Aside) tell(instance string, note func(w *waiting)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if w := a.waiting[instance]; w != nil {
		note(w)
		a.showLocked()
	}
}

// next returns the next message of a reader. With slow it waits for linger only; after that the instance is taken
// to be slow no longer.
func (p *drained) next(ctx context.Context, r *bus.Reader, slow bool) (bus.Delivery, error) {
	if !slow {
		return r.Next(ctx)
	}
	limited, stop := context.WithTimeout(ctx, linger)
	defer stop()
	m, err := r.Next(limited)
	if err != nil && ctx.Err() == nil && limited.Err() != nil {
		p.exporter.took, err = 0, errLingered
	}
	return m, err
}

// drained is what has been delivered of an instance's messages in ASIDE.
type drained struct {
	exporter *Exporter
	subject  string
	body     []byte
	done     uint64    // the last one that was delivered
	removed  time.Time // when delivered ones were last removed
}

// deliver writes a message to the backend, or to DEADLETTER.
func (p *drained) deliver(ctx context.Context, instance string, m bus.Delivery, again bool) error {
	d := p.exporter
	if !d.Owned() {
		return errNotOwner
	}
	if d.Signal == otlpwire.Traces {
		p.body = nil // a transport may still read the one before
	}
	from := Origin{Stream: bus.Aside, Seq: m.Seq, Arrival: m.Header.Arrival, Again: again}
	if m.Refusal != nil {
		from.first, from.Again = m.Refusal.Source, again || m.Refusal.Reason == mayRepeat
	}
	delivered := false
	if m.Decompress(&p.body); m.Err != nil {
		delivered = d.Undecodable(ctx, m, m.Err)
	} else {
		delivered = d.send(ctx, instance, m.Body, m.Header.Items, from)
	}
	if !delivered {
		return errNotOwner // or ctx has ended
	}
	p.done = m.Seq
	failpoint.Point("aside-delivered")
	return nil
}

// remove removes what was delivered, every removeInterval and when nothing is left.
func (p *drained) remove(ctx context.Context, nothingLeft bool) error {
	if p.done == 0 || !nothingLeft && time.Since(p.removed) <= removeInterval {
		return nil
	}
	p.removed = time.Now()
	err := p.exporter.Conn().Remove(ctx, bus.Aside, p.subject, p.done)
	failpoint.Point("aside-removed")
	return err
}

// close removes what was delivered: the lane is still ours, its owner waits for this.
func (p *drained) close(ctx context.Context) {
	last, stop := context.WithTimeout(context.WithoutCancel(ctx), removeInterval)
	defer stop()
	_ = p.remove(last, true)
}

// back returns an instance to the lane if nothing of it is left in ASIDE.
func (a *Aside) back(ctx context.Context, instance string) (bool, error) {
	a.mu.Lock()
	w := a.waiting[instance]
	a.mu.Unlock()
	w.mu.Lock()
	before := w.puts
	w.mu.Unlock()
	there, err := a.subjects(ctx, instance) // not under the lock, which would block the lane
	if err != nil || len(there) > 0 && !failpoint.BackTooSoon {
		return false, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.puts != before {
		return false, nil
	}
	w.back = true
	a.mu.Lock()
	defer a.mu.Unlock()
	failpoint.Point("aside-back")
	delete(a.waiting, instance)
	a.showLocked()
	if more, due := a.exporter.Said.Due("back "+a.subject(instance), time.Now()); due {
		a.exporter.Log.Info("instance is no longer set aside: the backend has accepted everything", "instance", instance, "more_since_last_said", more)
	}
	return true, nil
}
