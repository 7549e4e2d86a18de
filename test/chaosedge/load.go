package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	collectorlogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	collectormetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collectortrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
)

const (
	perSignal  = 4                      // senders: two over gRPC, two over HTTP
	interval   = 15 * time.Millisecond  // between requests of a sender
	maxItems   = 12                     // of a request
	retryPause = 200 * time.Millisecond // where the answer names none; at most that, where it does
)

// sizes of what an item carries, by chance.
var sizes = []int{0, 1, 40, 200, 2047, 2048, 2049, 20_000, 300_000}

// sender is an application: one request at a time, each until it is answered.
type sender struct {
	number int
	sig    otlpwire.Signal
	url    string // HTTP
	conn   *grpc.ClientConn
	rng    *rand.Rand

	mu        sync.Mutex
	attempted uint64          // items numbered from 1 up to here were sent
	acked     map[uint64]bool // by number
	refused   int             // for good
	firstBad  string
}

func newSenders(seed uint64, grpcAddr, httpAddr string) (all []*sender, err error) {
	for _, sig := range otlpwire.Signals {
		for i := range perSignal {
			s := &sender{number: len(all), sig: sig, rng: rand.New(rand.NewPCG(seed, uint64(len(all)))), acked: map[uint64]bool{}}
			if i%2 == 0 {
				s.conn, err = grpc.NewClient(grpcAddr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(otlpgrpc.Codec{})),
					grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second}))
				if err != nil {
					return nil, err
				}
			} else {
				s.url = "http://" + httpAddr + "/v1/" + sig.String()
			}
			all = append(all, s)
		}
	}
	return all, nil
}

// id is what an item carries of itself: sender and number.
func id(sender int, n uint64) uint64 { return uint64(sender)<<40 | n }

// text is what an item carries besides, a function of its id.
func text(id uint64, size int) string {
	rng := rand.New(rand.NewPCG(id, 9))
	b := make([]byte, size)
	for i := range b {
		b[i] = byte('a' + rng.IntN(26))
	}
	return string(b)
}

// run sends until ctx ends, and what it has begun until give ends.
func (s *sender) run(ctx, give context.Context) {
	clock := time.NewTicker(interval)
	defer clock.Stop()
	for ctx.Err() == nil {
		<-clock.C
		from := s.attempted + 1
		to := from + uint64(s.rng.IntN(maxItems))
		body := s.request(from, to)
		s.mu.Lock()
		s.attempted = to
		s.mu.Unlock()
		s.deliver(give, body, from, to)
	}
}

// deliver sends a request until it has a final answer, as the OTLP specification says.
func (s *sender) deliver(give context.Context, body []byte, from, to uint64) {
	for give.Err() == nil {
		again, err := s.try(give, body)
		if err == nil {
			s.mu.Lock()
			for n := from; n <= to; n++ {
				s.acked[n] = true
			}
			s.mu.Unlock()
			return
		}
		if !again {
			s.mu.Lock()
			if s.refused++; s.refused == 1 {
				s.firstBad = err.Error()
			}
			s.mu.Unlock()
			return
		}
		select {
		case <-time.After(retryPause):
		case <-give.Done():
		}
	}
}

// try sends once; again is whether the answer allows another attempt.
func (s *sender) try(ctx context.Context, body []byte) (again bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	var answer []byte
	if s.conn != nil {
		if err := s.conn.Invoke(ctx, otlpgrpc.Method(s.sig), body, &answer); err != nil {
			return retryable(err), err
		}
	} else {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url, bytes.NewReader(body))
		if err != nil {
			return false, err
		}
		req.Header.Set("Content-Type", "application/x-protobuf")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return true, err
		}
		defer func() { _ = res.Body.Close() }()
		if answer, err = io.ReadAll(io.LimitReader(res.Body, 1<<16)); err != nil {
			return true, err
		}
		switch res.StatusCode {
		case http.StatusOK:
		case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			return true, fmt.Errorf("%s", res.Status)
		default:
			return false, fmt.Errorf("%s: %.200q", res.Status, answer)
		}
	}
	if len(answer) > 0 {
		return false, fmt.Errorf("partial success: %.200q", answer)
	}
	return false, nil
}

func retryable(err error) bool {
	st := status.Convert(err)
	switch st.Code() {
	case codes.Canceled, codes.DeadlineExceeded, codes.Aborted, codes.OutOfRange, codes.Unavailable, codes.DataLoss:
		return true
	case codes.ResourceExhausted:
		for _, d := range st.Details() {
			if _, ok := d.(*errdetails.RetryInfo); ok {
				return true
			}
		}
	}
	return false
}

// request makes a request of the items from to to.
func (s *sender) request(from, to uint64) []byte {
	var m proto.Message
	attr := func(x uint64) []*commonpb.KeyValue {
		return []*commonpb.KeyValue{{Key: "text", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: text(x, s.size())}}}}
	}
	now := uint64(time.Now().UnixNano())
	switch s.sig {
	case otlpwire.Traces:
		scope := &tracepb.ScopeSpans{}
		for n := from; n <= to; n++ {
			x := id(s.number, n)
			scope.Spans = append(scope.Spans, &tracepb.Span{
				TraceId: binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, 1), x), SpanId: binary.BigEndian.AppendUint64(nil, x),
				Name: "op", StartTimeUnixNano: now, EndTimeUnixNano: now + 1, Attributes: attr(x),
			})
		}
		m = &collectortrace.ExportTraceServiceRequest{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{scope}}}}
	case otlpwire.Metrics:
		gauge := &metricspb.Gauge{}
		for n := from; n <= to; n++ {
			x := id(s.number, n)
			gauge.DataPoints = append(gauge.DataPoints, &metricspb.NumberDataPoint{TimeUnixNano: now, Value: &metricspb.NumberDataPoint_AsInt{AsInt: int64(x)}, Attributes: attr(x)})
		}
		metric := &metricspb.Metric{Name: fmt.Sprint("m", s.number), Data: &metricspb.Metric_Gauge{Gauge: gauge}}
		m = &collectormetrics.ExportMetricsServiceRequest{ResourceMetrics: []*metricspb.ResourceMetrics{{ScopeMetrics: []*metricspb.ScopeMetrics{{Metrics: []*metricspb.Metric{metric}}}}}}
	case otlpwire.Logs:
		scope := &logspb.ScopeLogs{}
		for n := from; n <= to; n++ {
			x := id(s.number, n)
			scope.LogRecords = append(scope.LogRecords, &logspb.LogRecord{TimeUnixNano: now, Body: &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: int64(x)}}, Attributes: attr(x)})
		}
		m = &collectorlogs.ExportLogsServiceRequest{ResourceLogs: []*logspb.ResourceLogs{{ScopeLogs: []*logspb.ScopeLogs{scope}}}}
	}
	body, err := proto.Marshal(m)
	if err != nil {
		panic("BUG: a request of our own: " + err.Error())
	}
	return body
}

// size is small most of the time.
func (s *sender) size() int {
	if s.rng.IntN(200) == 0 {
		return sizes[len(sizes)-1]
	}
	return sizes[s.rng.IntN(len(sizes)-2)]
}
