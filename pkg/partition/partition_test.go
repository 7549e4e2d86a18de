package partition

import (
	"math/rand/v2"
	"testing"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestOfNeverChanges pins the function: these values are on customers' disks.
func TestOfNeverChanges(t *testing.T) {
	for _, tc := range []struct {
		instance string
		id       otlpwire.TraceID
		n, want  int
	}{
		{"as-1", otlpwire.TraceID{}, 8, 0},
		{"as-1", otlpwire.TraceID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, 8, 3},
		{"as-2", otlpwire.TraceID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, 8, 7},
		{"as-1", otlpwire.TraceID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, 1024, 35},
	} {
		if got := Of(tc.instance, tc.id, tc.n); got != tc.want {
			t.Errorf("Of(%s, %x, %d) = %d, want %d", tc.instance, tc.id, tc.n, got, tc.want)
		}
	}
}

func TestOfSpreadsEvenly(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	const n, traces = 16, 160_000
	var counts [n]int
	for range traces {
		var id otlpwire.TraceID
		for i := range id {
			id[i] = byte(rng.Uint32())
		}
		counts[Of("as-1", id, n)]++
	}
	for p, c := range counts {
		if c < traces/n*95/100 || c > traces/n*105/100 {
			t.Errorf("partition %d has %d of %d traces", p, c, traces)
		}
	}
}

func TestOfDoesNotAllocate(t *testing.T) {
	var id otlpwire.TraceID
	if n := testing.AllocsPerRun(100, func() { Of("as-1", id, 8) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
