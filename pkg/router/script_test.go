package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/scripttest"
)

// TestScripts runs a route without a hub, and with a clock that moves only by the command wait:
//
//	route partitions=2 linger=20ms max_batch=64KiB     with spread=3, traces of a third partition make the splitter panic
//	input lane=A seq=1 instance=as-1 spans=a1/x,b2/y   one message of TRACES: trace/name
//	input lane=A seq=2 instance=as-1 garbage=yes       one that is no OTLP
//	wait for=20ms
//	hold to=spans.0 | answer to=spans.0                the hub does not answer, or answers again
//	refuse to=dead | accept to=dead                    it refuses, or stores again
//	counts
//
// The output is what the hub stores and refuses, with the number of the message's id, and which inputs
// are settled. A refusal of the same message is shown once.
func TestScripts(t *testing.T) {
	scripttest.Run(t, func(t *testing.T, s *scripttest.Script) {
		synctest.Test(t, func(t *testing.T) {
			sc := &script{t: t, lanes: map[string]*scriptLane{}, held: map[string]chan struct{}{}, refused: map[string]bool{}, said: map[string]bool{}}
			s.Run(t, scripttest.Commands{
				"route": sc.start, "input": sc.input, "wait": sc.wait, "counts": sc.counts,
				"hold": sc.hold, "answer": sc.answer, "refuse": sc.refuse, "accept": sc.accept,
			})
		})
	})
}

type script struct {
	t     *testing.T
	r     *route
	n     int // partitions of the spread
	log   logtest.Log
	lanes map[string]*scriptLane

	mu      sync.Mutex
	held    map[string]chan struct{} // by subject: the hub answers when it is closed
	refused map[string]bool
	said    map[string]bool // which refusals the script has shown
	did     []string
}

func (sc *script) note(format string, args ...any) {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	sc.did = append(sc.did, fmt.Sprintf(format, args...))
}

// events waits until nothing happens any more, and returns what has. Lanes are settled in no order.
func (sc *script) events() string {
	synctest.Wait()
	sc.mu.Lock()
	defer sc.mu.Unlock()
	var b strings.Builder
	for len(sc.did) > 0 {
		n := 1
		for strings.HasPrefix(sc.did[0], "lane ") && n < len(sc.did) && strings.HasPrefix(sc.did[n], "lane ") {
			n++
		}
		slices.Sort(sc.did[:n])
		for _, line := range sc.did[:n] {
			b.WriteString(line + "\n")
		}
		if letter := "stored in dead: "; strings.HasPrefix(sc.did[0], letter) {
			for n < len(sc.did) && strings.HasPrefix(sc.did[n], letter) {
				n++
			}
			if n > 1 {
				fmt.Fprintf(&b, "and %d more dead letters\n", n-1)
			}
		}
		sc.did = sc.did[n:]
	}
	return b.String()
}

func (sc *script) start(c *scripttest.Call) string {
	cfg := DefaultConfig()
	cfg.Streams.Partitions, cfg.Linger = c.Number("partitions", 1), c.Duration("linger")
	sc.n = c.Number("spread", cfg.Streams.Partitions)
	if err := cfg.MaxBatch.UnmarshalText([]byte(c.Text("max_batch", "4MiB"))); err != nil {
		c.Fatalf("%v", err)
	}
	sc.r = newRoute(cfg, bus.NewHub(bus.Config{}, cfg.Streams, slog.New(slog.DiscardHandler)), ledger.New(prometheus.NewRegistry()), sc.log.Logger(slog.LevelInfo))
	sc.r.to = sc
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); sc.r.run(ctx) }()
	sc.t.Cleanup(func() { stop(); <-done })
	return sc.events()
}

