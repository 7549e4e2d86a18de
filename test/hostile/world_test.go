// Package hostile attacks a hub with what an edge's credential, or that of a replay, of a
// router or a gateway's token, allows: a real nats-server with the files of deploy/nats, and
// real router, sink, gateway and edge. The attacker speaks NATS over a socket, for client
// libraries refuse much of it, and HTTP.
//
// After every attack the data of others, sent before, during and after it, is at the
// backends, floors have moved, and nothing but the attacker's own instance has changed.
package hostile

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/router"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/loki"
	"github.com/penstock/penstock/test/backend/tempo"
	"github.com/penstock/penstock/test/daemon"
)

const (
	password   = "test-password-of-every-user"
	partitions = 2

	// patience is how long a victim's data may take on a machine that has other work; the
	// slowest is shown.
	patience = 90 * time.Second

	// What an attack may make the log grow by.
	maxLog = 100 << 10
)

// world is a hub with its roles, a victim and backends.
type world struct {
	t       *testing.T
	addr    string // of nats-server
	gateway string // HTTP
	token   string // of the attacker, at the gateway
	edge    string // HTTP, the victim's
	tempo   *tempo.Server
	loki    *loki.Server
	metrics string // the file
	admin   jetstream.JetStream
	log     *logtest.Log

	sent   int           // of each signal, by the victim
	victim time.Duration // what its data took at the last check
}

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, log: new(logtest.Log), tempo: tempo.Start(t), loki: loki.Start(t)}
	t.Cleanup(func() {
		if text := w.log.String(); t.Failed() {
			t.Logf("log of the roles:\n%s", text[max(0, len(text)-16<<10):])
		}
	})
	url := w.serve()
	log := w.log.Logger(slog.LevelInfo)
	topology := bus.DefaultTopology()
	topology.Partitions, topology.MaxBytes = partitions, 256<<20

	rc := router.DefaultConfig()
	rc.Hub, rc.Streams, rc.Admin.Listen, rc.Member = bus.Config{URL: url, User: "router", Pass: password}, topology, "", "r1"
	rc.Gateway.GRPC.Listen, rc.Gateway.HTTP.Listen = daemon.FreeAddr(), daemon.FreeAddr()
	w.gateway = rc.Gateway.HTTP.Listen
	dir := t.TempDir()
	rc.Gateway.TokensFile = filepath.Join(dir, "tokens.yaml")
	out := must[[]byte](t)(exec.Command(w.penstock(), "token", "-instance-id", "as-1", "-customer-id", "evil", "-file", rc.Gateway.TokensFile).CombinedOutput())
	w.token = regexp.MustCompile(`token \(shown once\): (\S+)`).FindStringSubmatch(string(out))[1]
	rp := app.NewProcess(log.With("role", "router"), &rc)
	stages, err := router.Build(rp, rc)
	w.start(rp, stages, err)

	sc := sink.DefaultConfig()
	sc.Hub, sc.Streams, sc.Admin.Listen, sc.Member = bus.Config{URL: url, User: "sink", Pass: password}, topology, "", "s1"
	sc.Tempo.Endpoint, sc.Loki.URL, sc.File.Dir = w.tempo.Addr, w.loki.URL, dir
	sc.Tempo.Tenant.From, sc.Loki.Tenant.From = "instance", "instance"
	sc.Sampling.MaxBytes = 8 << 20
	sc.Sampling.File = filepath.Join(dir, "sampling.yaml")
	if err := os.WriteFile(sc.Sampling.File, []byte("decision_wait: 1s\npolicies: [{name: all, type: always_sample}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.metrics = filepath.Join(dir, "metrics.jsonl")
	sp := app.NewProcess(log.With("role", "sink"), &sc)
	stages, err = sink.Build(sp, sc)
	w.start(sp, stages, err)

	ec := edge.DefaultConfig()
	ec.Instance.ID, ec.Admin.Listen = "as-2", ""
	ec.Hub = bus.Config{URL: url, User: "edge-as-2", Pass: password}
	ec.Spool.Dir, ec.Spool.Reserve = t.TempDir(), 1<<20
	ec.Receive.GRPC.Listen, ec.Receive.HTTP.Listen = daemon.FreeAddr(), daemon.FreeAddr()
	w.edge = ec.Receive.HTTP.Listen
	ep := app.NewProcess(log.With("role", "edge"), &ec)
	stages, err = edge.Build(ep, ec)
	w.start(ep, stages, err)

	nc := must[*nats.Conn](t)(nats.Connect(url, nats.UserInfo("admin", password)))
	t.Cleanup(nc.Close)
	w.admin = must[jetstream.JetStream](t)(jetstream.New(nc))
	return w
}

var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "penstock-bin-")
	if err == nil {
		err = daemon.Build(context.Background(), dir, "", "penstock")
	}
	return dir, err
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := binaries(); err == nil {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

func (w *world) penstock() string { return filepath.Join(must[string](w.t)(binaries()), "penstock") }

// serve starts the server of deploy/nats with a second instance, which penstock nats-config
// adds; its passwords are replaced by that of the test.
func (w *world) serve() (url string) {
	t := w.t
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("../../deploy/nats")); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"add-instance", "as-2", "-dir", dir}, {"ca", "-dir", dir, "-host", "127.0.0.1"}} {
		if out, err := exec.Command(w.penstock(), append([]string{"nats-config"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	file := filepath.Join(dir, "instances", "as-2.conf")
	text := must[[]byte](t)(os.ReadFile(file))
	text = regexp.MustCompile(`password: "[^"]*"`).ReplaceAll(text, []byte("password: "+password))
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"NATS_ADMIN_PASSWORD": password, "ROUTER_PASSWORD": password, "SINK_PASSWORD": password, "OPERATOR_PASSWORD": password,
		"EDGE_AS_1_PASSWORD": password, "REPLAY_AS_1_PASSWORD": password,
		"NATS_TLS_CERT": filepath.Join(dir, "server.crt"), "NATS_TLS_KEY": filepath.Join(dir, "server.key"),
	} {
		t.Setenv(name, value)
	}
	opts := must[*server.Options](t)(server.ProcessConfigFile(filepath.Join(dir, "nats-server.conf")))
	opts.Host, opts.Port, opts.HTTPPort, opts.StoreDir, opts.TLS, opts.TLSConfig, opts.NoLog, opts.NoSigs = "127.0.0.1", server.RANDOM_PORT, 0, t.TempDir(), false, nil, true, true
	s := must[*server.Server](t)(server.NewServer(opts))
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(30 * time.Second) {
		t.Fatal("nats-server is not ready")
	}
	w.addr = s.Addr().String()
	return s.ClientURL()
}

// start runs a role until the end of the test.
func (w *world) start(p *app.Process, stages []app.Stage, err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- app.Run(ctx, p.Log, stages) }()
	w.t.Cleanup(func() {
		cancel()
		<-done //nolint:errcheck // that it was stopped
	})
	w.until("the stages run", func() error {
		for _, s := range stages {
			if st := s.State().String(); st != "Running" {
				return fmt.Errorf("%s is %s", s.Name, st)
			}
		}
		return nil
	})
}

func (w *world) until(what string, ok func() error) {
	w.t.Helper()
	if err := daemon.Until(w.t.Context(), patience, ok); err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
}

// item is number n of a signal.
func item(sig otlpwire.Signal, n int, at time.Time) proto.Message {
	name, now := "n"+strconv.Itoa(n), uint64(at.UnixNano())
	switch sig {
	case otlpwire.Traces:
		var trace [16]byte
		binary.BigEndian.PutUint64(trace[8:], uint64(n)+1)
		return &tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{{TraceId: trace[:], SpanId: trace[8:], Name: name, StartTimeUnixNano: now, EndTimeUnixNano: now}}}}}}}
	case otlpwire.Metrics:
		return &metricspb.MetricsData{ResourceMetrics: []*metricspb.ResourceMetrics{{ScopeMetrics: []*metricspb.ScopeMetrics{{Metrics: []*metricspb.Metric{{Name: name, Data: &metricspb.Metric_Gauge{Gauge: &metricspb.Gauge{DataPoints: []*metricspb.NumberDataPoint{{TimeUnixNano: now, Value: &metricspb.NumberDataPoint_AsInt{AsInt: int64(n)}}}}}}}}}}}}
	}
	return &logspb.LogsData{ResourceLogs: []*logspb.ResourceLogs{{ScopeLogs: []*logspb.ScopeLogs{{LogRecords: []*logspb.LogRecord{{TimeUnixNano: now, Body: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: name}}}}}}}}}
}

