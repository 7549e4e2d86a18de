package broker

import (
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func TestOneProcessOwnsADirectory(t *testing.T) {
	dir := t.TempDir()
	b, err := Start(Config{Name: "a", Dir: dir}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Start(Config{Name: "b", Dir: dir}, quiet); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("second owner: %v", err)
	}
	b.Stop()
	b, err = Start(Config{Name: "c", Dir: dir}, quiet)
	if err != nil {
		t.Fatalf("after the first has stopped: %v", err)
	}
	b.Stop()
}

func TestStartErrorsSayWhy(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for want, cfg := range map[string]Config{
		"address already in use": {Name: "x", Dir: t.TempDir(), Listen: ln.Addr().String()},
		"missing port":           {Name: "x", Dir: t.TempDir(), Listen: "nonsense"},
		"not a directory":        {Name: "x", Dir: file},
	} {
		if b, err := Start(cfg, quiet); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
			if b != nil {
				b.Stop()
			}
		}
	}
}

func TestNoSocketWithoutListen(t *testing.T) {
	b, err := Start(Config{Name: "x", Dir: t.TempDir()}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Stop()
	if a := b.srv.Addr(); a != nil {
		t.Errorf("listens on %v", a)
	}
	c, err := b.InProcessConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
}
