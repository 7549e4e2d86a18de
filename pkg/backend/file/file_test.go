package file

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/penstock/penstock/pkg/otlpwire"
)

func payload(t *testing.T) []byte {
	t.Helper()
	p, _, err := otlpwire.FromJSON(nil, otlpwire.Logs, []byte(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"stringValue":"a\nb"}}]}]}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestOneLineARequest(t *testing.T) {
	cfg := Config{Dir: filepath.Join(t.TempDir(), "new"), MaxBytes: 1 << 20}
	for range 2 { // the second time appends
		w, err := New(cfg, otlpwire.Logs)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if err := w.Write(t.Context(), "i", payload(t)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	text, err := os.ReadFile(filepath.Join(cfg.Dir, "logs.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.Split(bytes.TrimSuffix(text, []byte("\n")), []byte("\n"))
	if len(lines) != 40 {
		t.Errorf("%d lines, want 40", len(lines))
	}
	for _, l := range lines {
		var v struct{ ResourceLogs []any }
		if err := json.Unmarshal(l, &v); err != nil || len(v.ResourceLogs) != 1 {
			t.Fatalf("%s: %v", l, err)
		}
	}
}

func TestFileIsBounded(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), MaxBytes: 1000}
	w, err := New(cfg, otlpwire.Logs)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	for range 100 {
		if err := w.Write(t.Context(), "i", payload(t)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"logs.jsonl", "logs.jsonl.1"} {
		st, err := os.Stat(filepath.Join(cfg.Dir, name))
		if err != nil || st.Size() > 1200 {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}
}

// TestFilesAreForTheirOwner, the directory and what was rotated away, too.
func TestFilesAreForTheirOwner(t *testing.T) {
	cfg := Config{Dir: filepath.Join(t.TempDir(), "new", "files"), MaxBytes: 1}
	w, err := New(cfg, otlpwire.Logs)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := w.Write(t.Context(), "i", payload(t)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Dir(cfg.Dir), cfg.Dir, filepath.Join(cfg.Dir, "logs.jsonl"), filepath.Join(cfg.Dir, "logs.jsonl.1")} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, %v; want nothing for others", path, info.Mode(), err)
		}
	}
}

func TestErrorsNameTheFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Dir: file}, otlpwire.Logs); err == nil {
		t.Error("a file as directory is accepted")
	}
}

func TestTornLineIsEnded(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), MaxBytes: 1 << 20}
	path := filepath.Join(cfg.Dir, "logs.jsonl")
	if err := os.WriteFile(path, []byte("{\"resourceLogs\":[{\"sco"), 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := New(cfg, otlpwire.Logs)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	if err := w.Write(t.Context(), "i", payload(t)); err != nil {
		t.Fatal(err)
	}
	text, _ := os.ReadFile(path)
	lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	if len(lines) != 2 || !json.Valid(lines[1]) {
		t.Errorf("got %q", text)
	}
}
