// Package tally counts what has become of the items of each instance in a lane, so that the sum can be
// checked however many processes have read the lane one after the other:
//
//	items + rescued = delivered + sampled_out + filtered + dead + dropped + aside + duplicate + unrecorded
//
// Rescued are spans that were sampled out and, when a late span had brought their trace back, ended once more.
//
// A [Tally] holds for a sequence of the stream: it counts every message up to there once, and none
// after it. What has become of later messages is counted as well, and enters the tally when the lane's
// floor passes them. The owner of the lane stores the tally in the hub (bucket TALLIES), and the next
// owner continues it. `penstock audit` reads all of them.
//
// A tally also follows the numbers in the ids of messages that edges send: a number that never came
// is a message that an edge has acknowledged and that was lost before the lane read it.
//
// # Promises
//
//   - Moving a floor never waits for a tally. An owner that dies leaves messages between the tally and
//     its floor; the next owner counts these as unrecorded: finished, but not known how.
//   - A message that is read again is counted once.
//   - Where messages cannot be counted, because they are gone, the tally says so ([Break]).
//
// # Not here
//
// The counters of a process: package ledger.
package tally

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Outcome is what has become of an item.
type Outcome uint8

// The outcomes.
const (
	Delivered  Outcome = iota // the backend has it
	SampledOut                // its trace was not kept
	Filtered                  // processing.filter
	Dead                      // in DEADLETTER
	Dropped                   // unreadable messages beyond those that become dead letters
	Aside                     // in ASIDE, and from there at the backend or in DEADLETTER
	Duplicate                 // recognised as a repetition
	Routed                    // in SPANS
	Unrecorded                // finished, by an owner that ended before it stored how
	outcomes
)

var outcomeNames = [outcomes]string{"delivered", "sampled_out", "filtered", "dead", "dropped", "aside", "duplicate", "routed", "unrecorded"}

func (o Outcome) String() string { return outcomeNames[o] }

// MarshalText makes an outcome a key in JSON.
func (o Outcome) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// UnmarshalText is the reverse of MarshalText.
func (o *Outcome) UnmarshalText(text []byte) error {
	i := slices.Index(outcomeNames[:], string(text))
	if i < 0 {
		return fmt.Errorf("unknown outcome %q", text)
	}
	*o = Outcome(i)
	return nil
}

// Tally is what has become of the messages of a lane up to a sequence.
type Tally struct {
	Since   time.Time `json:"since"`   // when counting began
	Created time.Time `json:"created"` // the stream
	Upto    uint64    `json:"upto"`    // the sequence
	Breaks  []Break   `json:"breaks,omitempty"`
	// Again is the lowest sequence that the lane has finished and is going to read again: keepers leave what is from there on;
	// 0 for none.
	Again     uint64             `json:"again,omitempty"`
	Instances map[string]*Counts `json:"instances"`
}

// Break is a place at which messages have not been counted.
type Break struct {
	At      time.Time `json:"at"`
	Because string    `json:"because"`
}

// Counts is what has become of the items of one instance.
type Counts struct {
	Items uint64             `json:"items"`
	Ended map[Outcome]uint64 `json:"ended"`
	// Rescued is how many of them have ended twice: sampled out first.
	Rescued uint64 `json:"rescued,omitempty"`
	// Missing is how many messages of its edges never came; Missed when that was last noticed.
	Missing uint64             `json:"missing,omitempty"`
	Missed  time.Time          `json:"missed,omitzero"`
	Sources map[string]*source `json:"sources,omitempty"`
}

// source is an edge's spool, which numbers its messages without gaps.
type source struct {
	Last uint64      `json:"last"`
	Gaps [][2]uint64 `json:"gaps,omitempty"` // first and last number that has not come
	Seen int64       `json:"seen"`           // Unix seconds
}

const (
	// maxInstances is how many instances a tally has by name; the others are counted under [Others].
	maxInstances = 4096
	// maxSources is how many spools of an instance are followed: the most recent ones.
	maxSources = 8
	// maxGaps is how many gaps of a spool may still be filled; older ones stay missing.
	maxGaps = 8
	// maxJump is how far a number may be ahead of the last one: further ones are no edge's.
	maxJump = 1 << 32
	// reorder is how far behind a later one a message of an edge may come: the edge's window.
	reorder = 64
	// maxBreaks is how many breaks a tally keeps.
	maxBreaks = 4
	// maxRecount is how many sequences are read again at most to count what is unrecorded.
	maxRecount = 1_000_000
)

// Others stands for the instances beyond those that a tally has by name.
const Others = "_other"

// Sum returns how many items have an outcome.
func (c *Counts) Sum() (n uint64) {
	for _, k := range c.Ended {
		n += k
	}
	return n
}

