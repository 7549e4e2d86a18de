// Command replay measures how fast a sink replays what the hub's streams hold, into a
// backend that throws everything away, beside the raw speed of reading the same stream:
//
//	cd bench && go run ./replay
//
// All read over TCP, with the same pull requests. The raw reader takes the messages as
// they are stored and drops them: one reader of the whole stream, in order; then a reader
// for each partition at a time, as the replay has them; then these with decompression;
// then with the check that every payload goes through before a backend sees it, which is
// the limit of what a replay could do. The replay also splits spans by trace, samples
// whole traces, records its decisions, and writes down how far it is. Hub, one sink and
// the readers are this process; there is no router, so no live spans.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"

	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/bench/internal/load"
	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sink"
)

const (
	instances  = 16
	perMessage = 512 // items
	traceSpans = 8
	attributes = 10
	liveRate   = 10_000 // items a second of stream time
)

type options struct {
	items  int
	rounds int
	dir    string
}

func main() {
	var o options
	flag.IntVar(&o.items, "items", 4_000_000, "items of each signal: enough to make what a job costs at its beginning and end small")
	flag.IntVar(&o.rounds, "rounds", 3, "how often each is measured; the median counts")
	flag.StringVar(&o.dir, "dir", "", "`directory` for the hub's files; default: a temporary one")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench/replay:", err)
		os.Exit(1)
	}
}

// bench is a hub with filled streams.
type bench struct {
	options
	conn *bus.Conn
	top  bus.Topology
	url  string
	log  *slog.Logger
	base time.Time
}

func run(ctx context.Context, o options) error {
	dir, err := os.MkdirTemp(o.dir, "bench-replay-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	b := &bench{options: o, top: bus.DefaultTopology(), log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	b.base = time.Now().Add(-time.Duration(o.items/liveRate+60) * time.Second).Truncate(time.Second)
	addr, err := freeAddr()
	if err != nil {
		return err
	}
	b.url = "nats://" + addr
	hub, err := broker.Start(broker.Config{Name: "hub", Dir: filepath.Join(dir, "hub"), Listen: addr, MaxPayload: 8 << 20}, b.log)
	if err != nil {
		return err
	}
	defer hub.Stop()
	if b.conn, err = bus.OpenHub(ctx, b.reach("bench"), b.top, b.log); err != nil {
		return err
	}
	defer b.conn.Close()
	fmt.Printf("%s, %d CPUs shared by hub, sink and readers; %d items a signal in messages of %d, %d instances, %d partitions, spans in traces of %d\n\n",
		runtime.Version(), runtime.NumCPU(), o.items, perMessage, instances, b.top.Partitions, traceSpans)
	fmt.Println("                                                                         share of a raw read by")
	fmt.Println("signal   what                         items/s   MB/s stored  CPU ns/item  one  partitions  and decompressed  and checked  of 10,000/s")
	for _, sig := range otlpwire.Signals {
		if err := b.fill(ctx, sig); err != nil {
			return fmt.Errorf("fill %v: %w", sig, err)
		}
		if err := b.signal(ctx, sig); err != nil {
			return fmt.Errorf("%v: %w", sig, err)
		}
	}
	return nil
}

// reach connects over TCP, as a fleet does.
func (b *bench) reach(name string) bus.Config { return bus.Config{URL: b.url, Name: name} }

// freeAddr is an address of loopback that nobody listens on now.
func freeAddr() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer func() { _ = ln.Close() }()
	return ln.Addr().String(), nil
}

// fill publishes the messages of a signal as edges would have.
func (b *bench) fill(ctx context.Context, sig otlpwire.Signal) error {
	var pending []bus.Pending
	for i := range b.items / perMessage {
		body := load.Seeded(uint64(i+1), sig, perMessage, attributes)
		if sig == otlpwire.Traces {
			var err error
			if body, err = inTraces(body, i); err != nil {
				return err
			}
		}
		instance := fmt.Sprint("as-", i%instances)
		body, err := envelope.Instance{ID: instance}.Stamp().Append(nil, body)
		if err != nil {
			return err
		}
		m := bus.Message{Subject: bus.Subject(sig, instance), Header: envelope.Header{
			ContentType: envelope.ContentTypeOTLP, Items: perMessage, ID: fmt.Sprintf("%v-%d", sig, i),
			Arrival: b.base.Add(time.Duration(i*perMessage) * time.Second / liveRate).UnixNano(),
		}}
		m.Body, m.Header.Encoding = envelope.Compress(nil, body, envelope.S2)
		if pending = append(pending, b.conn.PublishAsync(m)); len(pending) < 64 {
			continue
		}
		if err := settle(ctx, pending); err != nil {
			return err
		}
		pending = pending[:0]
	}
	return settle(ctx, pending)
}

