package spool

import "time"

// retention determines how long messages that the hub has stay in the spool: if the
// hub loses what it has acknowledged, they are sent again. Not for concurrent use.
type retention struct {
	keep   time.Duration
	points []point // in order of time and sequence
	held   int64
}

// point is a range of messages that the hub has had since at.
type point struct {
	at    time.Time
	upto  uint64
	bytes int64
}

// grain is the resolution of the times; a point takes 48 bytes.
const grain = time.Second

// add notes that the hub has everything up to seq, bytes more than before.
func (r *retention) add(now time.Time, seq uint64, bytes int64) {
	r.held += bytes
	if n := len(r.points); n > 0 && now.Sub(r.points[n-1].at) < grain {
		r.points[n-1].upto, r.points[n-1].bytes = seq, r.points[n-1].bytes+bytes
		return
	}
	r.points = append(r.points, point{now, seq, bytes})
}

// expire returns up to where messages may be deleted now; 0 for nothing new.
func (r *retention) expire(now time.Time) (upto uint64) {
	n := 0
	for n < len(r.points) && now.Sub(r.points[n].at) >= r.keep {
		upto = r.points[n].upto
		r.held -= r.points[n].bytes
		n++
	}
	r.points = append(r.points[:0], r.points[n:]...)
	return upto
}

// forget is expire for a full log: everything that the hub has may be deleted.
func (r *retention) forget() { r.points, r.held = r.points[:0], 0 }
