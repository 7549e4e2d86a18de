package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	grpc "google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/httpclient"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Deliverer delivers payloads of one signal to one backend.
type Deliverer struct {
	Signal otlpwire.Signal
	Writer Writer
	Log    *slog.Logger
	// Arrival is when the payload arrived at its edge, in Unix nanoseconds; 0 if unknown.
	Arrival int64
	// Delivered counts items that the backend has.
	Delivered func(items int)
	// Deduplicated counts those of them that the backend has refused because it already has them, as
	// far as this can be known.
	Deduplicated func(items int)
	// Paused is called with true while the deliverer waits for an operator to correct an address or a
	// credential.
	Paused func(bool)
	// Waits, if set, is called when the writing of a payload begins, before each pause with the reason
	// for it, and with nil at the end.
	Waits func(why error)
	// GiveUp takes a payload that the backend refuses for good and that is not to be halved further. It
	// returns false if ctx ended first.
	GiveUp func(ctx context.Context, instance string, payload []byte, reason string, why error) bool
	// Aside, if set, may set a payload aside: before the first attempt, without a Trouble, if older ones of
	// its instance wait there, and after some attempts that were in vain. again says that the payload
	// may have been written before. It returns put true if it has taken the payload, and goOn false if
	// ctx ended first. It may change Writer.
	Aside func(ctx context.Context, instance string, payload []byte, again bool, t Trouble) (put, goOn bool)
	// MayAside, set together with Aside, is asked whether it would set a payload aside, while an attempt
	// takes longer than SlowAfter (0: is never asked).
	MayAside  func(instance string, t Trouble) bool
	SlowAfter time.Duration
	// Took, if set, is called for each attempt that was successful, with how long it took.
	Took func(instance string, took time.Duration)
	// Others, if set, reports whether the backend has accepted something of another instance since a time.
	Others func(instance string, since time.Time) bool
	// Poison is when a payload that the backend does not accept is given up, while Others are accepted.
	Poison Poison
	// Panicked, if set, is called when the writer has panicked; it is replaced by a new session then.
	Panicked func(instance string, why *fault.Panic)
	// refused is how many pieces of the current payload were given up in a row, asked how many requests
	// it has taken.
	refused, asked int
	// Owned, if set, is called before each attempt: an owner whose process was suspended must not write old items
	// after newer ones.
	Owned func() bool
}

// Trouble is why a payload may be set aside: it is not accepted for the time being.
type Trouble struct {
	Err      error     // nil: there is none
	Attempts int       // in vain
	Since    time.Time // a backend that has accepted something of another instance since then has trouble with this one
	Slow     bool      // the last attempt takes long
	Failed   bool      // the last attempt was answered, with a failure of the backend itself
}

// Poison says when a payload is given up that a backend does not accept, and does not refuse either: it answers 500,
// or nothing, each time, or closes the connection. Refusals of a sender or for a wrong configuration do not count.
type Poison struct {
	// For how long a payload must have been tried in vain before what the backend does not take of it becomes a dead
	// letter, with the reason poison. The backend must accept what other instances send meanwhile.
	After time.Duration `yaml:"after"`
	// How often it must have been tried, besides. 0: no payload is given up.
	Tries int `yaml:"tries"`
}

// Validate reports all errors at once; section is its key.
func (p Poison) Validate(section string) error {
	var errs []error
	if p.After < 0 || p.After > 7*24*time.Hour {
		errs = append(errs, fmt.Errorf("%s.after is %v, want 0 to 168h", section, p.After))
	}
	if p.Tries != 0 && p.Tries < suspectTries {
		errs = append(errs, fmt.Errorf("%s.tries is %d, want 0 (none is given up) or at least %d", section, p.Tries, suspectTries))
	}
	return errors.Join(errs...)
}

const (
	// suspectTries is how often a part of a payload that is poison is tried.
	suspectTries = 3

	// suspectPause is how long at least is waited between these.
	suspectPause = 2 * time.Second

	// lately is within what time others must have been accepted before a payload is given up as poison.
	lately = time.Minute
)

