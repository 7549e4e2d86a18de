// Package keeper removes messages from the hub's streams that are not needed any more. The streams
// discard nothing by themselves: what a lane has not finished stays, and a stream that is full of
// that refuses more, so that routers, gateways and edges keep what they have.
//
// A keeper removes from the front of TRACES, METRICS, LOGS and SPANS what every lane has finished,
// once it is older than the stream's retention or new messages need the room; and from DECISIONS
// the decisions that no span which may be delivered again can need. Lanes are those of the
// configuration, and all others that exist in the hub: one that no sink reads any more keeps its
// messages in the stream until an operator abandons it.
//
// Every sink has a keeper; the one of the first sink works, and the others stand in where it makes
// no room. Two at once, one whose process was suspended, or none do no harm: a message that was
// finished once stays finished, and without a keeper streams fill and refuse. There is one
// exception: when a stream is deleted and recreated while a keeper is suspended between its last
// check and its request, the request removes the new stream's first messages.
//
// Losses are counted: messages that somebody else removes before all lanes have finished them,
// messages that the hub loses, and dead letters that are deleted to make room.
//
// Not here: AUDIT and REPLAYED have their own bounds, and ASIDE is emptied by the sinks that deliver
// it.
package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/failpoint"
	"github.com/penstock/penstock/pkg/hold"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Keeper is the keeper of one sink process.
type Keeper struct {
	conn  func() hub
	first func() bool
	led   *ledger.Ledger
	log   *slog.Logger
	said  backoff.Repeats

	streams      []*kept
	setAside     [len(otlpwire.Signals)]*kept // ASIDE, by signal: only who is to hold back
	spans        *kept
	journals     map[string]string // of the lanes of SPANS, by name
	decisionsAge time.Duration
	settle       time.Duration        // see settle
	margin       time.Duration        // decisionsAge, or less while decisions fill their stream
	decided      time.Time            // when decisions were last checked
	failing      map[string]time.Time // by stream: since when it cannot be handled

	topology bus.Topology
	blind    time.Time // until then the bucket KEEPER is not read, because permissions are missing
	pushed   pushed

	mu    sync.Mutex
	open  func(of func(instance string) hold.Answer) (quiet func(), err error) // [hold.Serve]
	quiet func()                                                               // nil: it does not answer
}

// hub is a [bus.Conn].
type hub interface {
	Connected() bool
	Floors(ctx context.Context, stream string) (map[string]bus.Floor, bus.StreamState, error)
	State(ctx context.Context, stream string) (bus.StreamState, error)
	First(ctx context.Context, stream, filter string, seq uint64) (uint64, time.Time, error)
	SequenceAt(ctx context.Context, stream string, t time.Time) (uint64, error)
	Remove(ctx context.Context, stream, subject string, upTo uint64) error
	OpenBucket(ctx context.Context, cfg bus.BucketConfig, replicas int) (*bus.Bucket, error)
	Count(ctx context.Context, stream, filter string, from, to uint64) (uint64, error)
	Record(ctx context.Context, what string, body []byte) error
	Letters(ctx context.Context, signal, instance string, bodies bool, visit func(bus.Letter) bool) error
	DropLetter(ctx context.Context, seq uint64) error
	FindBucket(ctx context.Context, cfg bus.BucketConfig) (*bus.Bucket, error)
	Subjects(ctx context.Context, stream, filter string) (map[string]uint64, error)
	OpenReaderOf(ctx context.Context, cfg bus.ReaderConfig) (*bus.Reader, error)
}

// kept is a stream and what a keeper knows about it.
type kept struct {
	name string
	// signal is that of the instances' own subjects; empty for other streams.
	signal  string
	flooded time.Time        // when it was last determined who holds what is owed; zero: it is not full enough
	held    map[string]*told // instances that are to hold back, by name; changed under the keeper's mu

	age   time.Duration     // how long finished messages are retained
	lanes map[string]string // the filters of the configured lanes, by name
	again *again            // nil: no lane reads it again

	state  bus.StreamState // at the previous look
	looked time.Time
	rate   float64
	agedAt time.Time // when aged was last determined
	aged   uint64
	stood  map[string]owing // lanes whose floor has not moved, by name
	tight  time.Time        // since when the first message is the same and room is short
	freed  uint64           // how many messages the last look removed
	done   []finished       // what could be removed at the looks of the last settle, the oldest first
	memory memory
	// unknown: something was removed that is not in the keepers' memory.
	unknown bool
}

