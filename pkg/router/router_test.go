package router

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/hold"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/receive"
	"github.com/prometheus/client_golang/prometheus"
)

// TestSplitterKeepsTracesTogether splits payloads of two instances and looks at
// every span: none is lost, each is in the partition of its trace, with its own
// instance, whatever the payload claims.
func TestSplitterKeepsTracesTogether(t *testing.T) {
	const partitions = 8
	split := &splitter{spread: partition.Spread{N: partitions}}
	b := &batch{floors: map[origin]uint64{}, outs: make([][]out, partitions)}
	forged, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, []byte(`{"resourceSpans":[{"resource":{"attributes":[{"key":"instance.id","value":{"stringValue":"victim"}}]}}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	total := 0
	for i, inst := range []string{"as-1", "as-2", "as-1"} {
		m := &tracepb.TracesData{}
		if err := proto.Unmarshal(forged, m); err != nil {
			t.Fatal(err)
		}
		ss := &tracepb.ScopeSpans{}
		m.ResourceSpans[0].ScopeSpans = append(m.ResourceSpans[0].ScopeSpans, ss)
		for n := range 50 {
			trace := make([]byte, 16)
			trace[3], trace[15] = byte(n%40), 1
			ss.Spans = append(ss.Spans, &tracepb.Span{TraceId: trace, SpanId: []byte{1, 2, 3, 4, 5, 6, byte(i), byte(n)}})
			total++
		}
		payload, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		in := input{Delivery: bus.Delivery{Subject: "otlp.traces.3." + inst, Header: envelope.Header{Arrival: int64(i)}, Body: payload}}
		if _, _, err := split.add(b, in); err != nil {
			t.Fatal(err)
		}
	}
	seen, used := 0, 0
	for p, outs := range b.outs {
		count := 0
		if len(outs) != 1 {
			t.Fatalf("partition %d: %d messages", p, len(outs))
		}
		o := outs[0]
		for body := o.body; len(body) > 0; {
			var f envelope.Frame
			var err error
			if f, body, err = envelope.NextFrame(body); err != nil {
				t.Fatal(err)
			}
			for item := range otlpwire.Items(f.Payload) {
				id, _ := otlpwire.SpanTrace(item)
				if want := (partition.Spread{N: partitions}).Of(f.Instance, id); want != p {
					t.Errorf("trace %x of %s is in partition %d, want %d", id, f.Instance, p, want)
				}
				count++
			}
			for r := range otlpwire.Resources(f.Payload) {
				if v, _ := otlpwire.ResourceAttribute(r.Resource(), "instance.id"); string(v.Str) != f.Instance {
					t.Errorf("instance.id is %q in a frame of %s", v.Str, f.Instance)
				}
			}
		}
		if count != o.items {
			t.Errorf("partition %d: header says %d items, body has %d", p, o.items, count)
		}
		if seen += count; count > 0 {
			used++
		}
	}
	if seen != total || b.items != total || used < 3 {
		t.Errorf("%d spans in %d partitions, batch says %d; want %d", seen, used, b.items, total)
	}
	for _, bad := range [][]byte{[]byte("garbage"), {0x0b}} {
		if _, _, err := split.add(b, input{Delivery: bus.Delivery{Subject: "otlp.traces.3.as-1", Body: bad}}); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestConfig(t *testing.T) {
	for want, change := range map[string]func(*Config){
		"":                    func(*Config) {},
		"hub.url":             func(c *Config) { c.Hub.URL = "http://h:4222" },
		"linger":              func(c *Config) { c.Linger = 1 << 40 },
		"max_batch_bytes":     func(c *Config) { c.MaxBatch = 1 },
		"streams.partitions":  func(c *Config) { c.Streams.Partitions = 0 },
		"gateway.http.listen": func(c *Config) { c.Gateway.TokensFile = "x"; c.Gateway.HTTP.Listen = "0.0.0.0:4318" },
	} {
		c := DefaultConfig()
		change(&c)
		err := c.Validate()
		if (want == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), want)) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// TestMessagesStayBelowTheirBound fills one partition with more than a message
// holds, in one frame and in many.
func TestMessagesStayBelowTheirBound(t *testing.T) {
	b := &batch{outs: make([][]out, 1)}
	for n := range 40 {
		payload, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{
			{TraceId: bytes.Repeat([]byte{1}, 16), SpanId: []byte{1, 1, 1, 1, 1, 1, 1, byte(n)}, Name: strings.Repeat("x", 100<<10)},
		}}}}}})
		if err != nil {
			t.Fatal(err)
		}
		b.addPart(0, envelope.Frame{Instance: "as-1", Payload: payload})
		b.addPart(0, envelope.Frame{Instance: "as-2"})
	}
	items := 0
	for _, o := range b.outs[0] {
		if len(o.body) > envelope.MaxPayload+256 {
			t.Errorf("a message of %d bytes", len(o.body))
		}
		items += o.items
	}
	if items != 40 || len(b.outs[0]) != 5 {
		t.Errorf("%d spans in %d messages, want 40 in 5", items, len(b.outs[0]))
	}
}

// TestInputIsSettledAfterItsOutputs takes SPANS away: what comes in must stay
// owed until SPANS is there again and has it.
func TestInputIsSettledAfterItsOutputs(t *testing.T) {
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	bk, err := broker.Start(broker.Config{Name: "hub", Dir: t.TempDir(), MaxPayload: 2 << 20}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer bk.Stop()
	cfg := DefaultConfig()
	cfg.Streams.Partitions, cfg.Streams.MaxBytes = 1, 64<<20
	cfg.Hub = bus.Config{Name: "router", InProcess: bk}
	cfg.Drain = time.Millisecond
	stages, err := Build(app.NewProcess(quiet, &cfg), cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- app.Run(ctx, quiet, stages) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()

	nc, err := nats.Connect("", nats.InProcessServer(bk))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	wait, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	if !backoff.Until(wait, func() bool { return stages[1].State() == services.Running }) {
		t.Fatal("the router does not start")
	}
	spans, err := js.Stream(wait, bus.Spans)
	if err != nil {
		t.Fatal(err)
	}
	if err := js.DeleteStream(wait, bus.Spans); err != nil {
		t.Fatal(err)
	}
	payload, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{{TraceId: bytes.Repeat([]byte{1}, 16), SpanId: bytes.Repeat([]byte{1}, 8)}}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	msg := nats.NewMsg("otlp.traces.as-1")
	msg.Data = payload
	envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: 1, ID: "x"}.Fields(func(k, v string) { msg.Header.Set(k, v) })
	if _, err := js.PublishMsg(wait, msg); err != nil {
		t.Fatal(err)
	}
	floor := func() uint64 {
		c, err := js.Consumer(wait, "TRACES", "router-0")
		if err != nil {
			t.Fatal(err)
		}
		if c.CachedInfo().NumAckPending == 0 && c.CachedInfo().NumPending == 0 {
			return c.CachedInfo().AckFloor.Stream
		}
		return 0
	}
	// Delivered, tried at least once, and still owed.
	if !backoff.Until(wait, func() bool {
		c, err := js.Consumer(wait, "TRACES", "router-0")
		return err == nil && c.CachedInfo().NumAckPending == 1
	}) {
		t.Fatal("the message was not delivered")
	}
	for range 10 {
		if n := floor(); n != 0 {
			t.Fatalf("floor %d, although SPANS is not there", n)
		}
		backoff.Sleep(wait, 50*time.Millisecond)
	}
	if _, err := js.CreateStream(wait, spans.CachedInfo().Config); err != nil {
		t.Fatal(err)
	}
	if !backoff.Until(wait, func() bool { return floor() == 1 }) {
		t.Error("the input is not settled after SPANS is back")
	}
	again, err := js.Stream(wait, bus.Spans)
	if err != nil || again.CachedInfo().State.Msgs != 1 {
		t.Errorf("SPANS holds %+v, %v; want one message", again.CachedInfo().State, err)
	}
}

// TestMessagesOfAPartitionKeepTheirOrder sends a batch with several messages a
// partition: all are stored, each partition's in their order.
func TestMessagesOfAPartitionKeepTheirOrder(t *testing.T) {
	quiet := slog.New(slog.DiscardHandler)
	bk, err := broker.Start(broker.Config{Name: "hub", Dir: t.TempDir(), MaxPayload: 2 << 20}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer bk.Stop()
	cfg := DefaultConfig()
	cfg.Streams.Partitions, cfg.Streams.MaxBytes = 2, 64<<20
	hub := bus.NewHub(bus.Config{}, cfg.Streams, quiet)
	if hub.Conn, err = bus.OpenHub(t.Context(), bus.Config{Name: "router", InProcess: bk}, cfg.Streams, quiet); err != nil {
		t.Fatal(err)
	}
	defer hub.Conn.Close()
	r := newRoute(cfg, hub, ledger.New(prometheus.NewRegistry()), quiet)
	b := r.newBatch()
	for i := range 5 {
		b.outs[0] = append(b.outs[0], out{body: []byte{byte(i)}, items: 1})
	}
	b.outs[1] = append(b.outs[1], out{body: []byte("x"), items: 1})
	if !r.send(t.Context(), b) {
		t.Fatal("not sent")
	}
	lane, err := hub.Conn.OpenLane(t.Context(), bus.LaneConfig{Stream: bus.Spans, Filter: bus.SpansSubject(0), Name: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer lane.Close()
	for want := 0; want < 5; {
		d, err := lane.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if d.Seq == 0 {
			continue
		}
		if !bytes.Equal(d.Body, []byte{byte(want)}) {
			t.Fatalf("got %v, want %d", d.Body, want)
		}
		want++
	}
	if st, err := hub.Conn.State(t.Context(), bus.Spans); err != nil || st.Messages != 6 {
		t.Errorf("%+v, %v", st, err)
	}
}

// TestGatewayKeepsTheOrigin: what an edge sends again is stored once, with the time of
// its arrival at the edge, and the id of one instance means nothing for another.
func TestGatewayKeepsTheOrigin(t *testing.T) {
	hub := startHub(t)
	g := newGateway(hub, slog.New(slog.DiscardHandler))
	defer g.holds.Close()
	origin := receive.Origin{ID: "nonce-1-4", Arrival: time.Now().Add(-time.Minute).UnixNano(), Load: envelope.Load{9, 9, 9, 9}}
	for _, b := range []receive.Batch{
		{Instance: "as-1", Origin: origin}, {Instance: "as-1", Origin: origin}, {Instance: "as-2", Origin: origin}, {Instance: "as-1"}, {Instance: "as-1"},
	} {
		b.Signal, b.Items, b.Payload = otlpwire.Traces, 1, []byte("x")
		if err := g.accept(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	r, err := hub.Conn.OpenReader(t.Context(), bus.Stream(otlpwire.Traces), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var got []string
	for pending := uint64(1); pending > 0; {
		d, err := r.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		pending = d.Pending
		// Of an edge its own load; of the others what the gateway took: the longest window.
		got = append(got, fmt.Sprint(d.Instance(), d.Header.Arrival == origin.Arrival, d.Header.Load[3]))
	}
	if want := []string{"as-1true 9", "as-2true 9", "as-1false 1", "as-1false 2"}; !slices.Equal(got, want) {
		t.Errorf("stored %v, want %v", got, want)
	}
}

// TestAGatewayWithoutItsStreamSaysSo: once a minute, however many senders are told to try again.
func TestAGatewayWithoutItsStreamSaysSo(t *testing.T) {
	t.Parallel()
	quiet := slog.New(slog.DiscardHandler)
	bk, err := broker.Start(broker.Config{Name: "hub", Dir: t.TempDir(), MaxPayload: 8 << 20}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer bk.Stop()
	hub := bus.NewHub(bus.Config{}, bus.DefaultTopology(), quiet)
	if hub.Conn, err = bus.Dial(bus.Config{Name: "router", InProcess: bk}, quiet); err != nil {
		t.Fatal(err)
	}
	defer hub.Conn.Close()
	var said bytes.Buffer
	g := newGateway(hub, slog.New(slog.NewTextHandler(&said, nil)))
	for range 5 {
		if err := g.accept(t.Context(), receive.Batch{Instance: "as-7", Signal: otlpwire.Logs, Items: 1, Payload: []byte("x")}); !errors.Is(err, bus.ErrNoStream) {
			t.Fatal(err)
		}
	}
	if text := said.String(); strings.Count(text, "\n") != 1 || !strings.Contains(text, "signal=logs instance=as-7") || !strings.Contains(text, "no stream") {
		t.Errorf("it says %s", text)
	}
}

// startHub starts a hub of one partition.
func startHub(t *testing.T) *bus.Hub {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	bk, err := broker.Start(broker.Config{Name: "hub", Dir: t.TempDir(), MaxPayload: 8 << 20}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(bk.Stop)
	streams := bus.DefaultTopology()
	streams.Partitions, streams.MaxBytes = 1, 64<<20
	hub := bus.NewHub(bus.Config{}, streams, quiet)
	if hub.Conn, err = bus.OpenHub(t.Context(), bus.Config{Name: "router", InProcess: bk}, streams, quiet); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hub.Conn.Close)
	return hub
}

// TestGatewayHoldsBack: a gateway refuses the signal of an instance that the keeper names, as full, as long as it does, and
// nothing else.
func TestGatewayHoldsBack(t *testing.T) {
	hub := startHub(t)
	var held atomic.Bool
	held.Store(true)
	stop, err := hold.Serve(hub.Conn, func(instance string) (a hold.Answer) {
		if instance == "as-1" && held.Load() {
			a = hold.Answer{Signals: []string{"logs"}, Why: "it floods"}
		}
		return a
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	g := newGateway(hub, slog.New(slog.DiscardHandler))
	defer g.holds.Close()
	accept := func(instance string, sig otlpwire.Signal) error {
		return g.accept(t.Context(), receive.Batch{Instance: instance, Signal: sig, Items: 1, Payload: []byte("x")})
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if !backoff.Until(ctx, func() bool { err = accept("as-1", otlpwire.Logs); return err != nil }) || !errors.Is(err, receive.ErrFull) || !strings.Contains(err.Error(), "it floods") {
		t.Fatalf("got %v", err)
	}
	for range 3 {
		if err := errors.Join(accept("as-1", otlpwire.Metrics), accept("as-2", otlpwire.Logs)); err != nil {
			t.Error(err)
		}
	}
	held.Store(false)
	if !backoff.Until(ctx, func() bool { return accept("as-1", otlpwire.Logs) == nil }) {
		t.Error("it is held for ever")
	}
}