// clone returns a copy that shares nothing.
func (t Tally) clone() Tally {
	t.Instances, t.Breaks = maps.Clone(t.Instances), slices.Clone(t.Breaks)
	for name, c := range t.Instances {
		c := *c
		c.Ended, c.Sources = maps.Clone(c.Ended), maps.Clone(c.Sources)
		for spool, s := range c.Sources {
			s := *s
			s.Gaps = slices.Clone(s.Gaps)
			c.Sources[spool] = &s
		}
		t.Instances[name] = &c
	}
	return t
}

// of returns the counts of an instance.
func (t *Tally) of(instance string) *Counts {
	c := t.Instances[instance]
	if c == nil && len(t.Instances) >= maxInstances {
		instance = Others
		c = t.Instances[instance]
	}
	if c == nil {
		c = &Counts{Ended: map[Outcome]uint64{}}
		t.Instances[instance] = c
	}
	return c
}

// number notes that message n of a spool has come.
func (c *Counts) number(spool string, n uint64, now time.Time) {
	s := c.Sources[spool]
	if s == nil {
		if c.Sources == nil {
			c.Sources = map[string]*source{}
		}
		if len(c.Sources) >= maxSources {
			delete(c.Sources, slices.MinFunc(slices.Collect(maps.Keys(c.Sources)), func(a, b string) int {
				return cmp.Or(cmp.Compare(c.Sources[a].Seen, c.Sources[b].Seen), cmp.Compare(a, b))
			}))
		}
		s = &source{Last: n}
		c.Sources[spool] = s
	}
	s.Seen = now.Unix()
	switch {
	case n > s.Last && n-s.Last > maxJump:
		*s = source{Last: n, Seen: s.Seen}
	case n > s.Last:
		if n > s.Last+1 {
			s.Gaps = append(s.Gaps, [2]uint64{s.Last + 1, n - 1})
			c.Missing, c.Missed = c.Missing+n-s.Last-1, now
		}
		if s.Last = n; len(s.Gaps) > maxGaps {
			s.Gaps = s.Gaps[1:]
		}
	case s.fill(n):
		c.Missing--
	}
}

// fill removes a number from the gaps, and reports whether it was in one.
func (s *source) fill(n uint64) bool {
	i := slices.IndexFunc(s.Gaps, func(g [2]uint64) bool { return g[0] <= n && n <= g[1] })
	if i < 0 {
		return false
	}
	g := s.Gaps[i]
	var left [][2]uint64
	if g[0] < n {
		left = append(left, [2]uint64{g[0], n - 1})
	}
	if n < g[1] {
		left = append(left, [2]uint64{n + 1, g[1]})
	}
	s.Gaps = slices.Replace(s.Gaps, i, i+1, left...)
	return true
}

// stream is what a hub says about the lane's stream.
type stream struct {
	created     time.Time
	first, last uint64
}

// resume continues a tally at a lane's floor, and reports whether the messages between the tally's
// sequence and the floor are to be counted.
func (t *Tally) resume(s stream, floor uint64, now time.Time) (recount bool) {
	if t.Instances == nil {
		t.Instances = map[string]*Counts{}
	}
	switch {
	case t.Since.IsZero():
		t.Since, t.Upto = now, floor
	case !t.Created.Equal(s.created):
		t.lose("the stream was recreated", floor, now)
	case t.Upto > s.last:
		t.lose("the hub lost the end of the stream", floor, now)
	case floor > t.Upto && s.first > t.Upto+1:
		t.skip("messages may have been finished while no tally was stored", min(floor, s.first-1), now)
		return floor > t.Upto
	case floor > t.Upto && floor-t.Upto > maxRecount:
		t.skip("too many messages were finished while no tally was stored", floor, now)
	default:
		return floor > t.Upto
	}
	t.Created = s.created
	return false
}

// lose notes a break; messages that never come after it are missing.
func (t *Tally) lose(because string, floor uint64, now time.Time) {
	t.Upto = floor
	t.Breaks = append(t.Breaks, Break{now, because})
	t.Breaks = t.Breaks[max(0, len(t.Breaks)-maxBreaks):]
}

// skip is lose where messages have come that were not counted: numbers are followed from the next one on.
// What was missing and may have come among them is not missing any more.
func (t *Tally) skip(because string, floor uint64, now time.Time) {
	t.lose(because, floor, now)
	for _, c := range t.Instances {
		for _, s := range c.Sources {
			for _, g := range s.Gaps {
				if g[1]+reorder > s.Last {
					c.Missing -= g[1] + 1 - g[0]
				}
			}
		}
		c.Sources = nil
	}
}
