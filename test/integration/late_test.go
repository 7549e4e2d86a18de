package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/tempo"
)

// TestLateErrors: traces over two instances of a domain are not kept, and then some of them have an error. These arrive
// whole, each instance's spans in requests of their own, also where the sink is replaced right after the errors; the others do not.
// What has become of every span adds up, and a replay of one instance keeps what was kept of it.
func TestLateErrors(t *testing.T) {
	t.Parallel()
	tmp, again := tempo.Start(t), tempo.Start(t)
	policies := errorsAfter(t, "1s")
	configure := func(c *sink.Config) {
		c.Tempo.Endpoint, c.Sampling.File = tmp.Addr, policies
		c.Domains = domain.Config{{Name: "acme", Instances: []string{"acme-*"}}}
	}
	p := startPipeline(t, configure)
	one, two := p.startEdge(t, edge.InstanceConfig{ID: "acme-1"}), p.startEdge(t, edge.InstanceConfig{ID: "acme-2"})
	eventually(t, 30*time.Second, "the domain is in force", func() error {
		if !p.text.Says("new domains", "version=1") {
			return errors.New("nothing is said of it")
		}
		return nil
	})
	const traces, late = 60, 20
	begin := time.Now()
	for n := range traces {
		if err := errors.Join(post(t.Context(), one.http, otlpwire.Traces, spanOf(n, 0, false)), post(t.Context(), two.http, otlpwire.Traces, spanOf(n, 1, false))); err != nil {
			t.Fatal(err)
		}
	}
	sampledOut := func(want int) {
		t.Helper()
		eventually(t, 30*time.Second, fmt.Sprint(want, " spans are not kept"), func() error {
			if n := count(t, otlpwire.Traces, "penstock_sampled_out_items_total", p.sink); n != want {
				return fmt.Errorf("%d are", n)
			}
			return nil
		})
	}
	sampledOut(2 * traces)
	for n := range traces {
		if err := post(t.Context(), two.http, otlpwire.Traces, spanOf(n, 2, n < late/2)); err != nil {
			t.Fatal(err)
		}
	}
	sampledOut(3 * traces)
	for n := late / 2; n < late; n++ {
		if err := post(t.Context(), one.http, otlpwire.Traces, spanOf(n, 3, true)); err != nil {
			t.Fatal(err)
		}
	}
	p.sink.stop() // whatever has been recorded by now
	p.startSink(t, configure)
	want := map[string]int{}
	for n := range late {
		want[fmt.Sprint("acme-1 ", n)], want[fmt.Sprint("acme-2 ", n)] = 1+n/(late/2), 2
	}
	arrived(t, tmp, want)
	if n := count(t, otlpwire.Traces, "penstock_sampled_out_items_total", p.sink); n >= traces {
		t.Errorf("%d spans are not kept: the other sink did not go on", n)
	}
	for _, of := range tmp.Pushes() {
		for _, instance := range of {
			if instance != of[0] {
				t.Errorf("a request has spans of %q", of)
			}
		}
	}
	p.finished(t)
	arrived(t, tmp, want)

	p.sink.stop()
	p.startSink(t, func(c *sink.Config) {
		configure(c)
		c.Tempo.Endpoint = again.Addr
	})
	code, out := penstockReplay(t, p.hub.url, "--from", begin.Add(-time.Second).Format(time.RFC3339), "--to", time.Now().Add(time.Minute).Format(time.RFC3339), "--signal", "traces", "--instance", "acme-1")
	if code != 0 {
		t.Fatalf("exit %d: %s", code, out)
	}
	for n := range late {
		delete(want, fmt.Sprint("acme-2 ", n))
	}
	arrived(t, again, want)
}

// arrived waits for how many spans of each instance and trace there must be, and checks that there are no others.
func arrived(t *testing.T, s *tempo.Server, want map[string]int) {
	t.Helper()
	numbers := func() map[string]int {
		all, seen := map[string]int{}, map[string]bool{}
		for _, sp := range s.Spans() {
			if id := string(sp.Span.GetSpanId()); !seen[id] { // a sink that is replaced may send one twice
				seen[id] = true
				all[sp.Attribute("instance.id")+" "+sp.Span.GetName()]++
			}
		}
		return all
	}
	eventually(t, 30*time.Second, "the traces arrive", func() error {
		got := numbers()
		for key, n := range want {
			if got[key] != n {
				return fmt.Errorf("%d of %d spans of %s", got[key], n, key)
			}
		}
		return nil
	})
	for key, n := range numbers() {
		if want[key] != n {
			t.Errorf("%d spans of %s, want %d", n, key, want[key])
		}
	}
}

// TestAReplayFollowsLiveDecisions: of two traces of a partition with a late error one was over the limit. A replay whose sink has
// another limit keeps what was kept live, and no more.
func TestAReplayFollowsLiveDecisions(t *testing.T) {
	t.Parallel()
	tmp, again := tempo.Start(t), tempo.Start(t)
	policies := errorsAfter(t, "1s")
	configure := func(c *sink.Config) {
		c.Tempo.Endpoint, c.Sampling.File = tmp.Addr, policies
		c.Sampling.Late.MaxTraces = 1
	}
	p := startPipeline(t, configure)
	e := p.startEdge(t, edge.InstanceConfig{ID: "as-1"})
	partOf := func(n int) int {
		var id otlpwire.TraceID
		binary.BigEndian.PutUint64(id[8:], uint64(n+1)) // as spanOf
		return (partition.Spread{N: bus.DefaultTopology().Partitions}).Of("", id)
	}
	other := 1
	for partOf(other) != partOf(0) {
		other++
	}
	begin := time.Now()
	for i, failed := range []bool{false, true} {
		for _, n := range []int{0, other} {
			if err := post(t.Context(), e.http, otlpwire.Traces, spanOf(n, i, failed)); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, 30*time.Second, "both are not kept", func() error {
			if got := count(t, otlpwire.Traces, "penstock_sampled_out_items_total", p.sink); got != 2*(i+1) {
				return fmt.Errorf("%d spans are sampled out", got)
			}
			return nil
		})
	}
	arrived(t, tmp, map[string]int{"as-1 0": 2})

	p.sink.stop()
	p.startSink(t, func(c *sink.Config) {
		configure(c)
		c.Tempo.Endpoint, c.Sampling.Late.MaxTraces = again.Addr, 100
	})
	code, out := penstockReplay(t, p.hub.url, "--from", begin.Add(-time.Second).Format(time.RFC3339), "--to", time.Now().Add(time.Minute).Format(time.RFC3339), "--signal", "traces", "--instance", "as-1")
	if code != 0 {
		t.Fatalf("exit %d: %s", code, out)
	}
	arrived(t, again, map[string]int{"as-1 0": 2})
}
