// Package allinone runs edge, hub, router and sink in one process: penstock up.
//
// # Promises
//
//   - Every section of the roles' configurations works as it does in the role: it is
//     decoded into the role's own configuration and checked by the role.
//   - Only the edge, the gateway and the hub listen on the network; the roles reach the
//     hub within the process.
//
// # Not here
//
// What the roles do: packages edge, router and sink.
package allinone

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/processor"
	"github.com/penstock/penstock/pkg/router"
	"github.com/penstock/penstock/pkg/sink"
)

// Config is what an operator may set for all roles in one process. A section of a role
// is at the top level, as in the role's own file; one that several roles have (log,
// admin, memory_limiter, streams, member, drain_timeout) applies to all of them, and
// processing is done where data comes in, by edge and gateway: what it removes is never
// stored.
type Config struct {
	Own    `yaml:",inline"`
	Edge   edge.Config   `yaml:",inline"`
	Router router.Config `yaml:",inline"`
	Sink   sink.Config   `yaml:",inline"`
}

// Own are the keys that no role has.
type Own struct {
	// The directory of the hub, and of the spool and the files where spool.dir and file.dir are not
	// set.
	DataDir string     `yaml:"data_dir"`
	NATS    NATSConfig `yaml:"nats"`
	// How often a line with the state is printed. 0: never.
	Report time.Duration `yaml:"report_interval"`
}

// NATSConfig is the embedded hub.
type NATSConfig struct {
	// The address at which other penstock commands reach the hub, host:port.
	Listen string `yaml:"listen"`
	// Allows listening beyond loopback, without credentials and in plain text.
	Insecure bool `yaml:"insecure"`
}

// drain is how long Ctrl-C waits for decisions and backends. What is not delivered by
// then stays on disk and is delivered after the next start.
const drain = 15 * time.Second

// DefaultConfig is complete: nothing has to be set.
func DefaultConfig() Config {
	c := Config{
		Own:  Own{DataDir: "penstock-data", NATS: NATSConfig{Listen: "127.0.0.1:4222"}, Report: 5 * time.Second},
		Edge: edge.DefaultConfig(), Router: router.DefaultConfig(), Sink: sink.DefaultConfig(),
	}
	c.Edge.Config = app.DefaultConfig(9660)
	c.Edge.Instance.ID = "local"
	c.Edge.Spool.Dir, c.Sink.Backends.File.Dir = "", ""
	c.Edge.Hub, c.Router.Hub, c.Sink.Hub = bus.Config{}, bus.Config{}, bus.Config{}
	c.Edge.Drain, c.Router.Drain, c.Sink.Drain = drain, drain, drain
	// The edge has the ports of OTLP.
	c.Router.Gateway.GRPC.Listen, c.Router.Gateway.HTTP.Listen = "127.0.0.1:4327", "127.0.0.1:4328"
	return c
}

// plain is Own without methods.
type plain Own

// UnmarshalYAML decodes one document into the configuration of every role.
func (c *Config) UnmarshalYAML(n *yaml.Node) error {
	for _, part := range []any{(*plain)(&c.Own), &c.Edge, &c.Router, &c.Sink} {
		if err := n.Decode(part); err != nil {
			return err
		}
	}
	return nil
}

// MarshalYAML writes every section once.
func (c *Config) MarshalYAML() (any, error) {
	e, r, s := c.roles()
	all := &yaml.Node{Kind: yaml.MappingNode}
	seen := map[string]bool{"hub": true, "central": true}
	for _, part := range []any{c.Own, e, r, s} {
		var n yaml.Node
		if err := n.Encode(part); err != nil {
			return nil, err
		}
		for i := 0; i+1 < len(n.Content); i += 2 {
			if key := n.Content[i].Value; !seen[key] {
				seen[key] = true
				all.Content = append(all.Content, n.Content[i], n.Content[i+1])
			}
		}
	}
	return all, nil
}

// Process returns the part that is common to all roles.
func (c *Config) Process() *app.Config { return &c.Edge.Config }

// ApplyEnv applies the variables of all roles except those for the connection to the hub.
func (c *Config) ApplyEnv(getenv func(string) string) {
	hubs := []*bus.Config{&c.Edge.Hub, &c.Router.Hub, &c.Sink.Hub}
	before := []bus.Config{*hubs[0], *hubs[1], *hubs[2]}
	central := c.Edge.Central
	c.Edge.ApplyEnv(getenv)
	c.Router.ApplyEnv(getenv)
	c.Sink.ApplyEnv(getenv)
	for i, h := range hubs {
		*h = before[i]
	}
	c.Edge.Central = central
}

