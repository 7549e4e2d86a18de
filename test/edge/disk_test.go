package edge

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/test/daemon"
)

// straced returns the command that runs another with a fault in its system calls.
func straced(t *testing.T, inject string) []string {
	t.Helper()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("SKIPPED: strace is not installed (Debian: apt-get install strace)")
	}
	if out, err := exec.Command(strace, "-o", "/dev/null", "true").CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: strace may not trace here: %s", out)
	}
	call, _, _ := strings.Cut(inject, ":")
	return []string{strace, "-f", "-D", "-qq", "-o", filepath.Join(t.TempDir(), "trace"), "-e", "trace=" + call, "-e", "inject=" + inject}
}

// TestFsyncFails lets fsync and write fail a few times: no false success, and the edge
// goes on when the disk does.
func TestFsyncFails(t *testing.T) {
	for name, inject := range map[string]string{ // each thread counts by itself
		"sync, EIO":          "fdatasync:error=EIO:when=12..14",
		"write, EIO":         "pwrite64:error=EIO:when=12..14",
		"write, ENOSPC":      "pwrite64:error=ENOSPC:when=12..14",
		"every seventh sync": "fdatasync:error=EIO:when=12+7",
	} {
		t.Run(name, func(t *testing.T) {
			hub := startHub(t)
			e := newEdge(t, hub, t.TempDir(), "", straced(t, inject)...)
			e.start()
			refused := 0
			for n := 0; n < 150 || (refused == 0 && n < 2000); n++ {
				switch code := e.send(); code {
				case http.StatusOK:
				case http.StatusServiceUnavailable:
					refused++
				default:
					t.Fatalf("answered %d", code)
				}
			}
			if refused == 0 {
				t.Error("nothing was refused: the fault was not noticed, or not there")
			}
			if name != "every seventh sync" {
				e.until(http.StatusOK) // the disk works again
			}
			t.Logf("%d acknowledged, %d refused", len(e.acked), refused)
			e.arrived(bus.Config{URL: hub})
			e.End(syscall.SIGKILL)
			// What the disk holds is sound.
			e.Args = e.Args[len(e.Args)-3:]
			e.start()
			if lost := metric(t, e, "penstock_spool_lost_messages_total", otlpwire.Logs); lost != "0" {
				t.Errorf("%s messages are gone from the spool", lost)
			}
			e.sendAll(5)
			e.arrived(bus.Config{URL: hub})
		})
	}
}

