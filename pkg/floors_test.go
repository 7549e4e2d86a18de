package pkg

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// floors are the first versions without what is known against those before; of what reads
// from the network, or writes what others read.
var floors = map[string]string{
	"google.golang.org/grpc":              "v1.83.1", // CVE-2026-84304: frames of one byte take all memory
	"golang.org/x/net":                    "v0.60.0", // CVE-2023-45288, CVE-2026-33814; the test suite's HTTP/2 client
	"github.com/nats-io/nats-server/v2":   "v2.14.3", // all advisories of 2026
	"github.com/nats-io/nats.go":          "v1.55.0", // before, line ends in a subject are commands
	"google.golang.org/protobuf":          "v1.28.0", // has a limit of recursion
	"github.com/klauspost/compress":       "v1.20.0", // zstd's limits of memory and window
	"go.yaml.in/yaml/v3":                  "v3.0.4",
	"github.com/prometheus/client_golang": "v1.11.1", // CVE-2022-21698
}

// TestModulesAreNotBelowTheirFloors looks at the versions that a build takes.
func TestModulesAreNotBelowTheirFloors(t *testing.T) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Path}} {{.Version}}", "all").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	seen := 0
	for line := range strings.Lines(string(out)) {
		path, version, _ := strings.Cut(strings.TrimSpace(line), " ")
		floor, has := floors[path]
		if !has {
			continue
		}
		if seen++; below(version, floor) {
			t.Errorf("%s is %s, want at least %s", path, version, floor)
		}
	}
	if seen != len(floors) {
		t.Errorf("%d of %d modules are in the build: take those out of the list that are not", seen, len(floors))
	}
	for _, c := range []struct {
		version, floor string
		want           bool
	}{{"v1.83.0", "v1.83.1", true}, {"v1.9.9", "v1.10.0", true}, {"v1.83.1", "v1.83.1", false}, {"v2.0.0", "v1.83.1", false}, {"v1.83.1-rc.1", "v1.83.1", true}, {"v1.84.0-rc.1", "v1.83.1", false}, {"", "v1.0.0", true}} {
		if below(c.version, c.floor) != c.want {
			t.Errorf("%q below %s: want %v", c.version, c.floor, c.want)
		}
	}
}

// below reports whether a version, as go.mod has it, comes before a release.
func below(version, floor string) bool {
	release, before, _ := strings.Cut(version, "-")
	c := slices.Compare(numbers(release), numbers(floor))
	return c < 0 || c == 0 && before != ""
}

func numbers(version string) (ns []int) {
	for part := range strings.SplitSeq(strings.TrimPrefix(version, "v"), ".") {
		n, _ := strconv.Atoi(part)
		ns = append(ns, n)
	}
	return ns
}

// TestZstdDecodersAreBounded: a frame of a few bytes may claim a window, and a size, that is
// allocated before anything of it comes.
func TestZstdDecodersAreBounded(t *testing.T) {
	seen := 0
	for _, dir := range []string{".", "../cmd"} {
		if err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			text, err := os.ReadFile(path)
			for _, call := range strings.Split(string(text), "zstd.NewReader(")[1:] {
				seen++
				options, _, _ := strings.Cut(call, "\n")
				for _, want := range []string{"WithDecoderMaxMemory(", "WithDecoderMaxWindow("} {
					if !strings.Contains(options, want) {
						t.Errorf("%s: zstd.NewReader without zstd.%s…)", path, want)
					}
				}
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	if seen == 0 {
		t.Error("no decoder was found: is it made in another way now?")
	}
}
