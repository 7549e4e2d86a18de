// Package edge is the tier beside an AppServer: it receives OTLP, stamps it
// with the instance, keeps it in a spool on disk and forwards it to the hub.
//
//	receive → stamp → spool → forward → hub
//	                        → local → backends beside the edge
//
// # Promises
//
//   - A request is answered with success when its items are in the spool, with
//     fsync (spool.durability).
//   - A spooled message leaves the spool only when the hub has acknowledged it, and
//     spool.retain_after_ack later; the hub may be away for as long as there is room.
//     A hub that shows that it has lost some gets all that is held again.
//   - Per signal the hub gets messages in the order in which they were spooled, but
//     for one that the hub's own cluster refuses between others (docs/adr/0001).
//   - Full means refuse, with a code by which senders try again, unless the operator
//     has chosen spool.on_full: drop_oldest.
//   - Files that are damaged are put aside and reported; what is whole in them is
//     forwarded. A disk that does not write makes senders wait, not the edge fail.
//
// # Not here
//
// The OTLP servers and the stamping: package receive.
package edge

import (
	"errors"
	"fmt"
	"time"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/processor"
	"github.com/penstock/penstock/pkg/receive"
)

// Config is what an operator may set.
type Config struct {
	app.Config `yaml:",inline"`

	Instance InstanceConfig `yaml:"instance"`
	Receive  receive.Config `yaml:"receive"`
	Spool    SpoolConfig    `yaml:"spool"`
	Hub      bus.Config     `yaml:"hub"`
	Central  CentralConfig  `yaml:"central"`
	// Processing changes and drops telemetry before it is stamped and stored.
	Processing processor.Config `yaml:"processing"`
	// Local are backends beside the edge, which get everything, unsampled, whether the
	// hub is there or not. None of them holds anything back.
	Local backend.Config `yaml:"local"`
	// Drain is how long a stop may wait for the hub to take what is spooled.
	// What is left stays in the spool.
	Drain time.Duration `yaml:"drain_timeout"`
}

// InstanceConfig is the identity that is written into every resource.
type InstanceConfig struct {
	ID          string `yaml:"id"`                     // a part of NATS subjects: letters, digits, _ and -, up to 128
	Name        string `yaml:"name"`                   // default: the id
	Customer    string `yaml:"customer"`               // customer.id; empty removes what a payload claims
	Namespace   string `yaml:"service_namespace"`      // service.namespace, where the application sets none
	Environment string `yaml:"deployment_environment"` // deployment.environment, where the application sets neither that nor deployment.environment.name
}

// Instance returns the identity.
func (c InstanceConfig) Instance() envelope.Instance {
	return envelope.Instance{ID: c.ID, Name: c.Name, Customer: c.Customer, Namespace: c.Namespace, Environment: c.Environment}
}

// SpoolConfig bounds the spool.
type SpoolConfig struct {
	Dir string `yaml:"dir"` // one edge, one directory, on a local disk
	// MaxBytes is for all signals together, with what is held back. At the bound
	// OnFull says what happens.
	MaxBytes config.Bytes `yaml:"max_bytes"`
	// Shares is how much of MaxBytes each signal has, in percent: a storm of one
	// does not take the room of the others.
	Shares SharesConfig `yaml:"shares"`
	// Reserve is how much of the disk stays free: below it senders are told to
	// retry, because a spool that meets a full disk cannot be trusted.
	Reserve config.Bytes `yaml:"disk_reserve"`
	// OnFull is one of refuse (senders are told to retry, nothing is lost) and drop_oldest
	// (what is dropped is lost, and counted).
	OnFull string `yaml:"on_full"`
	// Durability is one of fsync (survives a power cut) and os (survives kill -9).
	Durability string `yaml:"durability"`
	// Linger is how long a request waits for others to share its fsync when none are
	// waiting. They share it anyway while the one before is written.
	Linger time.Duration `yaml:"linger"`
	// MaxItems bounds the items of a group; a single request may have more.
	MaxItems int `yaml:"max_group_items"`
	// Compression is one of s2 (quick) and zstd (a quarter to a third fewer bytes on disk
	// and on the way to the hub, for three to five times the CPU time).
	Compression envelope.Encoding `yaml:"compression"`
	// Retain is how long messages are kept that the hub has: three times the
	// sync_interval of its servers, and 0 where they sync always and are never
	// restored from a backup. They are the first to go when there is no room.
	Retain time.Duration `yaml:"retain_after_ack"`
}