func (sc *script) input(c *scripttest.Call) string {
	name := c.Text("lane", "A")
	lane := sc.lanes[name]
	if lane == nil {
		lane = &scriptLane{sc: sc, name: name}
		sc.lanes[name] = lane
	}
	in := input{lane, nil, bus.Delivery{
		Seq: uint64(c.Number("seq", 0)), Subject: "otlp.traces.0." + c.Text("instance", "as-1"), Header: envelope.Header{Arrival: time.Now().UnixNano()},
	}}
	if spans := c.Text("spans", ""); spans != "" {
		in.Body = spansOf(c, spans, c.Number("size", 0))
	}
	if c.Text("garbage", "") == "yes" {
		in.Body = []byte("garbage")
	}
	for i := range c.Number("times", 1) {
		next := in
		next.Seq += uint64(i)
		sc.r.inputs <- next
	}
	return sc.events()
}

func spansOf(c *scripttest.Call, list string, size int) []byte {
	ss := &tracepb.ScopeSpans{}
	for span := range strings.SplitSeq(list, ",") {
		trace, name, _ := strings.Cut(span, "/")
		ss.Spans = append(ss.Spans, &tracepb.Span{TraceId: fmt.Appendf(nil, "%016s", trace), SpanId: fmt.Appendf(nil, "%08s", name), Name: name})
		if size > 0 {
			ss.Spans[len(ss.Spans)-1].TraceState = strings.Repeat("x", size)
		}
	}
	body, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{ss}}}})
	if err != nil {
		c.Fatalf("%v", err)
	}
	return body
}

func (sc *script) wait(c *scripttest.Call) string {
	time.Sleep(c.Duration("for"))
	return sc.events()
}

func (sc *script) hold(c *scripttest.Call) string {
	sc.mu.Lock()
	sc.held[c.Text("to", "")] = make(chan struct{})
	sc.mu.Unlock()
	return sc.events()
}

func (sc *script) answer(c *scripttest.Call) string {
	sc.mu.Lock()
	close(sc.held[c.Text("to", "")])
	delete(sc.held, c.Text("to", ""))
	sc.mu.Unlock()
	return sc.events()
}

func (sc *script) refuse(c *scripttest.Call) string {
	sc.mu.Lock()
	sc.refused[c.Text("to", "")] = true
	sc.mu.Unlock()
	return sc.events()
}

func (sc *script) accept(c *scripttest.Call) string {
	sc.mu.Lock()
	delete(sc.refused, c.Text("to", ""))
	sc.mu.Unlock()
	return sc.events()
}

func (sc *script) counts(*scripttest.Call) string {
	led := sc.r.led.Of(otlpwire.Traces)
	text := fmt.Sprintf("routed=%v dead=%v dropped=%v\n", testutil.ToFloat64(led.Routed),
		testutil.ToFloat64(led.Dead(ledger.DeadUndecodable)), testutil.ToFloat64(led.Dropped(ledger.DroppedUndecodable)))
	if panics := testutil.ToFloat64(sc.r.led.Panics(ledger.PanicRouter)); panics > 0 {
		text += fmt.Sprintf("panics=%v poison=%v\n", panics, testutil.ToFloat64(led.Dead(ledger.DeadPoison)))
		if said := strings.Count(sc.log.String(), "made the router panic"); said != 1 || !sc.log.Says("level=ERROR", "subject=otlp.traces.0.as-1 seq=2 ", "splitter", "addPart") {
			sc.t.Errorf("it says %d times, want once a minute, of the first one and with the stack:\n%s", said, sc.log.String())
		}
	}
	return text
}

var errScript = errors.New("the stream is full")

