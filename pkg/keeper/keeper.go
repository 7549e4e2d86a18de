// Package keeper removes from the hub's streams what nobody needs any more. The streams throw
// nothing away by themselves: what a lane has not finished stays, and a stream that is full of that refuses
// more, so that routers, gateways and edges hold what they have.
//
// A keeper removes from the front of TRACES, METRICS, LOGS and SPANS what every lane has finished,
// when it is older than the stream is to go back or in the way of what comes; and from
// DECISIONS what no span that may come again can ask for. Lanes are those that the configuration
// names, and all others that the hub knows: one that nobody reads any more holds its stream until an
// operator deletes its consumer.
//
// Every sink has a keeper, and the first of the sinks lets its keeper work. Two at once, one that
// slept, or none do no harm: what was finished at any time stays finished, and without a keeper
// streams fill and refuse. But when a stream is deleted and made again while a keeper sleeps
// between its last look and its request, that removes the new stream's first messages.
//
// What is not here: DEADLETTER, AUDIT and REPLAYED have bounds of their own, and ASIDE is emptied by
// the sinks that deliver it.
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
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/proc"
)

// Keeper works for one process.
type Keeper struct {
	conn  func() hub
	first func() bool
	led   *ledger.Ledger
	log   *slog.Logger
	said  proc.Repeats

	streams      []*kept
	spans        *kept
	decisionsAge time.Duration
	decided      time.Time // when decisions were removed
}

// hub is a [bus.Conn].
type hub interface {
	Connected() bool
	Floors(ctx context.Context, stream string) (map[string]bus.Floor, bus.StreamState, error)
	State(ctx context.Context, stream string) (bus.StreamState, error)
	First(ctx context.Context, stream, filter string, seq uint64) (uint64, time.Time, error)
	SequenceAt(ctx context.Context, stream string, t time.Time) (uint64, error)
	Remove(ctx context.Context, stream, subject string, upTo uint64) error
}

// kept is a stream and what a keeper knows of it.
type kept struct {
	name  string
	age   time.Duration     // how far it is to go back
	lanes map[string]string // the filters of those that the configuration names, by name

	created  time.Time
	searched map[string]uint64 // by lane: up to here nothing of it is left, beyond its floor
	last     uint64            // of the look before
	looked   time.Time
	rate     float64
	agedAt   time.Time // when it was last asked how much is too old
	aged     uint64
}

const (
	interval = 2 * time.Second

	// agedInterval is how often it is asked how much is too old.
	agedInterval = time.Minute

	// patience is how long a look may take: what it found is as old.
	patience = 10 * time.Second

	// spansAge is how long spans stay that all lanes have finished.
	spansAge = 2 * time.Hour

	// decisionsAge is how long before the oldest span that is owed decisions are kept: spans
	// that come late follow them.
	decisionsAge = 2 * time.Hour
)

// New returns a keeper that works while first says so. lanes are those of the sinks; those of the
// routers are known.
func New(conn func() *bus.Conn, first func() bool, t bus.Topology, lanes []bus.Shared, led *ledger.Ledger, log *slog.Logger) *Keeper {
	k := &Keeper{conn: func() hub { return conn() }, first: first, led: led, log: log.With("component", "keeper"), decisionsAge: decisionsAge}
	add := func(name string, age time.Duration) *kept {
		s := &kept{name: name, age: age, lanes: map[string]string{}}
		for _, l := range lanes {
			if l.Stream == name {
				s.lanes[l.Name] = l.Filter
			}
		}
		k.streams = append(k.streams, s)
		return s
	}
	for _, sig := range otlpwire.Signals {
		s := add(bus.Stream(sig), t.MaxAge)
		for p := range t.Partitions {
			if sig == otlpwire.Traces {
				s.lanes[bus.RouterLane+strconv.Itoa(p)] = bus.PartitionFilter(sig, p)
			}
		}
	}
	k.spans = add(bus.Spans, spansAge)
	return k
}

// Run works until ctx ends.
func (k *Keeper) Run(ctx context.Context) {
	defer k.led.Keeper.Set(0)
	for proc.Sleep(ctx, interval) {
		if !k.first() || !k.conn().Connected() {
			k.led.Keeper.Set(0)
			k.led.ForgetStreams()
			continue
		}
		k.led.Keeper.Set(1)
		for _, s := range k.streams {
			k.try(ctx, s.name, func(ctx context.Context) error { return k.look(ctx, s) })
		}
		k.try(ctx, bus.Decisions, k.decisions)
	}
	k.led.ForgetStreams()
}

func (k *Keeper) try(ctx context.Context, stream string, look func(context.Context) error) {
	within, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := look(within); err != nil && ctx.Err() == nil {
		if more, due := k.said.Due(stream+bus.Kind(err), time.Now()); due {
			k.log.Warn("nothing can be removed from a stream; when it is full it refuses more", "stream", stream, "err", err, "more_since_last_said", more)
		}
	}
}