// finished is up to where messages could be removed at a time.
type finished struct {
	at   time.Time
	upTo uint64
}

// owing is what a lane whose floor has not moved has not finished.
type owing struct{ floor, first uint64 }

const (
	interval = 2 * time.Second

	// standIn is how long a stream may be short of room before the keepers of other sinks than the
	// first make room; they check twice in that time.
	standIn = 30 * time.Second

	// settle is after how long finished messages are removed whether the lanes' tallies have them or not: by
	// then they do, or the next owner of a lane has counted what the previous one left.
	settle = 15 * time.Second

	// agedInterval is how often the keeper determines which messages are too old.
	agedInterval = time.Minute

	// patience is how long a look may take, and therefore how old its findings may be.
	patience = 10 * time.Second

	// spansAge is how long spans stay that all lanes have finished.
	spansAge = 2 * time.Hour

	// decisionsAge is how far back from the oldest span that is owed decisions are kept, while there
	// is room: late spans follow them.
	decisionsAge = 2 * time.Hour
)

// New returns a keeper that works while first returns true, and that stands in when the first sink's
// keeper does not work. lanes are those of the sinks; those of the routers are known.
func New(conn func() *bus.Conn, first func() bool, t bus.Topology, lanes []membership.Shared, led *ledger.Ledger, log *slog.Logger) *Keeper {
	k := &Keeper{topology: t, conn: func() hub { return conn() }, first: first, led: led, log: log.With("component", "keeper"), journals: map[string]string{}, failing: map[string]time.Time{}, decisionsAge: decisionsAge, settle: settle, margin: decisionsAge}
	add := func(name string, age time.Duration) *kept {
		s := &kept{name: name, age: age, lanes: map[string]string{}, stood: map[string]owing{}}
		for _, l := range lanes {
			if l.Stream == name {
				s.lanes[l.Name] = l.Filter
			}
			if l.Stream == bus.Spans && l.Journal != "" {
				k.journals[l.Name] = l.Journal
			}
		}
		k.streams = append(k.streams, s)
		return s
	}
	for _, sig := range otlpwire.Signals {
		k.setAside[sig] = &kept{name: bus.Aside, signal: sig.String()}
		s := add(bus.Stream(sig), t.MaxAge)
		s.signal = sig.String()
		for p := range t.Partitions {
			if sig == otlpwire.Traces {
				s.lanes[bus.RouterLane+strconv.Itoa(p)] = bus.PartitionFilter(sig, p)
			}
		}
	}
	k.open = func(of func(instance string) hold.Answer) (quiet func(), err error) { return hold.Serve(conn(), of) }
	k.spans = add(bus.Spans, spansAge)
	k.spans.again = &again{seen: map[string]seenTally{}}
	return k
}

// Run works until ctx ends.
func (k *Keeper) Run(ctx context.Context) {
	defer k.led.ForgetStreams()
	defer k.led.Keeper.Set(0)
	defer k.serve(false)
	defer func() {
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		k.recordPushed(last, time.Time{})
	}()
	var stoodIn time.Time
	for backoff.Sleep(ctx, interval) {
		first := k.first()
		k.serve(first)
		if !first || !k.conn().Connected() {
			k.led.Keeper.Set(0)
			k.led.ForgetStreams()
		}
		if !first {
			for _, s := range k.streams {
				s.memory = memory{} // another keeper works
			}
			k.recordPushed(ctx, time.Time{})
		}
		if !k.conn().Connected() {
			continue
		}
		if !first && time.Since(stoodIn) < standIn/2 {
			continue
		}
		if !first {
			stoodIn = time.Now()
			for _, s := range k.streams {
				k.try(ctx, s.name, func(ctx context.Context) error { return k.standIn(ctx, s) })
			}
			k.try(ctx, bus.Decisions, func(ctx context.Context) error { return k.decisions(ctx, false) })
			continue
		}
		works := true
		for _, s := range k.streams {
			works = k.try(ctx, s.name, func(ctx context.Context) error { return k.look(ctx, s) }) && works
		}
		works = k.try(ctx, bus.Decisions, func(ctx context.Context) error { return k.decisions(ctx, true) }) && works
		k.letters(ctx)
		if state, err := k.conn().State(ctx, bus.Aside); err == nil { // the sinks empty it
			k.show(bus.Aside, held(state))
			k.asides(ctx, held(state), time.Now())
		}
		if works {
			k.led.Keeper.Set(1)
		} else {
			k.led.Keeper.Set(0)
		}
	}
}

