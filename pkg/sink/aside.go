package sink

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// AsideConfig says how a backend may refuse one instance without holding up the others.
type AsideConfig struct {
	// How many instances of each lane may be set aside at a time because the backend refuses them
	// and accepts others. When more are refused, the lane waits. 0: none is set aside.
	MaxInstances int `yaml:"max_instances"`
}

// aside lets a lane continue although its backend refuses an instance (401, 403, 404, 429: its
// tenant, or how much it sends). The instance's data is put into the stream ASIDE, and
// delivered from there, in order and beside the lane.
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
// Whether a refusal concerns one instance or all shows only when another one is tried. So one
// is set aside, and a further one only when the backend has accepted something since, or after
// [doubt]: with a backend that refuses everything, one instance each [doubt].
type aside struct {
	exporter  *exporter
	partition int
	most      int
	gauge     func(instances float64)
	waits     func(why error) // of the lane: what happens beside it does not hold it up

	taken atomic.Bool // the backend has accepted something since an instance was set aside

	mu      sync.Mutex      // held while something is put there
	waiting map[string]*int // instances, and how often something was put there since the claim
	last    time.Time       // when an instance was set aside
	part    struct {        // of the message that the lane has, how many were put there
		seq uint64
		n   int
	}
	drains sync.WaitGroup
	work   context.Context // of the drains, since the claim
	stop   context.CancelFunc
}

const (
	// doubt is after how long another instance is set aside although nothing was accepted.
	doubt = 30 * time.Second

	// removeInterval is how often what was delivered is removed from ASIDE, while more is there.
	removeInterval = time.Second

	// lookInterval is how often the hub is asked what is in ASIDE: nothing else shows what was put
	// there without an answer, or by a previous owner that was slow.
	lookInterval = time.Minute

	// mayRepeat is the reason of a message that may have been written before it was set aside.
	mayRepeat = "again"
)

// newAside is for the owner of a lane. d is copied: its writer is the lane's.
func newAside(d exporter, lane *bus.Lane, partition, most int) *aside {
	d.owned, d.waits = lane.Owned, nil
	return &aside{exporter: &d, waits: lane.Waits, partition: partition, most: most, gauge: d.led.Aside(d.sig.String(), partition, d.w.Name()).Set, stop: func() {}}
}

func (a *aside) subject(instance string) string {
	return bus.AsideSubject(a.exporter.sig, a.exporter.w.Name(), a.partition, instance)
}