func payload(sig otlpwire.Signal, n int, at time.Time) []byte {
	b, _ := proto.Marshal(item(sig, n, at)) // cannot fail
	return b
}

// sendVictim sends one more item of each signal through the victim's edge.
func (w *world) sendVictim() {
	w.t.Helper()
	for _, sig := range otlpwire.Signals {
		res, err := http.Post("http://"+w.edge+"/v1/"+sig.String(), "application/x-protobuf", bytes.NewReader(payload(sig, w.sent, time.Now())))
		if err != nil {
			w.t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != http.StatusOK {
			w.t.Fatalf("the victim's edge: %s", res.Status)
		}
	}
	w.sent++
}

// arrived looks for everything that the victim has sent.
func (w *world) arrived() error {
	spans, lines := map[string]bool{}, map[string]bool{}
	for _, s := range w.tempo.Spans() {
		if s.Attribute("instance.id") == "as-2" {
			spans[s.Span.Name] = true
		}
	}
	for _, e := range w.loki.Entries() {
		if e.Labels["instance_id"] == "as-2" {
			lines[e.Line] = true
		}
	}
	text, err := os.ReadFile(w.metrics)
	if err != nil {
		return err
	}
	points := 0
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, `"as-2"`) {
			points += strings.Count(line, `"asInt"`)
		}
	}
	if len(spans) != w.sent || len(lines) != w.sent || points != w.sent {
		return fmt.Errorf("of %d each: %d spans, %d lines, %d points", w.sent, len(spans), len(lines), points)
	}
	return nil
}