// try calls look, and reports false once it has failed for longer than standIn: consumers that are
// created or deleted while they are listed cause short failures that do not matter.
func (k *Keeper) try(ctx context.Context, stream string, look func(context.Context) error) bool {
	within, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := look(within)
	if err == nil {
		delete(k.failing, stream)
	} else if k.failing[stream].IsZero() {
		k.failing[stream] = time.Now()
	}
	if err == nil || time.Since(k.failing[stream]) < standIn {
		return true
	}
	if ctx.Err() == nil {
		if more, due := k.said.Due(stream+bus.Kind(err), time.Now()); due {
			k.log.Warn("cannot remove finished messages from a stream; it refuses more when it is full", "stream", stream, "err", err, "more_since_last_said", more)
		}
	}
	return false
}

// standIn handles a stream that has been short of room for so long that the first sink's keeper does
// not work, or lacks permissions: it may be an older version.
func (k *Keeper) standIn(ctx context.Context, s *kept) error {
	now := time.Now()
	state, err := k.conn().State(ctx, s.name)
	if err != nil {
		return err
	}
	short := state.MaxBytes > 0 && state.Bytes+state.MaxBytes/leastRoom > state.MaxBytes
	if !short || s.tight.IsZero() || state.FirstSeq != s.state.FirstSeq {
		if s.tight = (time.Time{}); short {
			s.tight = now
		}
		s.state = state
		return nil
	}
	if now.Sub(s.tight) < standIn {
		return nil
	}
	s.memory = memory{} // others have removed since
	if err := k.look(ctx, s); err != nil || s.freed == 0 {
		return err
	}
	if more, due := k.said.Due("stands in "+s.name, now); due {
		k.log.Warn("made room in a stream because the first sink's keeper does not; it may be an older version, or lack permissions", "stream", s.name, "more_since_last_said", more)
	}
	return nil
}

// look removes from one stream what is finished and not needed.
func (k *Keeper) look(ctx context.Context, s *kept) error {
	now, conn := time.Now(), k.conn()
	s.freed = 0
	floors, state, err := conn.Floors(ctx, s.name)
	if err != nil {
		s.agedAt = time.Time{}
		return err
	}
	missing := s.expect(floors)
	at := s.take(now, state)
	k.tell(s, state, floors, missing)
	if at.done, err = s.finished(ctx, conn, floors); err != nil {
		return err
	}
	k.show(s.name, at)
	defer k.floods(ctx, s, at, floors, now) // when there is room again
	if now.Sub(s.agedAt) > min(agedInterval, s.age) {
		if err := s.findAged(ctx, conn, state, now); err != nil {
			return err
		}
		k.age(ctx, s, now, floors)
	}
	at.aged, at.done = s.aged, state.LastSeq
	upTo, err := s.unowed(ctx, conn, floors, at.removable())
	if err != nil {
		return err
	}
	if settled := s.settled(now, k.settle, upTo); settled < upTo {
		upTo = max(settled, k.counted(ctx, s, floors, upTo))
	}
	if s.again != nil && upTo >= state.FirstSeq {
		upTo = k.readable(ctx, s, floors, upTo)
	}
	if upTo == 0 || upTo < state.FirstSeq || state.Forgets != "" {
		return k.account(ctx, s, state, floors, 0)
	}
	if err := s.trusted(ctx, conn, now); err != nil {
		return err
	}
	if failpoint.KeeperTooFar {
		upTo++
	}
	if err := k.account(ctx, s, state, floors, upTo); err != nil {
		return err
	}
	if err := conn.Remove(ctx, s.name, "", upTo); err != nil {
		return err
	}
	s.freed = upTo - state.FirstSeq + 1
	k.led.Removed(s.name).Add(float64(s.freed))
	return nil
}

// first returns the first message that a lane has not finished, and when it was stored; 0 for none. A
// server that cannot read a message answers that there is none: if its own count says otherwise, that
// answer is an error.
func first(ctx context.Context, conn hub, stream, lane string, f bus.Floor) (uint64, time.Time, error) {
	next, stored, err := conn.First(ctx, stream, f.Filter, f.Done+1)
	if err == nil && next == 0 && f.Lag > 0 && !f.Missing {
		err = fmt.Errorf("the hub counts %d unfinished messages of lane %s, and finds none", f.Lag, lane)
	}
	return next, stored, err
}

