// Package integration runs whole pipelines with the real nats-server, the
// OpenTelemetry Go SDK as client, the real Prometheus, and the backends of
// test/backend.
package integration

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/router"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend"
)

// newLog is shown when the test fails.
func newLog(t testing.TB) (*slog.Logger, *logtest.Log) {
	b := new(logtest.Log)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of the pipeline:\n%s", tail(b.String(), 16<<10))
		}
	})
	return b.Logger(slog.LevelDebug), b
}

func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

// role is a running edge, router or sink.
type role struct {
	*app.Process
	stop func() // waits
}

// start runs the stages of a role until stop or the end of the test.
func start(t testing.TB, p *app.Process, stages []app.Stage, err error) *role {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- app.Run(ctx, p.Log, stages) }()
	var once sync.Once
	r := &role{Process: p, stop: func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("stop: %v", err)
			}
		})
	}}
	t.Cleanup(r.stop)
	eventually(t, 30*time.Second, "all stages run", func() error {
		for _, s := range stages {
			if st := s.State().String(); st != "Running" {
				select {
				case err := <-done:
					done <- err
					t.Fatalf("stage %s: %s, %v", s.Name, st, err)
				default:
				}
				return fmt.Errorf("%s is %s", s.Name, st)
			}
		}
		return nil
	})
	return r
}

// slow is how many times longer than on an idle machine anything may take here.
const slow = 6

// eventually waits until ok returns nil, on a slow machine for a multiple of patience.
func eventually(t testing.TB, patience time.Duration, what string, ok func() error) {
	t.Helper()
	patience *= slow
	deadline := time.Now().Add(patience)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v: %v", what, patience, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// goesOn waits until ok returns nil, as long as its count grows within patience.
func goesOn(t testing.TB, patience time.Duration, what string, ok func() (int, error)) {
	t.Helper()
	patience *= slow
	most, since := -1, time.Now()
	for {
		n, err := ok()
		if err == nil {
			return
		}
		if n > most {
			most, since = n, time.Now()
		}
		if time.Since(since) > patience {
			t.Fatalf("%s: nothing more in %v: %v", what, patience, err)
		}
		time.Sleep(time.Second) // counting takes time, too
	}
}

// hub is an embedded server on a fixed address that can be stopped and started.
type hub struct {
	cfg    broker.Config
	log    *slog.Logger
	broker *broker.Broker
	url    string
}

func startHub(t testing.TB, log *slog.Logger) *hub {
	t.Helper()
	return startHubWith(t, log, nil)
}

func startHubWith(t testing.TB, log *slog.Logger, configure func(*hub)) *hub {
	t.Helper()
	addr := backend.FreeAddr(t)
	h := &hub{log: log, url: "nats://" + addr, cfg: broker.Config{Name: "hub", Dir: filepath.Join(t.TempDir(), "hub"), Listen: addr, Sync: true, MaxPayload: 8 << 20}}
	if configure != nil {
		configure(h)
	}
	h.start(t)
	t.Cleanup(h.stop)
	return h
}

func (h *hub) start(t testing.TB) {
	t.Helper()
	b, err := broker.Start(h.cfg, h.log)
	if err != nil {
		t.Fatal(err)
	}
	h.broker = b
}

func (h *hub) stop() {
	if h.broker != nil {
		h.broker.Stop()
		h.broker = nil
	}
}

// pipeline is a hub with a router and a sink, and edges on demand.
type pipeline struct {
	hub          *hub
	router, sink *role
	streams      bus.Topology // as the router makes them; zero for the default
	password     string       // of all roles at the hub, whose users are named as they are; empty for none
	log          *slog.Logger
	text         *logtest.Log
}

// startPipeline starts hub, router and sink. configure changes the sink's
// configuration.
func startPipeline(t testing.TB, configure func(*sink.Config)) *pipeline {
	t.Helper()
	p := new(pipeline)
	p.log, p.text = newLog(t)
	p.hub = startHub(t, p.log)
	p.startRouter(t)
	p.startSink(t, configure)
	return p
}

// credential is how a role reaches the hub.
func (p *pipeline) credential(role string) bus.Config {
	cfg := bus.Config{URL: p.hub.url}
	if p.password != "" {
		cfg.User, cfg.Pass = role, config.Secret(p.password)
	}
	return cfg
}

func (p *pipeline) startRouter(t testing.TB) {
	t.Helper()
	rc := router.DefaultConfig()
	rc.Hub = p.credential("router")
	rc.Admin.Listen = ""
	if p.streams.Partitions != 0 {
		rc.Streams = p.streams
	}
	proc := app.NewProcess(p.log.With("role", "router"), &rc)
	stages, err := router.Build(proc, rc)
	p.router = start(t, proc, stages, err)
}

func (p *pipeline) startSink(t testing.TB, configure func(*sink.Config)) {
	t.Helper()
	sc := sink.DefaultConfig()
	sc.Hub = p.credential("sink")
	sc.File.Dir = t.TempDir()
	configure(&sc)
	if err := sc.Validate(); err != nil {
		t.Fatal(err)
	}
	proc := app.NewProcess(p.log.With("role", "sink"), &sc)
	stages, err := sink.Build(proc, sc)
	p.sink = start(t, proc, stages, err)
}

// edgeAddrs are an edge's OTLP addresses.
type edgeAddrs struct {
	*role
	grpc, http string
}

func (p *pipeline) startEdge(t testing.TB, instance edge.InstanceConfig) *edgeAddrs {
	t.Helper()
	return startEdge(t, p.log, p.hub.url, t.TempDir(), instance)
}

func startEdge(t testing.TB, log *slog.Logger, hubURL, dir string, instance edge.InstanceConfig) *edgeAddrs {
	t.Helper()
	return startEdgeWith(t, log, hubURL, dir, instance, func(*edge.Config) {})
}

func startEdgeWith(t testing.TB, log *slog.Logger, hubURL, dir string, instance edge.InstanceConfig, configure func(*edge.Config)) *edgeAddrs {
	t.Helper()
	ec := edge.DefaultConfig()
	ec.Instance = instance
	ec.Hub.URL = hubURL
	ec.Spool.Dir = filepath.Join(dir, "spool")
	ec.Spool.Reserve = 1 << 20
	ec.Receive.GRPC.Listen, ec.Receive.HTTP.Listen = backend.FreeAddr(t), backend.FreeAddr(t)
	ec.Receive.HTTP.CORS.AllowedOrigins = []string{"https://shop.example"}
	configure(&ec)
	if err := ec.Validate(); err != nil {
		t.Fatal(err)
	}
	proc := app.NewProcess(log.With("role", "edge", "edge", instance.ID), &ec)
	stages, err := edge.Build(proc, ec)
	return &edgeAddrs{start(t, proc, stages, err), ec.Receive.GRPC.Listen, ec.Receive.HTTP.Listen}
}

// count adds up a ledger counter over roles, for one signal.
func count(t testing.TB, sig otlpwire.Signal, name string, roles ...*role) (n int) {
	t.Helper()
	for _, r := range roles {
		families, err := r.Registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() != name {
				continue
			}
			for _, m := range f.GetMetric() {
				for _, l := range m.GetLabel() {
					if l.GetName() == "signal" && l.GetValue() == sig.String() {
						n += int(m.GetCounter().GetValue())
					}
				}
			}
		}
	}
	return n
}