// claim begins with what the previous owner has set aside. It returns false when ctx ended first.
// A nil aside sets nothing aside.
func (a *aside) claim(ctx context.Context) bool {
	if a == nil {
		return true
	}
	a.close()
	a.work, a.stop = context.WithCancel(ctx)
	a.waiting = map[string]*int{}
	a.taken.Store(true)
	if !retry(ctx, a.exporter.log, a.waits, "look for what was set aside", func() error { return a.look(a.work) }) {
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
func (a *aside) look(ctx context.Context) error {
	there, err := a.subjects(ctx, "*")
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for subject := range there {
		if instance := subject[strings.LastIndexByte(subject, '.')+1:]; a.waiting[instance] == nil {
			a.beginLocked(instance)
		}
	}
	return nil
}

// subjects returns those of instances that have something in ASIDE: nothing in a hub without
// that stream.
func (a *aside) subjects(ctx context.Context, instance string) (map[string]uint64, error) {
	there, err := a.exporter.conn().Subjects(ctx, bus.Aside, a.subject(instance))
	if errors.Is(err, bus.ErrNoStream) {
		err = nil
	}
	return there, err
}

// beginLocked delivers what an instance has in ASIDE, until nothing is left or close.
func (a *aside) beginLocked(instance string) {
	a.waiting[instance] = new(int)
	a.gauge(float64(len(a.waiting)))
	work := a.work
	a.drains.Go(func() {
		backoff.Retry(work, a.exporter.log.With("instance", instance), "deliver what was set aside", func() error { return a.drain(work, instance) })
	})
}

// close ends the delivery beside the lane; what is in ASIDE stays there.
func (a *aside) close() {
	if a == nil {
		return
	}
	a.stop()
	a.drains.Wait()
	a.gauge(0)
}

// set is [backend.Deliverer.Aside] for payloads from an origin.
func (a *aside) set(ctx context.Context, instance string, payload []byte, again bool, from origin, why error) (put, goOn bool) {
	if a.part.seq != from.seq {
		a.part.seq, a.part.n = from.seq, 0
	}
	a.mu.Lock()
	put, goOn = a.waiting[instance] != nil, true
	a.mu.Unlock()
	if put {
		goOn = retry(ctx, a.exporter.log.With("instance", instance), a.waits, "set data aside", func() error {
			a.mu.Lock()
			defer a.mu.Unlock()
			if put = a.waiting[instance] != nil; !put {
				return nil // no longer set aside
			}
			*a.waiting[instance]++
			return a.store(ctx, instance, payload, again, from)
		})
	}
	if put || !goOn || why == nil {
		return put, goOn
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.waiting) >= a.most || (!a.taken.Load() && time.Since(a.last) < doubt) {
		return false, true
	}
	a.last = time.Now()
	more, due := a.exporter.said.Due("aside "+a.subject(instance), a.last)
	if err := a.store(ctx, instance, payload, again, from); err != nil {
		if due {
			a.exporter.log.Error("cannot set aside an instance that the backend refuses: the lane waits", "instance", instance, "err", err, "more_since_last_said", more)
		}
		return false, ctx.Err() == nil
	}
	a.taken.Store(false)
	if due {
		a.exporter.log.Warn("instance set aside: the backend refuses it; its data is kept and sent again later, the lane continues", "instance", instance, "err", why, "more_since_last_said", more)
	}
	a.beginLocked(instance)
	return true, true
}

// store publishes a payload, in several messages where one is too small.
func (a *aside) store(ctx context.Context, instance string, payload []byte, again bool, from origin) error {
	d := a.exporter
	body, encoding := envelope.Compress(nil, payload, envelope.S2)
	if len(body) > envelope.MaxPayload {
		if first, second, several := otlpwire.Halve(d.sig, payload); several {
			if err := a.store(ctx, instance, first, again, from); err != nil {
				return err
			}
			return a.store(ctx, instance, second, again, from)
		} // else the stream's limit has some room above MaxPayload, for what the sink has added
	}
	items := otlpwire.Count(d.sig, payload)
	// By its content, too: a payload that is cut differently next time is another message.
	hash := sha256.Sum256(payload)
	why := bus.Refusal{Reason: "refused", Backend: d.w.Name(), Source: from.source()}
	if again {
		why.Reason = mayRepeat
	}
	m := bus.Message{Subject: a.subject(instance), Body: body, Refusal: &why, Header: envelope.Header{
		ContentType: envelope.ContentTypeOTLP, Encoding: encoding, Items: items, Arrival: from.dated(d.sig),
		ID: fmt.Sprintf("aside-%s-%s-%d-%d-%x", d.w.Name(), from.stream, from.seq, a.part.n, hash[:12]),
	}}
	stored, err := d.conn().PublishAsync(m).Stored(ctx)
	if err != nil {
		return err
	}
	a.part.n++
	if !stored.Duplicate {
		d.led.Of(d.sig).Aside(d.w.Name()).Add(float64(items))
	}
	return nil
}

var errNotOwner = errors.New("the lane is not owned by this process now")

// drain delivers what an instance has in ASIDE and returns nil when nothing is left, and the
// instance is back in the lane. After an error it may be called again.
func (a *aside) drain(ctx context.Context, instance string) error {
	d, subject := a.exporter, a.subject(instance)
	r, err := d.conn().OpenReaderOf(ctx, bus.ReaderConfig{Stream: bus.Aside, Filters: []string{subject}, Single: true})
	if err != nil {
		if back, _ := a.back(ctx, instance); back { // the stream is gone
			return nil
		}
		return err
	}
	defer r.Close()
	own := *d // a copy, because this is another goroutine
	own.w, own.log = backend.Session(d.w), d.log.With("instance", instance)
	p := &drained{exporter: &own, subject: subject, removed: time.Now()}
	defer p.close(ctx)
	for n := 0; ; n++ {
		if err := p.remove(ctx, r.Left() == 0); err != nil {
			return err
		}
		if r.Left() == 0 {
			if back, err := a.back(ctx, instance); back || err != nil {
				return err
			}
		}
		m, err := r.Next(ctx)
		if err != nil {
			return err
		}
		if err := p.deliver(ctx, instance, m, n < maxRepeated); err != nil {
			return err
		}
	}
}

// drained is what has been delivered of an instance's messages in ASIDE.
type drained struct {
	exporter *exporter
	subject  string
	body     []byte
	done     uint64    // the last one that was delivered
	removed  time.Time // when delivered ones were last removed
}

// deliver writes a message to the backend, or to DEADLETTER.
func (p *drained) deliver(ctx context.Context, instance string, m bus.Delivery, again bool) error {
	d := p.exporter
	if !d.owned() {
		return errNotOwner
	}
	if d.sig == otlpwire.Traces {
		p.body = nil // a transport may still read the one before
	}
	from := origin{stream: bus.Aside, seq: m.Seq, arrival: m.Header.Arrival, again: again}
	if m.Refusal != nil {
		from.first, from.again = m.Refusal.Source, again || m.Refusal.Reason == mayRepeat
	}
	delivered := false
	if m.Decompress(&p.body); m.Err != nil {
		delivered = d.undecodable(ctx, m, m.Err)
	} else {
		delivered = d.send(ctx, instance, m.Body, m.Header.Items, from)
	}
	if !delivered {
		return errNotOwner // or ctx has ended
	}
	p.done = m.Seq
	return nil
}

// remove removes what was delivered, every removeInterval and when nothing is left.
func (p *drained) remove(ctx context.Context, nothingLeft bool) error {
	if p.done == 0 || !nothingLeft && time.Since(p.removed) <= removeInterval {
		return nil
	}
	p.removed = time.Now()
	return p.exporter.conn().Remove(ctx, bus.Aside, p.subject, p.done)
}

// close removes what was delivered: the lane is still ours, its owner waits for this.
func (p *drained) close(ctx context.Context) {
	last, stop := context.WithTimeout(context.WithoutCancel(ctx), removeInterval)
	defer stop()
	_ = p.remove(last, true)
}

// back returns an instance to the lane if nothing of it is left in ASIDE.
func (a *aside) back(ctx context.Context, instance string) (bool, error) {
	a.mu.Lock()
	before := *a.waiting[instance]
	a.mu.Unlock()
	there, err := a.subjects(ctx, instance) // not under the lock, which would block the lane
	if err != nil || len(there) > 0 {
		return false, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if *a.waiting[instance] != before {
		return false, nil
	}
	delete(a.waiting, instance)
	a.gauge(float64(len(a.waiting)))
	if more, due := a.exporter.said.Due("back "+a.subject(instance), time.Now()); due {
		a.exporter.log.Info("instance is no longer set aside: the backend has accepted everything", "instance", instance, "more_since_last_said", more)
	}
	return true, nil
}
