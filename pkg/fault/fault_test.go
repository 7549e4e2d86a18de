package fault

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestPauseGrowsAndIsCapped(t *testing.T) {
	err := errors.New("x")
	for n, want := range map[int]time.Duration{1: 100 * time.Millisecond, 2: 200 * time.Millisecond, 5: 1600 * time.Millisecond, 9: 25600 * time.Millisecond, 10: 30 * time.Second, 1 << 40: 30 * time.Second} {
		if got := Pause(err, n, 0); got != want {
			t.Errorf("attempt %d: %v, want %v", n, got, want)
		}
		if got := Pause(err, n, 0.999); got < want*3/4 || got > want {
			t.Errorf("attempt %d with jitter: %v, want within a quarter of %v", n, got, want)
		}
	}
	// What the other side asks for is honoured, within the cap.
	for after, want := range map[time.Duration]time.Duration{5 * time.Second: 5 * time.Second, 1e9 * time.Second: 30 * time.Second, 0: 100 * time.Millisecond} {
		if got := Pause(fmt.Errorf("wrapped: %w", After(err, after)), 1, 0); got != want {
			t.Errorf("asked for %v: %v, want %v", after, got, want)
		}
	}
	if got := Pause(Configuration(err), 1, 0); got != 30*time.Second {
		t.Errorf("configuration: %v", got)
	}
}

func TestMarksSurviveWrapping(t *testing.T) {
	base := errors.New("x")
	if r, ok := Reason(fmt.Errorf("a: %w", Permanent("refused", base))); !ok || r != "refused" {
		t.Errorf("got %q, %v", r, ok)
	}
	if _, ok := Reason(Configuration(base)); ok {
		t.Error("a configuration fault is permanent")
	}
	if !errors.Is(Permanent("refused", base), base) || IsConfiguration(base) || !IsConfiguration(Configuration(base)) {
		t.Error("marks hide or invent")
	}
}

// TestGuard: a panic is an error with its stack, whatever its value; errors pass.
func TestGuard(t *testing.T) {
	for _, value := range []any{"boom", errors.New("boom"), 3} {
		err := Guard(func() error { panic(value) })
		if p, is := errors.AsType[*Panic](err); !is || p.Value != value || !strings.Contains(p.Stack, "TestGuard") {
			t.Errorf("%v: %+v", value, err)
		}
		if _, permanent := Reason(err); permanent {
			t.Error("marked, although nothing says of what")
		}
	}
	why := errors.New("why")
	if err := Guard(func() error { return why }); !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
}
