package partition

import (
	"fmt"
	"slices"
	"testing"
)

func names(n int) (all []string) {
	for i := range n {
		all = append(all, fmt.Sprintf("sink-%d", i))
	}
	return all
}

func TestPlaceIsBalanced(t *testing.T) {
	for _, n := range []int{1, 2, 7, 8, 64, 1024} {
		for m := 1; m <= 20; m++ {
			load := map[string]int{}
			for _, owner := range Place("SPANS", n, names(m)) {
				load[owner]++
			}
			for _, name := range names(m) {
				if have := load[name]; have < n/m || have > (n+m-1)/m {
					t.Errorf("%d partitions, %d members: %s has %d", n, m, name, have)
				}
			}
		}
	}
}

func TestPlaceDependsOnTheSetOnly(t *testing.T) {
	all := names(5)
	want := Place("SPANS", 64, all)
	slices.Reverse(all)
	if got := Place("SPANS", 64, append(all, all[2])); !slices.Equal(got, want) {
		t.Errorf("another order, another placement:\n%v\n%v", got, want)
	}
	if slices.Equal(Place("LOGS", 64, all), want) {
		t.Error("all streams are placed alike")
	}
	if got := Place("SPANS", 8, nil); got != nil {
		t.Errorf("nobody owns %v", got)
	}
}

// TestPlaceMovesLittle lets a member join or leave, many times. At the least the
// share of that member must move; without a bound on the load that would be all.
func TestPlaceMovesLittle(t *testing.T) {
	for _, n := range []int{8, 64, 256} {
		moved, least := 0, 0
		for m := 2; m <= 12; m++ {
			all := names(m)
			full := Place("SPANS", n, all)
			for out := range m {
				rest := Place("SPANS", n, slices.Delete(slices.Clone(all), out, out+1))
				for p := range n {
					if rest[p] != full[p] {
						moved++
					}
					if full[p] == all[out] {
						least++
					}
				}
			}
		}
		t.Logf("%d partitions: %.2f times the least possible", n, float64(moved)/float64(least))
		if moved > 2*least {
			t.Errorf("%d partitions: %d moved where %d had to", n, moved, least)
		}
	}
}
