package bus

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Loss is a line of the stream AUDIT under [LossRecord]: what the hub has acknowledged, and no backend
// will get.
type Loss struct {
	At     time.Time `json:"at"`
	Stream string    `json:"stream"`
	// Messages is about how many: those that the backend with the most was owed.
	Messages uint64            `json:"messages"`
	Lanes    map[string]uint64 `json:"lanes,omitempty"`
	// Items are those of dead letters that made room for others, by signal and instance, as in
	// logs.as-1.
	Items   map[string]uint64 `json:"items,omitempty"`
	Because string            `json:"because"`
}

// LossRecord is where losses are recorded.
const LossRecord = "loss"

// Losses returns the losses on record, oldest first.
func (c *Conn) Losses(ctx context.Context) (all []Loss, err error) {
	lines, err := c.Recorded(ctx, LossRecord)
	for _, line := range lines {
		var l Loss
		if err := json.Unmarshal(line, &l); err != nil {
			l = Loss{Because: "a line that nobody can read: " + err.Error()}
		}
		all = append(all, l)
	}
	return all, err
}

// keeperBucket has what keepers leave one another, a key for each stream.
const keeperBucket = "KEEPER"

// Recall lets use read and write what keepers leave one another.
func (c *Conn) Recall(ctx context.Context, t Topology, use func(*Bucket) error) error {
	began := time.Now()
	kv, err := c.ensureBucket(ctx, jetstream.KeyValueConfig{
		Bucket: keeperBucket, Description: "what keepers leave one another, a key for each stream", Storage: jetstream.FileStorage, Replicas: t.Replicas,
	})
	b := &Bucket{kv, keeperBucket, c}
	if err != nil {
		return b.failed(began, "open", "all keys", err)
	}
	return use(b)
}

// Count returns how many messages with a subject of filter, empty for all, a stream has from one
// sequence to another; too many where more come meanwhile.
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
	after, err := behind(to + 1) // first, for more may come
	if err != nil {
		return 0, err
	}
	all, err := behind(max(from, 1))
	if err != nil {
		return 0, err
	}
	return all - min(after, all), nil
}
