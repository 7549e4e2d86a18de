package partition

import (
	"cmp"
	"slices"

	"github.com/cespare/xxhash/v2"
)

// Place computes which member should own which of n partitions: rendezvous hashing with a bounded
// load. Every member gets ⌊n/m⌋ or ⌈n/m⌉ of them, and when a member comes or goes few partitions
// move besides those it gets or leaves (TestPlaceMovesLittle). The result depends only on the set
// of members, not on their order; it is nil if there are none. key distinguishes placements, so
// that the extra partition that some members get goes to different members.
func Place(key string, n int, members []string) []string {
	members = slices.Compact(slices.Sorted(slices.Values(members)))
	if len(members) == 0 {
		return nil
	}
	type pair struct {
		score             uint64
		partition, member int
	}
	pairs := make([]pair, 0, n*len(members))
	var d xxhash.Digest
	for m, name := range members {
		for p := range n {
			d.Reset()
			_, _ = d.WriteString(name)
			_, _ = d.Write([]byte{0, byte(p >> 8), byte(p)})
			_, _ = d.WriteString(key)
			pairs = append(pairs, pair{d.Sum64(), p, m})
		}
	}
	slices.SortFunc(pairs, func(a, b pair) int {
		return cmp.Or(cmp.Compare(b.score, a.score), a.partition-b.partition, a.member-b.member)
	})
	owners, load := make([]string, n), make([]int, len(members))
	least, more := n/len(members), n%len(members) // so many members get one more
	for _, q := range pairs {
		if owners[q.partition] != "" || load[q.member] > least || (load[q.member] == least && more == 0) {
			continue
		}
		if load[q.member]++; load[q.member] > least {
			more--
		}
		owners[q.partition] = members[q.member]
	}
	return owners
}
