package keeper

import "time"

// stream is the state of one stream at a look.
type stream struct {
	first, last uint64 // sequences; first is last+1 when it is empty
	messages    uint64
	bytes, max  uint64
	largest     uint64  // size of the largest message allowed, in bytes
	rate        float64 // bytes a second that arrive
	done        uint64  // every lane has finished all of its messages up to here
	aged        uint64  // messages up to here are older than the stream's retention
}

const (
	// ahead is for how long a stream has room, at its rate, after room was made: several looks of a
	// keeper, and the time in which another one takes over.
	ahead = 30 * time.Second

	// The room is at least a sixteenth of the stream's bound, and two of the largest messages; at most
	// half of its bound.
	leastRoom, mostRoom = 16, 2
)

// size estimates the bytes of n of its messages.
func (s stream) size(n uint64) uint64 {
	return uint64(float64(s.bytes) / float64(max(s.messages, 1)) * float64(n))
}

// owed estimates how many bytes are not finished.
func (s stream) owed() uint64 { return min(s.size(s.last-min(s.done, s.last)), s.bytes) }

// room is how many bytes fit before the stream refuses, once everything finished has been removed.
func (s stream) room() uint64 { return s.max - min(s.owed(), s.max) }

// fills reports whether a bounded stream has less than a quarter of its room left.
func (s stream) fills() bool { return s.max > 0 && s.room() < s.max/4 }

// nearlyFull reports whether a bounded stream has no more room left than there should be.
func (s stream) nearlyFull() bool { return s.max > 0 && s.room() <= s.max/leastRoom }

// removable returns the sequence up to which messages are to be removed, 0 for none: those that are
// too old, and those whose room new messages need; never beyond done.
func (s stream) removable() uint64 {
	upTo := s.aged
	if s.max > 0 && s.messages > 0 {
		most := float64(s.max)
		want := min(max(s.rate*ahead.Seconds(), most/leastRoom, 2*float64(s.largest)), most/mostRoom)
		if float64(s.bytes)+want > most {
			excess := float64(s.bytes) + min(1.5*want, most/mostRoom) - most // more than needed, so that this is not done at every look
			upTo = max(upTo, s.first+uint64(excess/float64(s.bytes)*float64(s.messages)))
		}
	}
	if upTo = min(upTo, s.done, s.last); upTo < s.first {
		return 0
	}
	return upTo
}
