package versions

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Record is one version of the sampling policies as the hub has it, in the bucket POLICIES under its
// number. It is in force for traces whose first span is in SPANS at From or later, until the next
// version is. Version 0 is what the sinks have in their own configuration: it shows other processes
// what is in force while the hub has no other version.
type Record struct {
	Number uint64    `json:"-"`
	From   uint64    `json:"from"`   // a sequence of SPANS
	Spans  time.Time `json:"spans"`  // when that SPANS was created: in another one it is in force from the start
	Traces uint64    `json:"traces"` // the end of TRACES at the push: from here on it is in force for a replay
	At     time.Time `json:"at"`
	By     string    `json:"by"`
	Text   string    `json:"text"` // of the key tail_sampling
	// MaxKept, of version 0, is how many spans a second may be kept of an instance.
	MaxKept int64 `json:"max_kept,omitempty"`
}

// Bucket has a key for each version.
var Bucket = bus.BucketConfig{Name: "POLICIES", Description: "versions of the sampling policies, a key each"}

// maxKept is how many versions are kept: those of traces that are still undecided, and
// some that an operator may want to look up.
const maxKept = 16

// Push makes text the next version, in force from the end of SPANS on. The
// caller has checked it. The oldest versions are deleted. refused is as in [All].
func Push(ctx context.Context, conn *bus.Conn, t bus.Topology, text, by string, refused func(error)) (Record, error) {
	fail := func(err error) (Record, error) { return Record{}, fmt.Errorf("push policies: %w", err) }
	b, err := conn.OpenBucket(ctx, Bucket, t.Replicas)
	if err != nil {
		return fail(err)
	}
	all, err := read(ctx, b, refused)
	if err != nil {
		return fail(err)
	}
	spans, err := conn.State(ctx, bus.Spans)
	if err != nil {
		return fail(err)
	}
	traces, err := conn.State(ctx, bus.Stream(otlpwire.Traces))
	if err != nil {
		return fail(err)
	}
	r := Record{Number: 1, From: spans.LastSeq + 1, Spans: spans.Created.UTC(), Traces: traces.LastSeq + 1, At: time.Now().UTC(), By: by, Text: text}
	if n := len(all); n > 0 {
		r.Number = all[n-1].Number + 1
	}
	if len(all) > 0 && all[0].Number == 0 {
		all = all[1:] // version 0 is never deleted
	}
	value, err := json.Marshal(r)
	if err != nil {
		return fail(err)
	}
	if err := b.Create(ctx, strconv.FormatUint(r.Number, 10), value); err != nil { // fails if another push was faster
		return fail(err)
	}
	for len(all) >= maxKept {
		if err := b.Purge(ctx, strconv.FormatUint(all[0].Number, 10)); err != nil {
			return fail(err)
		}
		all = all[1:]
	}
	return r, nil
}

// publish writes what the sinks have in their own configuration to the hub.
func publish(ctx context.Context, hub *bus.Hub, text string, maxKept int64, by string) error {
	b, err := hub.OpenBucket(ctx, Bucket)
	if err == nil {
		var value []byte
		if value, err = json.Marshal(Record{At: time.Now().UTC(), By: by, Text: text, MaxKept: maxKept}); err == nil {
			err = b.Put(ctx, "0", value)
		}
	}
	if err != nil {
		return fmt.Errorf("write the sinks' own policies to the hub: %w", err)
	}
	return nil
}

// All returns all versions, by number. A record that is not a version is reported to refused and skipped.
func All(ctx context.Context, conn *bus.Conn, t bus.Topology, refused func(error)) ([]Record, error) {
	b, err := conn.OpenBucket(ctx, Bucket, t.Replicas)
	if err != nil {
		return nil, err
	}
	return read(ctx, b, refused)
}

func read(ctx context.Context, b *bus.Bucket, refused func(error)) (all []Record, err error) {
	keys, err := b.All(ctx)
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	for key, value := range keys {
		r, err := parse(key, value)
		if err != nil {
			refused(err)
			continue
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b Record) int { return int(a.Number) - int(b.Number) })
	return all, nil
}

// parse reads a version: its key must be a number, and it must have what a writer always sets.
func parse(key string, value []byte) (r Record, err error) {
	if r.Number, err = strconv.ParseUint(key, 10, 63); err == nil {
		err = json.Unmarshal(value, &r)
	}
	if err == nil && (r.At.IsZero() || r.MaxKept < 0 || r.Number > 0 && (r.Text == "" || r.From == 0 || key != strconv.FormatUint(r.Number, 10))) {
		err = errors.New("it was not written by penstock policies push")
	}
	if err != nil {
		return Record{}, fmt.Errorf("policies %.64q of the hub cannot be read: %w", key, err)
	}
	return r, nil
}

// retryInterval is the pause before a watch that has failed is started again.
const retryInterval = time.Second

// follow calls changed with each version until ctx ends: first with the existing ones, then with
// nil, then with new ones. It calls refused with the reason why a record is not a version.
func follow(ctx context.Context, hub *bus.Hub, log *slog.Logger, changed func(*Record), refused func(error)) {
	var said backoff.Repeats
	for ctx.Err() == nil {
		if err := followOnce(ctx, hub, changed, refused); err != nil && ctx.Err() == nil {
			if more, due := said.Due("policies", time.Now()); due {
				log.Warn("policies cannot be watched, will try again", "err", err, "more_since_last_said", more)
			}
		}
		backoff.Sleep(ctx, retryInterval)
	}
}

func followOnce(ctx context.Context, hub *bus.Hub, changed func(*Record), refused func(error)) error {
	b, err := hub.OpenBucket(ctx, Bucket)
	if err != nil {
		return err
	}
	spans, err := hub.Conn.State(ctx, bus.Spans)
	if err != nil {
		return err
	}
	traces, err := hub.Conn.State(ctx, bus.Stream(otlpwire.Traces))
	if err != nil {
		return err
	}
	return b.Watch(ctx, "*", func(key string, value []byte) {
		switch {
		case key == "":
			changed(nil)
			return
		case value == nil:
			return // deleted: a version stays in force where it has been seen
		}
		r, err := parse(key, value)
		if err != nil {
			refused(err)
			return
		}
		if !r.Spans.Equal(spans.Created) {
			r.From = 0
		}
		if traces.Created.After(r.At) {
			r.Traces = 0
		}
		changed(&r)
	})
}
