package bus

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Floor is how far a lane of a stream is.
type Floor struct {
	Filter string `json:"filter"` // the subjects that it reads; empty for all
	// Done is the stream's sequence up to which the lane has finished all of its messages.
	Done uint64 `json:"floor"`
	// Lag is how many it has not finished, by the hub's count.
	Lag uint64 `json:"owed"`
	// Missing: the hub does not have the lane yet.
	Missing bool `json:"-"`
	// Read: a reader owns the lane, or requests it.
	Read bool `json:"read"`
}

// LaneState is a lane of a stream, and since when it is owed something.
type LaneState struct {
	Stream string `json:"stream"`
	Name   string `json:"name"`
	Floor
	Oldest time.Time `json:"oldest,omitzero"` // when the oldest message that it has not finished was stored
}

// LaneBackend returns the backend, or router, in the name of a lane.
func LaneBackend(name string) string { return name[:max(strings.LastIndexByte(name, '-'), 0)] }

// Lanes returns the lanes of TRACES, METRICS, LOGS and SPANS, in the order of stream and name.
func (c *Conn) Lanes(ctx context.Context) (all []LaneState, err error) {
	for _, stream := range []string{Stream(otlpwire.Traces), Stream(otlpwire.Metrics), Stream(otlpwire.Logs), Spans} {
		floors, _, err := c.Floors(ctx, stream)
		for attempt := 1; errors.Is(err, errListed) && attempt < 10 && backoff.Sleep(ctx, 100*time.Millisecond); attempt++ {
			floors, _, err = c.Floors(ctx, stream)
		}
		if err != nil {
			return nil, err
		}
		for _, name := range slices.Sorted(maps.Keys(floors)) {
			l := LaneState{Stream: stream, Name: name, Floor: floors[name]}
			if l.Lag > 0 {
				if _, l.Oldest, err = c.First(ctx, stream, l.Filter, l.Done+1); err != nil {
					return nil, err
				}
			}
			all = append(all, l)
		}
	}
	return all, nil
}

// errListed reports that a list of consumers may be incomplete.
var errListed = errors.New("the list of the stream's consumers is incomplete, or some have just been created or deleted")

// Floors returns how far the lanes of a stream are, by name, and what the stream holds. Lanes of
// replays are not among them: they read what others have finished. It returns an error when a
// lane may be missing, for example while its leader in a cluster is unavailable, together with the
// floors that are known; nil where nothing is.
func (c *Conn) Floors(ctx context.Context, stream string) (map[string]Floor, StreamState, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	s, err := c.js.Stream(ctx, stream)
	if err != nil {
		return nil, StreamState{}, fmt.Errorf("lanes of stream %s: %w", stream, err)
	}
	before, floors, listed := s.CachedInfo(), map[string]Floor{}, map[string]bool{}
	consumers := s.ListConsumers(ctx)
	for info := range consumers.Info() {
		name := cmp.Or(info.Name, info.Config.Durable, info.Config.Name)
		lane := isLane(name, info)
		if lane && info.Name == "" {
			name = "" // its leader is unavailable: its floor is unknown
		}
		listed[name] = true // a cluster that misses one lists the last one twice
		if lane {
			floors[name] = floorOf(info)
		}
	}
	after := before
	if err = consumers.Err(); err == nil {
		var now *jetstream.StreamInfo
		if now, err = s.Info(ctx); err == nil {
			after = now
		}
	}
	if n := len(listed); err == nil && (listed[""] || n != before.State.Consumers || n != after.State.Consumers || !before.Created.Equal(after.Created)) {
		err = errListed
	}
	if err != nil {
		err = fmt.Errorf("lanes of stream %s: %w", stream, err)
	}
	state := stateOf(before)
	state.After = after.State.LastSeq
	return floors, state, err
}

// isLane reports whether a consumer belongs to a lane that is not a replay's.
func isLane(name string, info *jetstream.ConsumerInfo) bool {
	return info.Config.AckPolicy == jetstream.AckAllPolicy && slices.Contains(info.Config.PriorityGroups, pinGroup) && !strings.HasPrefix(name, replayLane)
}

// First returns the sequence of the first message with a subject of filter, empty for any, that a
// stream has from seq on, and when it was stored; 0 when there is none. The stream's leader answers.
// A consumer's count of messages is weaker: a message is acknowledged before it is counted
// (nats-server 2.15.2), and a consumer's leader counts what its own copy of the stream has.
func (c *Conn) First(ctx context.Context, stream, filter string, seq uint64) (uint64, time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	if filter == "" {
		filter = ">"
	}
	body, err := json.Marshal(struct { // cannot fail
		Seq  uint64 `json:"seq"`
		Next string `json:"next_by_subj"`
	}{seq, filter})
	if err != nil {
		return 0, time.Time{}, err
	}
	subject := "$JS.API.STREAM.MSG.GET." + stream
	msg, err := c.nc.RequestWithContext(ctx, subject, body)
	if err != nil {
		return 0, time.Time{}, fmt.Errorf("%s: %w", subject, err)
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message struct {
			Seq  uint64    `json:"seq"`
			Time time.Time `json:"time"`
		} `json:"message"`
	}
	switch err := json.Unmarshal(msg.Data, &answer); {
	case err != nil:
		return 0, time.Time{}, fmt.Errorf("%s: %w", subject, err)
	case answer.Error == nil:
		return answer.Message.Seq, answer.Message.Time, nil
	case answer.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return 0, time.Time{}, nil
	}
	return 0, time.Time{}, fmt.Errorf("%s: %w", subject, answer.Error)
}

// Count returns how many messages with a subject of filter, empty for all, a stream has from one
// sequence to another. It may return too many when more arrive meanwhile.
func (c *Conn) Count(ctx context.Context, stream, filter string, from, to uint64) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	behind := func(seq uint64) (uint64, error) {
		info, err := c.probe(ctx, stream, jetstream.ConsumerConfig{FilterSubject: filter, DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: seq})
		if err != nil {
			return 0, fmt.Errorf("count messages of stream %s: %w", stream, err)
		}
		return info.NumPending, nil
	}
	after, err := behind(to + 1) // first, because more may arrive
	if err != nil {
		return 0, err
	}
	all, err := behind(max(from, 1))
	if err != nil {
		return 0, err
	}
	return all - min(after, all), nil
}
