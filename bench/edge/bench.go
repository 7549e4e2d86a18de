package main

import (
	"context"
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// bench is one run: the binaries and where things are kept.
type bench struct {
	options
	dir       string // on the disk that is measured; removed by close
	hubDir    string // of hubs that stand for another machine; removed by close
	edgeBin   string
	peerBin   string // empty for none
	processes int    // started so far
}

func newBench(ctx context.Context, o options) (b *bench, err error) {
	b = &bench{options: o, edgeBin: o.edge}
	defer func() {
		if err != nil {
			_ = b.close()
		}
	}()
	if b.dir, err = os.MkdirTemp(o.dir, "bench-edge-"); err != nil {
		return b, err
	}
	if b.hubDir, err = os.MkdirTemp(memoryDir(b.dir), "bench-edge-hub-"); err != nil {
		return b, err
	}
	if b.edgeBin == "" {
		b.edgeBin = filepath.Join(b.dir, "edge")
		if err := build(ctx, "..", "./cmd/edge", b.edgeBin); err != nil {
			return b, err
		}
	}
	if o.peer != "" && !o.backlog {
		b.peerBin = filepath.Join(b.dir, "collector")
		if err := build(ctx, o.peer, ".", b.peerBin); err != nil {
			return b, fmt.Errorf(`%w; -peer "" measures the edge alone`, err)
		}
	}
	return b, nil
}

func (b *bench) close() error {
	if b.hubDir != "" {
		_ = os.RemoveAll(b.hubDir)
	}
	if b.dir == "" {
		return nil
	}
	return os.RemoveAll(b.dir)
}

// memoryDir is a directory in memory where there is one with room: the hub stands
// for another machine and must not write to the disk that is measured.
func memoryDir(otherwise string) string {
	const shm, need = "/dev/shm", 1 << 30
	var fs syscall.Statfs_t
	if err := syscall.Statfs(shm, &fs); err != nil || int64(fs.Bavail)*fs.Bsize < need {
		return otherwise
	}
	return shm
}

// build makes a binary as a release does.
func build(ctx context.Context, module, pkg, out string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-C", module, "-trimpath", "-ldflags", "-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s in %s: %w\n%s", pkg, module, err, text)
	}
	return nil
}

// header says what is measured, and on what.
func (b *bench) header() error {
	versions, err := versionsIn(b.edgeBin, "/nats.go", "google.golang.org/grpc")
	if err != nil {
		return err
	}
	fmt.Printf("edge: %s; %d CPUs, shared with sender and next hop; OTLP/%s\n", versions, runtime.NumCPU(), b.protocol)
	if b.peerBin != "" {
		if versions, err = versionsIn(b.peerBin, "/collector/otelcol", "/exporter/otlpexporter", "/storage/filestorage"); err != nil {
			return err
		}
		fmt.Printf("collector: %s; compression of its exporter %s\n", versions, b.compression)
	}
	if !b.options.backlog {
		where := "in memory"
		if strings.HasPrefix(b.hubDir, b.options.dir) {
			where = "on the same disk"
		}
		fmt.Printf("the hub keeps its streams %s, without fsync\n", where)
	}
	for _, d := range []struct {
		where string
		ready bool
	}{{"at the end of a file", false}, {"into zeros that are there", true}} {
		median, p99, cpu, err := diskSync(b.dir, d.ready)
		if err != nil {
			return err
		}
		fmt.Printf("disk: 4 KiB and fdatasync take %.2f ms, p99 %.2f ms, CPU %.3f ms, %s\n", ms(median), ms(p99), ms(cpu), d.where)
	}
	fmt.Println()
	return nil
}

// versionsIn names the Go of a binary and the modules whose paths end so.
func versionsIn(binary string, suffixes ...string) (string, error) {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return "", fmt.Errorf("read the versions of %s: %w", binary, err)
	}
	text := info.GoVersion
	for _, m := range info.Deps {
		if slices.ContainsFunc(suffixes, func(s string) bool { return strings.HasSuffix(m.Path, s) }) {
			text += ", " + m.Path + " " + m.Version
		}
	}
	return text, nil
}

// diskSync is how long the disk takes for 4 KiB and a sync, at the end of a file that
// grows as a log does, or into one that is ready and full of zeros; and the CPU time of
// this process for one.
func diskSync(dir string, ready bool) (median, p99, cpu time.Duration, err error) {
	f, err := os.CreateTemp(dir, "fsync-")
	if err != nil {
		return 0, 0, 0, err
	}
	defer func() {
		_ = f.Close()
		_ = os.Remove(f.Name())
	}()
	const writes = 500
	took := make([]time.Duration, writes)
	page := make([]byte, 4<<10)
	if ready {
		if _, err := f.Write(make([]byte, writes*len(page))); err != nil {
			return 0, 0, 0, fmt.Errorf("measure the disk: %w", err)
		}
		if err := f.Sync(); err != nil {
			return 0, 0, 0, fmt.Errorf("measure the disk: %w", err)
		}
	}
	before := ownCPU()
	for i := range took {
		start := time.Now()
		if _, err := f.WriteAt(page, int64(i*len(page))); err != nil {
			return 0, 0, 0, fmt.Errorf("measure the disk: %w", err)
		}
		if err := syscall.Fdatasync(int(f.Fd())); err != nil {
			return 0, 0, 0, fmt.Errorf("measure the disk: %w", err)
		}
		took[i] = time.Since(start)
	}
	cpu = (ownCPU() - before) / writes
	return quantile(took, 0.5), quantile(took, 0.99), cpu, nil
}

// ownCPU is the time that this process has used.
func ownCPU() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// quantile sorts all and returns the element that a share q of them does not exceed.
func quantile(all []time.Duration, q float64) time.Duration {
	if len(all) == 0 {
		return 0
	}
	slices.Sort(all)
	return all[min(int(q*float64(len(all))), len(all)-1)]
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// ints is a flag: numbers separated by commas.
type ints []int

func (l *ints) String() string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(*l), " ", ","), "[]")
}

// Set reads the numbers.
func (l *ints) Set(s string) error {
	*l = nil
	for f := range strings.SplitSeq(s, ",") {
		n, err := strconv.Atoi(f)
		if err != nil || n < 1 {
			return fmt.Errorf("%q is not a number from 1 on", f)
		}
		*l = append(*l, n)
	}
	return nil
}
