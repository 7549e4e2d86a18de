// Package memlimit keeps a process within its memory, in the terms of the
// collector's memory_limiter: above the soft limit new data is refused, and garbage collections are forced.
//
// # Not here
//
// The refusal: code that accepts data calls [Limiter.Over].
package memlimit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
)

// Config is what an operator may set. The names are the collector's.
type Config struct {
	// The hard limit of the heap, in MiB. If neither this nor limit_percentage is set, it is nine
	// tenths of the cgroup's limit, and without such a limit there is none.
	LimitMiB int64 `yaml:"limit_mib"`
	// How far below the hard limit new data is refused, in MiB. 0: a fifth of the hard limit.
	SpikeMiB int64 `yaml:"spike_limit_mib"`
	// The hard limit, in percent of the memory of the cgroup, or of the machine.
	LimitPercentage int64 `yaml:"limit_percentage"`
	// How far below the hard limit new data is refused, in percent of the same memory. 0: a fifth
	// of the hard limit.
	SpikePercentage int64 `yaml:"spike_limit_percentage"`
	// How often memory is checked.
	CheckInterval time.Duration `yaml:"check_interval"`
}

// DefaultConfig follows the cgroup.
func DefaultConfig() Config { return Config{CheckInterval: time.Second} }

// Validate reports all errors at once; section is the key under which c is configured.
func (c Config) Validate(section string) error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(section+"."+format, args...)) }
	if c.LimitMiB < 0 || (c.LimitMiB > 0 && c.LimitMiB < 32) {
		wrong("limit_mib is %d, want at least 32, or 0 for the cgroup's", c.LimitMiB)
	}
	if c.LimitPercentage < 0 || c.LimitPercentage > 100 {
		wrong("limit_percentage is %d, want 1 to 100", c.LimitPercentage)
	}
	if c.LimitMiB > 0 && c.LimitPercentage > 0 {
		wrong("limit_mib and limit_percentage are both set: set one")
	}
	if c.SpikeMiB < 0 || (c.SpikeMiB > 0 && c.SpikeMiB >= c.LimitMiB) {
		wrong("spike_limit_mib is %d, want less than limit_mib (%d)", c.SpikeMiB, c.LimitMiB)
	}
	if c.SpikePercentage < 0 || (c.SpikePercentage > 0 && c.SpikePercentage >= c.LimitPercentage) {
		wrong("spike_limit_percentage is %d, want less than limit_percentage (%d)", c.SpikePercentage, c.LimitPercentage)
	}
	if c.CheckInterval < 10*time.Millisecond || c.CheckInterval > time.Minute {
		wrong("check_interval is %v, want 10ms to 1m", c.CheckInterval)
	}
	return errors.Join(errs...)
}

// Limits are in bytes of the heap; 0 for none.
type Limits struct{ Soft, Hard uint64 }

// limits resolves the configuration. total and cgroup return the memory of the
// cgroup or the machine, and of the cgroup alone.
func (c Config) limits(total, cgroup memlimit.Provider) (l Limits, err error) {
	switch {
	case c.LimitMiB > 0:
		l.Hard = uint64(c.LimitMiB) << 20
		l.Soft = l.Hard - uint64(c.SpikeMiB)<<20
	case c.LimitPercentage > 0:
		bytes, err := total()
		if err != nil {
			return l, fmt.Errorf("memory_limiter.limit_percentage: cannot determine the memory size: %w", err)
		}
		l.Hard = bytes / 100 * uint64(c.LimitPercentage)
		l.Soft = l.Hard - bytes/100*uint64(c.SpikePercentage)
	default:
		bytes, err := cgroup()
		if err != nil {
			return l, nil //nolint:nilerr // no cgroup, or one without a limit
		}
		l.Hard = bytes / 10 * 9
		l.Soft = l.Hard
	}
	if l.Soft == l.Hard {
		l.Soft = l.Hard - l.Hard/5
	}
	return l, nil
}

// Limiter watches the memory of this process.
type Limiter struct {
	Limits
	every time.Duration
	log   *slog.Logger
	over  atomic.Bool
	last  time.Time // of the last forced collection
}

// New resolves the limits and sets GOMEMLIMIT to the soft one, unless the environment sets it.
func New(cfg Config, log *slog.Logger) (*Limiter, error) {
	limits, err := cfg.limits(memlimit.ApplyFallback(memlimit.FromCgroup, memlimit.FromSystem), memlimit.FromCgroup)
	if err != nil {
		return nil, err
	}
	l := &Limiter{Limits: limits, every: cfg.CheckInterval, log: log.With("component", "memory")}
	if limits.Hard > 0 && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(int64(limits.Soft))
		l.log.Debug("memory limited", "soft_bytes", limits.Soft, "hard_bytes", limits.Hard)
	}
	return l, nil
}

// Over reports whether new data is to be refused. A nil Limiter has no limit.
func (l *Limiter) Over() bool { return l != nil && l.over.Load() }

// Run checks memory until ctx ends.
func (l *Limiter) Run(ctx context.Context) error {
	if l.Hard == 0 {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(l.every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			l.check(now, heap, runtime.GC)
		}
	}
}

// gcInterval is between forced collections while memory is below the hard limit.
const gcInterval = 10 * time.Second

// check compares the heap with the limits. If it is above a limit, a garbage collection runs first:
// much of it may be garbage.
func (l *Limiter) check(now time.Time, heap func() uint64, collect func()) {
	used := heap()
	if used > l.Hard || (used > l.Soft && now.Sub(l.last) >= gcInterval) {
		collect()
		l.last = now
		used = heap()
	}
	over := used > l.Soft
	if l.over.Swap(over) == over {
		return
	}
	if over {
		l.log.Warn("memory limit reached; new data is refused", "heap_bytes", used, "soft_bytes", l.Soft)
	} else {
		l.log.Info("memory is below its limit again", "heap_bytes", used)
	}
}

// heap returns the bytes of live objects and of those that are not collected yet.
func heap() uint64 {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
