package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestReferenceIsUpToDate fails when `make docs` would change anything, and when
// a key has no description.
func TestReferenceIsUpToDate(t *testing.T) {
	for name, want := range pages(filepath.Join("..", "..", "..")) {
		got, err := os.ReadFile(filepath.Join("..", name))
		if err != nil || string(got) != want {
			t.Errorf("docs/reference/%s is not what `make docs` writes (%v)", name, err)
		}
		for line := range strings.Lines(want) {
			if strings.HasSuffix(strings.TrimSpace(line), "|  |") {
				t.Errorf("%s: no description: %s", name, line)
			}
		}
	}
}
