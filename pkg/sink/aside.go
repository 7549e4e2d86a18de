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

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/proc"
	"github.com/penstock/penstock/pkg/sink/backend"
)

// AsideConfig says how a backend may refuse one instance without holding up the others.
type AsideConfig struct {
	// MaxInstances bounds how many instances of each lane are set aside at a time because the
	// backend refuses them and takes others; beyond it the lane waits. 0 sets none aside.
	MaxInstances int `yaml:"max_instances"`
}

// aside lets a lane go on although its backend refuses an instance (401, 403, 404, 429: its
// tenant, or how much it sends). What the instance has is put into the stream ASIDE, and
// delivered from there, in order and beside the lane.
//
// Its messages in ASIDE are the record that an instance is set aside: the next owner of the lane
// finds them. While one is left there, what is newer goes behind it, so that the order of the
// instance holds; when none is, the instance is back in the lane. The lane's floor passes what
// ASIDE has acknowledged, and nothing of it counts as delivered before the backend has it.
//
// A crash may deliver again what was delivered within the last [removeInterval], or put what
// the floor had not passed into ASIDE twice; the backend is told that these may be repetitions.
//
// Whether a refusal concerns one instance or everybody shows only when another one is tried.
// So one is set aside, and a further one only when the backend has taken something since, or
// after [doubt]: of a backend that refuses everybody one instance in that time.
type aside struct {
	delivery  *delivery
	partition int
	most      int
	gauge     func(instances float64)

	taken atomic.Bool // something was taken since an instance was set aside

	mu      sync.Mutex // held while something is put there, and while an instance is found to have nothing left
	waiting map[string]bool
	last    time.Time // when an instance was set aside
	drains  sync.WaitGroup
	work    context.Context // of the drains, since the claim
	stop    context.CancelFunc
}

const (
	// doubt is after how long another instance is set aside although nothing was taken.
	doubt = 30 * time.Second

	// removeInterval is how often what was delivered is removed from ASIDE, while more is there.
	removeInterval = time.Second
)

// newAside is for the owner of a lane. d is copied: its writer is the lane's.
func newAside(d delivery, lane *bus.Lane, partition, most int) *aside {
	d.owned = lane.Owned
	return &aside{delivery: &d, partition: partition, most: most, gauge: d.led.Aside(d.sig.String(), partition, d.w.Name()).Set, stop: func() {}}
}

func (a *aside) subject(instance string) string {
	return bus.AsideSubject(a.delivery.sig, a.delivery.w.Name(), a.partition, instance)
}

