package sink

import (
	"slices"
	"strings"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/sink/policy"
	"github.com/penstock/penstock/pkg/sink/sample"
)

// TestOneInstanceARequest: kept traces of two instances are never in one request, and no
// request of several is larger than maxRequest.
func TestOneInstanceARequest(t *testing.T) {
	s := sample.NewSamplers(policy.KeepAll(time.Second), 1, 64<<20, 0, nil)
	for i, trace := range []struct {
		instance string
		kib      int
	}{{"a", 300}, {"a", 300}, {"a", 300}, {"a", 300}, {"b", 300}, {"c", 2000}, {"c", 1}} {
		payload, _ := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{
			{TraceId: []byte("0123456789abcde" + string(rune('a'+i))), SpanId: []byte("01234567"), Name: strings.Repeat("x", trace.kib<<10)},
		}}}}}})
		if _, err := s.Add(uint64(i+1), envelope.Frame{Instance: trace.instance, Arrival: int64(i + 1), Seq: uint64(i + 1), Payload: payload}); err != nil {
			t.Fatal(err)
		}
	}
	exports := s.Finish().Exports
	slices.SortFunc(exports, func(a, b sample.Export) int { return int(a.Seq) - int(b.Seq) })
	var got []string
	for len(exports) > 0 {
		n, spans, size := together(exports)
		if bytes := len(exports[0].Append(nil)); n == 1 && size != bytes || spans != n {
			t.Errorf("%d traces: %d spans, %d bytes, want %d", n, spans, size, bytes)
		}
		got = append(got, strings.Repeat(exports[0].Instance, n))
		exports = exports[n:]
	}
	if want := []string{"aaa", "a", "b", "c", "c"}; !slices.Equal(got, want) {
		t.Errorf("requests of %q, want %q", got, want)
	}
}
