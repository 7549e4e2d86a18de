package versions

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// Record is one version of the sampling policies, or of the domains, as the hub has it: in the bucket POLICIES
// under its number, that of domains under domains.<number>. Policies are in force for traces whose first span is in
// SPANS at From or later, domains for what is in TRACES at Traces or later, until the next version is. Version 0 of the
// policies is what the sinks have in their own configuration: it shows other processes what is in force while
// the hub has no other version.
type Record struct {
	Number uint64    `json:"-"`
	From   uint64    `json:"from"`   // a sequence of SPANS
	Spans  time.Time `json:"spans"`  // when that SPANS was created: in another one it is in force from the start
	Traces uint64    `json:"traces"` // the end of TRACES at the push; of policies, from here on they are in force for a replay
	At     time.Time `json:"at"`
	By     string    `json:"by"`
	Text   string    `json:"text,omitempty"` // of the key tail_sampling
	// Domains, of a version of the domains, is never nil.
	Domains         domain.Config `json:"domains,omitzero"`
	policy.Settings               // of version 0
}

// domainsKey begins the keys of versions of the domains. Earlier sinks watch "*", which such keys do not match.
const domainsKey = "domains."

func (r *Record) key() string {
	number := strconv.FormatUint(r.Number, 10)
	if r.Domains != nil {
		return domainsKey + number
	}
	return number
}

func (r *Record) name() string {
	if r.Domains != nil {
		return fmt.Sprintf("domains version %d", r.Number)
	}
	return fmt.Sprintf("policies version %d", r.Number)
}

// is reports whether r is what penstock writes under key.
func (r *Record) is(key string) bool {
	own := r.Number == 0 && r.Domains == nil // policies in the configuration of a sink
	version := r.Number > 0 && r.From > 0 && (r.Text != "") != (r.Domains != nil)
	return key == r.key() && !r.At.IsZero() && r.MaxKept >= 0 && r.SourceLag >= 0 && r.Late.Traces >= 0 && r.Late.Age >= 0 && (own || version)
}

// Bucket has a key for each version.
var Bucket = bus.BucketConfig{Name: "POLICIES", Description: "versions of the sampling policies and of the domains, a key each"}

// maxKept is how many versions are kept of each kind: those of traces that are still undecided, and
// some that an operator may want to look up.
const maxKept = 16

// Push makes text the next version of the policies, in force from the end of SPANS on. The
// caller has checked it. The oldest versions are deleted. refused is as in [All].
func Push(ctx context.Context, conn *bus.Conn, t bus.Topology, text, by string, refused func(error)) (Record, error) {
	fail := func(err error) (Record, error) { return Record{}, fmt.Errorf("push policies: %w", err) }
	b, err := conn.OpenBucket(ctx, Bucket, t.Replicas)
	if err != nil {
		return fail(err)
	}
	all, next, err := read(ctx, b, false, refused)
	if err != nil {
		return fail(err)
	}
	r := Record{Number: next, By: by, Text: text}
	if err := push(ctx, conn, b, &r, all); err != nil {
		return fail(err)
	}
	return r, nil
}

// propose makes c the next version of the domains, unless it is the newest one already.
func propose(ctx context.Context, hub *bus.Hub, c domain.Config, by string) error {
	b, err := hub.OpenBucket(ctx, Bucket)
	if err != nil {
		return err
	}
	for {
		all, next, err := read(ctx, b, true, func(error) {}) // the watch reports them
		if err != nil {
			return err
		}
		var newest domain.Config
		if n := len(all); n > 0 {
			newest = all[n-1].Domains
		}
		if newest.Equal(c) {
			return nil
		}
		if err = push(ctx, hub.Conn, b, &Record{Number: next, By: by, Domains: c}, all); !errors.Is(err, bus.ErrExists) {
			return err
		} // else another sink was faster: its domains may be the same
	}
}

// push stores a version with its number, in force from the end of SPANS on; [bus.ErrExists] if another push was
// faster. Of all, the versions before it, the oldest are deleted.
func push(ctx context.Context, conn *bus.Conn, b *bus.Bucket, r *Record, all []Record) error {
	s, err := statesOf(ctx, conn)
	if err != nil {
		return err
	}
	r.From, r.Spans, r.Traces, r.At = s.spans.LastSeq+1, s.spans.Created.UTC(), s.traces.LastSeq+1, time.Now().UTC()
	if err := s.place(r); err != nil {
		return err
	}
	value, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := b.Create(ctx, r.key(), value); err != nil {
		return err
	}
	if len(all) > 0 && all[0].Number == 0 {
		all = all[1:] // version 0 is never deleted
	}
	for ; len(all) >= maxKept; all = all[1:] {
		if err := b.Purge(ctx, all[0].key()); err != nil {
			return err
		}
	}
	return nil
}

// states are the streams in which a version begins.
type states struct{ spans, traces bus.StreamState }

