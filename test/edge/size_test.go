package edge

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	collectortrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/test/daemon"
)

// What the edge may take beside an application server (issue: the edge keeps its word).
const (
	maxIdle   = 45 << 20 // bytes of memory, idle
	maxBusy   = 120 << 20
	maxBinary = 45e6 // bytes of the file, stripped

	busyRate = 10_000 // spans a second
	busyFor  = 20 * time.Second
)

// TestSize measures memory idle and at 10,000 spans a second, goroutines before and
// after, and the stripped binary.
func TestSize(t *testing.T) {
	stripped := filepath.Join(t.TempDir(), "edge")
	build := exec.Command("go", "build", "-C", "../..", "-trimpath", "-ldflags", "-s -w", "-o", stripped, "./cmd/edge")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	st, err := os.Stat(stripped)
	if err != nil {
		t.Fatal(err)
	}
	hub := startHub(t)
	e := newEdge(t, hub, t.TempDir(), "memory_limiter: {limit_mib: 100}\nspool: {dir: "+strconv.Quote(t.TempDir())+", disk_reserve: 1MiB}\n")
	e.Args[0] = stripped
	e.start()
	e.sendAll(1)
	idle := e.resident()
	goroutines := e.gauge("go_goroutines")

	const perRequest = 100
	tick := time.NewTicker(time.Second * perRequest / busyRate)
	defer tick.Stop()
	sent, busy := 0, 0
	for end := time.Now().Add(busyFor); time.Now().Before(end); {
		<-tick.C
		res, err := client.Post("http://"+e.http+"/v1/traces", "application/x-protobuf", bytes.NewReader(spans(perRequest)))
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != http.StatusOK {
			t.Fatalf("answered %s", res.Status)
		}
		if sent += perRequest; sent%busyRate == 0 {
			busy = max(busy, e.resident())
		}
	}
	if err := daemon.Until(t.Context(), 30*time.Second, func() error {
		if got := metric(t, e, "penstock_forwarded_items_total", otlpwire.Traces); got != strconv.Itoa(sent) {
			return fmt.Errorf("%s of %d spans forwarded", got, sent)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	client.CloseIdleConnections()
	var after int
	if err := daemon.Until(t.Context(), 30*time.Second, func() error {
		if after = e.gauge("go_goroutines"); after > goroutines+goroutines/10 {
			return fmt.Errorf("%d goroutines, %d before", after, goroutines)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	t.Logf("binary %.1f MB; memory idle %.1f MiB, at %.0f spans/s up to %.1f MiB; goroutines %d before, %d after",
		float64(st.Size())/1e6, float64(idle)/(1<<20), float64(sent)/busyFor.Seconds(), float64(busy)/(1<<20), goroutines, after)
	if st.Size() > maxBinary || idle > maxIdle || busy > maxBusy {
		t.Errorf("want at most %.0f MB, %d MiB and %d MiB", maxBinary/1e6, maxIdle>>20, maxBusy>>20)
	}
}

// resident returns the memory of the process in bytes.
func (e *edge) resident() int {
	e.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", e.PID()))
	if err != nil {
		e.t.Skipf("SKIPPED: %v", err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "VmRSS:" {
			kb, _ := strconv.Atoi(f[1])
			return kb << 10
		}
	}
	e.t.Fatal("no VmRSS")
	return 0
}

func (e *edge) gauge(name string) int {
	e.t.Helper()
	v, err := daemon.Metric(e.admin, name)
	if err != nil {
		e.t.Fatal(err)
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		e.t.Fatal(err)
	}
	return n
}

// spans makes a request of n spans with ten attributes each, half a kilobyte a span.
func spans(n int) []byte {
	scope := &tracepb.ScopeSpans{}
	now := uint64(time.Now().UnixNano())
	for range n {
		var ids [24]byte
		_, _ = rand.Read(ids[:])
		sp := &tracepb.Span{TraceId: ids[:16], SpanId: ids[16:], Name: "GET /api/orders/{id}", Kind: tracepb.Span_SPAN_KIND_SERVER, StartTimeUnixNano: now, EndTimeUnixNano: now + 1e6}
		for i := range 10 {
			sp.Attributes = append(sp.Attributes, &commonpb.KeyValue{Key: fmt.Sprintf("app.attribute.%d", i), Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: fmt.Sprintf("value %x", ids[i:i+8])}}})
		}
		scope.Spans = append(scope.Spans, sp)
	}
	body, err := proto.Marshal(&collectortrace.ExportTraceServiceRequest{ResourceSpans: []*tracepb.ResourceSpans{{
		Resource: &resourcepb.Resource{Attributes: []*commonpb.KeyValue{{Key: "service.name", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: "orders"}}}}}, ScopeSpans: []*tracepb.ScopeSpans{scope},
	}}})
	if err != nil {
		panic("BUG: a request of our own: " + err.Error())
	}
	return body
}
