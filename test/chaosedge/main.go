// Command chaosedge kills an edge, takes its hub away, cuts and slows the way to it
// and fills its disk, while applications send all three signals, and then compares
// what was acknowledged with what the hub holds:
//
//	chaosedge -seed 7 -for 120s
//
// Edge and hub are processes; between them stands a proxy that does what networks do.
// A seed gives a schedule of faults: kill -9 at any moment and at named points of the
// edge (it is built with -tags points), kill -9 of the hub, one direction of the
// connection dropped, a slow link, resets, a full disk. The applications obey the
// retry rules of OTLP. With root the spool is on a tmpfs of 64 MiB, so that the disk
// can be filled.
//
// The exit code is 1 when a promise was broken. The last line is
//
//	acked=N found=N lost=0 phantom=0 misordered=0 duplicates=N faults=N
package main

import (
	"context"
	"errors"
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
	seed := flag.Uint64("seed", 1, "of the schedule and the load")
	length := flag.Duration("for", 2*time.Minute, "how long faults are injected")
	keep := flag.Bool("keep", false, "keep the directory with logs and data")
	tags := flag.String("tags", "", "further build tags: a bug planted on purpose (docs/testing.md)")
	hub := flag.String("hub", "", "run as the hub: `directory,address` (for chaosedge itself)")
	flag.Parse()
	if *hub != "" {
		os.Exit(daemon.RunHub(*hub))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	sum, err := Run(ctx, Options{Seed: *seed, For: *length, Keep: *keep, Tags: *tags, Out: os.Stdout})
	if err != nil {
		fmt.Fprintln(os.Stderr, "chaosedge:", err)
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
	Out  io.Writer // for progress
}

// Run builds the edge, lets the world run and judges it.
func Run(ctx context.Context, o Options) (Summary, error) {
	dir, err := os.MkdirTemp("", "penstock-chaosedge-")
	if err != nil {
		return Summary{}, err
	}
	if !o.Keep {
		defer func() { _ = os.RemoveAll(dir) }()
	}
	if err := daemon.Build(ctx, filepath.Join(dir, "bin"), "points,"+o.Tags, "edge"); err != nil {
		return Summary{}, err
	}
	w, err := newWorld(ctx, o, dir)
	if err != nil {
		return Summary{}, err
	}
	defer w.close()
	if err := w.run(ctx); err != nil {
		return Summary{}, fmt.Errorf("%w; logs are in %s (-keep keeps them)", err, dir)
	}
	var sum Summary
	err = daemon.Until(ctx, time.Minute, func() (err error) {
		// The gauge that says that nothing is owed is a second old.
		if sum, err = w.judge(ctx); err == nil && sum.Lost > 0 {
			err = errLost
		}
		return err
	})
	if errors.Is(err, errLost) {
		err = nil
	}
	return sum, err
}

var errLost = errors.New("not everything has arrived")
