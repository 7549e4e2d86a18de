package integration

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	backends "github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend"
	"github.com/penstock/penstock/test/backend/loki"
	"github.com/penstock/penstock/test/backend/tempo"
)

// TestFurtherBackends: a second set of backends is away, the first gets everything (F39).
// When it is back it gets everything, too, in order, and the same traces.
func TestFurtherBackends(t *testing.T) {
	t.Parallel()
	h := newPast(t, "as-1", "as-2")
	tmp, farTempo, l, farLoki := tempo.Start(t), tempo.Start(t), loki.Start(t), loki.Start(t)
	window := "storage: {tsdb: {out_of_order_time_window: 2h}}\n" // the past is an hour ago, and comes late
	prom, far := backend.StartPrometheusWith(t, window), backend.StartPrometheusWith(t, window)
	var away atomic.Bool
	away.Store(true)
	target, err := url.Parse(far.URL)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	gate := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if away.Load() {
			http.Error(w, "away", http.StatusServiceUnavailable)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(gate.Close)
	farTempo.Fail(status.Error(codes.Unavailable, "away"))
	farLoki.Fail(401) // a person has to mend that; nothing else waits
	p := startPipeline(t, func(c *sink.Config) {
		c.Tempo.Endpoint, c.Loki.URL, c.Prometheus.URL = tmp.Addr, l.URL, prom.URL
		c.Sampling.File = writeFile(t, "half.yaml", "decision_wait: 2s\npolicies: [{name: half, type: probabilistic, probabilistic: {sampling_percentage: 50}}]\n")
		other := backends.Named{Name: "site-b", Config: backends.DefaultConfig()}
		other.Tempo.Compression = "gzip"
		other.Tempo.Endpoint, other.Loki.URL, other.Prometheus.URL = farTempo.Addr, farLoki.URL, gate.URL
		c.Also = []backends.Named{other}
	})
	h.send(t, p.hub.url)
	eventually(t, 2*time.Minute, "the first set has everything", func() error {
		if n := len(l.Entries()); n < len(h.logs) {
			return fmt.Errorf("%d of %d records", n, len(h.logs))
		}
		return p.settled(t, "tempo", "prometheus")
	})
	first := keptSpans(tmp)
	if len(first) < len(h.spans)/4 || len(first) > len(h.spans)*3/4 {
		t.Errorf("%d of %d spans were kept", len(first), len(h.spans))
	}
	if n := len(farTempo.Spans()) + len(farLoki.Entries()); n != 0 {
		t.Errorf("%d items where nobody was", n)
	}
	if v := p.gauge(t, "penstock_lane_paused", "loki-site-b"); v == 0 {
		t.Error("no lane of loki-site-b says that it waits for a person")
	}
	farTempo.Fail(nil)
	farLoki.Fail(0)
	away.Store(false)
	eventually(t, 2*time.Minute, "the second set has it, too", func() error {
		if n := len(farLoki.Entries()); n < len(h.logs) {
			return fmt.Errorf("%d of %d records", n, len(h.logs))
		}
		return p.settled(t, "tempo-site-b", "prometheus-site-b", "loki-site-b", "loki", "prometheus")
	})
	if second := keptSpans(farTempo); !slices.Equal(first, second) {
		t.Errorf("%d spans here, %d there", len(first), len(second))
	}
	same := func(a, b *backend.Prometheus, query string) {
		t.Helper()
		x, err := a.Query(query)
		y, errThere := b.Query(query)
		if err != nil || errThere != nil || len(x) != 2 || fmt.Sprint(values(x)) != fmt.Sprint(values(y)) {
			t.Errorf("%s: %v here, %v there (%v, %v)", query, x, y, err, errThere)
		}
	}
	same(prom, far, `sum by (instance_id) (count_over_time({instance_id=~".+"}[3h]))`)
}

// keptSpans returns the IDs of a Tempo's spans, in order.
func keptSpans(tmp *tempo.Server) (ids []string) {
	for _, s := range tmp.Spans() {
		ids = append(ids, fmt.Sprintf("%x/%x", s.Span.GetTraceId(), s.Span.GetSpanId()))
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// values are the numbers of an answer, by instance.
func values(samples []backend.Sample) map[string]any {
	out := map[string]any{}
	for _, s := range samples {
		out[s.Metric["instance_id"]] = s.Value[1]
	}
	return out
}

// gauge returns the highest value of a metric of the sink among those with a label of a value.
func (p *pipeline) gauge(t *testing.T, name, of string) (most float64) {
	t.Helper()
	families, err := p.sink.Registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if f.GetName() == name && l.GetValue() == of {
					most = max(most, m.GetGauge().GetValue())
				}
			}
		}
	}
	return most
}

// settled reports lanes of backends that are behind.
func (p *pipeline) settled(t *testing.T, names ...string) error {
	conn, err := bus.Connect(bus.Config{URL: p.hub.url}, p.log)
	if err != nil {
		return err
	}
	defer conn.Close()
	for _, name := range names {
		backend, _, _ := strings.Cut(name, "-")
		stream := map[string]string{"tempo": bus.Spans, "prometheus": bus.Stream(otlpwire.Metrics), "loki": bus.Stream(otlpwire.Logs)}[backend]
		for partition := range bus.DefaultTopology().Partitions {
			lane := bus.LaneConfig{Stream: stream, Name: fmt.Sprint(name, "-", partition)}
			if at, err := conn.LaneFloor(t.Context(), lane); err != nil || at.Lag > 0 {
				return fmt.Errorf("%s is %d messages behind (%v)", lane.Name, at.Lag, err)
			}
		}
	}
	return nil
}
