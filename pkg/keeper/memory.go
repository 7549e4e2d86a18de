package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/bus"
)

// memory is what keepers store for their successors about a stream, in the bucket KEEPER under its
// name. If more is missing from the stream than the memory explains, it was removed by someone else,
// or lost by the hub.
type memory struct {
	Created time.Time `json:"created"` // of the stream
	// Removed is the sequence up to which a keeper has removed messages, or is about to. None of them
	// is owed.
	Removed uint64 `json:"removed"`
	Last    uint64 `json:"last"`            // the stream's last sequence at that time
	Holes   uint64 `json:"holes,omitempty"` // how many are missing between the first and the last
	// Lanes are those that had not finished everything at that time.
	Lanes map[string]bus.Floor `json:"lanes,omitempty"`

	revision uint64    // in the bucket; 0 for none
	stored   time.Time // in the bucket
	unsaved  bool      // the bucket has older lanes
}

const (
	// rememberInterval is how often the memory is written if nothing is removed meanwhile. Messages that
	// arrive and disappear within that time are not counted.
	rememberInterval = 10 * time.Second

	// rememberPatience is how long a look may wait for the bucket, and for counts.
	rememberPatience = 3 * time.Second

	// maxCounted is for how many lanes the remaining messages are counted; for others they are
	// estimated.
	maxCounted = 64
)

// remembered returns the memory of a look.
func remembered(state bus.StreamState, floors map[string]bus.Floor, removed uint64) memory {
	m := memory{Created: state.Created.UTC(), Removed: max(removed, state.FirstSeq-min(state.FirstSeq, 1)), Last: max(state.LastSeq, state.After), Holes: state.Holes(), Lanes: map[string]bus.Floor{}}
	for name, f := range floors {
		if f.Lag > 0 && !f.Missing {
			m.Lanes[name] = f
		}
	}
	return m
}

// because returns why messages that were owed may be missing; "" if none can be.
func (m memory) because(state bus.StreamState) string {
	switch {
	case m.Created.IsZero():
	case !m.Created.Equal(state.Created.UTC()):
		return "the stream was recreated"
	case max(state.LastSeq, state.After) < m.Last:
		return "the hub lost the end of the stream"
	case state.FirstSeq > m.Removed+1, state.Holes() > m.Holes:
		return "removed by someone other than a keeper"
	}
	return ""
}

// gone reports whether messages that a lane was owed may be missing.
func (m memory) gone(f bus.Floor, state bus.StreamState) bool {
	return !m.Created.Equal(state.Created.UTC()) || state.LastSeq < m.Last || f.Done+1 < state.FirstSeq || state.Holes() > m.Holes
}

// account counts messages that were owed and are missing from a stream, and writes the memory of the
// current state, before messages up to upTo are removed. It returns an error only if another keeper has
// written meanwhile: its memory must be read before anything may be removed. If the bucket cannot be
// used, nothing is counted, and removal continues.
func (k *Keeper) account(ctx context.Context, s *kept, state bus.StreamState, floors map[string]bus.Floor, upTo uint64) error {
	ctx, cancel := context.WithTimeout(ctx, rememberPatience)
	defer cancel()
	now := time.Now()
	m, losses := s.memory, []Loss{}
	because := ""
	if now.After(k.blind) {
		var err error
		if m, because, err = k.judge(ctx, s, state); err != nil {
			return k.see(s, err)
		}
	}
	if because != "" {
		losses = append(losses, k.missing(ctx, s, m, state, floors, because)...)
	}
	losses = append(losses, s.abandoned(m, state, floors)...)
	next := remembered(state, floors, upTo)
	next.follow(m)
	if now.After(k.blind) && (because != "" || len(losses) > 0 || next.urgent(m, now)) {
		if err := k.store(ctx, s.name, &next, now); err != nil {
			return k.see(s, err)
		}
	}
	s.memory = next
	for _, l := range losses { // no other keeper has reported them
		k.tellLoss(l)
		k.record(context.WithoutCancel(ctx), l)
	}
	return nil
}

// abandoned returns what lanes were owed that are gone, and are none of those that there should be.
func (s *kept) abandoned(m memory, state bus.StreamState, floors map[string]bus.Floor) (losses []Loss) {
	if !m.Created.Equal(state.Created.UTC()) {
		return nil
	}
	for name, was := range m.Lanes {
		_, there := floors[name]
		if _, ours := s.lanes[name]; !there && !ours {
			losses = append(losses, Loss{Stream: s.name, Messages: was.Lag, Lanes: map[string]uint64{name: was.Lag}, Because: givenUp})
		}
	}
	return losses
}

// follow takes over what stays true of the memory before, and what of it is in the bucket.
func (m *memory) follow(was memory) {
	if m.Created.Equal(was.Created) {
		m.Removed = max(m.Removed, was.Removed)
	}
	m.revision, m.stored, m.unsaved = was.revision, was.stored, was.unsaved || !maps.Equal(m.Lanes, was.Lanes)
}

// urgent reports whether what has changed since the memory before must be in the bucket now.
func (m *memory) urgent(was memory, now time.Time) bool {
	return !m.Created.Equal(was.Created) || m.Removed > was.Removed || m.unsaved && now.Sub(was.stored) > rememberInterval
}

