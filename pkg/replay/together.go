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
	for more := true; more; {
		more = spread(all)
	}
	all = slices.DeleteFunc(all, func(h holding) bool { return !h.wanted })
	lane := joined(all)
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

// spread wants what shares a domain with what is wanted, and reports whether that is more.
func spread(all []holding) (more bool) {
	wanted := map[string]bool{} // domains
	for _, h := range all {
		for _, d := range h.domains {
			wanted[d] = wanted[d] || h.wanted
		}
	}
	for i := range all {
		if h := &all[i]; !h.wanted && slices.ContainsFunc(h.domains, func(d string) bool { return wanted[d] }) {
			h.wanted, more = true, true
		}
	}
	return more
}

// joined returns the lowest partition of the lane of each partition.
func joined(all []holding) map[int]int {
	lane, first := map[int]int{}, map[string]int{} // first: a partition of a domain
	for _, h := range all {
		if _, known := lane[h.part]; !known {
			lane[h.part] = h.part
		}
		for _, d := range h.domains {
			other, known := first[d]
			if !known {
				first[d] = h.part
				continue
			}
			a, b := lane[h.part], lane[other]
			for p, l := range lane {
				if l == a || l == b {
					lane[p] = min(a, b)
				}
			}
		}
	}
	return lane
}

// laneOf returns the lane that reads holdings.
func laneOf(held []holding) (l Lane) {
	l.Partition = held[0].part
	for _, h := range held {
		l.Messages += h.messages
		l.Instances = append(l.Instances, h.instance)
		if !slices.Contains(l.Partitions, h.part) {
			l.Partitions = append(l.Partitions, h.part)
		}
		for _, d := range h.domains {
			if domain.Shared(d) && !slices.Contains(l.Domains, d) {
				l.Domains = append(l.Domains, d)
			}
		}
	}
	if len(l.Partitions) == 1 {
		l.Partitions = nil
	}
	slices.Sort(l.Domains)
	slices.Sort(l.Instances)
	return l
}
