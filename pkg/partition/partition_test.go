package partition

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestOfNeverChanges pins the function: these values are on customers' disks.
func TestOfNeverChanges(t *testing.T) {
	some := otlpwire.TraceID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	for _, tc := range []struct {
		spread   Spread
		instance string
		id       otlpwire.TraceID
		want     int
	}{
		{Spread{N: 8, ByInstance: true}, "as-1", otlpwire.TraceID{}, 0},
		{Spread{N: 8, ByInstance: true}, "as-1", some, 3},
		{Spread{N: 8, ByInstance: true}, "as-2", some, 7},
		{Spread{N: 1024, ByInstance: true}, "as-1", some, 35},
		{Spread{N: 8}, "as-1", otlpwire.TraceID{}, 2},
		{Spread{N: 8}, "as-1", some, 5},
		{Spread{N: 8}, "as-2", some, 5},
		{Spread{N: 1024}, "as-1", some, 389},
	} {
		if got := tc.spread.Of(tc.instance, tc.id); got != tc.want {
			t.Errorf("%+v.Of(%s, %x) = %d, want %d", tc.spread, tc.instance, tc.id, got, tc.want)
		}
	}
}

// TestOfInstanceIsFNV1a pins the function by published values; that the server computes it,
// too, is TestStreamsPartitionByInstance of package bus.
func TestOfInstanceIsFNV1a(t *testing.T) {
	for instance, want := range map[string]int{"": 0x1c9dc5, "a": 0x0c292c, "foobar": 0x9cf968} {
		if got := OfInstance(instance, 1<<24); got != want {
			t.Errorf("OfInstance(%q) = %#x, want %#x", instance, got, want)
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
		counts[Spread{N: n}.Of("as-1", id)]++
	}
	for p, c := range counts {
		if c < traces/n*95/100 || c > traces/n*105/100 {
			t.Errorf("partition %d has %d of %d traces", p, c, traces)
		}
	}
}

func TestOfDoesNotAllocate(t *testing.T) {
	var id otlpwire.TraceID
	name := strings.Repeat("x", 128)
	if n := testing.AllocsPerRun(100, func() { Spread{N: 8, ByInstance: true}.Of(name, id); OfInstance(name, 8) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