// maxRefused is after how many refused items in a row the rest of a payload, if it is refused, too, is
// given up as a whole: an instance whose clock is wrong must not cost the others of its partition two
// requests for each of its items.
const maxRefused = 256

// maxAsked is after how many requests for one payload a refused part is given up as a whole: valid and
// invalid items in turn would make two requests an item. A payload that may have been written before
// is always halved to the end, to find out what the backend has.
const maxAsked = 512

// asideAfter is how often a backend must not accept a payload before that may be set
// aside, and maxPatience the longest requested pause up to which the deliverer waits for that.
const (
	asideAfter  = 3
	maxPatience = time.Second
)

// definite reports whether a backend's answer means that it stored nothing.
func definite(err error) bool {
	var answer *httpclient.Error
	return errors.As(err, &answer) && slices.Contains([]int{401, 403, 404, 405, 429}, answer.Status) && !errors.Is(err, httpclient.ErrBegun)
}

// Write returns true when every item of a payload is stored or given up, and false if ctx ended
// first. again says that the payload may have been written before.
func (d *Deliverer) Write(ctx context.Context, instance string, payload []byte, items int, again bool) bool {
	d.refused, d.asked = 0, 0
	if d.Waits != nil {
		d.Waits(ErrNoAnswer)
		defer d.Waits(nil)
	}
	return (&delivery{Deliverer: d, instance: instance, payload: payload, items: items, again: again}).write(ctx)
}

// ErrNoAnswer is the reason to wait until the first attempt is answered.
var ErrNoAnswer = errors.New("the backend gives no answer")

// pause waits before the next attempt. It returns false if ctx ended, or if the lane may have another
// owner by then.
func (d *Deliverer) pause(ctx context.Context, wait time.Duration, why error) bool {
	if d.Waits != nil {
		d.Waits(why)
	}
	return backoff.Sleep(ctx, wait) && d.isOwner()
}

func (d *Deliverer) isOwner() bool { return d.Owned == nil || d.Owned() }

// arrival is Arrival as a time, the zero time for none.
func (d *Deliverer) arrival() time.Time {
	if d.Arrival <= 0 {
		return time.Time{}
	}
	return time.Unix(0, d.Arrival)
}

// delivery is one payload, or a part of one, until it is stored, given up or out of the way.
type delivery struct {
	*Deliverer
	instance string
	payload  []byte
	items    int
	again    bool // it may have been written before
	suspect  bool // it is a part of a payload that is poison
	patient  bool // it cannot be set aside for being slow

	failed time.Time // when the first attempt was in vain
	vain   int       // attempts that count for Poison, since
	since  time.Time // the first of them
	paused bool      // for a person
	warned bool      // that the backend does not take it
}

func (p *delivery) write(ctx context.Context) bool {
	defer p.setPaused(false)
	if !p.isOwner() {
		return false // it may have waited for its turn for long
	}
	if done, goOn := p.setAside(ctx, Trouble{}); done {
		return goOn
	}
	for attempt := 1; ; attempt++ {
		p.asked++
		slow, err := p.attempt(ctx, attempt)
		var parts fault.Parts
		if err == nil || errors.As(err, &parts) {
			if attempt > 1 {
				p.Log.Info("backend accepts data again", "attempts", attempt)
			}
			return p.stored(ctx, parts)
		}
		if ctx.Err() != nil || !p.isOwner() {
			return false
		}
		if reason, permanent := fault.Reason(err); permanent {
			return p.refusedForGood(ctx, reason, err)
		}
		p.again = p.again || !definite(err) // perhaps only the answer was lost, not the request
		now := time.Now()
		if attempt == 1 {
			p.failed = now
		}
		if p.isPoison(err, now) {
			p.suspect = true
			return p.refusedForGood(ctx, ledger.DeadPoison, fmt.Errorf("not accepted in %d attempts within %v, while the backend accepts what others send: %w", p.vain, now.Sub(p.since).Round(time.Second), err))
		}
		if done, goOn := p.wait(ctx, err, p.trouble(err, attempt, slow, now)); done {
			return goOn
		}
	}
}

