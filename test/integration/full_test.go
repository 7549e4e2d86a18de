package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend"
	"github.com/penstock/penstock/test/backend/loki"
	"github.com/penstock/penstock/test/backend/tempo"
)

const requestBytes = 60_000 // Loki takes 64 kB of metadata

// large is a numbered request of about requestBytes that no compression makes smaller.
func large(sig otlpwire.Signal, n int) proto.Message {
	noise := make([]byte, requestBytes)
	for i := range noise {
		noise[i] = '!' + byte(rand.IntN(90))
	}
	resource := &resourcepb.Resource{Attributes: []*commonpb.KeyValue{{Key: "noise", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: string(noise)}}}}}
	m := numbered(sig, n)
	switch m := m.(type) {
	case *tracepb.TracesData:
		m.ResourceSpans[0].Resource = resource
	case *logspb.LogsData:
		m.ResourceLogs[0].Resource = resource
	}
	return m
}

// TestBackendsAwayUntilAllIsFull: Tempo and Loki are away until SPANS, TRACES, LOGS and the edge's
// spool are full, one after the other, and the edge refuses. Routers and sinks are restarted
// meanwhile. Everything that was acknowledged arrives when the backends are back, in
// order, and then there is room again.
func TestBackendsAwayUntilAllIsFull(t *testing.T) {
	t.Parallel()
	p := &pipeline{streams: bus.DefaultTopology()}
	p.log, p.text = newLog(t)
	p.hub = startHub(t, p.log)
	backendsAway(t, p, 32<<20, func() {})
}

// TestBackendsAwayUntilThreeServersAreFull: of a hub of three, whose streams hold a quarter, one server
// ends meanwhile.
func TestBackendsAwayUntilThreeServersAreFull(t *testing.T) {
	servers, urls := startCluster(t)
	p := &pipeline{streams: bus.DefaultTopology(), hub: &hub{url: urls}, password: password}
	p.streams.Partitions, p.streams.Replicas = 2, 3
	p.log, p.text = newLog(t)
	const bound = 8 << 20
	openAs(t, urls, "router", p.streams) // makes them
	js := p.hub.jetStream(t, nats.UserInfo("admin", password))
	for name, bytes := range map[string]int64{"TRACES": bound, "LOGS": bound, bus.Spans: bound / 2} {
		lower(t, js, name, bytes)
	}
	backendsAway(t, p, bound, func() {
		servers[0].Shutdown()
		servers[0].WaitForShutdown()
	})
}

