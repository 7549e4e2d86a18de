package replay

import (
	"slices"

	"github.com/penstock/penstock/pkg/sampling/domain"
)

// holding is what a stream holds of an instance.
type holding struct {
	instance string
	part     int
	messages uint64
	wanted   bool     // it is to be read
	domains  []string // those that the instance has, or had
}

// together returns the holdings that are to be read, by the lane that reads them: one for each partition, or one for
// all partitions whose instances may share traces. Besides the wanted ones they are those of the instances that
// share a domain with one of these.
func together(all []holding, grouping domain.Versions, last uint64) (lanes [][]holding) {
	for i := range all {
		now, before := grouping.Of(all[i].instance, last)
		all[i].domains = append(before, now)
	}
	wanted := map[string]bool{} // domains
	for more := true; more; {
		more = false
		for i := range all {
			h := &all[i]
			if h.wanted = h.wanted || slices.ContainsFunc(h.domains, func(d string) bool { return wanted[d] }); !h.wanted {
				continue
			}
			for _, d := range h.domains {
				more = more || !wanted[d]
				wanted[d] = true
			}
		}
	}
	lane := map[int]int{} // the lowest partition of the lane, by partition
	join := func(a, b int) {
		a, b = lane[a], lane[b]
		for p, l := range lane {
			if l == a || l == b {
				lane[p] = min(a, b)
			}
		}
	}
	first := map[string]int{} // a partition of a domain
	all = slices.DeleteFunc(all, func(h holding) bool { return !h.wanted })
	for _, h := range all {
		if _, known := lane[h.part]; !known {
			lane[h.part] = h.part
		}
		for _, d := range h.domains {
			if other, known := first[d]; known {
				join(h.part, other)
			} else {
				first[d] = h.part
			}
		}
	}
	slices.SortFunc(all, func(a, b holding) int {
		return slices.Compare([]int{lane[a.part], a.part}, []int{lane[b.part], b.part})
	})
	for i, h := range all {
		if i == 0 || lane[h.part] != lane[all[i-1].part] {
			lanes = append(lanes, nil)
		}
		n := len(lanes) - 1
		lanes[n] = append(lanes[n], h)
	}
	return lanes
}
