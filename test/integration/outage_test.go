package integration

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/loki"
	"github.com/penstock/penstock/test/backend/tempo"
)

// outage is how long the hub is away.
func outage() time.Duration {
	if testing.Short() {
		return 5 * time.Second
	}
	return 60 * time.Second
}

// numbered makes a request whose only item carries the number n.
func numbered(sig otlpwire.Signal, n int) proto.Message {
	name, now := strconv.Itoa(n), uint64(time.Now().UnixNano())
	switch sig {
	case otlpwire.Traces:
		var trace [16]byte
		var span [8]byte
		binary.BigEndian.PutUint64(trace[:], uint64(n)+1)
		binary.BigEndian.PutUint64(span[:], uint64(n)+1)
		return &tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{{TraceId: trace[:], SpanId: span[:], Name: name, StartTimeUnixNano: now, EndTimeUnixNano: now}}}}}}}
	case otlpwire.Metrics:
		return &metricspb.MetricsData{ResourceMetrics: []*metricspb.ResourceMetrics{{ScopeMetrics: []*metricspb.ScopeMetrics{{Metrics: []*metricspb.Metric{{Name: "n", Data: &metricspb.Metric_Gauge{Gauge: &metricspb.Gauge{DataPoints: []*metricspb.NumberDataPoint{{TimeUnixNano: now, Value: &metricspb.NumberDataPoint_AsInt{AsInt: int64(n)}}}}}}}}}}}}
	}
	return &logspb.LogsData{ResourceLogs: []*logspb.ResourceLogs{{ScopeLogs: []*logspb.ScopeLogs{{LogRecords: []*logspb.LogRecord{{TimeUnixNano: now, Body: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: name}}}}}}}}}
}

