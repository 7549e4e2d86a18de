package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/penstock/penstock/pkg/bus"
)

// memory is what keepers leave one another about a stream, in the bucket KEEPER under its name:
// what is gone from the stream and is not in it was removed by somebody else, or the hub has lost it.
type memory struct {
	Created time.Time `json:"created"` // of the stream
	// Removed: up to here a keeper has removed, or is about to. Nothing of that is owed.
	Removed uint64 `json:"removed"`
	Last    uint64 `json:"last"` // the stream's last sequence then
	// Lanes are those that had not finished all then.
	Lanes map[string]bus.Floor `json:"lanes,omitempty"`

	revision uint64
	stored   time.Time
}

// rememberInterval is how often it is written down what lanes are owed, where nothing is removed
// meanwhile. What comes and goes in that time is not counted.
const rememberInterval = 10 * time.Second

// remembered returns what is to be remembered of a look.
func remembered(state bus.StreamState, floors map[string]bus.Floor, removed uint64) memory {
	m := memory{Created: state.Created.UTC(), Removed: max(removed, state.FirstSeq-min(state.FirstSeq, 1)), Last: state.LastSeq, Lanes: map[string]bus.Floor{}}
	for name, f := range floors {
		if f.Lag > 0 && !f.Missing {
			m.Lanes[name] = f
		}
	}
	return m
}

// because says why messages that were owed may be missing; empty when none can be.
func (m memory) because(state bus.StreamState) string {
	switch {
	case m.Created.IsZero():
	case !m.Created.Equal(state.Created.UTC()):
		return "the stream was made again"
	case state.LastSeq < m.Last:
		return "the hub has lost the end of the stream"
	case state.FirstSeq > m.Removed+1:
		return "somebody else than a keeper has removed them"
	}
	return ""
}

// recall reads what the keeper before has left, where it is not known, and when it seems that
// something is missing: another keeper may have been here.
func (k *Keeper) recall(ctx context.Context, s *kept, state bus.StreamState) error {
	if k.blind || s.memory.revision > 0 && s.memory.because(state) == "" {
		return nil
	}
	err := k.conn().Recall(ctx, k.topology, func(b *bus.Bucket) error {
		text, revision, err := b.Get(ctx, s.name)
		switch {
		case errors.Is(err, bus.ErrMissing), err == nil && revision < s.memory.revision:
			return nil // a hub of before, from a backup: what this keeper knows is newer
		case err != nil:
			return err
		}
		var m memory
		if err := json.Unmarshal(text, &m); err != nil {
			return fmt.Errorf("what the keeper before has left of %s: %w", s.name, err)
		}
		m.revision = revision
		s.memory = m
		return nil
	})
	return k.see(err)
}

// remember writes down what there is now, and that what is up to removed is going to be removed.
func (k *Keeper) remember(ctx context.Context, s *kept, now time.Time, m memory) error {
	m.revision, m.stored = s.memory.revision, s.memory.stored
	same := m.Created.Equal(s.memory.Created) && m.Removed <= s.memory.Removed
	if m.Removed = max(m.Removed, s.memory.Removed); !m.Created.Equal(s.memory.Created) {
		m.Removed = 0
	}
	if k.blind || same && (now.Sub(m.stored) < rememberInterval || maps.Equal(m.Lanes, s.memory.Lanes)) {
		s.memory = m
		return nil
	}
	err := k.conn().Recall(ctx, k.topology, func(b *bus.Bucket) error {
		text, err := json.Marshal(m)
		if err != nil {
			return err
		}
		if m.revision, err = b.Store(ctx, s.name, text, m.revision); err != nil {
			s.memory = memory{} // another keeper has been here
			return err
		}
		m.stored, s.memory = now, m
		return nil
	})
	return k.see(err)
}

// see returns err but where it is for want of rights: then nothing is remembered.
func (k *Keeper) see(err error) error {
	if !errors.Is(err, bus.ErrDenied) {
		return err
	}
	k.blind = true
	k.log.Warn("the credential does not allow the bucket KEEPER: what somebody else removes from the hub is not counted, see docs/upgrading.md", "err", err)
	return nil
}

// count counts what was owed to lanes and is not in the stream any more.
func (k *Keeper) count(ctx context.Context, s *kept, state bus.StreamState, floors map[string]bus.Floor) error {
	if err := k.recall(ctx, s, state); err != nil {
		return err
	}
	m := s.memory
	because := m.because(state)
	if because == "" {
		return nil
	}
	lost, by := map[string]uint64{}, map[string]uint64{}
	for name, was := range m.Lanes {
		if _, there := floors[name]; !there {
			continue // it was given up, see tell
		}
		left := uint64(0)
		if from, to := max(was.Done+1, state.FirstSeq), min(m.Last, state.LastSeq); m.Created.Equal(state.Created.UTC()) && from <= to {
			var err error
			if left, err = k.conn().Count(ctx, s.name, was.Filter, from, to); err != nil {
				return err
			}
		}
		if n := was.Lag - min(was.Lag, left); n > 0 {
			lost[name] = n
			by[name[:max(strings.LastIndexByte(name, '-'), 0)]] += n
		}
	}
	s.memory = memory{revision: m.revision} // it is not counted again, but should this keeper die now
	if len(lost) == 0 {
		return nil
	}
	messages := slices.Max(slices.Collect(maps.Values(by))) // each backend has its own of all partitions
	k.led.Lost(s.name).Add(float64(messages))
	for _, name := range slices.Sorted(maps.Keys(lost)) {
		k.log.Error("messages that a lane had not finished are not in the hub any more", "stream", s.name, "lane", name, "messages", lost[name], "because", because)
	}
	k.record(ctx, bus.Loss{Stream: s.name, Messages: messages, Lanes: lost, Because: because})
	return nil
}

// record leaves a loss in the audit.
func (k *Keeper) record(ctx context.Context, l bus.Loss) {
	l.At = time.Now().UTC()
	entry, err := json.Marshal(l)
	if err == nil {
		err = k.conn().Record(ctx, bus.LossRecord, entry)
	}
	if err != nil {
		k.log.Error("the loss is not in the audit", "stream", l.Stream, "err", err)
	}
}