// SharesConfig is in percent of spool.max_bytes.
type SharesConfig struct {
	Traces  int64 `yaml:"traces"`  // share of traces, in percent of spool.max_bytes
	Metrics int64 `yaml:"metrics"` // share of metrics, in percent
	Logs    int64 `yaml:"logs"`    // share of logs, in percent
}

// What happens when the spool is full.
const (
	Refuse     = "refuse"
	DropOldest = "drop_oldest"
)

// share returns the bytes that a signal may take.
func (c SpoolConfig) share(sig otlpwire.Signal) config.Bytes {
	percent := [...]int64{otlpwire.Traces: c.Shares.Traces, otlpwire.Metrics: c.Shares.Metrics, otlpwire.Logs: c.Shares.Logs}[sig]
	return c.MaxBytes / 100 * config.Bytes(percent)
}

// minShare holds a few messages of the largest size.
const minShare = 4 << 20

func (c SpoolConfig) validate() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf("spool."+format, args...)) }
	if c.Dir == "" {
		wrong("dir is not set")
	}
	if c.Durability != "fsync" && c.Durability != "os" {
		wrong("durability is %q, want fsync or os", c.Durability)
	}
	if c.OnFull != Refuse && c.OnFull != DropOldest {
		wrong("on_full is %q, want %s or %s", c.OnFull, Refuse, DropOldest)
	}
	if c.Compression != envelope.S2 && c.Compression != envelope.Zstd {
		wrong("compression is %q, want s2 or zstd", c.Compression)
	}
	if sum := c.Shares.Traces + c.Shares.Metrics + c.Shares.Logs; sum > 100 || c.Shares.Traces < 1 || c.Shares.Metrics < 1 || c.Shares.Logs < 1 {
		wrong("shares are %d, %d and %d percent, want at least 1 each and 100 together", c.Shares.Traces, c.Shares.Metrics, c.Shares.Logs)
	} else if least := (minShare*100/config.Bytes(min(c.Shares.Traces, c.Shares.Metrics, c.Shares.Logs))>>20 + 1) << 20; c.MaxBytes < least {
		wrong("max_bytes is %v, want at least %v, so that the smallest share holds %v", c.MaxBytes, least, config.Bytes(minShare))
	}
	if c.Linger < 0 || c.Linger > 100*time.Millisecond {
		wrong("linger is %v, want 0 to 100ms", c.Linger)
	}
	if c.MaxItems < 1 {
		wrong("max_group_items is %d, want at least 1", c.MaxItems)
	}
	if c.Retain < 0 || c.Retain > 24*time.Hour {
		wrong("retain_after_ack is %v, want 0 to 24h", c.Retain)
	}
	return errors.Join(errs...)
}

// DefaultConfig runs with the environment alone.
func DefaultConfig() Config {
	return Config{
		Config:   app.DefaultConfig(9661),
		Instance: InstanceConfig{Namespace: "appserver"},
		Receive:  receive.DefaultConfig(),
		Spool: SpoolConfig{
			Dir: "penstock-data/spool", MaxBytes: 3 << 30, Shares: SharesConfig{Traces: 40, Metrics: 30, Logs: 30}, Reserve: 512 << 20,
			OnFull: Refuse, Durability: "fsync", MaxItems: 1 << 16, Compression: envelope.S2, Retain: 6 * time.Minute,
		},
		Hub:     bus.Config{URL: "nats://127.0.0.1:4222"},
		Central: CentralConfig{Protocol: "grpc"},
		Local:   backend.DefaultConfig(),
		Drain:   10 * time.Second,
	}
}

