// Package sink is the central tier that writes to the backends: whole sampled
// traces to Tempo, metrics to Prometheus, logs to Loki, or any of them to
// files.
//
//	SPANS → sample → Tempo      METRICS → Prometheus      LOGS → Loki
//
// # Promises
//
//   - A lane's floor passes a message only after everything in it has been stored by
//     the backend, sampled out, filtered, set aside or dead-lettered with a reason.
//   - Per instance and signal items reach the backend in the order in which
//     they arrived at its edge; a retry blocks its own lane only, and trouble with one
//     instance that instance only.
//   - One request to a backend holds items of one instance.
//   - Sinks share the partitions: each has one owner, and a new one when that owner
//     stops or dies. The new one follows the decisions that the old one has recorded.
//
// # Not here
//
// Who the owner is: membership.Members and bus.Lane.
package sink

import (
	"errors"
	"fmt"
	"time"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/processor"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/pkg/sink/export"
	"github.com/penstock/penstock/pkg/sink/horizon"
	"github.com/penstock/penstock/pkg/tally"
)

// Backends are tempo, prometheus, loki and file.
type Backends = backend.Config

// Config is what an operator may set. A signal that has no backend goes to the
// file backend.
type Config struct {
	app.Config `yaml:",inline"`

	Hub      bus.Config      `yaml:"hub"`
	Streams  bus.Topology    `yaml:"streams"`
	Sampling versions.Config `yaml:"sampling"`
	// Which instances may share traces: those of a domain. An instance that is in none has its traces
	// by itself. The last list that a sink was started with is in force for all of them, for traces that
	// begin from then on; a sink without the key follows.
	Domains domain.Config `yaml:"domains"`
	// Processing changes and drops telemetry on the way to all backends, after the sampler.
	Processing processor.Config `yaml:"processing"`
	Backends   `yaml:",inline"`
	// Further backends: a second site, or the other one of a pair. Each receives all data of its
	// signals through its own lanes, so that a slow or unavailable one does not delay the others.
	Also []backend.Named `yaml:"also"`
	// How many requests a lane may have at its backend at a time, each of another instance.
	Requests int                `yaml:"requests_per_lane"`
	Aside    export.AsideConfig `yaml:"aside"`
	// When a payload that the backend never answers, or with an error of its own each time, becomes a dead letter,
	// while it accepts what other instances send: when both are reached.
	Poison backend.Poison `yaml:"poison"`
	// The name of this process among the sinks that share the partitions; it must be unique. Empty:
	// the host's name with a random suffix.
	Member string `yaml:"member"`
	// How long a stop waits for backends to accept the remaining data, when there is no other sink
	// to take over.
	Drain time.Duration `yaml:"drain_timeout"`

	// DrainTraces makes a stop wait for the decisions, too. Without it undecided
	// traces stay in SPANS and are decided by the next owner.
	DrainTraces bool `yaml:"-"`
}

// DefaultConfig is complete but for what the environment sets.
func DefaultConfig() Config {
	c := Config{
		Config:   app.DefaultConfig(9663),
		Hub:      bus.Config{URL: "nats://127.0.0.1:4222"},
		Streams:  bus.DefaultTopology(),
		Sampling: versions.DefaultConfig(),
		Backends: backend.DefaultConfig(),
		Drain:    5 * time.Second,
	}
	c.Backends.File.Dir = "penstock-data"
	c.Requests = 4
	c.Aside = export.AsideConfig{MaxInstances: 16, SlowAfter: 2 * time.Second}
	c.Poison = backend.Poison{After: 15 * time.Minute, Tries: 50}
	return c
}

// Writers are those of all backends, by signal; those of the set without a name come first.
type Writers [len(otlpwire.Signals)][]backend.Writer

// Writers opens them.
func (c *Config) Writers() (all Writers, err error) {
	for _, set := range append([]backend.Named{{Config: c.Backends}}, c.Also...) {
		for _, sig := range otlpwire.Signals {
			w, err := set.Open(sig)
			if err != nil {
				return all, errors.Join(err, all.Close())
			}
			if w != nil {
				all[sig] = append(all[sig], w)
			}
		}
	}
	return all, nil
}

// Close closes them.
func (w *Writers) Close() error {
	var errs []error
	for _, of := range w {
		for _, one := range of {
			errs = append(errs, one.Close())
		}
	}
	return errors.Join(errs...)
}

// Process returns the part that is common to all roles.
func (c *Config) Process() *app.Config { return &c.Config }

// ApplyEnv overrides the file with the environment.
func (c *Config) ApplyEnv(getenv func(string) string) {
	c.Hub.ApplyEnv(getenv)
	config.Env(getenv, "TEMPO_ENDPOINT", &c.Backends.Tempo.Endpoint)
	config.Env(getenv, "PROMETHEUS_URL", &c.Backends.Prometheus.URL)
	config.Env(getenv, "LOKI_URL", &c.Backends.Loki.URL)
}

// Validate reports every mistake at once, also those in the policies.
func (c *Config) Validate() error {
	errs := []error{c.Hub.Validate("hub"), c.Streams.Validate(), c.Sampling.Validate("sampling"), membership.CheckName(c.Member)}
	if c.Aside.MaxInstances < 0 || c.Aside.MaxInstances > 1024 {
		errs = append(errs, fmt.Errorf("aside.max_instances is %d, want 0 to 1024", c.Aside.MaxInstances))
	}
	if c.Aside.SlowAfter < 0 || c.Aside.SlowAfter > time.Minute {
		errs = append(errs, fmt.Errorf("aside.slow_after is %v, want 0 to 1m", c.Aside.SlowAfter))
	}
	if c.Requests < 1 || c.Requests > 64 {
		errs = append(errs, fmt.Errorf("requests_per_lane is %d, want 1 to 64", c.Requests))
	}
	if c.Backends.File.Dir == "" {
		errs = append(errs, errors.New("file.dir is not set"))
	}
	errs = append(errs, c.Poison.Validate("poison"), c.Domains.Validate("domains"), c.Backends.Validate(""), backend.ValidateNamed("also", c.Also))
	if _, err := processor.New("processing", c.Processing); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// CheckFiles checks files that a start does not need.
func (c *Config) CheckFiles() error { return c.Hub.CheckFiles("hub") }

// Build creates the stages: hub, lanes.
func Build(p *app.Process, cfg Config) ([]app.Stage, error) {
	cfg.Hub.Name, cfg.Hub.Counts = "sink", p.Ledger
	hub := bus.NewHub(cfg.Hub, cfg.Streams, p.Log, membership.Bucket, versions.Bucket, replay.Bucket, tally.Bucket)
	log := p.Log.With("component", "sink")
	policies, err := versions.New(cfg.Sampling, cfg.Domains, cfg.Streams.Partitions, p.Ledger, log)
	if err != nil {
		return nil, err
	}
	process, err := processor.New("processing", cfg.Processing)
	if err != nil {
		return nil, err
	}
	members := membership.New(hub, "sink", cfg.Member, p.Ledger, log)
	p.Page("/partitions", members.Page())
	ls := &lanes{cfg: cfg, policies: policies, process: process, hub: hub, members: members, horizon: horizon.New(hub, cfg.Sampling.Late, p.Ledger, log), led: p.Ledger, log: log}
	return []app.Stage{{Name: "hub", Service: hub.Service()}, {Name: "lanes", Service: ls.service()}}, nil
}
