// Package app is the frame of every penstock process: a configuration from file and environment, a
// logger, stages that start and stop in order, and an admin server.
//
//	os.Exit(app.Command{Name: "edge", Settings: &cfg, Build: build}.Main(os.Args[1:]))
//
// # Promises
//
//   - Stages start in the given order and stop in the reverse order, each only after the previous
//     one has finished.
//   - A stage that fails stops the process, in order, with exit code 1; a wrong
//     configuration ends it with exit code 2 before anything was opened.
//
// # Not here
//
// What the stages do.
package app

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/memlimit"
)

// Version is set by the linker.
var Version = "devel"

// Config is the part of the configuration that all roles have.
type Config struct {
	Log    LogConfig       `yaml:"log"`
	Admin  AdminConfig     `yaml:"admin"`
	Memory memlimit.Config `yaml:"memory_limiter"`
}

// LogConfig says what is logged to standard error, and how.
type LogConfig struct {
	// The lowest level that is logged: debug, info, warn or error.
	Level slog.Level `yaml:"level"`
	// The format of the log: text or json.
	Format string `yaml:"format"`
}

// DefaultConfig listens for admin requests on the loopback port.
func DefaultConfig(adminPort int) Config {
	return Config{
		Log:    LogConfig{Format: "text"},
		Admin:  AdminConfig{Listen: fmt.Sprintf("127.0.0.1:%d", adminPort)},
		Memory: memlimit.DefaultConfig(),
	}
}

// Validate reports all errors at once.
func (c Config) Validate() error {
	if c.Log.Format != "text" && c.Log.Format != "json" {
		return fmt.Errorf("log.format is %q, want text or json", c.Log.Format)
	}
	return c.Memory.Validate("memory_limiter")
}

// Settings is a pointer to a role's configuration.
type Settings interface {
	// Process returns the part that is common to all roles.
	Process() *Config
	// ApplyEnv overrides the file with the environment.
	ApplyEnv(getenv func(string) string)
	// Validate reports all errors at once, by the names of the keys. With -config.check the optional
	// method CheckFiles() error also checks files that may still be missing at the start.
	Validate() error
}

// Process is the argument of a role's build function.
type Process struct {
	Log      *slog.Logger
	Registry *prometheus.Registry
	Ledger   *ledger.Ledger
	Settings Settings
	Memory   *memlimit.Limiter // nil for no limit

	pages map[string]http.Handler
}

// Page adds a page to the admin server; if a path has a page already, that one is kept.
func (p *Process) Page(path string, h http.Handler) {
	if _, taken := p.pages[path]; taken {
		return
	}
	if p.pages == nil {
		p.pages = map[string]http.Handler{}
	}
	p.pages[path] = h
}

// Stage is a service with its name on /services.
type Stage struct {
	Name string
	services.Service
	// Ready, if set, returns why a running stage is not ready; nil if it is.
	Ready func() error
}

// NewProcess creates the argument of a build function.
func NewProcess(log *slog.Logger, settings Settings) *Process {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return &Process{Log: log, Registry: reg, Ledger: ledger.New(reg), Settings: settings}
}

// Command is one role's command line.
type Command struct {
	Name     string // as typed
	About    string // a few lines for -help
	Settings Settings
	// Flags registers further flags; nil for none. They override the environment.
	Flags func(*flag.FlagSet)
	// Build creates the stages in the order in which they start.
	Build func(*Process) ([]Stage, error)
}

// Main runs the command until a signal stops it, and returns the exit code.
func (c Command) Main(args []string) int {
	fs := flag.NewFlagSet(c.Name, flag.ContinueOnError)
	fs.SetOutput(os.Stderr)
	file := fs.String("config.file", "", "configuration `file`, YAML with ${ENV} expanded")
	check := fs.Bool("config.check", false, "check the configuration and exit")
	version := fs.Bool("version", false, "print the version and exit")
	if c.Flags != nil {
		c.Flags(fs)
	}
	fs.Usage = func() {
		fmt.Fprintf(fs.Output(), "Usage: %s [flags]\n\n%s\n\nFlags:\n", c.Name, c.About)
		fs.PrintDefaults()
	}
	if err := Parse(fs, args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if *version {
		fmt.Println(VersionLine(c.Name))
		return 0
	}
	if err := c.configure(fs, *file, args); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", c.Name, err)
		return 2
	}
	if *check {
		if files, is := c.Settings.(interface{ CheckFiles() error }); is {
			if err := files.CheckFiles(); err != nil {
				fmt.Fprintf(os.Stderr, "%s: %v\n", c.Name, err)
				return 2
			}
		}
		fmt.Println("configuration is valid")
		return 0
	}
	p := NewProcess(NewLogger(os.Stderr, c.Settings.Process().Log), c.Settings)
	if err := c.run(p); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", c.Name, err)
		return 1
	}
	return 0
}

