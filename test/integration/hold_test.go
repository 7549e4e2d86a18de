package integration

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/loki"
)

// TestAFloodIsHeldBack: while Loki is away, an instance sends as much as LOGS holds. Its edge is told to hold back before
// the stream is full, and another instance's logs go on into the hub. When Loki is back everything arrives.
func TestAFloodIsHeldBack(t *testing.T) {
	t.Parallel()
	p := &pipeline{streams: bus.DefaultTopology()}
	p.streams.MaxBytes = 32 << 20
	p.log, p.text = newLog(t)
	p.hub = startHub(t, p.log)
	lok := loki.Start(t)
	p.startRouter(t)
	p.startSink(t, func(c *sink.Config) { c.Streams, c.Loki.URL = p.streams, lok.URL })
	floods := startEdgeWith(t, p.log, p.hub.url, t.TempDir(), edge.InstanceConfig{ID: "as-1"}, func(c *edge.Config) { c.Spool.MaxBytes = 64 << 20 })
	quiet := startEdgeWith(t, p.log, p.hub.url, t.TempDir(), edge.InstanceConfig{ID: "as-2"}, func(*edge.Config) {})
	lok.Fail(http.StatusServiceUnavailable)

	conn := openAs(t, p.hub.url, "", p.streams)
	inHub := func(instance string) (n uint64) {
		t.Helper()
		there, err := conn.Subjects(t.Context(), bus.Stream(otlpwire.Logs), ">")
		if err != nil {
			t.Fatal(err)
		}
		for subject, messages := range there {
			if strings.HasSuffix(subject, "."+instance) {
				n += messages
			}
		}
		return n
	}
	acked := map[string]int{}
	send := func(e *edgeAddrs, instance string, flood bool) {
		t.Helper()
		n := acked[instance]
		m := numbered(otlpwire.Logs, n)
		if flood {
			m = large(otlpwire.Logs, n)
		}
		if err := post(context.Background(), e.http, otlpwire.Logs, m); err != nil {
			t.Fatalf("%s %d: %v", instance, n, err)
		}
		acked[instance]++
	}
	var last time.Time
	eventually(t, time.Minute, "the flood is told to hold back", func() error {
		// 22 MB, within the time that it takes to determine who floods; and then little, with which the edge asks.
		told := p.text.Says("an instance that fills a stream is told to hold back", "as-1")
		if acked["as-1"] < 450 || told && acked["as-1"] < 500 && time.Since(last) > time.Second {
			last = time.Now()
			send(floods, "as-1", true)
		}
		send(quiet, "as-2", false)
		if !p.text.Says("the hub's keeper says which signals are to be held back", "as-1") {
			return fmt.Errorf("%d of %d messages are in the hub", inHub("as-1"), acked["as-1"])
		}
		return nil
	})
	for range 40 {
		send(floods, "as-1", true) // its spool has room
		send(quiet, "as-2", false)
	}
	eventually(t, time.Minute, "what others send goes on", func() error {
		if n := inHub("as-2"); n == 0 || count(t, otlpwire.Logs, "penstock_forwarded_items_total", quiet.role) < acked["as-2"] {
			return fmt.Errorf("%d of %d", n, acked["as-2"])
		}
		return nil
	})
	state, err := conn.State(t.Context(), bus.Stream(otlpwire.Logs))
	if err != nil {
		t.Fatal(err)
	}
	if forwarded := count(t, otlpwire.Logs, "penstock_forwarded_items_total", floods.role); forwarded >= acked["as-1"] || state.Bytes > state.MaxBytes*7/8 {
		t.Errorf("%d of %d items of the flood are in the hub, whose stream has %d of %d bytes", forwarded, acked["as-1"], state.Bytes, state.MaxBytes)
	}
	lok.Fail(0)
	eventually(t, 2*time.Minute, "everything arrives", func() error {
		came := map[string]int{}
		for _, e := range lok.Entries() {
			came[e.Labels["instance_id"]]++
		}
		for _, instance := range []string{"as-1", "as-2"} {
			if came[instance] < acked[instance] {
				return fmt.Errorf("%d of %d of %s", came[instance], acked[instance], instance)
			}
		}
		return nil
	})
	if p.text.Says("does not hold back as it is told") {
		t.Error("the edge is said not to obey")
	}
}
