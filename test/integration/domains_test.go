package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/tempo"
	"github.com/penstock/penstock/test/faultproxy"
)

// TestATraceOverInstances: traces over two instances of a domain, which are in different partitions of TRACES. The
// error comes from the one that is cut off from the hub for longer than the decision wait, and the sink is replaced in
// between: what is kept is whole, and the rest is not there. An instance that is not of the domain has traces of
// the same IDs by itself. A replay of one instance keeps what was kept of it live.
func TestATraceOverInstances(t *testing.T) {
	t.Parallel()
	tmp, again := tempo.Start(t), tempo.Start(t)
	policies := errorsAfter(t, "3s")
	configure := func(c *sink.Config) {
		c.Tempo.Endpoint, c.Sampling.File = tmp.Addr, policies
		c.Domains = domain.Config{{Name: "acme", Instances: []string{"acme-*"}}}
	}
	p := startPipeline(t, configure)
	link, err := faultproxy.Start(strings.TrimPrefix(p.hub.url, "nats://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(link.Close)
	part := func(instance string) int { return partition.OfInstance(instance, bus.DefaultTopology().Partitions) }
	names := [...]string{"acme-1", "acme-2", "other"}
	for n := 3; part(names[0]) == part(names[1]); n++ {
		names[1] = fmt.Sprint("acme-", n)
	}
	near := p.startEdge(t, edge.InstanceConfig{ID: names[0]})
	far := startEdge(t, p.log, "nats://"+link.Addr(), t.TempDir(), edge.InstanceConfig{ID: names[1]})
	other := p.startEdge(t, edge.InstanceConfig{ID: names[2]})
	// An instance counts in a partition of SPANS once a span of it has come there.
	const first = 1000
	sent, parts := 0, map[int]bool{}
	for n := first; len(parts) < bus.DefaultTopology().Partitions; n++ {
		var id otlpwire.TraceID
		binary.BigEndian.PutUint64(id[8:], uint64(n+1))
		part := (partition.Spread{N: bus.DefaultTopology().Partitions}).Of("", id)
		if parts[part] {
			continue
		}
		parts[part] = true
		for i, e := range []*edgeAddrs{near, far} {
			if err := post(t.Context(), e.http, otlpwire.Traces, spanOf(n, i, false)); err != nil {
				t.Fatal(err)
			}
			sent++
		}
	}
	eventually(t, 30*time.Second, "each partition knows both instances", func() error {
		if n := count(t, otlpwire.Traces, "penstock_routed_items_total", p.router); n != sent {
			return fmt.Errorf("%d of %d spans are routed", n, sent)
		}
		return nil
	})
	begin := time.Now()
	const traces = 120
	load := time.NewTicker(100 * time.Millisecond)
	defer load.Stop()
	for n := range traces {
		<-load.C
		switch n {
		case 40:
			link.Set(faultproxy.Fault{DropUp: true, DropDown: true})
		case 75: // after three and a half seconds, more than the wait
			link.Set(faultproxy.Fault{})
			link.Reset()
		case 90:
			p.sink.stop()
			p.startSink(t, configure)
		}
		err := errors.Join(
			post(t.Context(), near.http, otlpwire.Traces, spanOf(n, 0, false)),
			post(t.Context(), far.http, otlpwire.Traces, spanOf(n, 1, n%2 == 0)),
			post(t.Context(), near.http, otlpwire.Traces, spanOf(n, 2, false)),
			post(t.Context(), other.http, otlpwire.Traces, spanOf(n, 3, false)),
		)
		if err != nil {
			t.Fatal(err)
		}
	}
	want := map[string]int{}
	for n := 0; n < traces; n += 2 {
		want[fmt.Sprint(names[0], " ", n)], want[fmt.Sprint(names[1], " ", n)] = 2, 1
	}
	arrived(t, tmp, want)
	p.finished(t)
	arrived(t, tmp, want)
	for _, of := range tmp.Pushes() {
		if len(slices.Compact(of)) != 1 {
			t.Errorf("a request has spans of %q", of)
		}
	}

	p.sink.stop()
	p.startSink(t, func(c *sink.Config) {
		configure(c)
		c.Tempo.Endpoint = again.Addr
	})
	out := []string{"--from", begin.Add(-time.Second).Format(time.RFC3339), "--to", time.Now().Add(time.Minute).Format(time.RFC3339), "--signal", "traces", "--instance", names[0]}
	if code, said := penstockReplay(t, p.hub.url, out...); code != 0 {
		t.Fatalf("replay: exit %d:\n%s", code, said)
	}
	for n := range traces {
		delete(want, fmt.Sprint(names[1], " ", n))
	}
	arrived(t, again, want)
}
