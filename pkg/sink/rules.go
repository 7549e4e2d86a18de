package sink

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// rules are the policies of the configuration and the versions that the hub has.
// One that cannot be read is reported and passed over: the one before stays in
// force.
type rules struct {
	cfg  SamplingConfig
	text string // of its file; empty to keep all
	base *policy.Set
	led  *ledger.Ledger
	log  *slog.Logger

	mu      sync.Mutex
	all     []policy.Version  // by number
	past    []policy.Version  // likewise, from where in TRACES each is in force
	texts   map[uint64]string // of all
	changes int
	known   bool          // what the hub had at the start has been read
	told    *bus.Policies // version 0, as the hub has it
}

// newRules reads the configuration. partitions is over how many the traces of an
// instance are spread.
func newRules(cfg SamplingConfig, partitions int, led *ledger.Ledger, log *slog.Logger) (*rules, error) {
	base, err := cfg.policies()
	if err != nil {
		return nil, err
	}
	r := &rules{cfg: cfg, led: led, log: log, texts: map[uint64]string{}}
	if cfg.File != "" {
		text, err := os.ReadFile(cfg.File)
		if err != nil {
			return nil, err
		}
		r.text = string(text)
	}
	base.Partitions, base.MaxKept = partitions, cfg.maxKept()
	r.base = base
	return r, nil
}

// changed takes in a version; nil when those that were there have been told.
func (r *rules) changed(p *bus.Policies) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p == nil {
		r.known = true
		r.led.PoliciesVersion.Set(float64(r.number()))
		return
	}
	if p.Number == 0 {
		if r.told = p; r.known && !r.same(p) {
			r.log.Warn("another sink has another sampling configuration; all must have the same", "member", p.By)
		}
		return
	}
	name := fmt.Sprintf("policies version %d", p.Number)
	switch text, have := r.texts[p.Number]; {
	case have && text == p.Text:
		return // told again by a new watch
	case have:
		r.refused(fmt.Errorf("%s of the hub was overwritten with another text: versions do not change, push a new one", name))
		return
	}
	set, err := policy.Parse(name, []byte(p.Text))
	if err != nil {
		r.refused(err)
		return
	}
	set.Partitions, set.MaxKept = r.base.Partitions, r.base.MaxKept
	r.texts[p.Number] = p.Text
	i, _ := slices.BinarySearchFunc(r.all, p.Number, func(v policy.Version, n uint64) int { return int(v.Number) - int(n) })
	r.all = slices.Insert(slices.Clone(r.all), i, policy.Version{Number: p.Number, From: p.From, Set: set})
	r.past = slices.Insert(slices.Clone(r.past), i, policy.Version{Number: p.Number, From: p.Traces, Set: set})
	r.changes++
	if r.known {
		r.log.Info("new policies", "version", p.Number, "from", p.From, "by", p.By)
		r.led.PoliciesVersion.Set(float64(r.number()))
	}
}

// refused says that a version is not used.
func (r *rules) refused(why error) {
	r.log.Error("policies of the hub are not used, those before stay in force", "err", why)
	r.led.PoliciesRefused.Inc()
}

func (r *rules) same(p *bus.Policies) bool { return p.Text == r.text && p.MaxKept == r.base.MaxKept }

// tells reports whether the hub has another version 0 than this sink.
func (r *rules) tells() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.known && (r.told == nil || !r.same(r.told))
}

// watch follows the versions in the hub, and tells it what this sink has of its own.
func (r *rules) watch(ctx context.Context, hub *bus.Hub, member string) {
	hub.WatchPolicies(ctx, func(p *bus.Policies) {
		r.changed(p)
		if p != nil || !r.tells() {
			return
		}
		if err := hub.TellPolicies(ctx, r.text, r.base.MaxKept, member); err != nil && ctx.Err() == nil {
			r.log.Warn("penstock whatif will not know what this sink keeps", "err", err)
		}
	}, r.refused)
}

func (r *rules) number() uint64 {
	if n := len(r.all); n > 0 {
		return r.all[n-1].Number
	}
	return 0
}

// versions returns those of the hub, and how often they have changed.
func (r *rules) versions() ([]policy.Version, int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all, r.changes
}

// replayed returns the rules for a reader of TRACES: those that were in force, or those
// of text.
func (r *rules) replayed(text string) (*rules, error) {
	if text == "" {
		r.mu.Lock()
		defer r.mu.Unlock()
		return &rules{base: r.base, all: r.past, known: true}, nil
	}
	set, err := policy.Parse("policies of the job", []byte(text))
	if err != nil {
		return nil, err
	}
	set.Partitions, set.MaxKept = r.base.Partitions, r.base.MaxKept
	return &rules{base: set, known: true}, nil
}

// wait returns how long the most patient of the policies wait for a trace.
func (r *rules) wait() time.Duration {
	longest := r.base.Wait
	for _, v := range r.all {
		longest = max(longest, v.Wait)
	}
	return longest
}

// hold is for how long the floor of a live lane stands for traces that wait.
func (r *rules) hold() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.wait()
}

// await waits until the hub's versions are known. It returns false when ctx ended
// first.
func (r *rules) await(ctx context.Context) bool {
	return backoff.Until(ctx, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.known
	})
}
