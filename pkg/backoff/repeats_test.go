package backoff

import (
	"fmt"
	"testing"
	"time"
)

func TestRepeats(t *testing.T) {
	var r Repeats
	now := time.Unix(1000, 0)
	for i, tc := range []struct {
		after time.Duration
		text  string
		held  int
		due   bool
	}{
		{0, "a", 0, true}, {time.Second, "a", 0, false}, {time.Second, "b", 0, true}, {time.Second, "a", 0, false},
		{time.Minute, "a", 2, true}, {time.Second, "a", 0, false}, {time.Hour, "b", 0, true}, {0, "a", 0, true},
	} {
		now = now.Add(tc.after)
		if held, due := r.Due(tc.text, now); held != tc.held || due != tc.due {
			t.Errorf("step %d: %d, %v", i, held, due)
		}
	}
	for i := range 3 * maxSaid {
		if _, due := r.Due(fmt.Sprint(i), now); !due {
			t.Errorf("%d is held back for nothing", i)
		}
	}
	if len(r.said) > maxSaid {
		t.Errorf("%d messages are held", len(r.said))
	}
}
