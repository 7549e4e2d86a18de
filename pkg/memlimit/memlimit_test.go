package memlimit

import (
	"errors"
	"io"
	"log/slog"
	"math"
	"runtime/debug"
	"strings"
	"testing"
	"time"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func TestLimits(t *testing.T) {
	gib := func() (uint64, error) { return 1000 << 20, nil }
	none := func() (uint64, error) { return 0, errors.New("no limit") }
	const mib = 1 << 20
	for name, tc := range map[string]struct {
		cfg    Config
		cgroup func() (uint64, error)
		want   Limits
	}{
		"mib":                   {Config{LimitMiB: 100}, none, Limits{80 * mib, 100 * mib}},
		"mib and spike":         {Config{LimitMiB: 100, SpikeMiB: 10}, none, Limits{90 * mib, 100 * mib}},
		"percentage":            {Config{LimitPercentage: 50}, none, Limits{400 * mib, 500 * mib}},
		"percentage and spike":  {Config{LimitPercentage: 50, SpikePercentage: 10}, none, Limits{400 * mib, 500 * mib}},
		"the cgroup's":          {Config{}, gib, Limits{720 * mib, 900 * mib}},
		"none":                  {Config{}, none, Limits{}},
		"mib before the cgroup": {Config{LimitMiB: 100}, gib, Limits{80 * mib, 100 * mib}},
	} {
		if got, err := tc.cfg.limits(gib, tc.cgroup); err != nil || got != tc.want {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, tc.want)
		}
	}
	if _, err := (Config{LimitPercentage: 50}).limits(none, none); err == nil {
		t.Error("a percentage of nothing is known")
	}
}

func TestCheck(t *testing.T) {
	l := &Limiter{Limits: Limits{Soft: 80, Hard: 100}, log: quiet}
	used, garbage, collections := uint64(0), uint64(0), 0
	heap := func() uint64 { return used + garbage }
	collect := func() { collections++; garbage = 0 }
	now := time.Unix(1_790_000_000, 0)
	step := func(u, g uint64, wantOver bool, wantCollections int) {
		t.Helper()
		now = now.Add(time.Second)
		used, garbage = u, g
		l.check(now, heap, collect)
		if l.Over() != wantOver || collections != wantCollections {
			t.Errorf("used %d, garbage %d: over %v, %d collections; want %v, %d", u, g, l.Over(), collections, wantOver, wantCollections)
		}
	}
	step(50, 20, false, 0)
	step(50, 40, false, 1) // garbage alone refuses nobody
	step(50, 40, true, 1)  // not again so soon
	step(50, 60, false, 2) // above the hard limit at once
	step(90, 0, true, 2)
	step(70, 0, false, 2)
	if (*Limiter)(nil).Over() {
		t.Error("no limiter refuses")
	}
}

func TestGOMEMLIMIT(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	defer debug.SetMemoryLimit(before)
	t.Setenv("GOMEMLIMIT", "")
	l, err := New(Config{LimitMiB: 1000, CheckInterval: time.Second}, quiet)
	if err != nil || debug.SetMemoryLimit(-1) != int64(l.Soft) || l.Soft != 800<<20 {
		t.Errorf("GOMEMLIMIT is %d, want %d (%v)", debug.SetMemoryLimit(-1), l.Soft, err)
	}
	debug.SetMemoryLimit(math.MaxInt64)
	t.Setenv("GOMEMLIMIT", "1GiB")
	if _, err := New(Config{LimitMiB: 100, CheckInterval: time.Second}, quiet); err != nil || debug.SetMemoryLimit(-1) != math.MaxInt64 {
		t.Error("the environment's GOMEMLIMIT was overridden")
	}
}

func TestConfig(t *testing.T) {
	for want, cfg := range map[string]Config{
		"":                       {CheckInterval: time.Second},
		"limit_mib":              {LimitMiB: 1, CheckInterval: time.Second},
		"both set":               {LimitMiB: 100, LimitPercentage: 10, CheckInterval: time.Second},
		"spike_limit_mib":        {LimitMiB: 100, SpikeMiB: 100, CheckInterval: time.Second},
		"limit_percentage is":    {LimitPercentage: 101, CheckInterval: time.Second},
		"spike_limit_percentage": {LimitPercentage: 10, SpikePercentage: 20, CheckInterval: time.Second},
		"check_interval":         {},
	} {
		err := cfg.Validate("m")
		if (want == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), want)) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}