func settle(ctx context.Context, pending []bus.Pending) error {
	for _, p := range pending {
		if err := p.Wait(ctx); err != nil {
			return err
		}
	}
	return nil
}

// inTraces gives the spans of message i trace IDs of their own, eight spans each.
func inTraces(body []byte, i int) ([]byte, error) {
	var req tracepb.TracesData
	if err := proto.Unmarshal(body, &req); err != nil {
		return nil, err
	}
	n := 0
	for _, rs := range req.GetResourceSpans() {
		for _, ss := range rs.GetScopeSpans() {
			for _, sp := range ss.GetSpans() {
				sp.TraceId = []byte(fmt.Sprintf("%08x%08d", uint32(i*2654435761), n/traceSpans))
				n++
			}
		}
	}
	return proto.Marshal(&req)
}

// result is one measurement.
type result struct {
	items, bytes int64
	took, cpu    time.Duration
}

func (r result) rate() float64 { return float64(r.items) / r.took.Seconds() }

// signal measures one signal and prints its lines.
func (b *bench) signal(ctx context.Context, sig otlpwire.Signal) error {
	raws := []struct {
		what    string
		readers int
		open    func(buf []byte, d bus.Delivery) ([]byte, error)
	}{
		{"raw read, one reader", 1, nil},
		{"raw read, by partition", b.top.Partitions, nil},
		{"and decompressed", b.top.Partitions, decompress},
		{"and checked", b.top.Partitions, func(buf []byte, d bus.Delivery) ([]byte, error) {
			buf, err := decompress(buf, d)
			if err == nil {
				_, err = otlpwire.Scan(sig, buf, otlpwire.DefaultLimits)
			}
			return buf, err
		}},
	}
	var raw [4]result
	printLine := func(what string, r result) {
		share := func(of result) float64 { return 100 * r.rate() / of.rate() }
		fmt.Printf("%-8v %-24s %11.0f %13.0f %12.0f %3.0f %% %9.0f %% %15.0f %% %10.0f %% %11.1fx\n", sig, what, r.rate(), float64(r.bytes)/1e6/r.took.Seconds(),
			float64(r.cpu.Nanoseconds())/float64(r.items), share(raw[0]), share(raw[1]), share(raw[2]), share(raw[3]), r.rate()/liveRate)
	}
	for i, read := range raws {
		var err error
		if raw[i], err = b.median(func() (result, error) { return b.raw(ctx, sig, read.readers, read.open) }); err != nil {
			return err
		}
	}
	for i, read := range raws {
		printLine(read.what, raw[i])
	}
	if sig != otlpwire.Traces {
		r, err := b.median(func() (result, error) { return b.replay(ctx, sig, func(*replay.Request) {}) })
		printLine("replay", r)
		return err
	}
	for _, c := range []struct {
		what   string
		change func(*replay.Request)
	}{
		{"replay, no sampling", func(r *replay.Request) { r.NoSampling = true }},
		{"replay, all kept", func(*replay.Request) {}},
		{"replay, 10 policies", func(r *replay.Request) { r.Policies = load.Policies(10, "10s") }},
	} {
		r, err := b.median(func() (result, error) { return b.replay(ctx, sig, c.change) })
		if err != nil {
			return err
		}
		printLine(c.what, r)
	}
	return nil
}

// median measures o.rounds times and returns the run in the middle.
func (b *bench) median(measure func() (result, error)) (result, error) {
	var all []result
	for range b.rounds {
		r, err := measure()
		if err != nil {
			return result{}, err
		}
		i := 0
		for i < len(all) && all[i].took < r.took {
			i++
		}
		all = append(all[:i], append([]result{r}, all[i:]...)...)
	}
	return all[len(all)/2], nil
}

func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func decompress(buf []byte, d bus.Delivery) ([]byte, error) {
	return envelope.Decompress(buf, d.Body, d.Header.Encoding)
}