// backendsAway tries that on a hub whose TRACES and LOGS hold so many bytes; meanwhile is what else happens.
func backendsAway(t *testing.T, p *pipeline, bound int, meanwhile func()) {
	t.Helper()
	tmp, lok := tempo.Start(t), loki.Start(t)
	p.streams.MaxBytes = 32 << 20 // where they are not there
	var dir string
	startSink := func() {
		p.startSink(t, func(c *sink.Config) {
			if dir == "" {
				dir = c.File.Dir
			}
			c.Streams, c.Tempo.Endpoint, c.Loki.URL, c.File.Dir = p.streams, tmp.Addr, lok.URL, dir
			c.Drain = time.Second
		})
	}
	p.startRouter(t)
	startSink()
	e := startEdgeWith(t, p.log, p.hub.url, t.TempDir(), edge.InstanceConfig{ID: "as-1"}, func(c *edge.Config) {
		c.Hub, c.Spool.MaxBytes = p.credential("edge-as-1"), 16<<20
	})
	tmp.Fail(status.Error(codes.Unavailable, "away"))
	lok.Fail(http.StatusServiceUnavailable)

	signals := []otlpwire.Signal{otlpwire.Traces, otlpwire.Logs}
	acked := map[string][]int{}
	var mu sync.Mutex
	// fill sends until the edge refuses for good, and returns how much it took.
	fill := func() (took int) {
		var wg sync.WaitGroup
		for _, sig := range signals {
			key := "as-1 " + sig.String()
			wg.Go(func() {
				n := len(acked[key])
				pace := time.NewTicker(100 * time.Millisecond)
				defer pace.Stop()
				for refused := 0; refused < 40 && n < 2000; {
					switch err := post(context.Background(), e.http, sig, large(sig, n)); {
					case err == nil:
						mu.Lock()
						acked[key] = append(acked[key], n)
						took++
						mu.Unlock()
						n, refused = n+1, 0
					case strings.HasPrefix(err.Error(), "503"):
						refused++
						<-pace.C // a sender does not come again at once
					default:
						t.Errorf("%v %d: %v", sig, n, err)
						return
					}
				}
			})
		}
		wg.Wait()
		return took
	}
	first := fill()
	for _, sig := range signals {
		if n := len(acked["as-1 "+sig.String()]); n*requestBytes < bound {
			t.Errorf("%d requests of %v were taken, less than the stream alone holds", n, sig)
		}
	}
	for stream, most := range map[string]float64{bus.Spans: float64(bound / 2), "TRACES": float64(bound), "LOGS": float64(bound)} {
		eventually(t, 30*time.Second, "the keeper tells of "+stream, func() error {
			if owed := p.gauge(t, "penstock_stream_owed_bytes", stream); owed < most*3/4 {
				return fmt.Errorf("%v bytes are owed", owed)
			}
			return nil
		})
	}
	p.router.stop()
	p.sink.stop()
	meanwhile()
	p.startRouter(t)
	startSink()
	again := fill()
	t.Logf("%d requests were taken, %d more behind a restart", first, again)
	if again > first/4 {
		t.Errorf("behind a restart there is room for %d requests, of %d before", again, first)
	}
	tmp.Fail(nil)
	lok.Fail(0)
	complete(t, acked, func() map[string][]int {
		got := map[string][]int{}
		add := func(sig, text string) {
			n, err := strconv.Atoi(text)
			if err != nil {
				t.Fatal(err)
			}
			got["as-1 "+sig] = append(got["as-1 "+sig], n)
		}
		for _, s := range tmp.Spans() {
			add("traces", s.Span.GetName())
		}
		for _, e := range lok.Entries() {
			add("logs", e.Line)
		}
		return got
	})
	eventually(t, time.Minute, "the streams have room", func() error {
		if room := p.gauge(t, "penstock_stream_room_bytes", "LOGS"); room < float64(bound*3/4) {
			return fmt.Errorf("%v bytes", room)
		}
		return nil
	})
	for _, sig := range signals {
		eventually(t, time.Minute, "the edge takes data", func() error {
			return post(context.Background(), e.http, sig, numbered(sig, 5000))
		})
	}
}

// TestTheNextSinkKeeps: of three sinks one is the keeper. When it is killed the next one is, soon.
func TestTheNextSinkKeeps(t *testing.T) {
	t.Parallel()
	log, _ := newLog(t)
	hub := startHub(t, log)
	sinks, admins := map[string]*process{}, map[string]string{}
	for _, name := range []string{"a", "b", "c"} {
		admins[name] = backend.FreeAddr(t)
		config := writeFile(t, "sink.yaml", fmt.Sprintf("admin: {listen: %q}\nhub: {url: %q}\nmember: %s\nfile: {dir: %q}\nstreams: {partitions: 1}\n", admins[name], hub.url, name, t.TempDir()))
		sinks[name] = run(t, nil, "sink", "-config.file", config)
	}
	keeps := func(want string) {
		t.Helper()
		begin := time.Now()
		eventually(t, 60*time.Second, want+" is the keeper", func() error {
			for name := range sinks {
				var page string
				if err := get("http://"+admins[name]+"/metrics", &page); err != nil {
					return err
				}
				if is := strings.Contains(page, "\npenstock_keeper 1\n"); is != (name == want) {
					return fmt.Errorf("%s: %v", name, is)
				}
			}
			return nil
		})
		t.Logf("%s is the only keeper after %v", want, time.Since(begin).Truncate(100*time.Millisecond))
	}
	keeps("a")
	for _, next := range []string{"b", "c"} {
		name := string(rune(next[0] - 1))
		sinks[name].kill(t)
		delete(sinks, name)
		keeps(next)
	}
}
