package membership

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

var quiet = slog.New(slog.DiscardHandler)

func testBroker(t testing.TB) *broker.Broker {
	t.Helper()
	b, err := broker.Start(broker.Config{Name: "test", Dir: t.TempDir(), MaxPayload: 2 << 20}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	return b
}

func testHub(t testing.TB, b *broker.Broker, partitions int) *bus.Conn {
	t.Helper()
	top := bus.DefaultTopology()
	top.Partitions, top.MaxBytes = partitions, 64<<20
	c, err := bus.OpenHub(t.Context(), bus.Config{Name: "test", InProcess: b}, top, quiet, Bucket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// connectTo connects one member to the hub of a test.
func connectTo(t testing.TB, b *broker.Broker, name string, log *slog.Logger) *bus.Hub {
	t.Helper()
	conn, err := bus.Connect(bus.Config{Name: name, InProcess: b}, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	until(t, "connected", conn.Connected)
	return &bus.Hub{Conn: conn, Topology: bus.DefaultTopology()}
}

// jetStream is the server's own interface, for operations that no member performs.
func jetStream(t testing.TB, b *broker.Broker) jetstream.JetStream {
	t.Helper()
	nc, err := nats.Connect("", nats.InProcessServer(b))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func publish(t testing.TB, c *bus.Conn, instance string, from, to int) {
	t.Helper()
	for n := from; n < to; n++ {
		if err := c.PublishAsync(bus.Message{Subject: bus.Subject(otlpwire.Logs, instance), Body: []byte(fmt.Sprint(n)), Header: envelope.Header{
			ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: time.Now().UnixNano(), ID: fmt.Sprintf("%s-%d", instance, n),
		}}).Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func until(t testing.TB, what string, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if !backoff.Until(ctx, done) {
		t.Fatalf("%s: never", what)
	}
}
