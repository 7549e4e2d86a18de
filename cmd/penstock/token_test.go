package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/tokens"
)

// TestTokenFile adds tokens to a file: it is replaced as a whole, keeps its mode, and
// expires as was said.
func TestTokenFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "tokens.yaml")
	add := func(want int, args ...string) {
		t.Helper()
		if code := token(append([]string{"-instance-id", "as-1", "-file", file}, args...)); code != want {
			t.Fatalf("%v: exit code %d, want %d", args, code, want)
		}
	}
	mode := func(want os.FileMode) {
		t.Helper()
		info, err := os.Stat(file)
		if err != nil || info.Mode().Perm() != want {
			t.Fatalf("mode %v, %v; want %v", info.Mode(), err, want)
		}
	}
	add(0, "-not-after", "30d")
	mode(0o600)
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	add(0, "-not-after", "2027-01-31T00:00:00+01:00")
	mode(0o640)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := tokens.Check(file, text); err != nil {
		t.Error(err)
	}
	in30 := time.Now().Add(30 * 24 * time.Hour).UTC().Format("2006-01-02T")
	if s := string(text); strings.Count(s, "sha256") != 2 || !strings.Contains(s, "not_after: 2027-01-30T23:00:00Z\n") || !strings.Contains(s, "not_after: "+in30) {
		t.Errorf("the file is:\n%s", s)
	}
	add(1, "-customer-id", "other") // of another customer than the entries before
	for _, wrong := range []string{"soon", "-1h", "0"} {
		add(2, "-not-after", wrong)
	}
	after, err := os.ReadFile(file)
	if err != nil || string(after) != string(text) {
		t.Errorf("refused entries have changed the file, %v:\n%s", err, after)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}
