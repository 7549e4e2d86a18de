package keeper

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/hold"
	"github.com/penstock/penstock/pkg/otlpwire"
)

const (
	// floodInterval is how often the keeper looks who holds what is owed, while a stream is more than a quarter full of it.
	floodInterval = 5 * time.Second

	// maxFlooding is of how many instances this is determined: those with the most messages in the stream.
	maxFlooding = 20

	// floodPatience is how long a look may take, and floodPause how long none follows on one that took longer.
	floodPatience, floodPause = 3 * time.Second, 30 * time.Second

	// holdFor is for how long an instance holds back if nothing is known since: the hub does not say.
	holdFor = time.Minute

	// obeys is after how long an instance that still sends does not hold back as it is told.
	obeys = time.Minute
)

// holding is what is owed of one instance, about.
type holding struct {
	instance string
	bytes    uint64
	messages uint64 // in the stream
}

// told is an instance that is told to hold back.
type told struct {
	since    time.Time
	seen     time.Time // when this was last determined
	sent     time.Time // when it had last sent something
	disobeys bool
	messages uint64 // in the stream, at the last look
	why      string
}

// flooding returns the instances that hold more than their share of what is owed on a stream that is more than half
// full of it. One that is held back already is so until it holds three quarters of that, or the stream is full to three
// eighths. When there is only one instance it may hold everything.
func flooding(at stream, share float64, holds []holding, before map[string]*told) (all []holding) {
	if share <= 0 || share >= 1 {
		return nil
	}
	sum := uint64(0)
	for _, h := range holds {
		sum += h.bytes
	}
	for _, h := range holds {
		limit := 1.0
		if before[h.instance] != nil {
			limit = 0.75
		}
		full := float64(at.owed()) > limit/2*float64(at.max)
		if full && float64(h.bytes) > limit*share*float64(max(at.owed(), sum)) && h.bytes < sum {
			all = append(all, h)
		}
	}
	return all
}

// overflowing returns the instances that are to hold back because of what is set aside of them: when ASIDE is more than half full
// those with more than their share of it, and when it is full to three quarters all. What is in it is of instances in trouble, and
// when it is full their lanes wait, with what others send. One that is held back already is so until ASIDE is full to three
// quarters of that.
func overflowing(at stream, share float64, holds []holding, before map[string]*told) (all []holding) {
	if share <= 0 || share >= 1 {
		return nil
	}
	for _, h := range holds {
		limit := float64(at.max)
		if before[h.instance] != nil {
			limit *= 0.75
		}
		if full := float64(at.bytes); full > limit*0.75 || full > limit/2 && float64(h.bytes) > share*full {
			all = append(all, h)
		}
	}
	return all
}

// waiting names what is set aside of an instance for a backend.
type waiting struct{ signal, backend, instance string }

// asides shows how much of whom is set aside, and determines who is to hold back because that fills ASIDE. Of how many bytes is
// determined of the largest only.
func (k *Keeper) asides(ctx context.Context, at stream, now time.Time) {
	pause := floodInterval
	if at.bytes <= at.max/4 && !slices.ContainsFunc(k.setAside[:], func(s *kept) bool { return len(s.held) > 0 }) { // nobody is to hold back
		pause = floodPause
	}
	if at.max == 0 || k.quiet == nil && k.open != nil || now.Sub(k.setAside[0].flooded) < pause {
		return
	}
	var holds [len(otlpwire.Signals)][]holding
	shown, messages := map[waiting]uint64{}, map[waiting]uint64{}
	if k.setAside[0].flooded = now; at.messages > 0 {
		ctx, cancel := context.WithTimeout(ctx, floodPatience)
		defer cancel()
		there, err := k.conn().Subjects(ctx, bus.Aside, "aside.*.*.*.*")
		if err != nil {
			k.setAside[0].flooded = now.Add(floodPause - floodInterval)
			k.log.Debug("cannot determine of whom most is set aside", "err", err)
			return
		}
		for subject, n := range there {
			part := strings.Split(subject, ".") // aside, signal, backend, partition, instance
			messages[waiting{part[1], part[2], part[4]}] += n
		}
		for i, one := range slices.SortedFunc(maps.Keys(messages), func(a, b waiting) int { return cmp.Compare(messages[b], messages[a]) }) {
			sig, err := otlpwire.ParseSignal(one.signal)
			if err != nil {
				continue
			}
			bytes := uint64(0)
			if i < maxFlooding { // one that is emptied meanwhile has none
				if bytes, err = k.left(ctx, bus.Aside, strings.Join([]string{"aside", one.signal, one.backend, "*", one.instance}, "."), 1); err == nil {
					shown[one] = bytes
				}
			}
			holds[sig] = add(holds[sig], holding{one.instance, bytes, messages[one]})
		}
	}
	k.led.ForgetAsideBytes()
	for one, bytes := range shown {
		k.led.AsideBytes(one.signal, one.backend, one.instance).Set(float64(bytes))
	}
	for i, s := range k.setAside {
		k.hold(s, overflowing(at, k.topology.InstanceShare, holds[i], s.held), now)
	}
}

