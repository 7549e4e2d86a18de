package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/proc"
	"github.com/penstock/penstock/pkg/receive"
	"github.com/penstock/penstock/pkg/router"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/pkg/sink/loki"
	"github.com/penstock/penstock/pkg/sink/remotewrite"
	"github.com/penstock/penstock/pkg/sink/tempo"
)

// upConfig is what an operator may set for all roles in one process.
type upConfig struct {
	proc.Config `yaml:",inline"`

	DataDir string `yaml:"data_dir"`
	NATS    struct {
		Listen string `yaml:"listen"` // of the embedded hub
	} `yaml:"nats"`
	Instance   edge.InstanceConfig `yaml:"instance"`
	Receive    receive.Config      `yaml:"receive"`
	Streams    bus.Topology        `yaml:"streams"`
	Sampling   sink.SamplingConfig `yaml:"sampling"`
	Tempo      tempo.Config        `yaml:"tempo"`
	Prometheus remotewrite.Config  `yaml:"prometheus"`
	Loki       loki.Config         `yaml:"loki"`
	// Report is how often a line with the state is printed; 0 for never.
	Report time.Duration `yaml:"report_interval"`
}

func defaultUp() upConfig {
	s := sink.DefaultConfig()
	c := upConfig{
		Config: proc.DefaultConfig(9660), DataDir: "penstock-data", Instance: edge.DefaultConfig().Instance, Receive: receive.DefaultConfig(),
		Streams: s.Streams, Sampling: s.Sampling, Prometheus: s.Backends.Prometheus, Loki: s.Backends.Loki, Report: 5 * time.Second,
	}
	c.NATS.Listen = "127.0.0.1:4222"
	c.Instance.ID = "local"
	return c
}

func (c *upConfig) Process() *proc.Config { return &c.Config }

// ApplyEnv takes the variables of all roles but those that say where the hub is.
func (c *upConfig) ApplyEnv(getenv func(string) string) {
	e, s := c.edge(), c.sink()
	e.ApplyEnv(getenv)
	s.ApplyEnv(getenv)
	c.Instance, c.Tempo, c.Prometheus, c.Loki = e.Instance, s.Backends.Tempo, s.Backends.Prometheus, s.Backends.Loki
}

func (c *upConfig) Validate() error {
	e, r, s := c.edge(), c.router(), c.sink()
	var errs []error
	if c.DataDir == "" {
		errs = append(errs, errors.New("data_dir is not set"))
	}
	if _, _, err := net.SplitHostPort(c.NATS.Listen); err != nil {
		errs = append(errs, fmt.Errorf("nats.listen: %w", err))
	}
	return errors.Join(append(errs, e.Validate(), r.Validate(), s.Validate())...)
}

func (c *upConfig) edge() edge.Config {
	e := edge.DefaultConfig()
	e.Instance, e.Receive = c.Instance, c.Receive
	e.Spool.Dir = filepath.Join(c.DataDir, "spool")
	return e
}

func (c *upConfig) router() router.Config {
	r := router.DefaultConfig()
	r.Streams = c.Streams
	return r
}

func (c *upConfig) sink() sink.Config {
	s := sink.DefaultConfig()
	s.Streams, s.Sampling = c.Streams, c.Sampling
	s.Backends.Tempo, s.Backends.Prometheus, s.Backends.Loki = c.Tempo, c.Prometheus, c.Loki
	s.Backends.File.Dir = c.DataDir
	s.Drain, s.DrainTraces = drain, true
	return s
}

// drain is how long Ctrl-C waits for decisions and backends. What is not
// delivered by then stays on disk and is delivered after the next start.
const drain = 15 * time.Second

const aboutUp = `Runs edge, hub, router and sink in this process. Send OTLP to 127.0.0.1:4317
(gRPC) or :4318 (HTTP). Without a backend, traces.jsonl, metrics.jsonl and
logs.jsonl appear in the data directory. Ctrl-C drains; nothing is lost.`

