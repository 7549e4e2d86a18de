package bus

import (
	"math"
	"testing"
	"time"
)

func TestPace(t *testing.T) {
	var p pace
	now := time.Unix(1000, 0)
	for i, step := range []struct {
		waiting uint64
		want    float64
	}{{0, 0}, {100, math.Inf(1)}, {200, math.Inf(1)}, {200, math.Inf(1)}, {150, math.Inf(1)}, {100, math.Inf(1)}, {50, 10}, {0, 0}, {10, 0.8}} {
		got := p.left(now.Add(time.Duration(i)*2*time.Second), step.waiting)
		if math.Abs(got-step.want) > 0.5 && got != step.want {
			t.Errorf("step %d, %d wait: %v s, want %v", i, step.waiting, got, step.want)
		}
	}
}
