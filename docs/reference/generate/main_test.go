package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// goName matches a description that begins with a name of several words, or with a name and a verb.
var goName = regexp.MustCompile(`^\| .* \| ([A-Z][a-z]+[A-Z][A-Za-z]* |[A-Z][a-z]+ (is|are) )`)

// byDefaultText matches the end of every description of a key.
var byDefaultText = regexp.MustCompile("The default is (`.+`|empty)\\. \\|$")

// TestEveryMetricIsThere: those of the ledger that have labels exist only once they are used.
func TestEveryMetricIsThere(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("..", "..", "..", "pkg", "ledger", "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	page, n := metrics(), 0
	for _, file := range files {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range regexp.MustCompile(`"penstock_[a-z_]+"`).FindAllString(string(source), -1) {
			if n++; !strings.Contains(page, "| `"+strings.Trim(name, `"`)+"` |") {
				t.Errorf("%s of %s is missing", name, file)
			}
		}
	}
	if n < 50 {
		t.Errorf("%d metrics only", n)
	}
}

// TestReferenceIsUpToDate fails when `make docs` would change anything, and when
// a key has no description.
func TestReferenceIsUpToDate(t *testing.T) {
	for name, want := range pages(filepath.Join("..", "..", "..")) {
		got, err := os.ReadFile(filepath.Join("..", name))
		if err != nil || string(got) != want {
			t.Errorf("docs/reference/%s is not what `make docs` writes (%v)", name, err)
		}
		for line := range strings.Lines(want) {
			if strings.HasSuffix(strings.TrimSpace(line), "|  |") || name == "configuration.md" && strings.Contains(line, "|  ") {
				t.Errorf("%s: no description: %s", name, line)
			}
			if strings.HasPrefix(line, "| `") && name == "configuration.md" && !byDefaultText.MatchString(strings.TrimSpace(line)) {
				t.Errorf("%s: no default: %s", name, line)
			}
			if goName.MatchString(line) {
				t.Errorf("%s: the description begins with a Go name: %s", name, line)
			}
		}
	}
}
