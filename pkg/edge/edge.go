// Package edge is the tier beside an AppServer: it receives OTLP, stamps it
// with the instance, keeps it in a spool on disk and forwards it to the hub.
//
//	receive → stamp → spool → forward → hub
//
// # Promises
//
//   - A request is answered with success when its items are in the spool, with
//     fsync (spool.durability).
//   - A spooled message leaves the spool only when the hub has acknowledged it;
//     the hub may be away for as long as there is room.
//   - Per signal the hub gets messages in the order in which they were spooled.
//
// # Not here
//
// The OTLP servers and the stamping: package receive.
package edge

import (
	"errors"
	"fmt"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/proc"
	"github.com/penstock/penstock/pkg/receive"
)

// Config is what an operator may set.
type Config struct {
	proc.Config `yaml:",inline"`

	Instance InstanceConfig `yaml:"instance"`
	Receive  receive.Config `yaml:"receive"`
	Spool    SpoolConfig    `yaml:"spool"`
	Hub      bus.Config     `yaml:"hub"`
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
	Environment string `yaml:"deployment_environment"` // deployment.environment, where the application sets none
}

// Instance returns the identity.
func (c InstanceConfig) Instance() envelope.Instance {
	return envelope.Instance{ID: c.ID, Name: c.Name, Customer: c.Customer, Namespace: c.Namespace, Environment: c.Environment}
}

// SpoolConfig bounds the spool.
type SpoolConfig struct {
	Dir string `yaml:"dir"` // one edge, one directory, on a local disk
	// MaxBytes is shared by the signals in equal parts. At the bound senders are
	// told to retry.
	MaxBytes proc.Bytes `yaml:"max_bytes"`
	// Reserve is how much of the disk stays free: below it senders are told to
	// retry, because a spool that meets a full disk cannot be trusted.
	Reserve proc.Bytes `yaml:"disk_reserve"`
	// Durability is fsync (survives a power cut) or os (survives kill -9).
	Durability string `yaml:"durability"`
	// Compression is s2 (quick) or zstd (a quarter to a third fewer bytes on disk
	// and on the way to the hub, for three to five times the CPU time).
	Compression envelope.Encoding `yaml:"compression"`
}

// DefaultConfig runs with the environment alone.
func DefaultConfig() Config {
	return Config{
		Config:   proc.DefaultConfig(9661),
		Instance: InstanceConfig{Namespace: "appserver"},
		Receive:  receive.DefaultConfig(),
		Spool:    SpoolConfig{Dir: "penstock-data/spool", MaxBytes: 3 << 30, Reserve: 512 << 20, Durability: "fsync", Compression: envelope.S2},
		Hub:      bus.Config{URL: "nats://127.0.0.1:4222"},
		Drain:    10 * time.Second,
	}
}

// Process returns the part that is common to all roles.
func (c *Config) Process() *proc.Config { return &c.Config }

// ApplyEnv overrides the file with the environment.
func (c *Config) ApplyEnv(getenv func(string) string) {
	proc.Env(getenv, "INSTANCE_ID", &c.Instance.ID)
	proc.Env(getenv, "INSTANCE_NAME", &c.Instance.Name)
	proc.Env(getenv, "CUSTOMER_ID", &c.Instance.Customer)
	proc.Env(getenv, "SERVICE_NAMESPACE", &c.Instance.Namespace)
	proc.Env(getenv, "DEPLOYMENT_ENVIRONMENT", &c.Instance.Environment)
	proc.Env(getenv, "HUB_URL", &c.Hub.URL)
	proc.Env(getenv, "HUB_CREDS", &c.Hub.Creds)
}

const minSpool = 16 << 20 // three streams of a few messages each

// Validate reports every mistake at once.
func (c *Config) Validate() error {
	errs := []error{c.Receive.Validate("receive")}
	if c.Instance.ID == "" {
		errs = append(errs, errors.New("instance.id is not set; set it in the configuration or as INSTANCE_ID"))
	} else if err := c.Instance.Instance().Validate(); err != nil {
		errs = append(errs, fmt.Errorf("instance.id: %w", err))
	}
	if c.Spool.Durability != "fsync" && c.Spool.Durability != "os" {
		errs = append(errs, fmt.Errorf("spool.durability is %q, want fsync or os", c.Spool.Durability))
	}
	if c.Spool.Compression != envelope.S2 && c.Spool.Compression != envelope.Zstd {
		errs = append(errs, fmt.Errorf("spool.compression is %q, want s2 or zstd", c.Spool.Compression))
	}
	if c.Spool.MaxBytes < minSpool {
		errs = append(errs, fmt.Errorf("spool.max_bytes is %v, want at least 16MiB", c.Spool.MaxBytes))
	}
	if c.Spool.Dir == "" {
		errs = append(errs, errors.New("spool.dir is not set"))
	}
	return errors.Join(errs...)
}

// Build makes the stages: spool, forward, receive. They stop in reverse order,
// so that nothing is taken that could not be kept.
func Build(p *proc.Process, cfg Config) ([]proc.Stage, error) {
	sp := newSpool(cfg.Spool, p.Ledger, p.Log)
	cfg.Hub.Name = "edge-" + cfg.Instance.ID
	if cfg.Hub.InboxPrefix == "" {
		cfg.Hub.InboxPrefix = "_INBOX_" + cfg.Instance.ID
	}
	fwd := newForward(cfg, sp, p.Ledger, p.Log)
	sender := receive.NewSender(cfg.Instance.Instance())
	rcv, err := receive.New(cfg.Receive, receive.Deps{
		Identify:   func(string) (*receive.Sender, error) { return sender, nil },
		Accept:     sp.Accept,
		MaxPayload: envelope.MaxPayload,
		Ledger:     p.Ledger,
		Log:        p.Log,
	})
	if err != nil {
		return nil, err
	}
	return []proc.Stage{
		{Name: "spool", Service: sp.service()},
		{Name: "forward", Service: fwd.service()},
		{Name: "receive", Service: rcv.Service()},
	}, nil
}
