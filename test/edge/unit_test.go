package edge

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/test/daemon"
)

const unit = "../../deploy/systemd/penstock-edge.service"

// TestUnit rates the service's hardening, and runs its configuration.
func TestUnit(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("SKIPPED: systemd-analyze is not installed (Debian: apt-get install systemd)")
	}
	if out, err := exec.Command(analyze, "security", "--offline=yes", "--threshold=20", unit).CombinedOutput(); err != nil {
		t.Errorf("the unit's exposure is above 2.0: %v\n%s", err, out[max(0, len(out)-300):])
	}
	bin, err := binary.Path()
	if err != nil {
		t.Fatal(err)
	}
	creds, err := daemon.Credential()
	if err != nil {
		t.Fatal(err)
	}
	loaded := t.TempDir() // as systemd loads it
	if err := os.WriteFile(filepath.Join(loaded, "hub.creds"), creds, 0o400); err != nil {
		t.Fatal(err)
	}
	check := exec.Command(bin, "-config.check", "-config.file", "../../deploy/systemd/edge.yaml")
	check.Env = append(os.Environ(), "CREDENTIALS_DIRECTORY="+loaded)
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("edge.yaml: %v\n%s", err, out)
	}
}

// TestUnitAllowsItsSystemCalls compares what the edge calls with what the unit's filter
// lets through.
func TestUnitAllowsItsSystemCalls(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("SKIPPED: strace is not installed (Debian: apt-get install strace)")
	}
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("SKIPPED: systemd-analyze is not installed (Debian: apt-get install systemd)")
	}
	text, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	allowed := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		sets, ok := strings.CutPrefix(strings.TrimSpace(line), "SystemCallFilter=")
		if !ok {
			continue
		}
		sets, deny := strings.CutPrefix(sets, "~")
		for set := range strings.FieldsSeq(sets) {
			for call := range calls(t, set, map[string]bool{}) {
				allowed[call] = !deny
			}
		}
	}
	hub := startHub(t)
	trace := filepath.Join(t.TempDir(), "trace")
	e := newEdge(t, hub, t.TempDir(), "", strace, "-f", "-D", "-qq", "-o", trace)
	if out, err := exec.Command(strace, "-o", "/dev/null", "true").CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: strace may not trace here: %s", out)
	}
	e.start()
	e.sendAll(20)
	e.arrived(bus.Config{URL: hub})
	e.End(syscall.SIGTERM)
	var seen int
	if err := daemon.Until(t.Context(), 10*time.Second, func() error { // the tracer ends behind the edge
		f, err := os.Open(trace)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		seen = 0
		ended := false
		for lines := bufio.NewScanner(f); lines.Scan(); {
			ended = ended || strings.Contains(lines.Text(), "exit_group(0")
			m := called.FindStringSubmatch(lines.Text())
			if m == nil {
				continue
			}
			seen++
			if ok, known := allowed[m[1]]; !known || !ok {
				// Answered with EPERM. What Go tries and does without is fine.
				if m[1] != "setrlimit" && m[1] != "sched_setaffinity" {
					t.Errorf("the edge calls %s, which the unit does not allow", m[1])
					allowed[m[1]] = true // once is enough
				}
			}
		}
		if !ended {
			return fmt.Errorf("the trace has no end")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if seen < 100 {
		t.Errorf("%d calls seen", seen)
	}
}

var called = regexp.MustCompile(`^\d+\s+([a-z0-9_]+)\(`)

// calls expands a set of system calls.
func calls(t *testing.T, set string, all map[string]bool) map[string]bool {
	t.Helper()
	if !strings.HasPrefix(set, "@") {
		all[set] = true
		return all
	}
	out, err := exec.Command("systemd-analyze", "syscall-filter", set).Output()
	if err != nil {
		t.Fatalf("systemd-analyze syscall-filter %s: %v", set, err)
	}
	for line := range strings.Lines(string(out)) {
		name := strings.TrimSpace(line)
		if strings.HasPrefix(line, " ") && !strings.HasPrefix(name, "#") && name != "" {
			calls(t, name, all)
		}
	}
	return all
}
