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
//   - A spooled message is deleted only after the hub has acknowledged it, and
//     spool.retain_after_ack later; the hub may be unavailable for as long as there is
//     room. A hub that shows that it has lost messages gets all that are held again.
//   - Per signal the hub gets messages in the order in which they were spooled, except
//     for one that the hub's own cluster refuses between others (docs/adr/0001).
//   - A full spool refuses requests with a retryable code, unless the operator has
//     chosen spool.on_full: drop_oldest.
//   - Damaged files are kept aside and reported; what is undamaged in them is
//     forwarded. If the disk cannot be written, senders are told to retry; the edge does not fail.
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
	"github.com/penstock/penstock/pkg/edge/forward"
	"github.com/penstock/penstock/pkg/edge/spool"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/processor"
	"github.com/penstock/penstock/pkg/receive"
)

// Config is what an operator may set.
type Config struct {
	app.Config `yaml:",inline"`

	Instance InstanceConfig        `yaml:"instance"`
	Receive  receive.Config        `yaml:"receive"`
	Spool    spool.Config          `yaml:"spool"`
	Hub      bus.Config            `yaml:"hub"`
	Central  forward.CentralConfig `yaml:"central"`
	// Processing changes and drops telemetry before it is stamped and stored.
	Processing processor.Config `yaml:"processing"`
	// Local are backends beside the edge, which get everything, unsampled, whether the
	// hub can be reached or not. None of them delays anything.
	Local backend.Config `yaml:"local"`
	// How long a stop waits for the hub to acknowledge what is spooled. What is left stays in the
	// spool.
	Drain time.Duration `yaml:"drain_timeout"`
}

// InstanceConfig is the identity that is written into every resource.
type InstanceConfig struct {
	// The instance's id, which is part of its NATS subjects: letters, digits, _ and -, up to 128
	// characters.
	ID string `yaml:"id"`
	// The instance's name, written as instance.name. Empty: the id.
	Name string `yaml:"name"`
	// The customer, written as customer.id. Empty: a customer.id in a payload is removed.
	Customer string `yaml:"customer"`
	// Written as service.namespace, where the application sets none.
	Namespace string `yaml:"service_namespace"`
	// Written as deployment.environment, where the application sets neither that nor
	// deployment.environment.name.
	Environment string `yaml:"deployment_environment"`
}

// Instance returns the identity.
func (c InstanceConfig) Instance() envelope.Instance {
	return envelope.Instance{ID: c.ID, Name: c.Name, Customer: c.Customer, Namespace: c.Namespace, Environment: c.Environment}
}

// DefaultConfig is complete but for what the environment sets.
func DefaultConfig() Config {
	return Config{
		Config:   app.DefaultConfig(9661),
		Instance: InstanceConfig{Namespace: "appserver"},
		Receive:  receive.DefaultConfig(),
		Spool:    spool.DefaultConfig(),
		Hub:      bus.Config{URL: "nats://127.0.0.1:4222"},
		Central:  forward.CentralConfig{Protocol: "grpc"},
		Local:    backend.DefaultConfig(),
		Drain:    10 * time.Second,
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
	errs := []error{c.Receive.Validate("receive"), c.Spool.Validate(), c.Central.Validate(), c.Local.Validate("local.")}
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

// CheckFiles checks files that a start does not need.
func (c *Config) CheckFiles() error { return c.Hub.CheckFiles("hub") }

// minLocalRetain lets a local backend be slow for a moment.
const minLocalRetain = 10 * time.Second

// Build creates the stages: spool, local, forward, receive. They stop in reverse order,
// so that nothing is accepted that could not be stored.
func Build(p *app.Process, cfg Config) ([]app.Stage, error) {
	sp := spool.New(cfg.Spool, p.Ledger, p.Log)
	cfg.Hub.Name, cfg.Hub.Counts = "edge-"+cfg.Instance.ID, p.Ledger
	if cfg.Hub.InboxPrefix == "" {
		cfg.Hub.InboxPrefix = "_INBOX_" + cfg.Instance.ID
	}
	fwd, err := forward.New(forward.Config{Instance: cfg.Instance.ID, Hub: cfg.Hub, Central: cfg.Central, Drain: cfg.Drain}, sp, p.Ledger, p.Log)
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
		{Name: "spool", Service: sp.Service()},
		{Name: "local", Service: forward.NewLocal(cfg.Local, cfg.Instance.ID, sp, p.Ledger, p.Log).Service()},
		{Name: "forward", Service: fwd.Service(), Ready: fwd.Ready},
		{Name: "receive", Service: rcv.Service()},
	}, nil
}
