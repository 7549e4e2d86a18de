package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	collectorlogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	collectormetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// sequence is what an application sends of metrics or logs to one edge: items that are numbered
// from 1, one request at a time, so that their order is known.
type sequence struct {
	sig      otlpwire.Signal
	instance string
	curse    atomic.Bool // a record of the next request is to be cursed

	mu     sync.Mutex
	sent   uint64 // the highest number that may have arrived
	acked  uint64 // all up to here were acknowledged
	acks   []ack  // of its requests, in their order
	lastMS int64  // time of the last point: one of each millisecond
	cursed uint64 // the number of the record that no backend takes; 0: there is none
}

// ack is when all items up to a number had been acknowledged.
type ack struct {
	upTo uint64
	at   time.Time
}

// curse is in an attribute of the record that the backend answers with 500.
const curse = "a curse upon it"

const (
	perRequest = 5
	largeItem  = 50 << 10 // bytes of one item of a request that is to fill streams
	floodItem  = 25 << 10 // the same of an instance that floods: 0.5 MiB a second of each signal
)

// app sends to one edge until ctx ends, and finishes what it has begun.
func (s *sequence) app(ctx, give context.Context, j *journal, addr string) {
	clock := time.NewTicker(tick)
	defer clock.Stop()
	for ctx.Err() == nil {
		if body := s.next(j.noise(s.instance)); !j.deliver(give, addr, s.sig, body) {
			return
		}
		s.mu.Lock()
		s.acked = s.sent
		s.acks = append(s.acks, ack{s.acked, time.Now()})
		s.mu.Unlock()
		<-clock.C
	}
}

// ackedAt is when an item was acknowledged; zero if it was not.
func (s *sequence) ackedAt(n uint64) (at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, _ := slices.BinarySearchFunc(s.acks, n, func(a ack, n uint64) int { return cmp.Compare(a.upTo, n) }); i < len(s.acks) {
		at = s.acks[i].at
	}
	return at
}

// next makes a request of the next items. Of log records one has so many bytes of noise; of points, which have none, there
// are more when streams are to be filled.
func (s *sequence) next(bytes int) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.sig == otlpwire.Logs {
		scope := &logspb.ScopeLogs{}
		for range perRequest {
			s.sent++
			record := &logspb.LogRecord{TimeUnixNano: uint64(now.UnixNano()), Body: text(s.name(s.sent))}
			if bytes > 0 && len(scope.LogRecords) == 0 {
				record.Attributes = noise(bytes)
			}
			if len(scope.LogRecords) == perRequest/2 && s.curse.CompareAndSwap(true, false) {
				s.cursed = s.sent
				record.Attributes = []*commonpb.KeyValue{{Key: "cursed", Value: text(curse)}}
			}
			scope.LogRecords = append(scope.LogRecords, record)
		}
		body, _ := proto.Marshal(&collectorlogs.ExportLogsServiceRequest{ResourceLogs: []*logspb.ResourceLogs{{ScopeLogs: []*logspb.ScopeLogs{scope}}}})
		return body
	}
	gauge := &metricspb.Gauge{}
	count := perRequest
	if bytes == largeItem { // a flood would fill METRICS sooner than its instance is told to hold back
		count *= 20
	}
	for range count {
		s.sent++
		s.lastMS = max(now.UnixMilli(), s.lastMS+1)
		gauge.DataPoints = append(gauge.DataPoints, &metricspb.NumberDataPoint{
			TimeUnixNano: uint64(s.lastMS) * uint64(time.Millisecond), Value: &metricspb.NumberDataPoint_AsInt{AsInt: int64(s.sent)},
			Attributes: []*commonpb.KeyValue{{Key: "from", Value: text(s.instance)}},
		})
	}
	metric := &metricspb.Metric{Name: "number", Data: &metricspb.Metric_Gauge{Gauge: gauge}}
	body, _ := proto.Marshal(&collectormetrics.ExportMetricsServiceRequest{ResourceMetrics: []*metricspb.ResourceMetrics{{ScopeMetrics: []*metricspb.ScopeMetrics{{Metrics: []*metricspb.Metric{metric}}}}}})
	return body
}

// name is the body of a log record.
func (s *sequence) name(n uint64) string { return fmt.Sprintf("%s %d", s.instance, n) }

func text(s string) *commonpb.AnyValue {
	return &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: s}}
}

// noise is an attribute that no compression makes smaller.
func noise(size int) []*commonpb.KeyValue {
	b := make([]byte, size)
	for i := range b {
		b[i] = '!' + byte(rand.IntN(90))
	}
	return []*commonpb.KeyValue{{Key: "noise", Value: text(string(b))}}
}

// arrival is an item that came to a backend.
type arrival struct {
	n  uint64
	at time.Time
}

// arrivals are items in the order in which they came, by the instance.
type arrivals map[string][]arrival

func (w *world) arrived(sig otlpwire.Signal) arrivals {
	all := arrivals{}
	add := func(instance string, n uint64, at time.Time) { all[instance] = append(all[instance], arrival{n, at}) }
	switch sig {
	case otlpwire.Traces:
		for _, sp := range w.tempo.Spans() {
			add(sp.Attribute("instance.id"), binary.BigEndian.Uint64(sp.Span.GetSpanId()), sp.Came)
		}
	case otlpwire.Logs:
		for _, e := range w.loki.Entries() {
			instance, number, _ := strings.Cut(e.Line, " ")
			n, _ := strconv.ParseUint(number, 10, 64) // 0 is nobody's
			add(instance, n, e.Came)
		}
	default:
		for _, s := range w.prometheus.Samples() {
			if s.Labels["__name__"] == "number" {
				add(s.Labels["from"], uint64(s.Value), s.Came)
			}
		}
	}
	return all
}

// judge compares what was acknowledged with what came.
func (s *sequence) judge(came []arrival, say func(format string, args ...any)) (sum Summary) {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen, highest := make(map[uint64]bool, len(came)), uint64(0)
	for _, c := range came {
		switch n := c.n; {
		case n == 0 || n > s.sent:
			sum.Leaked++
			say("leaked: %v %d of %s was never sent", s.sig, n, s.instance)
		case seen[n]:
			sum.Duplicates++
		case n < highest:
			sum.Misordered++
			say("misordered: %v %d of %s came behind %d", s.sig, n, s.instance, highest)
		}
		seen[c.n], highest = true, max(highest, c.n)
	}
	sum.Acked = int(s.acked)
	if s.cursed > 0 && s.cursed <= s.acked {
		sum.Cursed = 1
	}
	gone := uint64(0) // the first of a run of missing ones
	for n := uint64(1); n <= s.acked+1; n++ {
		switch missing := n <= s.acked && !seen[n]; {
		case missing:
			sum.Lost++
			if gone == 0 {
				gone = n
			}
		case gone != 0:
			say("not delivered: %v %d to %d of %s", s.sig, gone, n-1, s.instance)
			gone = 0
		}
		if n <= s.acked && seen[n] {
			sum.Delivered++
		}
	}
	return sum
}