// post sends one request over OTLP/HTTP and returns nil when it was accepted.
func post(ctx context.Context, addr string, sig otlpwire.Signal, m proto.Message) error {
	body, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+"/v1/"+sig.String(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-protobuf")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	return nil
}

// TestHubAwayUnderLoad stops the hub under load and starts it again: nothing
// acknowledged is missing, and the order per instance and signal is kept.
func TestHubAwayUnderLoad(t *testing.T) {
	t.Parallel()
	tmp, lok := tempo.Start(t), loki.Start(t)
	var dir string
	p := startPipeline(t, func(c *sink.Config) {
		c.Tempo.Endpoint, c.Loki.URL, dir = tmp.Addr, lok.URL, c.File.Dir
	})
	instances := []string{"as-1", "as-2"}
	var edges []*edgeAddrs
	for _, id := range instances {
		edges = append(edges, p.startEdge(t, edge.InstanceConfig{ID: id}))
	}

	ctx, stopLoad := context.WithCancel(t.Context())
	defer stopLoad()
	var wg sync.WaitGroup
	acked := map[string][]int{} // by instance and signal, in the order of the answers
	var mu sync.Mutex
	for i, e := range edges {
		for _, sig := range otlpwire.Signals {
			wg.Go(func() {
				pace := time.NewTicker(25 * time.Millisecond)
				defer pace.Stop()
				for n := 0; ctx.Err() == nil; n++ {
					<-pace.C
					if err := post(context.Background(), e.http, sig, numbered(sig, n)); err != nil {
						t.Errorf("%s %v %d: %v: the edge must take data while the hub is away", instances[i], sig, n, err)
						return
					}
					mu.Lock()
					acked[instances[i]+" "+sig.String()] = append(acked[instances[i]+" "+sig.String()], n)
					mu.Unlock()
				}
			})
		}
	}
	load := func(d time.Duration) { <-time.After(d) }
	eventually(t, 120*time.Second, "something is delivered before the outage", func() error {
		if count(t, otlpwire.Logs, "penstock_delivered_items_total", p.sink) == 0 {
			return errors.New("nothing yet")
		}
		return nil
	})
	p.hub.stop()
	load(outage())
	p.hub.start(t)
	load(2 * time.Second)
	stopLoad()
	wg.Wait()
	complete(t, acked, func() map[string][]int { return arrivals(t, tmp, lok, dir) })
}

// complete waits until everything acknowledged has arrived, by instance and signal, and wants its
// order kept.
func complete(t *testing.T, acked map[string][]int, arrivals func() map[string][]int) {
	t.Helper()
	// A slow machine takes its time; what does not go on at all is a stall or a loss.
	goesOn(t, time.Minute, "everything acknowledged has arrived", func() (sum int, err error) {
		got := arrivals()
		for key, want := range acked {
			n := distinct(got[key])
			if sum += n; n < len(want) {
				err = fmt.Errorf("%s: %d of %d", key, n, len(want))
			}
		}
		return sum, err
	})

	got := arrivals()
	for key, want := range acked {
		seen, last, disorder := map[int]int{}, map[int]int{}, 0
		for _, n := range got[key] {
			if seen[n]++; seen[n] > 1 {
				continue
			}
			l := lane(key, n)
			if n < last[l] {
				disorder++
			}
			last[l] = max(last[l], n)
		}
		missing := 0
		for _, n := range want {
			if seen[n] == 0 {
				missing++
			}
		}
		t.Logf("%s: %d acknowledged, %d arrived, %d missing, %d out of order, %d twice", key, len(want), len(seen), missing, disorder, len(got[key])-len(seen))
		if missing > 0 {
			t.Errorf("%s: %d of %d acknowledged items are missing", key, missing, len(want))
		}
		if disorder > 0 {
			t.Errorf("%s: %d items are out of order", key, disorder)
		}
	}
}

func distinct(ns []int) int {
	seen := map[int]bool{}
	for _, n := range ns {
		seen[n] = true
	}
	return len(seen)
}

// lane returns what an item is ordered with: traces are spread over partitions,
// each a stream of its own.
func lane(key string, n int) int {
	instance, isTraces := strings.CutSuffix(key, " traces")
	if !isTraces {
		return 0
	}
	var id otlpwire.TraceID
	binary.BigEndian.PutUint64(id[:], uint64(n)+1)
	return (partition.Spread{N: bus.DefaultTopology().Partitions}).Of(instance, id)
}

// arrivals lists the numbers that reached the backends, by instance and signal.
func arrivals(t *testing.T, tmp *tempo.Server, lok *loki.Server, dir string) map[string][]int {
	got := map[string][]int{}
	add := func(instance, sig, text string) {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatalf("%s %s: %v", instance, sig, err)
		}
		got[instance+" "+sig] = append(got[instance+" "+sig], n)
	}
	for _, s := range tmp.Spans() {
		add(s.Attribute("instance.id"), "traces", s.Span.GetName())
	}
	for _, e := range lok.Entries() {
		add(e.Labels["instance_id"], "logs", e.Line)
	}
	f, err := os.Open(filepath.Join(dir, "metrics.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var req metricsLine
		if json.Unmarshal(lines.Bytes(), &req) != nil {
			continue // being written right now
		}
		for _, rm := range req.ResourceMetrics {
			for _, sm := range rm.ScopeMetrics {
				for _, m := range sm.Metrics {
					add(rm.instance(), "metrics", m.Gauge.DataPoints[0].AsInt)
				}
			}
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return got
}

// metricsLine is what the test reads of a line of metrics.jsonl.
type metricsLine struct {
	ResourceMetrics []metricsResource
}

type metricsResource struct {
	Resource struct {
		Attributes []struct {
			Key   string
			Value struct{ StringValue string }
		}
	}
	ScopeMetrics []struct {
		Metrics []struct {
			Gauge struct {
				DataPoints []struct{ AsInt string }
			}
		}
	}
}

func (r metricsResource) instance() string {
	for _, a := range r.Resource.Attributes {
		if a.Key == "instance.id" {
			return a.Value.StringValue
		}
	}
	return fmt.Sprintf("none in %v", r.Resource.Attributes)
}