func statesOf(ctx context.Context, conn *bus.Conn) (s states, err error) {
	if s.spans, err = conn.State(ctx, bus.Spans); err == nil {
		s.traces, err = conn.State(ctx, bus.Stream(otlpwire.Traces))
	}
	return s, err
}

// errByInstance is why the domains of a hub, or of a sink, are not in force.
var errByInstance = errors.New("domains cannot be used: the stream SPANS was created by an earlier penstock and has the traces of each instance in partitions of their own; docs/upgrading.md says how to recreate it")

// place puts a version into the current streams: in those that were created after it, it is in force from the start.
func (s states) place(r *Record) error {
	if r.Domains != nil && !s.spans.ByTrace {
		return fmt.Errorf("%s: %w", r.name(), errByInstance)
	}
	if !r.Spans.Equal(s.spans.Created) {
		r.From = 0
	}
	if s.traces.Created.After(r.At) {
		r.Traces = 0
	}
	return nil
}

// publish writes what the sinks have in their own configuration to the hub.
func publish(ctx context.Context, hub *bus.Hub, text string, settings policy.Settings, by string) error {
	b, err := hub.OpenBucket(ctx, Bucket)
	if err == nil {
		var value []byte
		if value, err = json.Marshal(Record{At: time.Now().UTC(), By: by, Text: text, Settings: settings}); err == nil {
			err = b.Put(ctx, "0", value)
		}
	}
	if err != nil {
		return fmt.Errorf("write the sinks' own policies to the hub: %w", err)
	}
	return nil
}

// All returns all versions of the policies, by number. A record that is not a version is reported to refused and
// skipped.
func All(ctx context.Context, conn *bus.Conn, t bus.Topology, refused func(error)) ([]Record, error) {
	b, err := conn.OpenBucket(ctx, Bucket, t.Replicas)
	if err != nil {
		return nil, err
	}
	all, _, err := read(ctx, b, false, refused)
	return all, err
}

// AllDomains returns all versions of the domains, by sequences of TRACES. One that is not in force is reported to
// refused and skipped.
func AllDomains(ctx context.Context, conn *bus.Conn, t bus.Topology, refused func(error)) (domain.Versions, error) {
	b, err := conn.OpenBucket(ctx, Bucket, t.Replicas)
	if err != nil {
		return nil, err
	}
	records, _, err := read(ctx, b, true, refused)
	if err != nil || len(records) == 0 {
		return nil, err
	}
	s, err := statesOf(ctx, conn)
	if err != nil {
		return nil, err
	}
	var all domain.Versions
	for _, r := range records {
		if err := s.place(&r); err != nil {
			refused(err)
			continue
		}
		all = append(all, domain.Version{Number: r.Number, From: r.Traces, Set: domain.New(r.Domains)})
	}
	return all, nil
}

// read returns all versions of the policies, or of the domains, by number, and the number of the next one. A number
// stays taken by a record that is not a version.
func read(ctx context.Context, b *bus.Bucket, ofDomains bool, refused func(error)) (all []Record, next uint64, err error) {
	keys, err := b.All(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("read policies and domains: %w", err)
	}
	next = 1
	for key, value := range keys {
		if strings.HasPrefix(key, domainsKey) != ofDomains {
			continue
		}
		r, err := parse(key, value)
		next = max(next, r.Number+1)
		if err != nil {
			refused(err)
			continue
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b Record) int { return cmp.Compare(a.Number, b.Number) })
	return all, next, nil
}

// parse reads a version: its key must have a number, which is returned in any case, and it must have what a writer
// always sets.
func parse(key string, value []byte) (r Record, err error) {
	kind := "policies"
	number, ofDomains := strings.CutPrefix(key, domainsKey)
	if ofDomains {
		kind = "domains"
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil {
		n = 0 // not the highest one
	} else {
		err = json.Unmarshal(value, &r)
	}
	if r.Number = n; err == nil && !r.is(key) {
		err = errors.New("it was not written by penstock")
	}
	if err == nil {
		err = r.Domains.Validate("domains")
	}
	if err != nil {
		return Record{Number: n}, fmt.Errorf("%s %.64q of the hub cannot be read: %w", kind, key, err)
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
			if more, due := said.Due("versions", time.Now()); due {
				log.Warn("policies and domains cannot be watched, will try again", "err", err, "more_since_last_said", more)
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
	s, err := statesOf(ctx, hub.Conn)
	if err != nil {
		return err
	}
	return b.Watch(ctx, ">", func(key string, value []byte) {
		switch {
		case key == "":
			changed(nil)
			return
		case value == nil:
			return // deleted: a version stays in force where it has been seen
		}
		r, err := parse(key, value)
		if err == nil {
			err = s.place(&r)
		}
		if err != nil {
			refused(err)
			return
		}
		changed(&r)
	})
}
