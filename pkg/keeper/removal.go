package keeper

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/failpoint"
	"github.com/penstock/penstock/pkg/tally"
)

// settled returns up to where, at most upTo, which is finished now, all lanes had finished some time ago.
func (s *kept) settled(now time.Time, ago time.Duration, upTo uint64) uint64 {
	most := upTo
	if n := len(s.done); n > 0 {
		most = max(most, s.done[n-1].upTo) // less is wanted now
	}
	s.done = append(s.done, finished{now, most})
	n := 0
	for n+1 < len(s.done) && now.Sub(s.done[n+1].at) >= ago {
		n++
	}
	s.done = s.done[n:] // append moves the rest from time to time
	if now.Sub(s.done[0].at) < ago {
		return 0
	}
	return min(upTo, s.done[0].upTo)
}

// counted returns up to where, at most upTo, which is finished, the lanes' tallies have counted messages.
func (k *Keeper) counted(ctx context.Context, s *kept, floors map[string]bus.Floor, upTo uint64) uint64 {
	all, err := tally.All(ctx, k.conn())
	if err != nil {
		if more, due := k.said.Due("tallies "+bus.Kind(err), time.Now()); due {
			k.log.Warn("cannot read the lanes' tallies; finished messages are removed later", "stream", s.name, "err", err, "more_since_last_said", more)
		}
		return 0
	}
	floors = maps.Clone(floors)
	for name, t := range all[s.name] {
		if f, there := floors[name]; there && t.Created.Equal(s.state.Created) && t.Upto < f.Done {
			f.Done = t.Upto
			floors[name] = f
		}
	}
	upTo, err = s.unowed(ctx, k.conn(), floors, upTo)
	if err != nil {
		return 0
	}
	return upTo
}

// readable returns up to where, at most upTo, no lane is going to read again what it has finished. If the tallies cannot be read,
// that is not known, and a lane may find less than it needs; the same where a lane's tally is not stored any more.
func (k *Keeper) readable(ctx context.Context, s *kept, floors map[string]bus.Floor, upTo uint64) uint64 {
	now := time.Now()
	if now.Before(s.again.denied) {
		return upTo
	}
	all, err := tally.All(ctx, k.conn())
	if err != nil {
		s.again.denied = now.Add(againPause)
		if more, due := k.said.Due("again "+bus.Kind(err), now); due {
			k.log.Warn("cannot read the lanes' tallies; what is to be read again for late errors may be removed before", "stream", s.name, "err", err, "more_since_last_said", more)
		}
		return upTo
	}
	for name, t := range all[s.name] {
		f, there := floors[name]
		if !there || !t.Created.Equal(s.state.Created) || t.Again == 0 {
			delete(s.again.seen, name)
			continue
		}
		was, known := s.again.seen[name]
		if !known || was.upTo != t.Upto || f.Done <= t.Upto {
			was = seenTally{t.Upto, now}
			s.again.seen[name] = was
		}
		if now.Sub(was.at) < againPause {
			upTo = min(upTo, t.Again-1)
		}
	}
	return upTo
}

// againPause is for how long a lane's floor may move while its tally is not stored, until what that says does not count; and
// after how long tallies are read again that could not be read.
const againPause = time.Minute

// again is what a keeper knows of tallies of lanes that read again what they have finished.
type again struct {
	denied time.Time            // until when they are not read
	seen   map[string]seenTally // by lane
}

type seenTally struct {
	upTo uint64
	at   time.Time // when it was first seen, or the lane's floor last was not ahead of it
}

// findAged finds up to which sequence messages are older than they must be kept.
func (s *kept) findAged(ctx context.Context, conn hub, state bus.StreamState, now time.Time) error {
	s.agedAt, s.aged = now, 0
	old := now.Add(-s.age)
	if state.Messages == 0 || !state.FirstTime.Before(old) {
		return nil
	}
	next, err := conn.SequenceAt(ctx, s.name, old)
	if err != nil {
		return err
	}
	s.aged = next - 1
	return nil
}

// unowed returns up to where, at most upTo, all lanes have finished. The stream itself is asked what
// each lane has not finished: a consumer's counts, and the result of the previous look, are not reliable
// enough for a removal.
func (s *kept) unowed(ctx context.Context, conn hub, floors map[string]bus.Floor, upTo uint64) (uint64, error) {
	for _, name := range slices.SortedFunc(maps.Keys(floors), func(a, b string) int { return cmp.Compare(floors[a].Done, floors[b].Done) }) {
		f := floors[name]
		if upTo < s.state.FirstSeq || f.Done >= upTo {
			break
		}
		if failpoint.LaneIgnored && strings.HasPrefix(name, "loki-") {
			continue
		}
		next, _, err := first(ctx, conn, s.name, name, f)
		if err != nil {
			return 0, err
		}
		if next != 0 {
			upTo = min(upTo, next-1)
		}
	}
	return upTo, nil
}

// trusted reports why the answers of a look that began at a time are not enough to remove anything.
func (s *kept) trusted(ctx context.Context, conn hub, began time.Time) error {
	// A server that has just ceased to be the stream's leader may not have all of its messages.
	switch last, _, err := conn.First(ctx, s.name, "", s.state.LastSeq); {
	case err != nil:
		return err
	case last == 0:
		return errors.New("the server that answers for the stream does not have its last message")
	case time.Since(began) > patience:
		return errors.New("this process was suspended, or the hub was slow")
	}
	return nil
}
