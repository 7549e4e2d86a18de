package failpoint

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestDefaultBuildHasNone: no failpoint is in a binary that was built without the tag.
func TestDefaultBuildHasNone(t *testing.T) {
	for tags, want := range map[string]bool{"": false, "failpoints": true} {
		bin := filepath.Join(t.TempDir(), "edge")
		if out, err := exec.Command("go", "build", "-tags", tags, "-o", bin, "github.com/penstock/penstock/cmd/edge").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		text, err := os.ReadFile(bin)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"PENSTOCK_FAILPOINTS", "PENSTOCK_KILL_AT", "PENSTOCK_CLOCK", "answer_before_spool"} {
			if is := bytes.Contains(text, []byte(name)); is != want {
				t.Errorf("tags %q: %s in the binary: %v", tags, name, is)
			}
		}
	}
}
