// Command chaosedge kills an edge, takes its hub away, cuts and slows the way to it
// and fills its disk, while applications send all three signals, and then compares
// what was acknowledged with what the hub holds:
//
//	chaosedge -seed 7 -for 120s
//
// Edge and hub are processes; between them stands a proxy that does what networks do.
// A seed gives a schedule of faults: kill -9 at any moment and at named points of the
// edge (it is built with -tags failpoints), kill -9 of the hub, one direction of the
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
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/penstock/penstock/test/daemon"
)

func main() { daemon.Main("chaosedge", Run) }

// Run builds the edge, lets the world run and judges it.
func Run(ctx context.Context, o daemon.Options) (Summary, error) {
	dir, err := os.MkdirTemp("", "penstock-chaosedge-")
	if err != nil {
		return Summary{}, err
	}
	if !o.Keep {
		defer func() { _ = os.RemoveAll(dir) }()
	}
	if err := daemon.Build(ctx, filepath.Join(dir, "bin"), "failpoints", "edge"); err != nil {
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