func up(args []string) int {
	cfg := defaultUp()
	return proc.Command{
		Name: "penstock up", About: aboutUp, Settings: &cfg,
		Flags: func(fs *flag.FlagSet) {
			fs.StringVar(&cfg.DataDir, "data-dir", cfg.DataDir, "`directory` of spool, hub and files")
			fs.StringVar(&cfg.Instance.ID, "instance-id", cfg.Instance.ID, "instance.id of this machine")
			fs.StringVar(&cfg.Tempo.Endpoint, "tempo-endpoint", "", "Tempo's OTLP/gRPC `endpoint`, host:4317")
			fs.StringVar(&cfg.Prometheus.URL, "prometheus-url", "", "Prometheus with remote_write receiver, `http://host:9090`")
			fs.StringVar(&cfg.Loki.URL, "loki-url", "", "Loki, `http://host:3100`")
			fs.StringVar(&cfg.Sampling.File, "sampling.file", "", "the collector's tail_sampling configuration, a YAML `file`")
		},
		Build: func(p *proc.Process) ([]proc.Stage, error) { return buildUp(p, &cfg) },
	}.Main(args)
}

// buildUp puts the roles together: the stages of cmd/sink, cmd/router and
// cmd/edge, in this order, around an embedded hub.
func buildUp(p *proc.Process, cfg *upConfig) ([]proc.Stage, error) {
	hub := &embeddedHub{cfg: broker.Config{
		Name: "hub", Dir: filepath.Join(cfg.DataDir, "hub"), Listen: cfg.NATS.Listen, Sync: true, MaxPayload: 8 << 20,
	}, p: p}
	e, r, s := cfg.edge(), cfg.router(), cfg.sink()
	e.Hub, r.Hub, s.Hub = bus.Config{InProcess: hub}, bus.Config{InProcess: hub}, bus.Config{InProcess: hub}
	var stages []proc.Stage
	if cfg.Report > 0 { // first to start, last to stop: its last line is the end
		stages = append(stages, proc.Stage{Name: "report", Service: proc.Service(func(ctx context.Context) error {
			return report(ctx, os.Stdout, p.Registry, cfg.Report)
		})})
	}
	stages = append(stages, proc.Stage{Name: "hub", Service: hub.service()})
	add := func(role string, more []proc.Stage, err error) error {
		for _, st := range more {
			stages = append(stages, proc.Stage{Name: role + " " + st.Name, Service: st.Service})
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

// embeddedHub is the hub in this process, there from the start of its stage on.
type embeddedHub struct {
	cfg    broker.Config
	p      *proc.Process
	broker *broker.Broker
}

func (h *embeddedHub) service() services.Service {
	return services.NewIdleService(func(context.Context) (err error) {
		h.broker, err = broker.Start(h.cfg, h.p.Log)
		return err
	}, func(error) error {
		if h.broker != nil {
			h.broker.Stop()
		}
		return nil
	})
}

// InProcessConn connects to the hub.
func (h *embeddedHub) InProcessConn() (net.Conn, error) { return h.broker.InProcessConn() }

// report prints one line that a person can read, every interval and at the end.
func report(ctx context.Context, w *os.File, reg prometheus.Gatherer, every time.Duration) error {
	var before totals
	last := time.Now()
	for {
		goOn := proc.Sleep(ctx, every)
		now, t := time.Now(), total(reg)
		rate := (t.in - before.in) / now.Sub(last).Seconds()
		fmt.Fprintf(w, "%s  in %.0f (%.0f/s)  kept %.0f spans  sampled out %.0f  delivered %.0f  dead %.0f  lag %.0f messages\n",
			now.Format(time.TimeOnly), t.in, rate, t.kept, t.sampledOut, t.delivered, t.dead, t.lag)
		if before, last = t, now; !goOn {
			return nil
		}
	}
}

type totals struct{ in, kept, sampledOut, delivered, dead, lag float64 }

// total adds up the ledger over signals.
func total(reg prometheus.Gatherer) (t totals) {
	families, err := reg.Gather()
	if err != nil {
		return t
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			v := m.GetCounter().GetValue() + m.GetGauge().GetValue()
			switch f.GetName() {
			case "penstock_accepted_items_total":
				t.in += v
			case "penstock_sampled_out_items_total":
				t.sampledOut += v
			case "penstock_dead_lettered_items_total":
				t.dead += v
			case "penstock_lane_lag_messages":
				t.lag += v
			case "penstock_delivered_items_total":
				t.delivered += v
				for _, l := range m.GetLabel() {
					if l.GetName() == "signal" && l.GetValue() == "traces" {
						t.kept += v
					}
				}
			}
		}
	}
	return t
}