// tellLoss counts a loss and writes it to the log.
func (k *Keeper) tellLoss(l Loss) {
	if l.Because == givenUp {
		k.led.Abandoned(l.Stream).Add(float64(l.Messages))
		k.log.Error("lane abandoned with unfinished messages; they are lost for its backend", "stream", l.Stream, "lanes", l.Lanes)
		return
	}
	k.led.Lost(l.Stream).Add(float64(l.Messages))
	k.log.Error("unfinished messages disappeared from the stream", "stream", l.Stream, "messages", l.Messages, "lanes", l.Lanes, "because", l.Because)
}

const givenUp = "the lane was abandoned"

// judge returns the memory of a stream, and why something may be missing. Before it concludes that, it
// reads what other keepers have written since, and then the state of the stream again.
func (k *Keeper) judge(ctx context.Context, s *kept, state bus.StreamState) (m memory, because string, err error) {
	m = s.memory
	if m.revision > 0 && m.because(state) == "" {
		return m, "", nil
	}
	left, err := k.load(ctx, s.name)
	if err != nil {
		return m, "", err
	}
	if left.revision > m.revision { // otherwise the hub was restored from a backup
		m = left
	}
	if s.unknown { // it does not include what this keeper has removed meanwhile
		s.unknown = false
		return memory{revision: m.revision}, "", nil
	}
	if m.because(state) == "" {
		return m, "", nil
	}
	if state, err = k.conn().State(ctx, s.name); err != nil { // the look's state may be older than the memory
		return m, "", err
	}
	return m, m.because(state), nil
}

// Bucket has what keepers leave one another, a key for each stream.
var Bucket = bus.BucketConfig{Name: "KEEPER", Description: "what keepers leave one another, a key for each stream"}

// load reads the memory of the previous keeper; it is empty if it cannot be decoded.
func (k *Keeper) load(ctx context.Context, stream string) (m memory, err error) {
	b, err := k.conn().OpenBucket(ctx, Bucket, k.topology.Replicas)
	if err != nil {
		return memory{}, err
	}
	text, revision, err := b.Get(ctx, stream)
	if errors.Is(err, bus.ErrMissing) {
		return memory{}, nil
	}
	if err == nil && json.Unmarshal(text, &m) != nil {
		m = memory{}
	}
	m.revision = revision
	return m, err
}

func (k *Keeper) store(ctx context.Context, stream string, m *memory, now time.Time) error {
	b, err := k.conn().OpenBucket(ctx, Bucket, k.topology.Replicas)
	if err != nil {
		return err
	}
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	m.revision, err = b.Store(ctx, stream, text, m.revision)
	m.stored, m.unsaved = now, false
	return err
}

// see returns err if another keeper has written; other errors are logged and do not stop the removal.
func (k *Keeper) see(s *kept, err error) error {
	s.memory = memory{}
	if errors.Is(err, bus.ErrChanged) || errors.Is(err, bus.ErrExists) {
		return err
	}
	s.unknown = true
	if errors.Is(err, bus.ErrDenied) {
		k.blind = time.Now().Add(time.Minute)
	}
	if more, due := k.said.Due("memory "+bus.Kind(err), time.Now()); due {
		k.log.Warn("cannot use bucket KEEPER; messages removed by others are not counted (permissions: docs/upgrading.md)", "stream", s.name, "err", err, "more_since_last_said", more)
	}
	return nil
}

// missing counts messages that lanes were owed and that are not in the stream any more.
func (k *Keeper) missing(ctx context.Context, s *kept, m memory, state bus.StreamState, floors map[string]bus.Floor, because string) []Loss {
	again := !m.Created.Equal(state.Created.UTC())
	lost, by := map[string]uint64{}, map[string]uint64{}
	counted := 0
	for name, was := range m.Lanes {
		if _, there := floors[name]; !there && !again || !m.gone(was, state) {
			continue
		}
		left := uint64(0)
		if from, to := max(was.Done+1, state.FirstSeq), min(m.Last, state.LastSeq); !again && from <= to {
			var err error
			if counted++; counted <= maxCounted {
				left, err = k.conn().Count(ctx, s.name, was.Filter, from, to)
			}
			if counted > maxCounted || err != nil { // estimated from the other lanes
				left = uint64(float64(was.Lag) * float64(to-from+1) / float64(m.Last-min(was.Done, m.Last-1)))
			}
		}
		if n := was.Lag - min(was.Lag, left); n > 0 {
			lost[name] = n
			by[bus.LaneBackend(name)] += n
		}
	}
	if len(lost) == 0 {
		return nil
	}
	// Each backend has its own lane of each partition.
	return []Loss{{Stream: s.name, Messages: slices.Max(slices.Collect(maps.Values(by))), Lanes: lost, Because: because}}
}

// record writes a loss to the audit.
func (k *Keeper) record(ctx context.Context, l Loss) {
	l.At = time.Now().UTC()
	entry, err := json.Marshal(l)
	if err == nil {
		err = k.conn().Record(ctx, LossRecord, entry)
	}
	if err != nil {
		k.log.Error("audit entry about lost messages not written", "stream", l.Stream, "err", fmt.Errorf("audit.%s: %w", LossRecord, err))
	}
}
