// Package versions has the sampling policies that are in force: those of a sink's configuration, and the
// versions that operators have pushed to the hub, each from its sequence of the stream on. It has the domains,
// too, whose versions are those of the sinks' configuration.
//
//	r, err := versions.Push(ctx, conn, topology, text, by, refused) // an operator
//	v, err := versions.New(cfg, domains, partitions, led, log)      // a sink
//	go v.Watch(ctx, hub, member)
//	all, changes := v.All()
//	now, before := v.Domains().Of(instance, seq)
//
// # Promises
//
//   - A version is in force for traces that begin at its sequence of SPANS or later, the same on
//     every sink. A version never changes; a record that is not a version is reported and skipped.
//   - A sink makes its domains the next version once, when it starts. Sinks with different domains
//     do not replace each other's for ever: they warn.
//
// # Not here
//
// What a policy means: pkg/sampling/policy. What it decides: pkg/sampling/sampler. What a domain is:
// pkg/sampling/domain.
package versions

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// Config determines which traces are kept.
type Config struct {
	// A file with the collector's tail_sampling configuration. Empty: every trace is kept.
	File string `yaml:"file"`
	// The memory of each partition's sampler: spans as on the wire and about 500 bytes for each
	// trace. At the bound new traces of the instance that holds most stay in the hub and are read
	// later.
	MaxBytes config.Bytes `yaml:"max_bytes_per_partition"`
	// The rate of spans that the backend is meant to store, a second, of all instances; only
	// instance_share_percent uses it. 0: no such bound.
	KeptSpans int64 `yaml:"kept_spans_per_second"`
	// The share of kept_spans_per_second that one instance may use, in percent, whatever policies
	// want, so that one instance cannot use all of it.
	InstanceShare int64 `yaml:"instance_share_percent"`
	// The key of an attribute that is added to every kept span with the name of the policy that
	// kept it, such as tailsampling.policy. Empty: none.
	PolicyAttribute string `yaml:"policy_attribute"`
	// For how long a trace waits, after the end of its window, for spans of another edge or gateway that is
	// behind. It does not wait for one that was further behind when something last came of it.
	SourceLag time.Duration `yaml:"source_lag"`
	Late      Late          `yaml:"late"`
}

// Late is when spans that come after their trace was not kept bring it back: if a policy without a budget, such as
// one for errors, wants them by themselves. The earlier spans are read again from the hub.
type Late struct {
	// How many traces of an instance, or of a domain, each partition brings back a minute. 0: none.
	MaxTraces int `yaml:"max_traces_per_minute"`
	// How long ago the trace may have been decided.
	MaxAge time.Duration `yaml:"max_age"`
	// About how many bytes of spans are read again for one pass, which may be for many traces.
	MaxBytes config.Bytes `yaml:"max_bytes"`
}

// settings are those for the policies.
func (c Config) settings(partitions int) policy.Settings {
	return policy.Settings{Partitions: partitions, MaxKept: c.maxKept(), SourceLag: c.SourceLag, Late: policy.Late{Traces: c.Late.MaxTraces, Age: c.Late.MaxAge}}
}

func (c Config) maxKept() int64 {
	if c.KeptSpans == 0 {
		return 0
	}
	return max(c.KeptSpans*c.InstanceShare/100, 1)
}

func (c Config) policies() (*policy.Set, error) {
	if c.File == "" {
		return policy.KeepAll(keepAllWait), nil
	}
	return policy.LoadFile(c.File)
}

// DefaultConfig keeps every trace.
func DefaultConfig() Config {
	return Config{
		MaxBytes: 256 << 20, InstanceShare: 25, SourceLag: 10 * time.Second,
		Late: Late{MaxTraces: 100, MaxAge: 10 * time.Minute, MaxBytes: 256 << 20},
	}
}