// TestDiskThatDoesNotAnswer holds syncs up: senders are told to retry, those that wait
// for it and those that come, and it goes on when the disk does.
func TestDiskThatDoesNotAnswer(t *testing.T) {
	hub := startHub(t)
	e := newEdge(t, hub, t.TempDir(), "", straced(t, "fdatasync:delay_enter=7000000:when=20")...)
	e.start()
	var stop atomic.Bool
	var taken, refused atomic.Int64
	var acked [4][]int // by sender
	var wg sync.WaitGroup
	for i := range acked { // each thread counts its syncs and is held up by the 20th
		wg.Go(func() {
			for n := 1_000_000 * (i + 1); !stop.Load(); n++ {
				switch code, _ := post(e.http, n, ""); code {
				case http.StatusOK:
					taken.Add(1)
					acked[i] = append(acked[i], n)
				case http.StatusServiceUnavailable:
					refused.Add(1)
					_ = daemon.Until(t.Context(), 20*time.Second, func() error { // a sender that is told to wait
						if writable, err := daemon.Metric(e.admin, "penstock_spool_writable"); err != nil || writable != "1" {
							return fmt.Errorf("writable %s: %w", writable, err)
						}
						return nil
					})
				default:
					t.Errorf("answered %d", code)
					return
				}
			}
		})
	}
	if err := daemon.Until(t.Context(), 30*time.Second, func() error {
		writable, err := daemon.Metric(e.admin, "penstock_spool_writable")
		if err == nil && (writable != "0" || refused.Load() == 0) {
			err = fmt.Errorf("writable %s, %d refused, %d taken", writable, refused.Load(), taken.Load())
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	before := taken.Load()
	if err := daemon.Until(t.Context(), 30*time.Second, func() error {
		if n := taken.Load(); n < before+20 {
			return fmt.Errorf("%d taken after %d", n, before)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	stop.Store(true)
	wg.Wait()
	e.until(http.StatusOK)
	e.acked = append(e.acked, slices.Concat(acked[:]...)...)
	e.held(bus.Config{URL: hub})
	t.Logf("%d taken, %d refused", taken.Load(), refused.Load())
}

// image is a small ext4 file system in a file.
type image struct {
	t    *testing.T
	file string
	dir  string
}

func newImage(t *testing.T) *image {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: mounting a file system needs root")
	}
	i := &image{t: t, file: filepath.Join(t.TempDir(), "disk.img"), dir: t.TempDir()}
	f, err := os.Create(i.file)
	if err == nil {
		err = errors.Join(f.Truncate(96<<20), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", i.file).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: mkfs.ext4: %v %s", err, out)
	}
	i.mount(i.file)
	return i
}

// mount puts a file's file system where the edge looks for it. The journal is
// committed seldom: what was not synced is not on the device.
func (i *image) mount(file string) {
	i.t.Helper()
	if out, err := exec.Command("mount", "-o", "loop,commit=300", file, i.dir).CombinedOutput(); err != nil {
		i.t.Skipf("SKIPPED: mounting an image: %v %s", err, out)
	}
	i.t.Cleanup(func() { _ = syscall.Unmount(i.dir, syscall.MNT_DETACH) })
}

func (i *image) unmount() {
	i.t.Helper()
	if err := daemon.Until(i.t.Context(), 10*time.Second, func() error { return syscall.Unmount(i.dir, 0) }); err != nil {
		i.t.Fatal(err)
	}
}

// powerCut ends a process as a power cut does: the disk holds what had reached the
// device at one moment, and nothing else.
func (i *image) powerCut(p *daemon.Process) {
	i.t.Helper()
	p.Signal(syscall.SIGSTOP)
	after := i.file + ".after"
	if out, err := exec.Command("cp", "--sparse=always", i.file, after).CombinedOutput(); err != nil {
		i.t.Fatalf("cp: %v %s", err, out)
	}
	p.Signal(syscall.SIGCONT)
	p.End(syscall.SIGKILL)
	i.unmount()
	i.mount(after)
}

// TestPowerCut cuts the power while data comes in and the hub is away: with fsync
// everything that was acknowledged is there afterwards. Without, some is not, which
// shows that the test can see it.
func TestPowerCut(t *testing.T) {
	for _, durability := range []string{"fsync", "os"} {
		t.Run(durability, func(t *testing.T) {
			disk := newImage(t)
			spool := fmt.Sprintf("spool: {dir: %q, max_bytes: 48MiB, disk_reserve: 1MiB, durability: %s}\n", filepath.Join(disk.dir, "spool"), durability)
			e := newEdge(t, away, "", spool)
			e.start()
			e.sendAll(200)
			for range 40 { // several files
				if code := e.post(noise(e.next, 200<<10)); code != http.StatusOK {
					t.Fatalf("answered %d", code)
				}
			}
			disk.powerCut(&e.Process)

			hub := startHub(t)
			after := newEdge(t, hub, "", spool)
			after.start()
			after.acked = e.acked
			if durability == "fsync" {
				after.arrived(bus.Config{URL: hub})
				return
			}
			after.next = e.next
			after.acked = nil
			after.sendAll(5)
			after.arrived(bus.Config{URL: hub})
			got := stored(t, operator(t, bus.Config{URL: hub, Name: "operator"}))
			if lost := len(e.acked) + 5 - len(got); lost == 0 {
				t.Error("nothing is lost without fsync: the power was not cut")
			} else {
				t.Logf("%d of %d acknowledged are gone, as durability: os says", lost, len(e.acked))
			}
		})
	}
}

// TestReadOnlyDisk lets the kernel take a file system read-only, as it does after
// errors: senders are told to retry, and after a repair it goes on.
func TestReadOnlyDisk(t *testing.T) {
	disk := newImage(t)
	hub := startHub(t)
	e := newEdge(t, hub, "", fmt.Sprintf("spool: {dir: %q, max_bytes: 32MiB, disk_reserve: 1MiB}\n", filepath.Join(disk.dir, "spool")))
	e.start()
	e.sendAll(50)
	if out, err := exec.Command("mount", "-o", "remount,abort", disk.dir).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: remount,abort: %v %s", err, out)
	}
	e.until(http.StatusServiceUnavailable)
	for range 3 {
		if code := e.send(); code != http.StatusServiceUnavailable {
			t.Errorf("answered %d on a disk that does not write", code)
		}
	}
	e.arrived(bus.Config{URL: hub})
	e.End(syscall.SIGTERM)
	disk.unmount()
	_ = exec.Command("e2fsck", "-fy", disk.file).Run() // 1 when it has mended something
	disk.mount(disk.file)
	e.start()
	e.sendAll(10)
	e.arrived(bus.Config{URL: hub})
}

// TestStopWithAFullSpool: a stop does not wait for a hub that is away, and nothing is
// lost by it.
func TestStopWithAFullSpool(t *testing.T) {
	dir := t.TempDir()
	spool := fmt.Sprintf("spool: {dir: %q, max_bytes: 14MiB, disk_reserve: 1MiB, durability: os}\n", dir)
	e := newEdge(t, away, "", spool)
	e.start()
	for e.post(noise(e.next, 300<<10)) != http.StatusServiceUnavailable {
		if e.next > 1000 {
			t.Fatal("the spool is never full")
		}
	}
	began := time.Now()
	e.End(syscall.SIGTERM)
	if code := e.ExitCode(); code != 0 {
		t.Errorf("exit code %d after SIGTERM", code)
	}
	t.Logf("%d messages in a full spool, stopped after %v", len(e.acked), time.Since(began).Truncate(time.Millisecond))
	hub := startHub(t)
	after := newEdge(t, hub, "", spool)
	after.start()
	after.acked = e.acked
	after.arrived(bus.Config{URL: hub})
}

// TestBadDirectories: what a person must mend ends a start, with a line that says so.
func TestBadDirectories(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	taken := t.TempDir()
	first := newEdge(t, away, taken, "")
	first.start()
	for name, tc := range map[string]struct{ dir, want string }{
		"a file":             {file, "not a directory"},
		"in use":             {taken, "another process is using this directory"},
		"where none may be":  {"/proc/spool", "/proc/spool"},
		"below one's own":    {filepath.Join(file, "spool"), "not a directory"},
		"not on this device": {"/dev/null/spool", "/dev/null"},
	} {
		e := newEdge(t, away, tc.dir, "")
		if err := e.Start(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-e.Done:
		case <-time.After(20 * time.Second):
			t.Errorf("%s: the edge runs", name)
			e.End(syscall.SIGKILL)
			continue
		}
		if code := e.ExitCode(); code != 1 || !strings.Contains(e.log(), tc.want) {
			t.Errorf("%s: exit code %d, want 1 and %q:\n%s", name, code, tc.want, e.log())
		}
	}
}