// add adds what an instance holds at another backend.
func add(all []holding, h holding) []holding {
	for i := range all {
		if all[i].instance == h.instance {
			all[i].bytes += h.bytes
			all[i].messages += h.messages
			return all
		}
	}
	return append(all, h)
}

// floods shows which instances hold most of what is owed on a stream, and determines who is to hold back.
func (k *Keeper) floods(ctx context.Context, s *kept, at stream, floors map[string]bus.Floor, now time.Time) {
	if s.signal == "" || at.max == 0 || k.quiet == nil && k.open != nil {
		return // nobody would be told
	}
	if at.owed() <= at.max/4 {
		if !s.flooded.IsZero() {
			s.flooded = time.Time{}
			k.led.ForgetOwed(s.signal)
			k.hold(s, nil, now)
		}
		return
	}
	if now.Sub(s.flooded) < floodInterval {
		return
	}
	s.flooded = now
	ctx, cancel := context.WithTimeout(ctx, floodPatience)
	defer cancel()
	holds, err := k.holds(ctx, s, floors)
	if err != nil { // later
		s.flooded = now.Add(floodPause - floodInterval)
		k.log.Debug("cannot determine who holds what is owed", "stream", s.name, "err", err)
		return
	}
	k.led.ForgetOwed(s.signal)
	for _, h := range holds {
		k.led.Owed(s.signal, h.instance).Set(float64(h.bytes))
	}
	k.hold(s, flooding(at, k.topology.InstanceShare, holds, s.held), now)
}

// hold notes who is to hold back, and says what has changed.
func (k *Keeper) hold(s *kept, floods []holding, now time.Time) {
	all := map[string]*told{}
	for _, h := range floods {
		one := s.held[h.instance]
		if one == nil || now.Sub(one.seen) >= holdFor { // else it was not told lately
			one = &told{since: now, sent: now, messages: h.messages, why: fmt.Sprintf("%s has %d MiB of what backends have not stored yet in the stream %s, which fills up (streams.instance_share)", h.instance, h.bytes>>20, s.name)}
			k.log.Warn("an instance that fills a stream is told to hold back", "stream", s.name, "instance", h.instance, "owed_bytes", h.bytes)
		}
		sent, disobeys := one.sent, false
		if h.messages > one.messages {
			sent = now
		}
		if s.name != bus.Aside && now.Sub(one.since) > obeys && now.Sub(sent) < obeys { // what the hub had before still comes to ASIDE
			disobeys = true
			if more, due := k.said.Due("disobeys "+s.name+h.instance, now); due {
				k.log.Error("an instance does not hold back as it is told, and fills a stream; to stop it: penstock nats-config remove-instance (docs/backends.md)", "stream", s.name, "instance", h.instance, "owed_bytes", h.bytes, "more_since_last_said", more)
			}
		}
		all[h.instance] = &told{since: one.since, seen: now, sent: sent, disobeys: disobeys, messages: h.messages, why: one.why}
	}
	for instance := range s.held {
		if all[instance] == nil {
			k.log.Info("an instance need not hold back any more", "stream", s.name, "instance", instance)
		}
	}
	before := s.held
	k.mu.Lock()
	s.held = all
	k.mu.Unlock()
	for instance := range before {
		k.showHeld(s.signal, instance, now)
	}
	for instance := range all {
		k.showHeld(s.signal, instance, now)
	}
}