// balanced waits until accepted = delivered + sampled out + dead-lettered for
// every signal, which is when nothing is in flight.
func (p *pipeline) balanced(t testing.TB, patience time.Duration, edges ...*edgeAddrs) {
	t.Helper()
	var roles []*role
	for _, e := range edges {
		roles = append(roles, e.role)
	}
	eventually(t, patience, "the ledger balances", func() error {
		for _, sig := range otlpwire.Signals {
			accepted := count(t, sig, "penstock_accepted_items_total", roles...)
			delivered := count(t, sig, "penstock_delivered_items_total", p.sink)
			sampledOut := count(t, sig, "penstock_sampled_out_items_total", p.sink)
			dead := count(t, sig, "penstock_dead_lettered_items_total", p.sink, p.router)
			if accepted == 0 || accepted != delivered+sampledOut+dead {
				return fmt.Errorf("%v: accepted %d, delivered %d, sampled out %d, dead %d", sig, accepted, delivered, sampledOut, dead)
			}
		}
		return nil
	})
}

// finished waits until `penstock audit` says that everything adds up.
func (p *pipeline) finished(t *testing.T) {
	t.Helper()
	eventually(t, 30*time.Second, "everything is finished", func() error {
		if code := run(t, nil, "penstock", "audit", "-hub", p.hub.url).exit(t, time.Minute); code != 0 {
			return fmt.Errorf("penstock audit: exit %d", code)
		}
		return nil
	})
}

// errorsAfter returns a file with policies that keep errors only, decided after a wait.
func errorsAfter(t testing.TB, wait string) string {
	t.Helper()
	return writeFile(t, "errors.yaml", "decision_wait: "+wait+"\npolicies: [{name: errors, type: status_code, status_code: {status_codes: [ERROR]}}]\n")
}

func writeFile(t testing.TB, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(strings.TrimLeft(text, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
