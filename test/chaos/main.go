// Command chaos lets a whole pipeline of real processes be killed, paused and
// scaled while traces flow, and then compares what was acknowledged with what has
// arrived:
//
//	chaos -seed 7 -for 120s
//
// A hub, four edges, two routers and one to four sinks run as processes; two edges are of one instance, and two
// instances of one domain, whose traces have spans of all three edges. The
// backend is a recording Tempo in this one. Before the faults the delays of what instances send are measured,
// without trouble and beside an instance that the backends refuse and that floods. A seed gives a schedule of faults:
// kill -9, SIGSTOP, SIGTERM, a backend that refuses, or that refuses, fails for or is slow for one
// instance only, an edge whose clock is set. One log record of a run is answered with 500
// whenever it comes: it must become a dead letter, and nothing else. The oracle knows the
// policies and what it has sent; it looks at the answers, at Tempo and at the
// streams DECISIONS and DEADLETTER, never into the pipeline.
//
// The exit code is 1 when a promise was broken. The last line is
//
//	acked=N delivered=N sampled_out=N dead=0 poisoned=1 lost=0 wrongly_dropped=0 split=0 leaked=0 misordered=0 duplicates=N unaccounted=0 refused=N faults=N worst_recovery=Ns p99_ratio=N
//
// where p99_ratio is how many times longer the p99 of the delays was beside that instance, of the signal with the
// highest; 2 is the bound from -for 60s on.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/penstock/penstock/test/daemon"
)

func main() { daemon.Main("chaos", Run) }

// Run builds the binaries, lets the world run and judges it.
func Run(ctx context.Context, o daemon.Options) (Summary, error) {
	dir, err := os.MkdirTemp("", "penstock-chaos-")
	if err != nil {
		return Summary{}, err
	}
	if !o.Keep {
		defer func() { _ = os.RemoveAll(dir) }()
	}
	bin := filepath.Join(dir, "bin")
	if err := errors.Join(daemon.Build(ctx, bin, o.Tags(), "edge", "router", "sink"), daemon.Build(ctx, filepath.Join(bin, stepped), "failpoints", "edge")); err != nil {
		return Summary{}, err
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