func held(state bus.StreamState) stream {
	return stream{first: state.FirstSeq, last: state.LastSeq, messages: state.Messages, bytes: state.Bytes, max: state.MaxBytes, largest: state.MaxMsgSize}
}

// age sets the gauges of how long lanes have been owed something, if the hub answers.
func (k *Keeper) age(ctx context.Context, s *kept, now time.Time, floors map[string]bus.Floor) {
	ages := map[string]float64{}
	for name, f := range floors {
		if f.Missing {
			continue
		}
		ages[name] = 0
		if f.Lag > 0 {
			_, stored, err := k.conn().First(ctx, s.name, f.Filter, f.Done+1)
			if err != nil {
				return
			}
			if !stored.IsZero() {
				ages[name] = max(now.Sub(stored).Seconds(), 0)
			}
		}
	}
	k.led.ForgetOldest(s.name) // drops lanes that do not exist any more
	for name, age := range ages {
		k.led.Oldest(s.name, name).Set(age)
	}
}

// take records the current state of a stream.
func (s *kept) take(now time.Time, state bus.StreamState) stream {
	at := held(state)
	if !state.Created.Equal(s.state.Created) || state.LastSeq < s.state.LastSeq { // recreated, or it has lost its end
		s.state, s.looked, s.rate, s.agedAt, s.done = state, now, 0, time.Time{}, nil
		clear(s.stood)
	}
	if took := now.Sub(s.looked).Seconds(); took > 0 { // follows a higher rate at once, a lower one gradually
		rate := float64(at.size(at.last-s.state.LastSeq)) / took
		s.rate = max(rate, s.rate*0.9+rate*0.1)
	}
	s.state, s.looked = state, now
	at.rate = s.rate
	return at
}

// finished returns up to which sequence all lanes have finished, as accurately as the metrics need:
// the hub is not asked about a lane whose floor moves, and only once about one whose floor does not.
func (s *kept) finished(ctx context.Context, conn hub, floors map[string]bus.Floor) (uint64, error) {
	done := s.state.LastSeq
	for name, f := range floors {
		o, stood := s.stood[name]
		switch {
		case f.Lag == 0:
			delete(s.stood, name)
			continue
		case !stood || o.floor != f.Done:
			o = owing{floor: f.Done}
		case o.first == 0:
			var err error
			if o.first, _, err = first(ctx, conn, s.name, name, f); err != nil {
				return 0, err
			}
		}
		s.stood[name] = o
		done = min(done, max(f.Done+1, o.first)-1)
	}
	return done, nil
}

// expect adds configured lanes that do not exist in the hub yet, and returns their names.
func (s *kept) expect(floors map[string]bus.Floor) (missing []string) {
	for name, filter := range s.lanes {
		if _, there := floors[name]; !there {
			floors[name] = bus.Floor{Filter: filter, Lag: 1, Missing: true}
			missing = append(missing, name)
		}
	}
	return missing
}

// tell logs why nothing can be removed from a stream, or why messages stay for ever.
func (k *Keeper) tell(s *kept, state bus.StreamState, floors map[string]bus.Floor, missing []string) {
	if state.Forgets != "" {
		if more, due := k.said.Due("forgets "+s.name, time.Now()); due {
			k.log.Error("stream is misconfigured: it discards messages that are owed, or finished ones cannot be removed; see docs/upgrading.md", "stream", s.name, "because", state.Forgets, "more_since_last_said", more)
		}
	}
	if len(missing) > 0 && state.Messages > 0 {
		slices.Sort(missing)
		if more, due := k.said.Due("missing "+s.name, time.Now()); due {
			k.log.Warn("lanes have not read anything yet; the whole stream is kept for them", "stream", s.name, "lanes", strings.Join(missing, " "), "more_since_last_said", more)
		}
	}
	var unread []string
	for name, f := range floors {
		if _, ours := s.lanes[name]; !ours && f.Lag > 0 {
			unread = append(unread, fmt.Sprintf("%s (%d messages)", name, f.Lag))
		}
	}
	k.led.Unread(s.name).Set(float64(len(unread)))
	if len(unread) > 0 {
		slices.Sort(unread)
		if more, due := k.said.Due("unread "+s.name, time.Now()); due {
			k.log.Warn("lanes of backends that are not configured hold messages; to abandon them: penstock lanes abandon STREAM/LANE", "stream", s.name, "lanes", strings.Join(unread, " "), "more_since_last_said", more)
		}
	}
}

