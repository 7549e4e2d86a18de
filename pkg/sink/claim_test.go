package sink

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/snappy"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink/export"
)

// sums is a Prometheus that keeps the first value of each request, and the lane of metrics that feeds it.
type sums struct {
	*export.Exporter
	conn *bus.Conn

	mu     sync.Mutex
	values []float64
	refuse int // how many requests more
	answer func(http.ResponseWriter)
}

func newSums(t *testing.T) *sums {
	t.Helper()
	s := new(sums)
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	cfg := backend.DefaultConfig()
	cfg.Prometheus.URL, cfg.Prometheus.Protocol, cfg.Prometheus.TargetInfo = server.URL, "1.0", false
	w, err := cfg.Open(otlpwire.Metrics)
	if err != nil {
		t.Fatal(err)
	}
	s.Exporter, s.conn = testExporter(t, w)
	s.Signal = otlpwire.Metrics
	s.Count = liveCounterOf(s.Exporter)
	return s
}

func (s *sums) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refuse > 0 {
		s.refuse--
		s.answer(w)
		return
	}
	packed, _ := io.ReadAll(r.Body)
	body, _ := snappy.Decode(nil, packed)
	s.values = append(s.values, firstValue(body))
	w.WriteHeader(http.StatusNoContent)
}

// refuses makes it refuse the given number of requests.
func (s *sums) refuses(n, status int, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refuse, s.answer = n, func(w http.ResponseWriter) { http.Error(w, text, status) }
}

func (s *sums) stored() []float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.values)
}

// publish publishes a delta of 1, at millisecond n.
func (s *sums) publish(t *testing.T, n int) {
	t.Helper()
	body, _, err := otlpwire.FromJSON(nil, otlpwire.Metrics, fmt.Appendf(nil, `{"resourceMetrics":[{"scopeMetrics":[{"metrics":[{"name":"d","sum":{"isMonotonic":true,"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"%d000000","asInt":"1"}]}}]}]}]}`, n), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.conn.Publish(t.Context(), bus.Message{Subject: bus.Subject(otlpwire.Metrics, "as-1"), Body: body, Header: envelope.Header{
		ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: time.Now().UnixNano(), ID: fmt.Sprint(n),
	}}); err != nil {
		t.Fatal(err)
	}
}

// lane opens the lane.
func (s *sums) lane(t *testing.T) *bus.Lane {
	t.Helper()
	lane, err := s.conn.OpenLane(t.Context(), bus.LaneConfig{Stream: bus.Stream(otlpwire.Metrics), Filter: bus.PartitionFilter(otlpwire.Metrics, 0), Name: "prometheus-0", Raw: true})
	if err != nil {
		t.Fatal(err)
	}
	return lane
}

// TestAClaimBeginsAnew: a sink that claims a lane again does not use the sums of deltas from its
// earlier ownership, and treats a refusal of the first messages as a repetition.
func TestAClaimBeginsAnew(t *testing.T) {
	s := newSums(t)
	// own runs the lane until the given number of samples is stored or refused.
	own := func(until int) {
		t.Helper()
		lane := s.lane(t)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			mine := *s.Exporter // as when the members start it again
			_ = newDirectLane(lane, &mine, liveCounterOf(&mine), nil).run(ctx)
		}()
		if !backoff.Until(t.Context(), func() bool {
			return len(s.stored())+int(testutil.ToFloat64(s.Ledger.Of(otlpwire.Metrics).Deduplicated("prometheus"))) >= until
		}) {
			t.Fatal("stopped")
		}
		stop()
		<-done
	}
	for n := range 3 {
		s.publish(t, n+1)
	}
	own(3)
	for n := range 2 {
		s.publish(t, n+4)
	}
	own(5)
	s.refuses(1, http.StatusBadRequest, "duplicate sample for timestamp") // the backend already has the first one
	for n := range 2 {
		s.publish(t, n+6)
	}
	own(7)
	if values, want := s.stored(), []float64{1, 2, 3, 1, 2, 1}; fmt.Sprint(values) != fmt.Sprint(want) {
		t.Errorf("sums are %v, want %v", values, want)
	}
	signal := s.Ledger.Of(otlpwire.Metrics)
	if dead, dedup, delivered := testutil.ToFloat64(signal.Dead(ledger.DeadOutOfOrder)), testutil.ToFloat64(signal.Deduplicated("prometheus")), testutil.ToFloat64(signal.Delivered("prometheus")); dead != 0 || dedup != 1 || delivered != 7 {
		t.Errorf("%v dead, %v there already, %v delivered", dead, dedup, delivered)
	}
}

