package router

import "time"

// pace keeps the lanes of TRACES together: one does not run ahead of another that has messages left. After a long
// outage some partitions have much more to route than others, and samplers must hold what instances of a domain in one
// partition have sent until those in the others have come as far (package sampler, order).
type pace struct{ lanes map[string]position }

// position is how far a lane is.
type position struct {
	seq   uint64 // of TRACES, the last one that was routed, or is about to be
	left  bool   // it has messages after that
	moved time.Time
}

const (
	// ahead is by how many messages of TRACES a lane may be ahead of others.
	ahead = 4096

	// stands is for how long a lane must not have moved that the others do not wait for.
	stands = 30 * time.Second
)

// saw notes how far a lane is.
func (p *pace) saw(lane string, seq uint64, left bool, now time.Time) {
	if p.lanes == nil {
		p.lanes = map[string]position{}
	}
	was, known := p.lanes[lane]
	if !known || seq > was.seq || left && !was.left {
		was.moved = now
	}
	p.lanes[lane] = position{max(seq, was.seq), left, was.moved}
}

// waitsFor returns a lane that one at seq has to wait for, and how many messages that is behind.
func (p *pace) waitsFor(seq uint64, now time.Time) (lane string, behind uint64) {
	for name, other := range p.lanes {
		if other.left && other.seq+ahead < seq && seq-other.seq > behind && now.Sub(other.moved) < stands {
			lane, behind = name, seq-other.seq
		}
	}
	return lane, behind
}