// wait waits before the next attempt, or has the payload set aside. done and goOn are as for setAside.
func (p *delivery) wait(ctx context.Context, err error, t Trouble) (done, goOn bool) {
	pause, sender := fault.Pause(err, t.Attempts, rand.Float64()), fault.IsSender(err)
	if p.suspect {
		pause = max(pause, suspectPause) // a backend that restarts is not to be taken for one that fails on this part
	}
	if sender && p.Aside != nil && mayHealSoon(err, t.Attempts, pause) {
		pause = min(pause, maxPatience/4)
	} else {
		if sender || t.Slow || t.Attempts >= asideAfter {
			if done, goOn := p.setAside(ctx, t); done {
				return true, goOn
			}
			p.patient = p.patient || t.Slow // cut again, it would never be stored
		}
		p.report(err)
	}
	return !p.pause(ctx, pause, err), false
}

// errSlow is the reason of an attempt that was given up.
var errSlow = errors.New("the backend gives no answer, while it answers to others")

// attempt tries to write the payload once. slow says that this was given up because it took too long, and the
// payload may be set aside.
func (p *delivery) attempt(ctx context.Context, attempt int) (slow bool, err error) {
	began := time.Now()
	if p.MayAside != nil && p.SlowAfter > 0 && !p.patient {
		limited, cut := context.WithCancelCause(ctx)
		var watch sync.WaitGroup
		watch.Go(func() {
			for backoff.Sleep(limited, p.SlowAfter) {
				if p.MayAside(p.instance, p.trouble(errSlow, attempt, true, time.Now())) {
					cut(errSlow)
				}
			}
		})
		defer func() {
			var parts fault.Parts
			_, permanent := fault.Reason(err)
			if slow = err != nil && !permanent && !errors.As(err, &parts) && errors.Is(context.Cause(limited), errSlow); slow {
				err = fmt.Errorf("%w: none in %v", errSlow, time.Since(began).Round(time.Millisecond))
				p.Writer = Session(p.Writer) // a transport may still read what the writer would reuse
			}
			cut(nil)
			watch.Wait()
		}()
		ctx = limited
	}
	err = fault.Guard(func() error { return writeArrived(ctx, p.Writer, p.instance, p.payload, p.arrival()) })
	parts, panicked := fault.Parts(nil), (*fault.Panic)(nil)
	switch {
	case errors.As(err, &panicked):
		p.Writer, p.again = Session(p.Writer), true
		if p.Panicked != nil {
			p.Panicked(p.instance, panicked)
		}
		err = fault.Permanent(ledger.DeadPoison, err)
	case (err == nil || errors.As(err, &parts)) && p.Took != nil:
		p.Took(p.instance, time.Since(began))
	}
	return false, err
}

// trouble describes a failed attempt, or one that takes long.
func (p *delivery) trouble(err error, attempts int, slow bool, now time.Time) Trouble {
	t := Trouble{Err: err, Attempts: attempts, Since: p.failed, Slow: slow, Failed: failed(err)}
	if slow {
		t.Since = now.Add(-p.SlowAfter / 2)
	}
	return t
}

// failed reports whether a backend's answer means that it has failed.
func failed(err error) bool {
	if answer, is := errors.AsType[*httpclient.Error](err); is {
		return answer.Status/100 == 5
	}
	st, is := grpc.FromError(err)
	return is && slices.Contains([]codes.Code{codes.Unknown, codes.Internal, codes.DataLoss, codes.Aborted}, st.Code())
}

