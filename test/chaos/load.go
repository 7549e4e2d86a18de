package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// What an application sends: traces of one to eight spans, in requests over up to
// spread.
const (
	tick       = 50 * time.Millisecond
	perTick    = 3 // new traces
	spread     = 600 * time.Millisecond
	inFlight   = 24 // requests an application has out at the most
	retryAfter = 300 * time.Millisecond
)

// trace is what the oracle knows of one trace.
type trace struct {
	id       [16]byte
	spans    int
	failing  bool      // has an error, wherever it stands
	several  bool      // it may have spans of several edges
	sent     time.Time // first attempt
	answered time.Time // last success
	ackedIDs []uint64
}

// kept is the policy, as the oracle reads it.
func (t *trace) kept() bool { return t.failing || t.spans >= large }

const (
	wait  = 3 * time.Second
	large = 7

	policies = `
decision_wait: 3s
policies:
  - {name: errors, type: status_code, status_code: {status_codes: [ERROR]}}
  - {name: large, type: span_count, span_count: {min_spans: 7}}
`
)

// journal holds what was sent and what was answered.
type journal struct {
	mu     sync.Mutex
	traces map[[16]byte]*trace
	next   uint64               // span IDs are numbers
	acked  map[uint64]time.Time // when, by the span's ID

	sequences []*sequence
	large     atomic.Bool            // requests are to fill streams
	flood     atomic.Pointer[string] // the instance that floods; nil: none does
	refused   atomic.Int64           // requests that were told to come again
}

// noise is how many bytes one item of a request of an instance is to have besides; 0: none.
func (j *journal) noise(instance string) int {
	if floods := j.flood.Load(); j.large.Load() {
		return largeItem
	} else if floods != nil && *floods == instance {
		return floodItem
	}
	return 0
}

// app sends traces with spans of each of some edges until ctx ends, then finishes what it has begun, but
// starts no new trace.
func (j *journal) app(ctx, give context.Context, edges []*proc, rng *rand.Rand) {
	var later [][]outgoing // by tick from now on
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, inFlight)
	clock := time.NewTicker(tick)
	defer clock.Stop()
	for ctx.Err() == nil || len(later) > 0 {
		for range perTick {
			if ctx.Err() != nil {
				break
			}
			for at, spans := range j.newTrace(edges, rng) {
				for len(later) <= at {
					later = append(later, nil)
				}
				later[at] = append(later[at], spans...)
			}
		}
		if len(later) > 0 {
			batch := later[0]
			later = later[1:]
			for _, e := range edges {
				own := slices.DeleteFunc(slices.Clone(batch), func(o outgoing) bool { return o.edge != e })
				if len(own) == 0 {
					continue
				}
				slots <- struct{}{}
				wg.Go(func() {
					defer func() { <-slots }()
					j.send(give, e, own)
				})
			}
		}
		<-clock.C
	}
}

// outgoing is one span.
type outgoing struct {
	*trace
	edge *proc
	span *tracepb.Span
	n    uint64
}

// newTrace invents a trace: its spans by the tick in which they are sent.
func (j *journal) newTrace(edges []*proc, rng *rand.Rand) map[int][]outgoing {
	t := &trace{spans: 1 + rng.IntN(8), several: len(edges) > 1}
	binary.BigEndian.PutUint64(t.id[:], rng.Uint64())
	binary.BigEndian.PutUint64(t.id[8:], rng.Uint64())
	bad := -1
	if rng.IntN(4) == 0 {
		bad, t.failing = rng.IntN(t.spans), true
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.traces[t.id] = t
	all := map[int][]outgoing{}
	for i := range t.spans {
		j.next++
		sp := &tracepb.Span{TraceId: t.id[:], SpanId: binary.BigEndian.AppendUint64(nil, j.next), Name: "op", StartTimeUnixNano: uint64(time.Now().UnixNano()), Kind: tracepb.Span_SPAN_KIND_INTERNAL}
		sp.EndTimeUnixNano = sp.StartTimeUnixNano + 1000
		if i == bad {
			sp.Status = &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR}
		}
		at := 0
		if i > 0 {
			at = rng.IntN(int(spread / tick))
		}
		all[at] = append(all[at], outgoing{t, edges[rng.IntN(len(edges))], sp, j.next})
	}
	return all
}

// send sends one request until it is answered with success or give ends, as an
// SDK with patience does.
func (j *journal) send(give context.Context, to *proc, batch []outgoing) {
	scope := &tracepb.ScopeSpans{}
	now := time.Now()
	j.mu.Lock()
	for _, o := range batch {
		if o.sent.IsZero() {
			o.sent = now
		}
		scope.Spans = append(scope.Spans, o.span)
	}
	j.mu.Unlock()
	if size := j.noise(to.instance); size > 0 {
		batch[0].span.Attributes = noise(size)
	}
	body, _ := proto.Marshal(&collectorpb.ExportTraceServiceRequest{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{scope}}}})
	if !j.deliver(give, to.otlp, otlpwire.Traces, body) {
		return
	}
	now = time.Now()
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, o := range batch {
		o.ackedIDs = append(o.ackedIDs, o.n)
		o.answered, j.acked[o.n] = now, now
	}
}

// deliver sends a request until it is answered with success; false: give has ended before.
func (j *journal) deliver(give context.Context, addr string, sig otlpwire.Signal, body []byte) bool {
	for {
		status, err := post(give, addr, sig, body)
		if err == nil {
			return true
		}
		if status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests {
			j.refused.Add(1)
		}
		select {
		case <-time.After(retryAfter):
		case <-give.Done():
			return false
		}
	}
}

var client = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: inFlight + 2}}

// post sends one request. Without an error it was answered with success, all of it: the answer to
// that is an empty message of any signal.
func post(ctx context.Context, addr string, sig otlpwire.Signal, body []byte) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+"/v1/"+sig.String(), bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/x-protobuf")
	res, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = res.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(res.Body, 1<<16))
	if err == nil && (res.StatusCode != http.StatusOK || len(answer) > 0) {
		err = fmt.Errorf("%s: %q", res.Status, answer)
	}
	return res.StatusCode, err
}
