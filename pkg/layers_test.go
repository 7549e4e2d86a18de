// Package pkg holds the layer test: a package imports lower layers only.
package pkg

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/penstock/penstock/"

// layers lists the house from the bottom up. A package may import what stands
// in a layer below its own; leaves may import the leaves before them in the
// list. ARCHITECTURE.md draws the same.
var layers = [][]string{
	// leaves
	{"pkg/otlpwire", "pkg/otlpwire/badinput", "pkg/disk", "pkg/logtest", "pkg/scripttest"}, {"pkg/wal"}, {"pkg/otlpgrpc", "pkg/envelope", "pkg/partition", "pkg/fault", "pkg/ledger", "pkg/memlimit"}, {"pkg/stall"}, {"pkg/config", "pkg/backoff"}, {"pkg/app"}, {"pkg/broker", "pkg/failpoint"},
	// the bus
	{"pkg/bus"},
	{"pkg/membership", "pkg/hold"}, {"pkg/tally"},
	// stages
	{"pkg/otlpattr", "pkg/httpclient", "pkg/sampling/policy", "pkg/sampling/domain"}, {"pkg/otlpclient", "pkg/processor"},
	{"pkg/replay", "pkg/keeper"}, {"pkg/audit"},
	{"pkg/receive", "pkg/generate", "pkg/sampling/sampler", "pkg/sampling/versions", "pkg/backend/tempo", "pkg/backend/prometheus", "pkg/backend/loki", "pkg/backend/file"},
	{"pkg/backend", "pkg/sampling/whatif", "pkg/edge/edgetest", "pkg/edge/spool", "pkg/tokens"},
	{"pkg/edge/forward", "pkg/sink/horizon", "pkg/sink/export"},
	// tiers: they never import each other
	{"pkg/edge", "pkg/router", "pkg/sink"},
	{"pkg/allinone"},
	// commands
	{"cmd/edge", "cmd/router", "cmd/sink", "cmd/penstock"},
	{"docs/reference/generate"},
}

// walls are libraries that only the packages named may import.
var walls = map[string][]string{
	"github.com/nats-io/nats.go":               {"pkg/bus"},
	"github.com/nats-io/nats-server":           {"pkg/broker"},
	"github.com/KimMachineGun/automemlimit":    {"pkg/memlimit"},
	"go.opentelemetry.io/proto/otlp":           {"pkg/generate"},
	"github.com/klauspost/compress/s2":         {"pkg/envelope", "pkg/receive"},
	"github.com/open-telemetry/":               {"pkg/sampling/policy"},
	"go.opentelemetry.io/collector/":           {"pkg/sampling/policy"},
	"go.uber.org/zap":                          {"pkg/sampling/policy"},
	"github.com/klauspost/compress/zstd":       {"pkg/envelope", "pkg/receive"},
	"github.com/prometheus/otlptranslator":     {"pkg/backend/prometheus", "pkg/backend/loki"},
	"github.com/prometheus/client_golang/prom": {"pkg/ledger", "pkg/app", "pkg/allinone", "docs/reference/generate"},
}

func TestPackagesImportLowerLayersOnly(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	level := map[string]int{}
	for i, l := range layers {
		for _, p := range l {
			level[p] = i
		}
	}
	seen := 0
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		pkg := strings.TrimPrefix(f[0], module)
		if pkg == "pkg" {
			continue
		}
		mine, placed := level[pkg]
		if !placed {
			t.Errorf("%s stands in no layer: place it in layers_test.go and ARCHITECTURE.md", pkg)
			continue
		}
		seen++
		for _, imp := range f[1:] {
			if other, own := strings.CutPrefix(imp, module); own && level[other] >= mine {
				t.Errorf("%s imports %s, which is not below it", pkg, other)
			}
			for lib, allowed := range walls {
				if strings.HasPrefix(imp, lib) && !slices.Contains(allowed, pkg) {
					t.Errorf("%s imports %s; only %v may", pkg, imp, allowed)
				}
			}
		}
	}
	if seen < 15 {
		t.Errorf("only %d packages seen", seen)
	}
}

// maxRoom is how many lines of code, without comments, blank lines and tests, a package may have; one
// that grows beyond it holds more than one thing.
const maxRoom = 2500

// TestRoomsAreSmall: but for otlpwire, which is one format.
func TestRoomsAreSmall(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}} {{.Dir}} {{join .GoFiles " "}}`, module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		pkg, dir, lines := strings.TrimPrefix(f[0], module), f[1], 0
		for _, file := range f[2:] {
			text, err := os.ReadFile(filepath.Join(dir, file))
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(text)) {
				if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "//") {
					lines++
				}
			}
		}
		if lines > maxRoom && pkg != "pkg/otlpwire" {
			t.Errorf("%s has %d lines of code, want at most %d", pkg, lines, maxRoom)
		}
	}
}