// claim begins with what the owner before has set aside. It returns false when ctx ended first.
// nil sets nothing aside.
func (a *aside) claim(ctx context.Context) bool {
	if a == nil {
		return true
	}
	a.close()
	var there map[string]uint64
	if !proc.Retry(ctx, a.delivery.log, "look for what was set aside", func() (err error) {
		there, err = a.delivery.conn().Subjects(ctx, bus.Aside, a.subject("*"))
		return err
	}) {
		return false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting = map[string]bool{}
	a.work, a.stop = context.WithCancel(ctx)
	a.taken.Store(true)
	for subject := range there {
		a.beginLocked(subject[strings.LastIndexByte(subject, '.')+1:])
	}
	return true
}

// beginLocked delivers what an instance has in ASIDE, until nothing is left or close.
func (a *aside) beginLocked(instance string) {
	a.waiting[instance] = true
	a.gauge(float64(len(a.waiting)))
	work := a.work
	a.drains.Go(func() {
		proc.Retry(work, a.delivery.log.With("instance", instance), "deliver what was set aside", func() error { return a.drain(work, instance) })
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

// put is [backend.Delivery.Aside] for payloads from an origin.
func (a *aside) put(ctx context.Context, instance string, payload []byte, from origin, why error) (put, goOn bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting[instance] {
		return true, proc.Retry(ctx, a.delivery.log.With("instance", instance), "set data aside", func() error { return a.store(ctx, instance, payload, from) })
	}
	if why == nil || len(a.waiting) >= a.most || (!a.taken.Load() && time.Since(a.last) < doubt) {
		return false, true
	}
	a.last = time.Now()
	if err := a.store(ctx, instance, payload, from); err != nil {
		if more, due := a.delivery.said.Due("aside "+a.subject(instance), time.Now()); due {
			a.delivery.log.Error("cannot set an instance aside that the backend refuses: the lane waits", "instance", instance, "err", err, "more_since_last_said", more)
		}
		return false, ctx.Err() == nil
	}
	a.taken.Store(false)
	a.delivery.log.Warn("instance set aside: the backend refuses it; its data is kept and tried again, the lane goes on", "instance", instance, "err", why)
	a.beginLocked(instance)
	return true, true
}

// store publishes a payload, in several messages where one is too small.
func (a *aside) store(ctx context.Context, instance string, payload []byte, from origin) error {
	d := a.delivery
	body, encoding := envelope.Compress(nil, payload, envelope.S2)
	if len(body) > envelope.MaxPayload {
		first, second, several := otlpwire.Halve(d.sig, payload)
		if !several {
			return fmt.Errorf("an item of %d bytes fits into no message", len(payload))
		}
		if err := a.store(ctx, instance, first, from); err != nil {
			return err
		}
		return a.store(ctx, instance, second, from)
	}
	items := otlpwire.Count(d.sig, payload)
	// By its content: a payload that is cut otherwise next time is another one.
	hash := sha256.Sum256(payload)
	_, err := d.conn().Publish(ctx, bus.Message{Subject: a.subject(instance), Body: body, Header: envelope.Header{
		ContentType: envelope.ContentTypeOTLP, Encoding: encoding, Items: items, Arrival: from.dated(d.sig),
		ID: fmt.Sprintf("aside-%s-%s-%d-%x", d.w.Name(), from.stream, from.seq, hash[:12]),
	}})
	if err == nil {
		d.led.Of(d.sig).Aside(d.w.Name()).Add(float64(items))
	}
	return err
}

var errNotOwner = errors.New("the lane is another's for the moment")

// drain delivers what an instance has in ASIDE and returns nil when nothing is left, and the
// instance is back in the lane. After an error it may be called again.
func (a *aside) drain(ctx context.Context, instance string) error {
	d, subject := a.delivery, a.subject(instance)
	r, err := d.conn().OpenReaderOf(ctx, bus.ReaderConfig{Stream: bus.Aside, Filters: []string{subject}})
	if err != nil {
		return err
	}
	defer r.Close()
	own := *d // a goroutine of its own
	own.w = backend.Session(d.w)
	var body []byte // a writer does not keep it
	done, removed := uint64(0), time.Now()
	remove := func() error {
		removed = time.Now()
		if done == 0 {
			return nil
		}
		return d.conn().Remove(ctx, bus.Aside, subject, done)
	}
	for {
		if r.Left() == 0 {
			if err := remove(); err != nil {
				return err
			}
			if back, err := a.back(ctx, instance); back || err != nil {
				return err
			}
		}
		m, err := r.Next(ctx)
		if err != nil {
			return err
		}
		delivered := false
		if m.Decompress(&body); m.Err != nil {
			delivered = own.undecodable(ctx, m, m.Err)
		} else {
			delivered = own.send(ctx, instance, m.Body, m.Header.Items, origin{stream: bus.Aside, seq: m.Seq, arrival: m.Header.Arrival, again: true})
		}
		if !delivered {
			return errNotOwner // or ctx has ended
		}
		if done = m.Seq; time.Since(removed) > removeInterval {
			if err := remove(); err != nil {
				return err
			}
		}
	}
}

// back takes an instance of which nothing is left into the lane again.
func (a *aside) back(ctx context.Context, instance string) (bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	there, err := a.delivery.conn().Subjects(ctx, bus.Aside, a.subject(instance))
	if err != nil || len(there) > 0 {
		return false, err
	}
	delete(a.waiting, instance)
	a.gauge(float64(len(a.waiting)))
	a.delivery.log.Info("instance is no longer set aside: the backend has taken everything", "instance", instance)
	return true, nil
}