// isPoison reports whether a payload that was tried in vain once more is to be given up. Only attempts count that the
// backend has not refused, in a time in which it has accepted what others send.
func (p *delivery) isPoison(err error, now time.Time) bool {
	if p.Poison.Tries == 0 || p.Others == nil || definite(err) || fault.IsSender(err) || fault.IsConfiguration(err) {
		return false
	}
	if p.vain == 0 || !p.Others(p.instance, now.Add(-lately)) {
		p.vain, p.since = 0, now // trouble of everybody
	}
	p.vain++
	if p.suspect {
		return p.vain >= suspectTries && p.Others(p.instance, p.since)
	}
	return p.vain >= p.Poison.Tries && now.Sub(p.since) >= p.Poison.After && p.Others(p.instance, now.Add(-lately))
}

// setAside has the payload taken out of the way, where there is such a way: before it is
// tried, without a trouble, or for one. done says that nothing is left to do, and goOn what
// [Deliverer.Write] returns then.
func (p *delivery) setAside(ctx context.Context, t Trouble) (done, goOn bool) {
	if p.Aside == nil {
		return false, true
	}
	put, goOn := p.Aside(ctx, p.instance, p.payload, p.again, t)
	return put || !goOn, goOn
}

// mayHealSoon reports whether a payload whose sender is refused is tried again before it
// may go aside.
func mayHealSoon(err error, attempt int, wait time.Duration) bool {
	return attempt < asideAfter && (wait <= maxPatience || fault.IsConfiguration(err))
}

// stored counts the payload as delivered, but for the parts that the backend will never take:
// they are given up. It returns false when ctx ended first.
func (p *delivery) stored(ctx context.Context, but fault.Parts) bool {
	for _, part := range but {
		if part.Known {
			p.Deduplicated(part.Items)
			continue
		}
		if p.items -= part.Items; !p.GiveUp(ctx, p.instance, part.Payload, part.Reason, part.Err) {
			return false
		}
	}
	p.refused = 0
	p.Delivered(p.items)
	return true
}

// refusedForGood brings the halves of a payload that the backend will never take as it is, so
// that only the culprits are given up.
func (p *delivery) refusedForGood(ctx context.Context, reason string, err error) bool {
	first, second, several := otlpwire.Halve(p.Signal, p.payload)
	switch {
	case several && !fault.IsWhole(err) && p.mayHalve():
		return p.half(ctx, first) && p.half(ctx, second)
	case !several && p.repeated(reason):
		p.Deduplicated(p.items)
		p.Delivered(p.items)
		return true
	}
	p.refused++
	return p.GiveUp(ctx, p.instance, p.payload, reason, err)
}

// mayHalve reports whether the payload that this one is a part of has not yet cost too much.
func (p *delivery) mayHalve() bool {
	return p.refused < maxRefused && (p.again || p.asked < maxAsked)
}

func (p *delivery) half(ctx context.Context, payload []byte) bool {
	return (&delivery{Deliverer: p.Deliverer, instance: p.instance, payload: payload, items: otlpwire.Count(p.Signal, payload), again: p.again, suspect: p.suspect}).write(ctx)
}

// repeated reports whether the backend refuses an item because it has it from an earlier attempt.
// A sample is a part of a series, in order; a line that is too far behind need not be there.
func (p *delivery) repeated(reason string) bool {
	return p.again && reason == ledger.DeadOutOfOrder && p.Signal == otlpwire.Metrics
}

// setPaused tells when the delivery begins to wait for a person, and when that is over.
func (p *delivery) setPaused(now bool) {
	if now != p.paused {
		p.paused = now
		p.Paused(now)
	}
}

// report says once why the backend does not take the payload, and each time that it takes a
// person to mend that.
func (p *delivery) report(err error) {
	was := p.paused
	p.setPaused(fault.IsConfiguration(err))
	switch {
	case p.paused && !was:
		p.Log.Error("lane paused: the backend's address or credential is wrong; the data is kept", "err", err)
	case !p.warned:
		p.warned = true
		p.Log.Warn("backend does not accept data; retrying", "err", err)
	}
}