// Validate reports every mistake at once, also those in the policies; section is the key of c in the
// configuration.
func (c Config) Validate(section string) error {
	var errs []error
	if c.MaxBytes < 8<<20 { // several messages of the bus
		errs = append(errs, fmt.Errorf("%s.max_bytes_per_partition is %v, want at least 8MiB", section, c.MaxBytes))
	}
	if c.KeptSpans < 0 || c.InstanceShare < 1 || c.InstanceShare > 100 {
		errs = append(errs, fmt.Errorf("%s.kept_spans_per_second is %d, %s.instance_share_percent is %d: want 0 or more, and 1 to 100", section, c.KeptSpans, section, c.InstanceShare))
	}
	if c.SourceLag <= 0 || c.SourceLag > maxSourceLag {
		errs = append(errs, fmt.Errorf("%s.source_lag is %v, want more than 0s, and at most %v", section, c.SourceLag, maxSourceLag))
	}
	if l := c.Late; l.MaxTraces < 0 || l.MaxTraces > 1_000_000 {
		errs = append(errs, fmt.Errorf("%s.late.max_traces_per_minute is %d, want 0 (none) to 1000000", section, l.MaxTraces))
	} else if l.MaxTraces > 0 && (l.MaxAge <= 0 || l.MaxAge > 24*time.Hour || l.MaxBytes < 1<<20) {
		errs = append(errs, fmt.Errorf("%s.late.max_age is %v, %s.late.max_bytes is %v: want more than 0s and at most 24h, and at least 1MiB", section, l.MaxAge, section, l.MaxBytes))
	}
	if _, err := c.policies(); err != nil {
		errs = append(errs, err) // names the file of the policies
	}
	return errors.Join(errs...)
}

// maxSourceLag is less than after how much of the others' time a source is taken to be gone (package sampler).
const maxSourceLag = 2 * time.Minute

// keepAllWait is the decision wait when nothing is sampled out: long enough for the spans
// of a request to go to the backend in one write.
const keepAllWait = 2 * time.Second

// Versions are the policies of the configuration and the versions of policies and domains that the hub has.
// One that cannot be read is reported and skipped: the previous one stays in
// force. It is safe for concurrent use.
type Versions struct {
	text string // of the configured file; empty to keep all
	base *policy.Set
	own  domain.Config // of the configuration; nil to follow the hub
	led  *ledger.Ledger
	log  *slog.Logger

	mu         sync.Mutex
	live, past []policy.Version   // the policies, by sequences of SPANS, and of TRACES
	domains    domain.Versions    // by sequences of TRACES
	seen       map[string]*Record // all of them, by key
	changes    int
	known      bool    // what the hub had at the start has been read
	told       *Record // version 0, as the hub has it
	differs    bool    // the hub has other domains than the configuration
}

// New reads the configuration. domains are those of the configuration, nil if it does not have the key: then those
// of the hub are followed. partitions is over how many the traces of an instance are spread.
func New(cfg Config, domains domain.Config, partitions int, led *ledger.Ledger, log *slog.Logger) (*Versions, error) {
	base, err := cfg.policies()
	if err != nil {
		return nil, err
	}
	v := &Versions{own: domains, led: led, log: log, seen: map[string]*Record{}}
	if cfg.File != "" {
		text, err := os.ReadFile(cfg.File)
		if err != nil {
			return nil, err
		}
		v.text = string(text)
	}
	base.Settings = cfg.settings(partitions)
	v.base = base
	return v, nil
}

// changed handles a version; nil when the existing ones have been reported.
func (v *Versions) changed(p *Record) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if p == nil {
		v.known = true
		v.led.PoliciesVersion.Set(float64(v.number()))
		return
	}
	if p.Number == 0 {
		if v.told = p; v.known && !v.same(p) {
			v.log.Warn("another sink has another sampling configuration; all must have the same", "member", p.By)
		}
		return
	}
	switch old, have := v.seen[p.key()]; {
	case have && old.Text == p.Text && old.Domains.Equal(p.Domains):
		return // reported again by a new watch
	case have:
		v.refused(fmt.Errorf("%s of the hub was overwritten: versions do not change, push a new one", p.name()))
		return
	}
	if p.Domains != nil {
		v.addDomains(p)
	} else if err := v.addPolicies(p); err != nil {
		v.refused(err)
		return
	}
	v.seen[p.key()] = p
	v.changes++
}

func (v *Versions) addPolicies(p *Record) error {
	set, err := policy.Parse(p.name(), []byte(p.Text))
	if err != nil {
		return err
	}
	set.Settings = v.base.Settings
	number := func(one policy.Version) uint64 { return one.Number }
	v.live = with(v.live, policy.Version{Number: p.Number, From: p.From, Set: set}, number)
	v.past = with(v.past, policy.Version{Number: p.Number, From: p.Traces, Set: set}, number)
	if v.known {
		v.log.Info("new policies", "version", p.Number, "from", p.From, "by", p.By)
		v.led.PoliciesVersion.Set(float64(v.number()))
	}
	return nil
}