// write is what the hub does with a message to a subject: it answers at once, later, or refuses it.
func (sc *script) write(subject, what string) func(context.Context) error {
	sc.mu.Lock()
	held := sc.held[subject]
	sc.mu.Unlock()
	return func(ctx context.Context) error {
		if held != nil {
			select {
			case <-held:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		sc.mu.Lock()
		refused, said := sc.refused[subject], sc.said[what]
		sc.said[what] = refused
		sc.mu.Unlock()
		switch {
		case !refused:
			sc.note("stored in %s: %s", subject, what)
			return nil
		case !said:
			sc.note("refused by %s: %s", subject, what)
		}
		return errScript
	}
}

func (sc *script) spread(context.Context) (partition.Spread, error) {
	return partition.Spread{N: sc.n}, nil
}

func (sc *script) publish(m bus.Message) func(context.Context) error {
	_, number, _ := strings.Cut(m.Header.ID, "-")
	return sc.write(m.Subject, fmt.Sprintf("#%s of %d spans%s", number, m.Header.Items, sc.frames(m)))
}

// frames describes the body of a message of SPANS.
func (sc *script) frames(m bus.Message) string {
	body, err := envelope.Decompress(nil, m.Body, m.Header.Encoding)
	if err != nil {
		sc.t.Error(err)
	}
	if len(body) > envelope.MaxPayload+1<<10 {
		sc.t.Errorf("a message of %d bytes", len(body))
	}
	var b strings.Builder
	for len(body) > 0 {
		var f envelope.Frame
		if f, body, err = envelope.NextFrame(body); err != nil {
			sc.t.Error(err)
			break
		}
		fmt.Fprintf(&b, ", %s %d:", f.Instance, f.Seq)
		for item := range otlpwire.Items(f.Payload) {
			var sp otlpwire.Span
			sp.Parse(item)
			fmt.Fprintf(&b, " %s/%s", strings.TrimLeft(string(sp.TraceID[:]), "0"), strings.TrimLeft(string(sp.SpanID[:]), "0"))
		}
	}
	return b.String()
}

func (sc *script) deadLetter(ctx context.Context, instance string, m bus.Message) error {
	return sc.write("dead", fmt.Sprintf("%s of %s, %s: %s", m.Header.ID, instance, m.Refusal.Reason, m.Refusal.Source))(ctx)
}

// scriptLane notes what is settled, and what it waits for.
type scriptLane struct {
	sc    *script
	name  string
	waits bool
}

func (l *scriptLane) Ack(seq uint64) error {
	l.sc.note("lane %s: settled up to %d", l.name, seq)
	return nil
}

func (l *scriptLane) Waits(why error) {
	switch {
	case why != nil && !l.waits:
		l.sc.note("lane %s: waits, %v", l.name, why)
	case why == nil && l.waits:
		l.sc.note("lane %s: waits no longer", l.name)
	}
	l.waits = why != nil
}

// TestAPanicDiscardsTheSplitter: what it holds then is not used again, and the batch is as it was.
func TestAPanicDiscardsTheSplitter(t *testing.T) {
	cfg := DefaultConfig()
	cfg.Streams.Partitions = 1
	r := newRoute(cfg, bus.NewHub(bus.Config{}, cfg.Streams, slog.New(slog.DiscardHandler)), ledger.New(prometheus.NewRegistry()), slog.New(slog.DiscardHandler))
	r.to = &script{t: t, said: map[string]bool{}}
	spread := partition.Spread{N: 2, ByInstance: true} // of which the batch has one
	split, b := &splitter{spread: spread}, r.newBatch()
	ss := &tracepb.ScopeSpans{}
	for i := range 20 {
		ss.Spans = append(ss.Spans, &tracepb.Span{TraceId: fmt.Appendf(nil, "%016d", i), SpanId: []byte("01234567")})
	}
	body, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{ScopeSpans: []*tracepb.ScopeSpans{ss}}}})
	if err != nil {
		t.Fatal(err)
	}
	if !r.add(t.Context(), split, b, input{Delivery: bus.Delivery{Seq: 1, Subject: "otlp.traces.0.as-1", Body: body}}) {
		t.Fatal("not added")
	}
	if n := testutil.ToFloat64(r.led.Panics(ledger.PanicRouter)); n != 1 || split.parts != nil || split.spread != spread {
		t.Errorf("%v panics, then %d parts, spread %+v", n, len(split.parts), split.spread)
	}
	if len(b.outs[0]) != 0 || b.bytes != 0 || b.items != 0 {
		t.Errorf("the batch has %d messages, %d bytes, %d items", len(b.outs[0]), b.bytes, b.items)
	}
}