// raw reads a stream with so many readers at a time: one for everything, or one for each
// partition. Each message goes through open, with a buffer to be used again; nil for none.
func (b *bench) raw(ctx context.Context, sig otlpwire.Signal, readers int, open func([]byte, bus.Delivery) ([]byte, error)) (result, error) {
	var items, bytes atomic.Int64
	errs := make([]error, readers)
	start, before := time.Now(), cpu()
	var wg sync.WaitGroup
	for p := range readers {
		wg.Go(func() {
			cfg := bus.ReaderConfig{Stream: bus.Stream(sig)}
			if readers > 1 {
				cfg.Filters = []string{bus.PartitionFilter(sig, p)}
			}
			r, err := b.conn.OpenReaderOf(ctx, cfg)
			if err != nil {
				errs[p] = err
				return
			}
			defer r.Close()
			var buf []byte
			for r.Left() > 0 {
				d, err := r.Next(ctx)
				if err == nil && open != nil {
					buf, err = open(buf, d)
				}
				if err != nil {
					errs[p] = err
					return
				}
				items.Add(int64(d.Header.Items))
				bytes.Add(int64(d.Size))
			}
		})
	}
	wg.Wait()
	return result{items.Load(), bytes.Load(), time.Since(start), cpu() - before}, errors.Join(errs...)
}

// replay files a job and measures from its first message to its end, by the clock of
// the sink. A sink of its own, so that each run begins alike.
func (b *bench) replay(ctx context.Context, sig otlpwire.Signal, change func(*replay.Request)) (result, error) {
	cfg := sink.DefaultConfig()
	cfg.Hub = b.reach("sink")
	cfg.Admin.Listen, cfg.Discard = "", true
	p := app.NewProcess(b.log, &cfg)
	stages, err := sink.Build(p, cfg)
	if err != nil {
		return result{}, err
	}
	serving, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- app.Run(serving, b.log, stages) }()
	defer func() {
		stop()
		<-ended //nolint:errcheck // that it was stopped
	}()
	if err := b.lived(ctx, sig); err != nil {
		return result{}, err
	}
	jobs, err := replay.Open(ctx, b.conn, b.top)
	if err != nil {
		return result{}, err
	}
	r := replay.Request{From: replay.Point{Time: b.base}, To: replay.Point{Time: time.Now()}, Signals: []string{sig.String()}}
	change(&r)
	job, _, err := jobs.File(ctx, &replay.Job{Request: r}, "bench", time.Now())
	if err != nil {
		return result{}, err
	}
	var res result
	var start time.Time
	var before time.Duration
	for look := time.NewTicker(20 * time.Millisecond); ; {
		select {
		case <-look.C:
		case <-ctx.Done():
			return res, ctx.Err()
		}
		s, err := jobs.Status(ctx, job.ID)
		if err != nil {
			return res, err
		}
		sum, _ := s.Sum("")
		switch phase := s.Phase(); {
		case phase == replay.Refused:
			return res, fmt.Errorf("refused: %q", s.Refusals())
		case start.IsZero() && phase == replay.Running:
			start, before = time.Now(), cpu()
		case phase == replay.Done:
			look.Stop()
			res = result{sum.Delivered + sum.SampledOut, sum.Bytes, time.Since(start), cpu() - before}
			if want := int64(b.items / perMessage * perMessage); res.items != want {
				return res, fmt.Errorf("%d items, want %d", res.items, want)
			}
			return res, jobs.Remove(ctx, job.ID, "bench", time.Now())
		}
	}
}

// lived waits until the live lanes of a signal have nothing left: a replay makes room
// for them. There is no router, so no live lane has spans.
func (b *bench) lived(ctx context.Context, sig otlpwire.Signal) error {
	if sig == otlpwire.Traces {
		return nil
	}
	for p := range b.top.Partitions {
		lane := fmt.Sprintf("discard-%d", p)
		for {
			at, err := b.conn.LaneFloor(ctx, bus.LaneConfig{Stream: bus.Stream(sig), Name: lane})
			if err == nil && at.Lag == 0 {
				break
			}
			if !backoff.Sleep(ctx, 50*time.Millisecond) {
				return ctx.Err()
			}
		}
	}
	return nil
}