func (k *Keeper) show(name string, at stream) {
	seconds := math.Inf(1)
	if at.rate >= 1 {
		seconds = float64(at.room()) / at.rate
	}
	owed, room, left := k.led.Stream(name)
	owed.Set(float64(at.owed()))
	room.Set(float64(at.room()))
	left.Set(seconds)
}

// decisions removes decisions that no span which may be delivered again can need. A lane needs the
// decisions since the oldest span that it, or the routers before it, have not finished; and those of
// some time before, because late spans follow them. That time is halved at each look while decisions
// fill their stream, because a lane that cannot record decisions makes no progress. A keeper that is
// not the first does nothing until the stream is nearly full.
func (k *Keeper) decisions(ctx context.Context, first bool) error {
	began, conn := time.Now(), k.conn()
	state, err := conn.State(ctx, bus.Decisions)
	if err != nil {
		return err
	}
	at := held(state)
	if first {
		k.show(bus.Decisions, at)
		k.tell(&kept{name: bus.Decisions}, state, nil, nil)
	} else if !at.nearlyFull() {
		return nil
	}
	short := at.fills()
	if k.margin /= 2; !short {
		k.margin = k.decisionsAge
	}
	if state.Messages == 0 || state.Forgets != "" || !short && (began.Sub(k.decided) < agedInterval || began.Sub(state.FirstTime) < k.margin) {
		return nil
	}
	unrouted, err := k.unrouted(ctx, began)
	if err != nil {
		return err
	}
	var of []error
	r := removal{began: began, first: state.FirstSeq, margin: k.margin, cuts: map[time.Time]uint64{}}
	if err := k.oldest(ctx, k.spans, func(lane string, stored time.Time) {
		if stored.After(unrouted) && !short {
			stored = unrouted
		}
		if subject := k.journals[lane]; subject != "" { // else nobody's here
			of = append(of, r.remove(ctx, conn, subject, stored))
		}
	}); err != nil {
		return err
	}
	k.decided = began
	if after, err := conn.State(ctx, bus.Decisions); err == nil {
		k.led.Removed(bus.Decisions).Add(float64(state.Messages - min(after.Messages, state.Messages)))
	}
	return errors.Join(of...)
}

// unrouted returns since when the routers have a message that they have not finished; now when they
// have finished all.
func (k *Keeper) unrouted(ctx context.Context, now time.Time) (since time.Time, err error) {
	since = now
	err = k.oldest(ctx, k.streams[otlpwire.Traces], func(_ string, stored time.Time) {
		if stored.Before(since) {
			since = stored
		}
	})
	return since, err
}

// removal is one removal of decisions, lane by lane.
type removal struct {
	began  time.Time
	first  uint64               // of the stream
	margin time.Duration        // for how long decisions are kept before the oldest span
	cuts   map[time.Time]uint64 // by that span's time; lanes that have finished all have the same
}

// remove removes the decisions of a lane whose oldest span was stored at a time.
func (r *removal) remove(ctx context.Context, conn hub, subject string, stored time.Time) (err error) {
	next, known := r.cuts[stored]
	if !known {
		if next, err = conn.SequenceAt(ctx, bus.Decisions, stored.Add(-r.margin)); err != nil {
			return err
		}
		r.cuts[stored] = next
	}
	if next <= r.first || time.Since(r.began) >= patience {
		return nil
	}
	return conn.Remove(ctx, bus.Decisions, subject, next-1)
}

// oldest calls tell for every lane of a stream with the time at which the first message was stored
// that the lane has not finished; the present if it has finished everything.
func (k *Keeper) oldest(ctx context.Context, s *kept, tell func(lane string, stored time.Time)) error {
	now := time.Now()
	floors, _, err := k.conn().Floors(ctx, s.name)
	if err != nil {
		return err
	}
	s.expect(floors)
	for name, f := range floors {
		next, stored, err := first(ctx, k.conn(), s.name, name, f)
		if err != nil {
			return err
		}
		if next == 0 || stored.After(now) {
			stored = now
		}
		tell(name, stored)
	}
	return nil
}
