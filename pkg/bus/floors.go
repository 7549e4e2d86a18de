package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Floor says how far a lane of a stream is.
type Floor struct {
	Filter string // the subjects that it reads; empty for all
	// Done is the stream's sequence up to which the lane has finished all of its messages.
	Done uint64
	// Lag is how many it has not finished, as the hub has counted.
	Lag uint64
}

// errListed says that a list of consumers is not known to be whole.
var errListed = errors.New("the hub does not show all consumers of the stream, or some have just come or gone")

// Floors returns how far the lanes of a stream are, by name, and what the stream holds. Lanes of
// replays are not among them: they read what others have finished. An error when a lane
// may be missing, as while its leader in a cluster is away.
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
		listed[info.Name] = true // a cluster that misses one lists the last one twice
		if isLane(info) {
			floors[info.Name] = Floor{Filter: info.Config.FilterSubject, Done: info.AckFloor.Stream, Lag: lag(info)}
		}
	}
	after := before
	if err = consumers.Err(); err == nil {
		after, err = s.Info(ctx)
	}
	if n := len(listed); err == nil && (listed[""] || n != before.State.Consumers || n != after.State.Consumers || !before.Created.Equal(after.Created)) {
		err = errListed
	}
	if err != nil {
		return nil, StreamState{}, fmt.Errorf("lanes of stream %s: %w", stream, err)
	}
	return floors, stateOf(before), nil
}

// isLane reports whether a consumer is that of a lane which is not a replay's.
func isLane(info *jetstream.ConsumerInfo) bool {
	return info.Config.AckPolicy == jetstream.AckAllPolicy && slices.Contains(info.Config.PriorityGroups, pinGroup) && !strings.HasPrefix(info.Name, replayLane)
}

// First returns the sequence of the first message with a subject of filter, empty for any, that a
// stream has from seq on, and when it was stored; 0 when there is none. The stream's leader says
// so. What a consumer's count of messages says is less: a message is acknowledged before it is
// counted (nats-server 2.15.2), and a consumer's leader counts what its own copy of the stream has.
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