// look removes from one stream what is finished and not needed.
func (k *Keeper) look(ctx context.Context, s *kept) error {
	now, conn := time.Now(), k.conn()
	floors, state, err := conn.Floors(ctx, s.name)
	if err != nil {
		return err
	}
	if !state.Created.Equal(s.created) {
		s.created, s.searched, s.last, s.looked, s.rate, s.aged, s.agedAt = state.Created, map[string]uint64{}, state.LastSeq, now, 0, 0, time.Time{}
	}
	at := stream{first: state.FirstSeq, last: state.LastSeq, messages: state.Messages, bytes: state.Bytes, max: state.MaxBytes, done: state.LastSeq}
	s.pace(now, at)
	at.rate = s.rate
	missing := s.expect(floors)
	for name, f := range floors {
		if f.Lag > 0 {
			at.done = min(at.done, max(f.Done, s.searched[name]))
		}
	}
	k.tell(s, state, floors, missing)
	k.show(s.name, at)
	if now.Sub(s.agedAt) > agedInterval {
		s.agedAt, s.aged = now, 0
		if old := now.Add(-s.age); state.Messages > 0 && state.FirstTime.Before(old) {
			next, err := conn.SequenceAt(ctx, s.name, old)
			if err != nil {
				return err
			}
			s.aged = next - 1
		}
	}
	at.aged = s.aged
	upTo := at.removable()
	for name, f := range floors { // the counts are not to be relied on
		if upTo == 0 || f.Done >= upTo || s.searched[name] >= upTo {
			continue
		}
		next, _, err := conn.First(ctx, s.name, f.Filter, max(f.Done, s.searched[name])+1)
		if err != nil {
			return err
		}
		if next == 0 {
			next = state.LastSeq + 1
		}
		s.searched[name] = next - 1
		upTo = min(upTo, next-1)
	}
	if upTo < state.FirstSeq || state.Forgets != "" {
		return nil
	}
	if time.Since(now) > patience {
		return errors.New("this process was stopped, or the hub was slow")
	}
	if err := conn.Remove(ctx, s.name, "", upTo); err != nil {
		return err
	}
	k.led.Removed(s.name).Add(float64(upTo - state.FirstSeq + 1))
	return nil
}

// expect adds the lanes that have read nothing yet, and returns their names.
func (s *kept) expect(floors map[string]bus.Floor) (missing []string) {
	for name, filter := range s.lanes {
		if _, there := floors[name]; !there {
			floors[name] = bus.Floor{Filter: filter, Lag: 1}
			missing = append(missing, name)
		}
	}
	return missing
}

// pace takes in how fast a stream grows: at once when that is faster, by and by when it is slower.
func (s *kept) pace(now time.Time, at stream) {
	if took := now.Sub(s.looked).Seconds(); took > 0 {
		rate := float64(at.size(at.last-min(s.last, at.last))) / took
		s.rate = max(rate, s.rate*0.9+rate*0.1)
	}
	s.last, s.looked = at.last, now
}

// tell says what keeps a stream from being kept, or for ever.
func (k *Keeper) tell(s *kept, state bus.StreamState, floors map[string]bus.Floor, missing []string) {
	if state.Forgets != "" {
		if more, due := k.said.Due("forgets "+s.name, time.Now()); due {
			k.log.Error("stream throws away its oldest messages whether they are owed or not, or cannot be made room in: see docs/upgrading.md", "stream", s.name, "because", state.Forgets, "more_since_last_said", more)
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		if more, due := k.said.Due("missing "+s.name, time.Now()); due {
			k.log.Warn("lanes have not begun, everything in the stream is kept for them", "stream", s.name, "lanes", strings.Join(missing, " "), "more_since_last_said", more)
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
			k.log.Warn("lanes of backends that are not in the configuration hold messages; to give these up, delete the consumers", "stream", s.name, "lanes", strings.Join(unread, " "), "more_since_last_said", more)
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

// decisions removes decisions that no span which may come again can ask for: those of long before
// the oldest span that a lane of SPANS has not finished, and of long before now.
func (k *Keeper) decisions(ctx context.Context) error {
	began, conn := time.Now(), k.conn()
	if began.Sub(k.decided) < agedInterval {
		return nil
	}
	state, err := conn.State(ctx, bus.Decisions)
	if err != nil {
		return err
	}
	k.tell(&kept{name: bus.Decisions}, state, nil, nil)
	if state.Messages == 0 || state.Forgets != "" || began.Sub(state.FirstTime) < k.decisionsAge {
		return nil
	}
	floors, _, err := conn.Floors(ctx, bus.Spans)
	if err != nil {
		return err
	}
	k.spans.expect(floors)
	oldest := began
	for _, f := range floors {
		next, stored, err := conn.First(ctx, bus.Spans, f.Filter, f.Done+1)
		if err != nil {
			return err
		}
		if next != 0 && stored.Before(oldest) {
			oldest = stored
		}
	}
	next, err := conn.SequenceAt(ctx, bus.Decisions, oldest.Add(-k.decisionsAge))
	if err == nil && next > state.FirstSeq && time.Since(began) < patience {
		err = conn.Remove(ctx, bus.Decisions, "", next-1)
	}
	if err != nil {
		return err
	}
	k.decided = began
	k.led.Removed(bus.Decisions).Add(float64(next - state.FirstSeq))
	return nil
}
