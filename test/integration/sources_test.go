package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/tempo"
	"github.com/penstock/penstock/test/faultproxy"
)

// TestTwoEdgesOfAnInstance: traces whose error comes through the other edge of their instance, which is cut off from
// the hub for longer than the decision wait: all of them are kept, and whole.
func TestTwoEdgesOfAnInstance(t *testing.T) {
	t.Parallel()
	tmp := tempo.Start(t)
	p := startPipeline(t, func(c *sink.Config) {
		c.Tempo.Endpoint = tmp.Addr
		c.Sampling.File = errorsAfter(t, "2s")
	})
	link, err := faultproxy.Start(strings.TrimPrefix(p.hub.url, "nats://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(link.Close)
	near := p.startEdge(t, edge.InstanceConfig{ID: "as-1"})
	far := startEdge(t, p.log, "nats://"+link.Addr(), t.TempDir(), edge.InstanceConfig{ID: "as-1"})
	const traces = 120
	load := time.NewTicker(100 * time.Millisecond)
	defer load.Stop()
	for n := range traces {
		<-load.C
		switch n {
		case 50: // each partition has had spans of both edges
			link.Set(faultproxy.Fault{DropUp: true, DropDown: true})
		case 75: // after two and a half seconds, more than the wait
			link.Set(faultproxy.Fault{})
			link.Reset()
		}
		err := errors.Join(
			post(t.Context(), near.http, otlpwire.Traces, spanOf(n, 0, false)),
			post(t.Context(), far.http, otlpwire.Traces, spanOf(n, 1, true)),
			post(t.Context(), near.http, otlpwire.Traces, spanOf(n, 2, false)),
		)
		if err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, 20*time.Second, "all traces are kept", func() error {
		missing := map[string]bool{}
		for n := range traces {
			missing[fmt.Sprint(n)] = true
		}
		spans := tmp.Spans()
		for _, sp := range spans {
			delete(missing, sp.Span.GetName())
		}
		if len(spans) < 3*traces {
			return fmt.Errorf("%d of %d spans, nothing of %v", len(spans), 3*traces, slices.Sorted(maps.Keys(missing)))
		}
		return nil
	})
	if n := count(t, otlpwire.Traces, "penstock_sampled_out_items_total", p.sink); n != 0 {
		t.Errorf("%d spans were sampled out", n)
	}
}

// spanOf returns the nth span of a trace, of up to four, whose name is the trace's number.
func spanOf(trace, n int, failed bool) proto.Message {
	now := uint64(time.Now().UnixNano())
	sp := &tracepb.Span{
		TraceId: binary.BigEndian.AppendUint64(make([]byte, 8), uint64(trace+1)), SpanId: binary.BigEndian.AppendUint64(nil, uint64(4*trace+n+1)),
		Name: fmt.Sprint(trace), StartTimeUnixNano: now, EndTimeUnixNano: now, Status: &tracepb.Status{},
	}
	if failed {
		sp.Status.Code = tracepb.Status_STATUS_CODE_ERROR
	}
	return &tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{sp}}}}}}
}