// Process returns the part that is common to all roles.
func (c *Config) Process() *app.Config { return &c.Config }

// ApplyEnv overrides the file with the environment.
func (c *Config) ApplyEnv(getenv func(string) string) {
	config.Env(getenv, "INSTANCE_ID", &c.Instance.ID)
	config.Env(getenv, "INSTANCE_NAME", &c.Instance.Name)
	config.Env(getenv, "CUSTOMER_ID", &c.Instance.Customer)
	config.Env(getenv, "SERVICE_NAMESPACE", &c.Instance.Namespace)
	config.Env(getenv, "DEPLOYMENT_ENVIRONMENT", &c.Instance.Environment)
	c.Hub.ApplyEnv(getenv)
	config.Env(getenv, "CENTRAL_OTEL_ENDPOINT", &c.Central.Endpoint)
	config.Env(getenv, "CENTRAL_OTEL_TOKEN", (*string)(&c.Central.Token))
}

// Validate reports every mistake at once.
func (c *Config) Validate() error {
	errs := []error{c.Receive.Validate("receive"), c.Spool.validate(), c.Central.validate(), c.Local.Validate("local.")}
	if c.Central.Endpoint == "" {
		errs = append(errs, c.Hub.Validate("hub"))
	}
	if _, err := processor.New("processing", c.Processing); err != nil {
		errs = append(errs, err)
	}
	if c.Instance.ID == "" {
		errs = append(errs, errors.New("instance.id is not set; set it in the configuration or as INSTANCE_ID"))
	} else if err := c.Instance.Instance().Validate(); err != nil {
		errs = append(errs, fmt.Errorf("instance.id: %w", err))
	}
	if l := c.Local; l.Tempo.Endpoint+l.Prometheus.URL+l.Loki.URL+l.File.Dir != "" && c.Spool.Retain < minLocalRetain {
		errs = append(errs, fmt.Errorf("spool.retain_after_ack is %v, want at least %v where there are local backends: they read what the hub has already", c.Spool.Retain, minLocalRetain))
	}
	return errors.Join(errs...)
}

// CheckFiles looks at what may come after the start.
func (c *Config) CheckFiles() error { return c.Hub.CheckFiles("hub") }

// minLocalRetain lets a local backend be slow for a moment.
const minLocalRetain = 10 * time.Second

// Build makes the stages: spool, local, forward, receive. They stop in reverse order,
// so that nothing is taken that could not be kept.
func Build(p *app.Process, cfg Config) ([]app.Stage, error) {
	sp := newSpool(cfg.Spool, p.Ledger, p.Log)
	cfg.Hub.Name, cfg.Hub.Counts = "edge-"+cfg.Instance.ID, p.Ledger
	if cfg.Hub.InboxPrefix == "" {
		cfg.Hub.InboxPrefix = "_INBOX_" + cfg.Instance.ID
	}
	fwd, err := newForward(cfg, sp, p.Ledger, p.Log)
	if err != nil {
		return nil, err
	}
	sender := receive.NewSender(cfg.Instance.Instance())
	rules, err := processor.New("processing", cfg.Processing)
	if err != nil {
		return nil, err
	}
	rcv, err := receive.New(cfg.Receive, receive.Deps{
		Process:    rules.Apply,
		Identify:   func(receive.Credentials) (*receive.Sender, error) { return sender, nil },
		Accept:     sp.Accept,
		Over:       p.Memory.Over,
		MaxPayload: envelope.MaxPayload,
		Ledger:     p.Ledger,
		Log:        p.Log,
	})
	if err != nil {
		return nil, err
	}
	return []app.Stage{
		{Name: "spool", Service: sp.service()},
		{Name: "local", Service: newLocal(cfg, sp, p.Ledger, p.Log).service()},
		{Name: "forward", Service: fwd.service(), Ready: fwd.way.ready},
		{Name: "receive", Service: rcv.Service()},
	}, nil
}
