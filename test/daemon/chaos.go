package daemon

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"
)

// Options say what a run of chaos does.
type Options struct {
	Seed       uint64
	For        time.Duration // how long faults are injected
	Keep       bool          // the directory with logs and data
	Failpoints string        // bugs that the binaries are to have (package failpoint), separated by commas
	Out        io.Writer     // for progress
}

// Tags are the build tags of the binaries.
func (o Options) Tags() string {
	if o.Failpoints != "" {
		return "failpoints"
	}
	return ""
}

// Env is what the processes of the binaries have in their environment.
func (o Options) Env() []string { return []string{"PENSTOCK_FAILPOINTS=" + o.Failpoints} }

// Verdict is what a run of chaos ends with.
type Verdict interface {
	fmt.Stringer
	Broken() bool // a promise was
}

// Main is the main function of a command that runs chaos: it reads the flags, is the
// hub's process when it is called as one (see [Hub]), and ends with exit code 1 when a
// promise was broken.
func Main[V Verdict](name string, run func(context.Context, Options) (V, error)) {
	asHub(os.Args[1:])
	o := Options{Out: os.Stdout}
	flag.Uint64Var(&o.Seed, "seed", 1, "of the schedule and the load")
	flag.DurationVar(&o.For, "for", 2*time.Minute, "how long faults are injected")
	flag.BoolVar(&o.Keep, "keep", false, "keep the directory with logs and data")
	flag.StringVar(&o.Failpoints, "failpoints", "", "`bugs` that the binaries are to have, separated by commas (docs/testing.md)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	verdict, err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
	fmt.Println(verdict)
	if verdict.Broken() {
		os.Exit(1)
	}
}

// TestMain is Main for tests: the test's binary is the hub's process, too.
func TestMain(m interface{ Run() int }) {
	asHub(os.Args[1:])
	os.Exit(m.Run())
}

func asHub(args []string) {
	if len(args) == 2 && args[0] == hubFlag {
		os.Exit(runHub(args[1]))
	}
}

const hubFlag = "-hub"

// Hub returns the command of a hub's process: this program once more.
func Hub(dir, addr string) ([]string, error) {
	self, err := os.Executable()
	return []string{self, hubFlag, dir + "," + addr}, err
}
