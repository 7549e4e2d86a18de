// Command edge measures the edge daemon beside an OpenTelemetry Collector that does
// the same work: take OTLP, stamp it, keep it on disk, pass it on. Both run as real
// processes, one after the other in every cell of the table, and get the same bytes:
//
//	cd bench && go run ./edge            # the table
//	cd bench && go run ./edge -backlog   # how fast an hour without a hub is made up for
//
// The sender is this process. Each connection sends its next request when the last
// was answered; what is refused for now is sent again after a pause and counts when
// it is taken. Behind the edge stands a hub, behind the collector a server that
// counts and discards, both processes of their own. CPU time and memory are those of
// the edge and of the collector alone. The same receiver in front of the same log, with
// nothing behind it, says how little an edge could need (limit.go).
//
// A cell begins with a warm-up. Its CPU time runs from the first request to the
// moment when the next hop has all of its spans, so that one who puts off work pays
// for it too. That the next hop has them all is checked: nothing was dropped.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

const about = `Measures the edge daemon beside an OpenTelemetry Collector (bench/collector), as
real processes on the same requests. Run it in the directory bench.

  go run ./edge                              everything, about 8 minutes
  go run ./edge -quick -peer ""              edge and limit alone, two cells, under 30 s
  go run ./edge -connections 8 -spans 512    one cell
  go run ./edge -backlog                     fill an hour without a hub, then drain it
  go run ./edge -backlog -quick              a minute instead of an hour

spans/s       spans answered with success a second; with fsync on, on the disk,
              but for the collector that answers before
CPU s/M       CPU seconds, user and system, for a million spans, passed on
peak MiB      the most memory the process has had, VmHWM
behind s      time after the last answer until the next hop had everything
edge/this     spans a CPU second of the edge over those of this side

The limit is a process that has the edge's receiver and its log and no more: each
request is compressed and appended by the goroutine that received it, or by that of
another which waits for the disk, too. Nothing is read back; there is no hub.

`

// options are what the flags say.
type options struct {
	round       time.Duration
	connections ints
	spans       ints
	attrs       int
	protocol    string
	compression string
	queueBatch  bool
	peer        string
	edge        string
	dir         string
	quick       bool
	fsyncs      []bool

	backlog  bool
	rate     int           // spans/s
	away     time.Duration // what the hub misses, at that rate
	hubFsync bool
}

func main() {
	if len(os.Args) > 2 && os.Args[1] == childFlag {
		os.Exit(child(os.Args[2:]))
	}
	o := options{connections: ints{1, 8, 64}, spans: ints{64, 512}, fsyncs: []bool{true, false}}
	flag.DurationVar(&o.round, "round", 5*time.Second, "how long a cell sends; the warm-up is a fifth of it")
	flag.Var(&o.connections, "connections", "numbers of connections, separated by commas")
	flag.Var(&o.spans, "spans", "spans a request, separated by commas")
	flag.IntVar(&o.attrs, "attrs", 10, "attributes a span")
	flag.StringVar(&o.protocol, "protocol", "grpc", "grpc or http: how requests are sent")
	flag.StringVar(&o.compression, "compression", "snappy", "of the collector's exporter: snappy, which is nearest to the edge's s2, gzip, which is the collector's default, or none")
	flag.BoolVar(&o.queueBatch, "queue-batch", true, "the collector that answers after the disk makes batches on the way out of its queue; without, it passes on request by request")
	flag.StringVar(&o.peer, "peer", "collector", "`directory` of the collector's module; empty for none")
	flag.StringVar(&o.edge, "edge", "", "`file` of an edge to measure; empty builds the one of this tree")
	flag.StringVar(&o.dir, "dir", os.TempDir(), "`directory` on the disk that spool and queue are to be on")
	flag.BoolVar(&o.quick, "quick", false, "a second a cell, two cells, fsync only; with -backlog a minute")
	flag.BoolVar(&o.backlog, "backlog", false, "measure how a backlog is drained, and check its order")
	flag.IntVar(&o.rate, "rate", 2000, "with -backlog: live spans a second")
	flag.DurationVar(&o.away, "away", time.Hour, "with -backlog: how long the hub is away; its spans, this times -rate, are sent as fast as the edge takes them")
	flag.BoolVar(&o.hubFsync, "hub-fsync", true, "with -backlog: the hub, on the same disk, writes with fsync, too")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), about)
		flag.PrintDefaults()
	}
	flag.Parse()
	if o.quick {
		o.shorten()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		fmt.Fprintln(os.Stderr, "edge:", err)
		os.Exit(1)
	}
}

// shorten sets what is long by default and was not set by a flag.
func (o *options) shorten() {
	set := map[string]bool{}
	flag.Visit(func(f *flag.Flag) { set[f.Name] = true })
	for name, apply := range map[string]func(){
		"round":       func() { o.round = time.Second },
		"connections": func() { o.connections = ints{1, 8} },
		"spans":       func() { o.spans = ints{512} },
		"away":        func() { o.away = time.Minute },
	} {
		if !set[name] {
			apply()
		}
	}
	o.fsyncs = []bool{true}
}

func run(ctx context.Context, o options) (err error) {
	if o.protocol != "grpc" && o.protocol != "http" {
		return fmt.Errorf("-protocol is %q, want grpc or http", o.protocol)
	}
	if o.rate < 1 {
		return fmt.Errorf("-rate is %d, want at least 1", o.rate)
	}
	b, err := newBench(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if err := b.header(); err != nil {
		return err
	}
	if o.backlog {
		return b.backlog(ctx)
	}
	if err := b.table(ctx); err != nil {
		return err
	}
	return b.lightLoad(ctx)
}