// Validate reports every mistake at once.
func (c *Config) Validate() error {
	var errs []error
	if c.DataDir == "" {
		errs = append(errs, errors.New("data_dir is not set"))
	}
	if host, _, err := net.SplitHostPort(c.NATS.Listen); err != nil {
		errs = append(errs, fmt.Errorf("nats.listen: %w", err))
	} else if !c.NATS.Insecure && !config.Loopback(host) {
		errs = append(errs, fmt.Errorf("nats.listen is %s, which others can reach, and this hub knows no credentials: they could read and delete everything; run nats-server with deploy/nats, or set nats.insecure: true", c.NATS.Listen))
	}
	if c.Report < 0 {
		errs = append(errs, fmt.Errorf("report_interval is %v, want 0 or more", c.Report))
	}
	if !reflect.ValueOf(c.Edge.Hub).IsZero() {
		errs = append(errs, errors.New("hub: penstock up has a hub of its own, under nats.listen; with another hub run edge, router and sink"))
	}
	if c.Edge.Central.Endpoint != "" {
		errs = append(errs, errors.New("central.endpoint: penstock up has a hub of its own; to send to a gateway run edge"))
	}
	e, r, s := c.roles()
	for _, err := range []error{e.Validate(), r.Validate(), s.Validate()} {
		errs = appendNew(errs, err)
	}
	return errors.Join(errs...)
}

// appendNew appends the errors joined in err whose text is not there yet: several
// roles check a section that they share.
func appendNew(errs []error, err error) []error {
	if err == nil {
		return errs
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			errs = appendNew(errs, e)
		}
		return errs
	}
	for _, e := range errs {
		if e.Error() == err.Error() {
			return errs
		}
	}
	return append(errs, err)
}

// roles returns the configurations that the roles run with.
func (c *Config) roles() (edge.Config, router.Config, sink.Config) {
	e, r, s := c.Edge, c.Router, c.Sink
	r.Config, s.Config = e.Config, e.Config
	// Once, where data comes in: rules that hash must not be applied twice.
	r.Gateway.Processing, s.Processing = e.Processing, processor.Config{}
	s.DrainTraces = true
	if e.Spool.Dir == "" {
		e.Spool.Dir = filepath.Join(c.DataDir, "spool")
	}
	if s.Backends.File.Dir == "" {
		s.Backends.File.Dir = c.DataDir
	}
	hub := bus.Config{InProcess: &embeddedHub{}}
	e.Hub, r.Hub, s.Hub = hub, hub, hub
	return e, r, s
}

// Build creates the stages: an embedded hub, and after it those of sink, router and edge,
// in this order.
func Build(p *app.Process, cfg *Config) ([]app.Stage, error) {
	hub := &embeddedHub{cfg: broker.Config{
		Name: "hub", Dir: filepath.Join(cfg.DataDir, "hub"), Listen: cfg.NATS.Listen, Sync: true, MaxPayload: 8 << 20,
	}, p: p}
	e, r, s := cfg.roles()
	e.Hub.InProcess, r.Hub.InProcess, s.Hub.InProcess = hub, hub, hub
	var stages []app.Stage
	if cfg.Report > 0 { // first to start, last to stop: its last line is the end
		stages = append(stages, app.Stage{Name: "report", Service: app.Service(func(ctx context.Context) error {
			return report(ctx, os.Stdout, p.Registry, cfg.Report)
		})})
	}
	stages = append(stages, app.Stage{Name: "hub", Service: hub.service()})
	add := func(role string, more []app.Stage, err error) error {
		for _, st := range more {
			stages = append(stages, app.Stage{Name: role + " " + st.Name, Service: st.Service, Ready: st.Ready})
		}
		return err
	}
	sinkStages, err := sink.Build(p, s)
	if err := add("sink", sinkStages, err); err != nil {
		return nil, err
	}
	routerStages, err := router.Build(p, r)
	if err := add("router", routerStages, err); err != nil {
		return nil, err
	}
	edgeStages, err := edge.Build(p, e)
	if err := add("edge", edgeStages, err); err != nil {
		return nil, err
	}
	return stages, nil
}
