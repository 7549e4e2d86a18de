package spool

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/otlpwire"
)

func TestMarks(t *testing.T) {
	m, err := loadPositions(filepath.Join(t.TempDir(), "marks"))
	if err != nil {
		t.Fatal(err)
	}
	m.advance("a", otlpwire.Logs, 5, 50)
	m.advance("a", otlpwire.Logs, 3, 0)
	m.advance("b", otlpwire.Logs, 9, 0)
	m.advance("a", otlpwire.Traces, 7, 70)
	if got := m.get("a", otlpwire.Logs); got != (Position{5, 50}) {
		t.Errorf("a mark went back: %+v", got)
	}
	m.appended(otlpwire.Logs, 12)
	if err := m.save(); err != nil {
		t.Fatal(err)
	}
	if m, err = loadPositions(m.path); err != nil || m.get("b", otlpwire.Logs).Done != 9 || m.end(otlpwire.Logs) != 12 {
		t.Errorf("%v: read back %+v", err, m.mu.state)
	}
	if missing := m.reconcile(otlpwire.Logs, 6); missing != 6 {
		t.Errorf("%d missing, want 6", missing)
	}
	if a, b, other := m.get("a", otlpwire.Logs), m.get("b", otlpwire.Logs), m.get("a", otlpwire.Traces); a.Done != 5 || b.Done != 6 || other.Done != 7 {
		t.Errorf("after an end was lost: %+v, %+v, %+v", a, b, other)
	}
}

// TestMarksAreBelievedWhole: a flipped bit in the positions must not skip messages.
func TestMarksAreBelievedWhole(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	s, stop := startSpool(t, cfg)
	accept(t, s, 0, 9)
	s.positions.advance(Hub, otlpwire.Logs, 1, 0)
	stop()
	path := filepath.Join(cfg.Dir, "marks")
	text, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(text), `"done":1`) {
		t.Fatalf("%v: %s", err, text)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(text), `"done":1`, `"done":9`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ = startSpool(t, cfg)
	if done := s.positions.get(Hub, otlpwire.Logs).Done; done != 0 {
		t.Errorf("the hub is said to have messages up to %d", done)
	}
}

func TestRetention(t *testing.T) {
	at := time.Unix(1_790_000_000, 0)
	r := retention{keep: time.Minute}
	for i := range 600 { // ten a second
		r.add(at.Add(time.Duration(i)*100*time.Millisecond), uint64(i+1), 10)
	}
	if len(r.points) > 60 || r.held != 6000 {
		t.Errorf("%d points for 60 s, %d bytes held", len(r.points), r.held)
	}
	if upto := r.expire(at.Add(59 * time.Second)); upto != 0 {
		t.Errorf("%d expired early", upto)
	}
	if upto := r.expire(at.Add(90 * time.Second)); upto < 290 || upto > 310 || r.held != 6000-int64(upto)*10 {
		t.Errorf("expired up to %d, %d bytes held", upto, r.held)
	}
	if upto := r.expire(at.Add(time.Hour)); upto != 600 || r.held != 0 || len(r.points) != 0 {
		t.Errorf("expired up to %d, %d bytes held", upto, r.held)
	}
	none := retention{}
	none.add(at, 7, 1)
	if upto := none.expire(at); upto != 7 {
		t.Errorf("without hold-back: expired up to %d", upto)
	}
}