// Parse parses flags. -help goes to standard output; a wrong flag is reported in one line, without the
// whole usage text.
func Parse(fs *flag.FlagSet, args []string) error {
	usage := fs.Usage
	fs.Usage = func() {}
	fs.SetOutput(io.Discard)
	err := fs.Parse(args)
	fs.Usage = usage
	fs.SetOutput(os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fs.SetOutput(os.Stdout)
		usage()
	case err != nil:
		fmt.Fprintf(os.Stderr, "%s: %v; see %s -help\n", fs.Name(), err, fs.Name())
	}
	return err
}

// configure applies file, environment and flags, in this order.
func (c Command) configure(fs *flag.FlagSet, file string, args []string) error {
	if fs.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q; see -help", fs.Arg(0))
	}
	var lines map[string]int
	if file != "" {
		var err error
		if lines, err = config.LoadFileLines(file, c.Settings); err != nil {
			return err
		}
	}
	c.Settings.ApplyEnv(os.Getenv)
	if err := fs.Parse(args); err != nil { // again: flags override the environment
		return err
	}
	return config.At(file, lines, errors.Join(c.Settings.Process().Validate(), c.Settings.Validate()))
}

func (c Command) run(p *Process) error {
	signals := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // ignored under nohup: the process continues
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	defer stop()
	var err error
	if p.Memory, err = memlimit.New(c.Settings.Process().Memory, p.Log); err != nil {
		return err
	}
	stages, err := c.Build(p)
	if err != nil {
		return err
	}
	admin, err := NewAdmin(p, stages)
	if err != nil {
		return err
	}
	stages = append([]Stage{{Name: "admin", Service: admin}, {Name: "memory", Service: Service(p.Memory.Run)}}, stages...)
	go func() {
		<-ctx.Done()
		stop() // a second signal ends the process at once
	}()
	p.Log.Info("starting", "role", c.Name, "version", Version, "go", runtime.Version())
	err = Run(ctx, p.Log, stages)
	p.Log.Info("stopped", "role", c.Name)
	return err
}

// Run starts the stages in order, waits until ctx ends or a stage fails, and
// stops them in the reverse order. It returns the first failure.
func Run(ctx context.Context, log *slog.Logger, stages []Stage) error {
	failed := make(chan error, len(stages)) // at most one failure a stage
	started := make([]Stage, 0, len(stages))
	var err error
	for _, s := range stages {
		s.AddListener(services.NewListener(nil, nil, nil, nil, func(_ services.State, failure error) {
			failed <- fmt.Errorf("%s: %w", s.Name, failure)
		}))
		started = append(started, s)
		if startErr := s.start(ctx); startErr != nil {
			if ctx.Err() == nil {
				err = fmt.Errorf("start %s: %w", s.Name, startErr)
			}
			break
		}
		log.Debug("stage running", "stage", s.Name)
	}
	if err == nil && len(started) == len(stages) {
		select {
		case <-ctx.Done():
		case err = <-failed:
		}
	}
	if ctx.Err() != nil {
		log.Info("stopping; a second signal ends the process at once")
	}
	for _, s := range slices.Backward(started) {
		begin := time.Now()
		stopErr := services.StopAndAwaitTerminated(context.WithoutCancel(ctx), s)
		log.Debug("stage stopped", "stage", s.Name, "took", time.Since(begin), "err", stopErr)
		interrupted := ctx.Err() != nil && errors.Is(stopErr, context.Canceled) // while it was starting
		if err == nil && stopErr != nil && !interrupted {
			err = fmt.Errorf("stop %s: %w", s.Name, stopErr)
		}
	}
	return err
}

// start returns when the stage runs, has failed, or ctx has ended. The stage's
// own context does not end with ctx: all stages would stop at once.
func (s Stage) start(ctx context.Context) error {
	if err := s.StartAsync(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	err := s.AwaitRunning(ctx)
	if err != nil && ctx.Err() == nil {
		// It has ended, or is about to: its own error says more.
		_ = s.AwaitTerminated(ctx)
	}
	if failure := s.FailureCase(); failure != nil {
		return failure
	}
	return err
}

// Service turns a function that blocks until its context ends into a stage's service.
func Service(run func(ctx context.Context) error) services.Service {
	return services.NewBasicService(nil, run, nil)
}

// NewLogger returns a logger that writes to w.
func NewLogger(w io.Writer, cfg LogConfig) *slog.Logger {
	opts := &slog.HandlerOptions{Level: cfg.Level}
	if cfg.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// VersionLine returns the name and version of a program, and the Go version that built it.
func VersionLine(name string) string {
	line := fmt.Sprintf("%s %s %s", name, Version, runtime.Version())
	if bi, ok := debug.ReadBuildInfo(); ok {
		for _, s := range bi.Settings {
			if s.Key == "vcs.revision" {
				line += " " + s.Value
			}
		}
	}
	return line
}
