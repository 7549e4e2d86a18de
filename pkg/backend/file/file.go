// Package file is the built-in backend: one line of OTLP/JSON a request, in
// traces.jsonl, metrics.jsonl and logs.jsonl, the format of the collector's
// file exporter.
//
// # Promises
//
//   - A write that returned nil has been fsynced.
//   - Directory and files are accessible only to their owner.
//   - A file that reaches MaxBytes is renamed to <name>.1, and an older <name>.1 is deleted: a signal
//     takes at most twice MaxBytes.
package file

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/disk"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Config is what an operator may set.
type Config struct {
	// The directory of the files.
	Dir string `yaml:"dir"`
	// The size of a file, at which it is renamed to <name>.1, replacing the previous one.
	MaxBytes config.Bytes `yaml:"max_bytes"`
}

// Writer appends the requests of one signal to its file. It is safe for
// concurrent use by the lanes.
type Writer struct {
	sig  otlpwire.Signal
	path string
	max  int64

	mu struct {
		sync.Mutex
		f    *os.File
		size int64
		line []byte
	}
}

// New opens the file of a signal for appending.
func New(cfg Config, sig otlpwire.Signal) (*Writer, error) {
	if err := disk.MakeDir(cfg.Dir); err != nil {
		return nil, fmt.Errorf("file backend: %w", err)
	}
	w := &Writer{sig: sig, path: filepath.Join(cfg.Dir, sig.String()+".jsonl"), max: int64(cfg.MaxBytes)}
	if err := w.openLocked(); err != nil {
		return nil, err
	}
	return w, nil
}

func (w *Writer) openLocked() error {
	f, err := os.OpenFile(w.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("file backend: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return fmt.Errorf("file backend: %w", err)
	}
	w.mu.f, w.mu.size = f, st.Size()
	return w.endLineLocked()
}

// endLineLocked ends a line that a crash has cut short, so that the next one begins on a new line. Its
// items are delivered again: they were not acknowledged.
func (w *Writer) endLineLocked() error {
	if w.mu.size == 0 {
		return nil
	}
	var last [1]byte
	r, err := os.Open(w.path)
	if err == nil {
		_, err = r.ReadAt(last[:], w.mu.size-1)
		_ = r.Close()
	}
	if err == nil && last[0] != '\n' {
		var n int
		n, err = w.mu.f.WriteString("\n")
		w.mu.size += int64(n)
	}
	if err != nil {
		return fmt.Errorf("file backend: %w", err)
	}
	return nil
}

// Name is the backend's label.
func (w *Writer) Name() string { return "file" }

// Write appends one line and returns when it is on disk.
func (w *Writer) Write(_ context.Context, _ string, payload []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mu.f == nil {
		if err := w.openLocked(); err != nil {
			return err
		}
	}
	if w.mu.size >= w.max {
		if err := w.rotateLocked(); err != nil {
			return err
		}
	}
	w.mu.line = append(otlpwire.AppendJSON(w.mu.line[:0], w.sig, payload), '\n')
	n, err := w.mu.f.Write(w.mu.line)
	w.mu.size += int64(n)
	if err == nil {
		err = w.mu.f.Sync()
	}
	if err != nil {
		// Half a line must not remain before the next attempt.
		_ = w.mu.f.Truncate(w.mu.size - int64(n))
		_ = w.mu.f.Close()
		w.mu.f = nil
		return fmt.Errorf("file backend: %w", err)
	}
	return nil
}

func (w *Writer) rotateLocked() error {
	_ = w.mu.f.Close()
	w.mu.f = nil
	if err := os.Rename(w.path, w.path+".1"); err != nil {
		return fmt.Errorf("file backend: %w", err)
	}
	return w.openLocked()
}

// Close closes the file.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mu.f == nil {
		return nil
	}
	return w.mu.f.Close()
}
