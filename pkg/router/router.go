// Package router is the central tier between the instances' streams and the
// sinks: it regroups spans by trace ID, and its gateway takes OTLP from
// services that have no edge.
//
//	TRACES → route → SPANS        OTLP + token or certificate → receive → hub
//
// # Promises
//
//   - All spans of a trace go to the same partition, for ever, from whichever instances they come.
//   - An input message is settled when every message made from it is in SPANS. A crash in between
//     sends spans again; the sampler recognises them by their ids.
//   - A gateway's success means that the hub's stream has stored the items.
//   - A sender is identified by its token or certificate, and named by the tokens file. A sender
//     that is removed from that file is refused within five seconds.
//
// # Not here
//
// Decisions about traces: package sink. Metrics and logs are partitioned by the
// hub itself.
package router

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/hold"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/processor"
	"github.com/penstock/penstock/pkg/receive"
	"github.com/penstock/penstock/pkg/tally"
	"github.com/penstock/penstock/pkg/tokens"
)

// Config is what an operator may set.
type Config struct {
	app.Config `yaml:",inline"`

	Hub     bus.Config    `yaml:"hub"`
	Streams bus.Topology  `yaml:"streams"`
	Gateway GatewayConfig `yaml:"gateway"`
	// The name of this process among the routers that share the partitions; it must be unique.
	// Empty: the host's name with a random suffix.
	Member string `yaml:"member"`
	// How long spans wait for other spans of their partition, to be published in one message.
	Linger time.Duration `yaml:"linger"`
	// How long a stop may take to route the remaining spans, when no other router takes over.
	Drain time.Duration `yaml:"drain_timeout"`
	// How many bytes of spans are gathered for one message at most.
	MaxBatch config.Bytes `yaml:"max_batch_bytes"`
}

// GatewayConfig configures the OTLP receiver for services that have no edge.
type GatewayConfig struct {
	// A file that maps tokens and certificates to instances; without it there is no gateway. It has
	// the key tokens, with the entries that penstock token creates, and is reloaded when it
	// changes: a removed entry is refused within 5 seconds.
	TokensFile     string `yaml:"tokens_file"`
	receive.Config `yaml:",inline"`
	// Processing is used only in penstock up, where the gateway processes data; for a separate
	// router the sinks do.
	Processing processor.Config `yaml:"-"`
}

// DefaultConfig is enough to run with only environment variables set.
func DefaultConfig() Config {
	c := Config{
		Config:   app.DefaultConfig(9662),
		Hub:      bus.Config{URL: "nats://127.0.0.1:4222"},
		Streams:  bus.DefaultTopology(),
		Gateway:  GatewayConfig{Config: receive.DefaultConfig()},
		Linger:   20 * time.Millisecond,
		Drain:    5 * time.Second,
		MaxBatch: 4 << 20,
	}
	c.Gateway.GRPC.MaxConnectionAge = 15 * time.Minute
	c.Gateway.Limits = receive.LimitsConfig{
		Instance: receive.InstanceLimits{Bytes: 64 << 20, Requests: 2000},
		Address:  receive.AddressLimits{Connections: c.Gateway.MaxConnections / 4},
	}
	return c
}

// Process returns the part that is common to all roles.
func (c *Config) Process() *app.Config { return &c.Config }

// ApplyEnv overrides the file with the environment.
func (c *Config) ApplyEnv(getenv func(string) string) {
	c.Hub.ApplyEnv(getenv)
	config.Env(getenv, "CENTRAL_TOKENS_FILE", &c.Gateway.TokensFile)
}

// Validate reports all errors at once.
func (c *Config) Validate() error {
	errs := []error{c.Hub.Validate("hub"), c.Streams.Validate(), membership.CheckName(c.Member)}
	if c.Gateway.TokensFile != "" {
		_, err := tokens.Load(c.Gateway.TokensFile, nil)
		errs = append(errs, c.Gateway.Validate("gateway"), err)
	}
	if c.Linger < 0 || c.Linger > time.Second {
		errs = append(errs, fmt.Errorf("linger is %v, want 0 to 1s", c.Linger))
	}
	if c.MaxBatch < 1<<16 || c.MaxBatch > 64<<20 {
		errs = append(errs, fmt.Errorf("max_batch_bytes is %v, want 64KiB to 64MiB", c.MaxBatch))
	}
	return errors.Join(errs...)
}

// CheckFiles checks files that may still be missing at the start.
func (c *Config) CheckFiles() error { return c.Hub.CheckFiles("hub") }