// TestALostFloorRepeats: a hub that has lost a lane's floor, as on a full disk, delivers everything
// again. What this reader has written before is not dead-lettered, however much it is.
func TestALostFloorRepeats(t *testing.T) {
	s := newSums(t)
	lane := s.lane(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		mine := *s.Exporter
		_ = newDirectLane(lane, &mine, liveCounterOf(&mine), nil).run(ctx)
	}()
	defer func() { stop(); <-done }()
	const n = 2 * export.MaxRepeated
	for i := range n {
		s.publish(t, i+1)
	}
	signal := s.Ledger.Of(otlpwire.Metrics)
	until := func(what string, c prometheus.Counter, want float64) {
		t.Helper()
		within, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if !backoff.Until(within, func() bool { return testutil.ToFloat64(c) >= want }) {
			t.Fatalf("%s: %v of %v, %v dead", what, testutil.ToFloat64(c), want, testutil.ToFloat64(signal.Dead(ledger.DeadOutOfOrder)))
		}
	}
	until("delivered", signal.Delivered("prometheus"), n)
	s.refuses(n, http.StatusBadRequest, "out of order sample")
	if err := s.conn.DropLane(t.Context(), bus.Stream(otlpwire.Metrics), "prometheus-0"); err != nil {
		t.Fatal(err)
	}
	until("there already", signal.Deduplicated("prometheus"), n)
	if dead := testutil.ToFloat64(signal.Dead(ledger.DeadOutOfOrder)); dead != 0 {
		t.Errorf("%v dead", dead)
	}
}

// TestWhatIsNewIsNoRepetition: what came to the hub after the claim cannot have been written by the
// previous owner, and is dead-lettered if the backend refuses it.
func TestWhatIsNewIsNoRepetition(t *testing.T) {
	answered := make(chan struct{}, 10)
	prometheus := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "duplicate sample for timestamp", http.StatusBadRequest)
		answered <- struct{}{}
	}))
	defer prometheus.Close()
	cfg := backend.DefaultConfig()
	cfg.Prometheus.URL, cfg.Prometheus.Protocol, cfg.Prometheus.TargetInfo = prometheus.URL, "1.0", false
	w, err := cfg.Open(otlpwire.Metrics)
	if err != nil {
		t.Fatal(err)
	}
	d, conn := testExporter(t, w)
	d.Signal = otlpwire.Metrics
	d.Count = liveCounterOf(d)
	lane, err := conn.OpenLane(t.Context(), bus.LaneConfig{Stream: bus.Stream(otlpwire.Metrics), Filter: bus.PartitionFilter(otlpwire.Metrics, 0), Name: "prometheus-0", Raw: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = newDirectLane(lane, d, liveCounterOf(d), nil).run(ctx)
	}()
	body, _, err := otlpwire.FromJSON(nil, otlpwire.Metrics, []byte(`{"resourceMetrics":[{"scopeMetrics":[{"metrics":[{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"1","asInt":"1"}]}}]}]}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	signal := d.Ledger.Of(otlpwire.Metrics)
	for n := range 3 {
		if _, err := conn.Publish(t.Context(), bus.Message{Subject: bus.Subject(otlpwire.Metrics, "as-1"), Body: body, Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: time.Now().UnixNano(), ID: fmt.Sprint(n)}}); err != nil {
			t.Fatal(err)
		}
		<-answered
		if !backoff.Until(t.Context(), func() bool {
			return testutil.ToFloat64(signal.Dead(ledger.DeadOutOfOrder))+testutil.ToFloat64(signal.Deduplicated("prometheus")) == float64(n+1)
		}) {
			t.Fatal("stopped")
		}
	}
	stop()
	<-done
	// The first may have been in the hub when the lane was claimed.
	if dead := testutil.ToFloat64(signal.Dead(ledger.DeadOutOfOrder)); dead < 2 {
		t.Errorf("%v are dead, want those that came later", dead)
	}
}

// firstValue is the value of the first sample of a request of remote_write 1.0.
func firstValue(body []byte) float64 {
	next := func(msg []byte, tag int) (out []byte) {
		for i := 0; i < len(msg) && out == nil; {
			var f otlpwire.Field
			if f, i = otlpwire.NextField(msg, i); f.Tag == tag {
				out = f.Bytes
			}
		}
		return out
	}
	sample := next(next(body, otlpwire.Tag(1, otlpwire.Bytes)), otlpwire.Tag(2, otlpwire.Bytes))
	return math.Float64frombits(binary.LittleEndian.Uint64(sample[1:]))
}
