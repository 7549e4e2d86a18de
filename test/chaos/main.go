// Command chaos lets a whole pipeline of real processes be killed, paused and
// scaled while traces flow, and then compares what was acknowledged with what has
// arrived:
//
//	chaos -seed 7 -for 120s
//
// A hub, two edges, two routers and one to four sinks run as processes; the
// backend is a recording Tempo in this one. A seed gives a schedule of faults:
// kill -9, SIGSTOP, SIGTERM, a backend that refuses. The oracle knows the
// policies and what it has sent; it looks at the answers, at Tempo and at the
// streams DECISIONS and DEADLETTER, never into the pipeline.
//
// The exit code is 1 when a promise was broken. The last line is
//
//	acked=N delivered=N sampled_out=N dead=N lost=0 split=0 leaked=0 duplicates=N faults=N worst_recovery=Ns
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/penstock/penstock/test/daemon"
)

func main() {
	seed := flag.Uint64("seed", 1, "of the schedule and the traces")
	length := flag.Duration("for", 2*time.Minute, "how long faults are injected")
	keep := flag.Bool("keep", false, "keep the directory with logs and data")
	tags := flag.String("tags", "", "build tags of the binaries: a bug planted on purpose (docs/testing.md)")
	hub := flag.String("hub", "", "run as the hub: `directory,address` (for chaos itself)")
	flag.Parse()
	if *hub != "" {
		os.Exit(daemon.RunHub(*hub))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	sum, err := Run(ctx, Options{Seed: *seed, For: *length, Keep: *keep, Tags: *tags, Out: os.Stdout})
	if err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
	fmt.Println(sum)
	if sum.Broken() {
		os.Exit(1)
	}
}

// Options says what to run.
type Options struct {
	Seed uint64
	For  time.Duration
	Keep bool
	Tags string
	Hub  []string  // command of the hub; empty: this program with -hub
	Out  io.Writer // for progress
}

// Run builds the binaries, lets the world run and judges it.
func Run(ctx context.Context, o Options) (Summary, error) {
	dir, err := os.MkdirTemp("", "penstock-chaos-")
	if err != nil {
		return Summary{}, err
	}
	if !o.Keep {
		defer func() { _ = os.RemoveAll(dir) }()
	}
	bin := filepath.Join(dir, "bin")
	if err := daemon.Build(ctx, bin, o.Tags, "edge", "router", "sink"); err != nil {
		return Summary{}, err
	}
	if len(o.Hub) == 0 {
		self, err := os.Executable()
		if err != nil {
			return Summary{}, err
		}
		o.Hub = []string{self, "-hub"}
	}
	w, err := newWorld(o, dir, bin)
	if err != nil {
		return Summary{}, err
	}
	defer w.close()
	if err := w.run(ctx); err != nil {
		return Summary{}, fmt.Errorf("%w; logs are in %s (-keep keeps them)", err, dir)
	}
	return w.judge(ctx)
}