// Build creates the stages: hub, route, gateway.
func Build(p *app.Process, cfg Config) ([]app.Stage, error) {
	cfg.Hub.Name, cfg.Hub.Counts = "router", p.Ledger
	hub := bus.NewHub(cfg.Hub, cfg.Streams, p.Log, membership.Bucket, tally.Bucket)
	rt := newRoute(cfg, hub, p.Ledger, p.Log)
	p.Page("/partitions", rt.members.Page())
	stages := []app.Stage{{Name: "hub", Service: hub.Service()}, {Name: "route", Service: rt.service()}}
	if cfg.Gateway.TokensFile == "" {
		return stages, nil
	}
	senders, err := tokens.Load(cfg.Gateway.TokensFile, p.Log.With("component", "gateway"))
	if err != nil {
		return nil, err
	}
	rules, err := processor.New("processing", cfg.Gateway.Processing)
	if err != nil {
		return nil, err
	}
	g := newGateway(hub, p.Log.With("component", "gateway"))
	rcv, err := receive.New(cfg.Gateway.Config, receive.Deps{
		Process:    rules.Apply,
		Identify:   senders.Identify,
		Accept:     g.accept,
		Tokens:     true,
		Origin:     true,
		Over:       p.Memory.Over,
		MaxPayload: envelope.MaxPayload,
		Ledger:     p.Ledger,
		Log:        p.Log,
	})
	if err != nil {
		return nil, err
	}
	return append(stages, app.Stage{Name: "holds", Service: g.service()}, app.Stage{Name: "gateway", Service: rcv.Service()}), nil
}

// gateway publishes requests to the hub as an edge would.
type gateway struct {
	hub   *bus.Hub
	log   *slog.Logger
	said  backoff.Repeats
	epoch string
	seq   atomic.Uint64
	holds *hold.Asker

	mu     sync.Mutex
	meters map[string]*envelope.Meter // by instance of the tokens file
}

// load is what an instance without an edge has recently sent to this gateway.
func (g *gateway) load(instance string, arrival int64, b receive.Batch) envelope.Load {
	g.mu.Lock()
	defer g.mu.Unlock()
	m := g.meters[instance]
	if m == nil {
		m = new(envelope.Meter)
		g.meters[instance] = m
	}
	return m.Add(arrival, int64(b.Items))
}

func newGateway(h *bus.Hub, log *slog.Logger) *gateway {
	return &gateway{hub: h, log: log, epoch: nonce(), holds: hold.NewAsker(log), meters: map[string]*envelope.Meter{}}
}

// service ends what the gateway has begun.
func (g *gateway) service() services.Service {
	return app.Service(func(ctx context.Context) error {
		<-ctx.Done()
		g.holds.Close()
		return nil
	})
}

func nonce() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// refused logs, once a minute, that the hub does not store a signal, and the instance of that request.
func (g *gateway) refused(b receive.Batch, why error) {
	if more, due := g.said.Due(b.Signal.String(), time.Now()); due {
		g.log.Warn("hub does not store a request to the gateway; senders retry", "signal", b.Signal, "instance", b.Instance, "err", why, "more_since_last_said", more)
	}
}

// accept returns when the hub has stored b. A failed publish may have been stored after all: the
// sender retries, and the promise is at least once.
func (g *gateway) accept(ctx context.Context, b receive.Batch) error {
	if why := g.holds.Held(g.hub.Conn, b.Instance, b.Signal, time.Now()); why != "" {
		return fmt.Errorf("%w for this instance: %s", receive.ErrFull, why)
	}
	msg := bus.Message{Subject: bus.Subject(b.Signal, b.Instance), Header: envelope.Header{
		ContentType: envelope.ContentTypeOTLP, Items: b.Items, Arrival: time.Now().UnixNano(),
		ID: fmt.Sprintf("%s-g%d", g.epoch, g.seq.Add(1)), // not [envelope.Numbered]: a refused one leaves a gap
	}}
	if b.Origin.ID != "" {
		msg.Header.ID = b.Instance + "/" + b.Origin.ID // unique to the instance, which the token names
	}
	if b.Origin.Arrival != 0 {
		msg.Header.Arrival = b.Origin.Arrival
	}
	switch {
	case b.Signal != otlpwire.Traces:
	case b.Origin.ID != "":
		msg.Header.Load = b.Origin.Load // the source is the edge
	default:
		msg.Header.Load = g.load(b.Instance, msg.Header.Arrival, b)
	}
	msg.Body, msg.Header.Encoding = envelope.Compress(nil, b.Payload, envelope.S2)
	_, err := g.hub.Conn.Publish(ctx, msg)
	if err != nil {
		g.refused(b, err)
	}
	return err
}