// showHeld shows for how long an instance has been told to hold back with a signal, because of its stream or of ASIDE, and whether
// it does not.
func (k *Keeper) showHeld(signal, instance string, now time.Time) {
	var since time.Time
	disobeys := 0.0
	for _, s := range k.filled() {
		one := s.held[instance]
		if one == nil || s.signal != signal {
			continue
		}
		if since.IsZero() || one.since.Before(since) {
			since = one.since
		}
		if one.disobeys {
			disobeys = 1
		}
	}
	if since.IsZero() {
		k.led.ForgetHeld(signal, instance)
		return
	}
	k.led.Held(signal, instance).Set(now.Sub(since).Seconds())
	k.led.Disobeys(signal, instance).Set(disobeys)
}

// answer tells an instance whether to hold back.
func (k *Keeper) answer(instance string) (a hold.Answer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range k.filled() {
		if one := s.held[instance]; one != nil && time.Since(one.seen) < holdFor && !slices.Contains(a.Signals, s.signal) {
			a.Signals, a.Why = append(a.Signals, s.signal), one.why
		}
	}
	return a
}

// serve answers those who ask whether to hold back, while this is the keeper.
func (k *Keeper) serve(first bool) {
	switch {
	case !first && k.quiet != nil:
		k.quiet()
		k.quiet = nil
		k.led.ForgetAsideBytes()
		for _, s := range k.filled() {
			k.hold(s, nil, time.Now())
		}
	case first && k.quiet == nil && k.open != nil:
		quiet, err := k.open(k.answer)
		if err != nil {
			k.log.Debug("cannot answer instances", "err", err)
			return
		}
		k.quiet = quiet
	}
}

// holds returns what is owed of the instances with the most messages.
func (k *Keeper) holds(ctx context.Context, s *kept, floors map[string]bus.Floor) ([]holding, error) {
	done := map[string]uint64{} // by filter: what all lanes of a partition have finished
	for _, f := range floors {
		if upTo, known := done[f.Filter]; !known || f.Done < upTo {
			done[f.Filter] = f.Done
		}
	}
	there, err := k.conn().Subjects(ctx, s.name, ">")
	if err != nil {
		return nil, err
	}
	subjects := slices.SortedFunc(maps.Keys(there), func(a, b string) int { return cmp.Or(cmp.Compare(there[b], there[a]), cmp.Compare(a, b)) })
	var all []holding
	for _, subject := range subjects[:min(len(subjects), maxFlooding)] {
		dot := strings.LastIndexByte(subject, '.')
		bytes, err := k.left(ctx, s.name, subject, done[subject[:dot]+".*"]+1)
		if err != nil {
			return nil, err
		}
		all = append(all, holding{subject[dot+1:], bytes, there[subject]})
	}
	return all, nil
}

// filled returns all streams that an instance may fill: it has to hold back because of any of them.
func (k *Keeper) filled() []*kept { return slices.Concat(k.streams, k.setAside[:]) }

// measured is how many messages' sizes stand for all of a subject.
const measured = 32

// left returns about how many bytes the messages of a subject have from a sequence on, by the size of the first ones.
func (k *Keeper) left(ctx context.Context, stream, subject string, from uint64) (bytes uint64, err error) {
	r, err := k.conn().OpenReaderOf(ctx, bus.ReaderConfig{Stream: stream, From: from, Filters: []string{subject}, Headers: true, Single: true})
	if err != nil {
		return 0, err
	}
	defer r.Close()
	messages, n, size := r.Left(), uint64(0), uint64(0)
	err = r.Each(ctx, func(d bus.Delivery) bool {
		n, size = n+1, size+uint64(d.Size)
		return n < measured
	})
	return size / max(n, 1) * messages, err
}
