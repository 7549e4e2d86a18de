// Package logtest is a log that a test reads while it is written.
//
// # Not here
//
// What to look for: the tests.
package logtest

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
)

// Log keeps what is written. The zero Log is ready to use, and safe for concurrent use.
type Log struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// Write implements io.Writer.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// String returns everything that was written.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// Logger writes lines of level and above to it.
func (l *Log) Logger(level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: level}))
}

// Says reports whether one line has all of these texts.
func (l *Log) Says(all ...string) bool {
next:
	for line := range strings.Lines(l.String()) {
		for _, text := range all {
			if !strings.Contains(line, text) {
				continue next
			}
		}
		return true
	}
	return false
}
