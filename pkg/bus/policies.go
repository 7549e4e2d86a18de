package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Policies is one version of the sampling policies, in the bucket POLICIES under its
// number. It is in force for traces whose first span stands in SPANS at From or
// behind, until the next version is.
type Policies struct {
	Number uint64    `json:"-"`
	From   uint64    `json:"from"`   // a sequence of SPANS
	Spans  time.Time `json:"spans"`  // when that SPANS was made: in force from the start of another one
	Traces uint64    `json:"traces"` // the end of TRACES at the push: where a replay has the new version begin
	At     time.Time `json:"at"`
	By     string    `json:"by"`
	Text   string    `json:"text"` // what stands under tail_sampling
	// MaxKept, of version 0, is how many spans a second may be kept of an instance.
	MaxKept int64 `json:"max_kept,omitempty"`
}

// Version 0 is what the sinks have in their own configuration, for those who want to know
// what is in force while the hub has no other version.

const (
	policiesBucket = "POLICIES"

	// maxPolicies is how many versions are kept: those of the last traces that are
	// still to be decided, and what an operator wants to look up.
	maxPolicies = 16
)

func (c *Conn) ensurePolicies(ctx context.Context, t Topology) (jetstream.KeyValue, error) {
	return c.ensureBucket(ctx, jetstream.KeyValueConfig{
		Bucket: policiesBucket, Description: "versions of the sampling policies, a key each", Storage: jetstream.FileStorage, Replicas: t.Replicas,
	})
}

// PushPolicies makes text the next version, in force from the end of SPANS on. The
// caller has checked it. The oldest versions are deleted.
func (c *Conn) PushPolicies(ctx context.Context, t Topology, text, by string) (Policies, error) {
	fail := func(err error) (Policies, error) { return Policies{}, fmt.Errorf("push policies: %w", err) }
	kv, err := c.ensurePolicies(ctx, t)
	if err != nil {
		return fail(err)
	}
	all, err := c.AllPolicies(ctx, t)
	if err != nil {
		return fail(err)
	}
	spans, err := c.State(ctx, Spans)
	if err != nil {
		return fail(err)
	}
	traces, err := c.State(ctx, Stream(otlpwire.Traces))
	if err != nil {
		return fail(err)
	}
	p := Policies{Number: 1, From: spans.LastSeq + 1, Spans: spans.Created.UTC(), Traces: traces.LastSeq + 1, At: time.Now().UTC(), By: by, Text: text}
	if n := len(all); n > 0 {
		p.Number = all[n-1].Number + 1
	}
	if len(all) > 0 && all[0].Number == 0 {
		all = all[1:] // it stays
	}
	value, err := json.Marshal(p)
	if err != nil {
		return fail(err)
	}
	if _, err := kv.Create(ctx, strconv.FormatUint(p.Number, 10), value); err != nil { // fails when another was as quick
		return fail(err)
	}
	for len(all) >= maxPolicies {
		if err := kv.Purge(ctx, strconv.FormatUint(all[0].Number, 10)); err != nil {
			return fail(err)
		}
		all = all[1:]
	}
	return p, nil
}

// TellPolicies says what the sinks have in their own configuration.
func (h *Hub) TellPolicies(ctx context.Context, text string, maxKept int64, by string) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	kv, err := h.Conn.ensurePolicies(ctx, h.topology)
	if err == nil {
		var value []byte
		if value, err = json.Marshal(Policies{At: time.Now().UTC(), By: by, Text: text, MaxKept: maxKept}); err == nil {
			_, err = kv.Put(ctx, "0", value)
		}
	}
	if err != nil {
		return fmt.Errorf("tell the hub the sinks' own policies: %w", err)
	}
	return nil
}

// AllPolicies returns the versions there are, by number.
func (c *Conn) AllPolicies(ctx context.Context, t Topology) (all []Policies, err error) {
	kv, err := c.ensurePolicies(ctx, t)
	if err != nil {
		return nil, err
	}
	keys, err := kv.Keys(ctx)
	if errors.Is(err, jetstream.ErrNoKeysFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	for _, key := range keys {
		e, err := kv.Get(ctx, key)
		if err != nil {
			return nil, fmt.Errorf("read policies: %w", err)
		}
		p, err := parsePolicies(e.Key(), e.Value())
		if err != nil {
			c.log.Error("policies ignored", "err", err)
			continue
		}
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b Policies) int { return int(a.Number) - int(b.Number) })
	return all, nil
}

// parsePolicies reads a version: a number for a key, and when it was written by whom.
func parsePolicies(key string, value []byte) (p Policies, err error) {
	if p.Number, err = strconv.ParseUint(key, 10, 63); err == nil {
		err = json.Unmarshal(value, &p)
	}
	if err == nil && (p.At.IsZero() || p.MaxKept < 0 || p.Number > 0 && (p.Text == "" || p.From == 0 || key != strconv.FormatUint(p.Number, 10))) {
		err = errors.New("it is no version that penstock policies push has written")
	}
	if err != nil {
		return Policies{}, fmt.Errorf("policies %.64q of the hub cannot be read: %w", key, err)
	}
	return p, nil
}

// WatchPolicies calls changed with each version, those that are there first, and
// with nil when these have been said, until ctx ends; and refused with why a record is no
// version.
func (h *Hub) WatchPolicies(ctx context.Context, changed func(*Policies), refused func(error)) {
	for ctx.Err() == nil {
		if err := h.watchPolicies(ctx, changed, refused); err != nil && ctx.Err() == nil {
			if more, due := h.Conn.said.Due("policies", time.Now()); due {
				h.log.Warn("policies cannot be watched, will try again", "err", err, "more_since_last_said", more)
			}
		}
		backoff.Sleep(ctx, renewInterval)
	}
}

func (h *Hub) watchPolicies(ctx context.Context, changed func(*Policies), refused func(error)) error {
	kv, err := h.Conn.ensurePolicies(ctx, h.topology)
	if err != nil {
		return err
	}
	spans, err := h.Conn.State(ctx, Spans)
	if err != nil {
		return err
	}
	traces, err := h.Conn.State(ctx, Stream(otlpwire.Traces))
	if err != nil {
		return err
	}
	w, err := kv.Watch(ctx, "*", jetstream.IgnoreDeletes())
	if err != nil {
		return err
	}
	defer func() { _ = w.Stop() }()
	for {
		select {
		case e, ok := <-w.Updates():
			switch {
			case !ok:
				return errors.New("the watch has ended")
			case e == nil:
				changed(nil)
			default:
				p, err := parsePolicies(e.Key(), e.Value())
				if err != nil {
					refused(err)
					continue
				}
				if !p.Spans.Equal(spans.Created) {
					p.From = 0
				}
				if traces.Created.After(p.At) {
					p.Traces = 0
				}
				changed(&p)
			}
		case <-ctx.Done():
			return nil
		}
	}
}