// settled reports whether no lane owes anything.
func (w *world) settled() error {
	for _, stream := range []string{"TRACES", "METRICS", "LOGS", "SPANS"} {
		s, err := w.admin.Stream(w.t.Context(), stream)
		if err != nil {
			return err
		}
		consumers := s.ListConsumers(w.t.Context())
		n := 0
		for info := range consumers.Info() {
			if n++; info.NumPending > 0 || info.NumAckPending > 0 {
				return fmt.Errorf("lane %s of %s: %d pending, %d not acknowledged", info.Name, stream, info.NumPending, info.NumAckPending)
			}
		}
		if err := consumers.Err(); err != nil || n < partitions {
			return fmt.Errorf("%s has %d consumers, %v", stream, n, err)
		}
	}
	return nil
}

// intact reports whether anything in the hub is not as its roles and the victim made it.
func (w *world) intact() error {
	count := func(stream, filter string) (n uint64) {
		s, err := w.admin.Stream(w.t.Context(), stream)
		if err != nil {
			w.t.Fatal(err)
		}
		info, err := s.Info(w.t.Context(), jetstream.WithSubjectFilter(filter))
		if err != nil {
			w.t.Fatal(err)
		}
		for _, messages := range info.State.Subjects {
			n += messages
		}
		return n
	}
	for _, c := range []struct {
		stream, filter string
		want           uint64
	}{
		{"TRACES", "otlp.traces.*.as-2", uint64(w.sent)}, {"METRICS", "otlp.metrics.*.as-2", uint64(w.sent)}, {"LOGS", "otlp.logs.*.as-2", uint64(w.sent)},
		{"DEADLETTER", "dead.*.as-2", 0}, {"AUDIT", "audit.>", 0}, {"REPLAYED", "replayed.>", 0}, {"KV_REPLAYS", "$KV.REPLAYS.>", 0},
		{"KV_POLICIES", "$KV.POLICIES.>", 1}, {"KV_MEMBERS", "$KV.MEMBERS.>", 2}, {"SPANS", "replay.>", 0},
	} {
		if n := count(c.stream, c.filter); n != c.want {
			return fmt.Errorf("%s has %d messages under %s, want %d", c.stream, n, c.filter, c.want)
		}
	}
	streams := w.admin.ListStreams(w.t.Context())
	n := 0
	for range streams.Info() {
		n++
	}
	if n != 14 || streams.Err() != nil {
		return fmt.Errorf("%d streams, %v", n, streams.Err())
	}
	return nil
}

// check sends more of the victim's and waits until all is well; it says what is not.
func (w *world) check(before int) error {
	began := time.Now()
	w.victim = 0
	w.sendVictim()
	var err error
	for _, state := range []struct {
		what string
		ok   func() error
	}{{"the victim's data", w.arrived}, {"the lanes", w.settled}, {"the hub", w.intact}} {
		if err = daemon.Until(w.t.Context(), patience, state.ok); err != nil {
			return fmt.Errorf("%s: %w", state.what, err)
		}
		if w.victim == 0 {
			w.victim = time.Since(began)
		}
	}
	if text := w.log.String()[before:]; len(text) > maxLog {
		return fmt.Errorf("the log has grown by %d bytes:\n%s", len(text), text[:2000])
	}
	var mem runtime.MemStats
	if runtime.ReadMemStats(&mem); mem.HeapAlloc > 1<<30 {
		return fmt.Errorf("%d bytes of heap", mem.HeapAlloc)
	}
	return nil
}