func (v *Versions) addDomains(p *Record) {
	set, number := domain.New(p.Domains), func(one domain.Version) uint64 { return one.Number }
	v.domains = with(v.domains, domain.Version{Number: p.Number, From: p.Traces, Set: set}, number)
	if !v.known {
		return
	}
	v.log.Info("new domains", "version", p.Number, "from", p.Traces, "by", p.By)
	before := v.differs
	if v.differs = v.own != nil && !v.own.Equal(p.Domains); v.differs && !before {
		v.log.Warn("another sink has other domains; all must have the same", "member", p.By)
	}
}

// with returns all and one more, by number.
func with[V any](all []V, one V, number func(V) uint64) []V {
	all = append(slices.Clone(all), one)
	slices.SortFunc(all, func(a, b V) int { return cmp.Compare(number(a), number(b)) })
	return all
}

// refused logs and counts that a version is not used.
func (v *Versions) refused(why error) {
	v.log.Error("a version of policies or domains cannot be used, the previous one stays in force", "err", why)
	v.led.PoliciesRefused.Inc()
}

func (v *Versions) same(p *Record) bool {
	own := v.base.Settings
	own.Partitions = 0
	return p.Text == v.text && p.Settings == own
}

// tells reports whether this sink has to publish its version 0: the hub has another one, or none.
func (v *Versions) tells() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.known && (v.told == nil || !v.same(v.told))
}

// Watch follows the versions in the hub until ctx ends, and publishes this sink's own configuration.
func (v *Versions) Watch(ctx context.Context, hub *bus.Hub, member string) {
	var proposal sync.WaitGroup
	defer proposal.Wait()
	if v.own != nil {
		proposal.Go(func() { v.propose(ctx, hub, member) })
	}
	follow(ctx, hub, v.log, func(p *Record) {
		v.changed(p)
		if p != nil || !v.tells() {
			return
		}
		if err := publish(ctx, hub, v.text, v.base.Settings, member); err != nil && ctx.Err() == nil {
			v.log.Warn("cannot publish this sink's policies; penstock whatif will not know them", "err", err)
		}
	}, v.refused)
}

// propose makes the domains of the configuration the next version, once: what other sinks push later counts.
func (v *Versions) propose(ctx context.Context, hub *bus.Hub, member string) {
	if !v.Await(ctx) {
		return
	}
	backoff.Retry(ctx, v.log, "push this sink's domains", func() error {
		err := propose(ctx, hub, v.own, member)
		if errors.Is(err, errByInstance) {
			v.refused(err)
			return nil
		}
		return err
	})
}

func (v *Versions) number() uint64 {
	if n := len(v.live); n > 0 {
		return v.live[n-1].Number
	}
	return 0
}

// Base returns the policies of the configuration, which are in force before the first version of the hub.
func (v *Versions) Base() *policy.Set { return v.base }

// All returns the versions of the policies that the hub has, and how often these or the domains have changed.
func (v *Versions) All() ([]policy.Version, int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.live, v.changes
}

// Domains returns the versions of the domains, by sequences of TRACES.
func (v *Versions) Domains() domain.Versions {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.domains
}

// Replayed returns the policies for a reader of TRACES: those that were in force, or those
// of text, the collector's tail_sampling configuration. The domains are those that were in force, or, alone, none.
func (v *Versions) Replayed(text string, alone bool) (*Versions, error) {
	v.mu.Lock()
	past := &Versions{base: v.base, live: v.past, domains: v.domains, known: true}
	v.mu.Unlock()
	if alone {
		past.domains = nil
	}
	if text == "" {
		return past, nil
	}
	set, err := policy.Parse("policies of the job", []byte(text))
	if err != nil {
		return nil, err
	}
	set.Settings = v.base.Settings
	past.base, past.live = set, nil
	return past, nil
}

// Fixed returns policies that have no versions, and those of the domains.
func Fixed(set *policy.Set, domains ...domain.Version) *Versions {
	return &Versions{base: set, domains: domains, known: true}
}

// Wait returns the longest decision wait of all versions: the floor of a live lane may not move for
// that long.
func (v *Versions) Wait() time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	longest := v.base.Wait
	for _, one := range v.live {
		longest = max(longest, one.Wait)
	}
	return longest
}

// Await waits until the hub's versions are known. It returns false when ctx ended
// first.
func (v *Versions) Await(ctx context.Context) bool {
	return backoff.Until(ctx, func() bool {
		v.mu.Lock()
		defer v.mu.Unlock()
		return v.known
	})
}
