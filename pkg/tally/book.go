package tally

import (
	"cmp"
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
)

// Book is a tally and what has become so far of the messages after it. It is a pure state machine, for
// one goroutine at a time.
type Book struct {
	tally Tally
	open  []entry // by sequence
	dirty bool    // the tally has changed
}

// entry is what has become of the items of one instance in one message.
type entry struct {
	seq      uint64
	instance string
	items    int
	ended    [outcomes]int32
	rescued  int
	spool    string // "" if the message has no number
	number   uint64
}

// begin continues a tally. What was noted of later messages is forgotten: they are read again.
func (b *Book) begin(t Tally) { b.tally, b.open, b.dirty = t, nil, true }

// Saw notes items of a message, in the order of sequences. id is the message's, "" where it has been
// followed before.
func (b *Book) Saw(seq uint64, instance string, items int, id string) {
	if seq <= b.tally.Upto {
		return // counted, by an owner whose last ack was lost
	}
	i, there := b.find(seq, instance)
	if !there {
		b.open = slices.Insert(b.open, i, entry{seq: seq, instance: instance})
	}
	e := &b.open[i]
	if e.items += items; e.spool == "" {
		e.spool, e.number, _ = envelope.Numbered(id)
	}
}

// find returns the place of an entry, or where it would be. Those of later messages may be there already: something
// was rescued with them.
func (b *Book) find(seq uint64, instance string) (i int, there bool) {
	i, _ = slices.BinarySearchFunc(b.open, seq, func(e entry, seq uint64) int { return cmp.Compare(e.seq, seq) })
	for ; i < len(b.open) && b.open[i].seq == seq; i++ {
		if b.open[i].instance == instance {
			return i, true
		}
	}
	return i, false
}

// Rescued notes that items of messages which may have been counted as sampled out are going to end in another way,
// with a later message.
func (b *Book) Rescued(seq uint64, instance string, items int) {
	i, there := b.find(seq, instance)
	switch {
	case seq <= b.tally.Upto:
		return
	case !there:
		b.open = slices.Insert(b.open, i, entry{seq: seq, instance: instance})
	}
	b.open[i].rescued += items
}

// Ended notes what has become of items that were seen.
func (b *Book) Ended(seq uint64, instance string, what Outcome, items int) {
	if i, there := b.find(seq, instance); there {
		b.open[i].ended[what] += int32(items)
	}
}

// Part is items of one instance in one message.
type Part struct {
	Seq      uint64
	Instance string
	Items    int
}

// EndedTogether notes what has become of the items of several messages that were written in one
// request, where it is known only of all together how many ended how: they are assigned in order.
func (b *Book) EndedTogether(parts []Part, ended *Outcomes) {
	left, what := *ended, Outcome(0)
	for _, p := range parts {
		for n := p.Items; n > 0 && what < outcomes; {
			if left[what] == 0 {
				what++
				continue
			}
			k := min(n, left[what])
			b.Ended(p.Seq, p.Instance, what, k)
			left[what] -= k
			n -= k
		}
	}
}

// Outcomes is how many items ended how.
type Outcomes [outcomes]int

// Close moves the tally to a lane's floor.
func (b *Book) Close(floor uint64, now time.Time) {
	n := 0
	for ; n < len(b.open) && b.open[n].seq <= floor; n++ {
		e := &b.open[n]
		c := b.tally.of(e.instance)
		c.Items += uint64(e.items)
		c.Rescued += uint64(e.rescued)
		for what, k := range e.ended {
			if k != 0 {
				c.Ended[Outcome(what)] += uint64(k)
			}
		}
		if e.spool != "" {
			c.number(e.spool, e.number, now)
		}
	}
	clear(b.open[:n])
	b.open = b.open[n:] // append moves the rest from time to time
	if floor > b.tally.Upto {
		b.tally.Upto = floor
		b.dirty = b.dirty || n > 0
	}
}
