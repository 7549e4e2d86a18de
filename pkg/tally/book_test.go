package tally

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"
)

const spool = "0123456789abcdef0123456789abcdef"

var now = time.Unix(1_700_000_000, 0).UTC()

func id(n int) string { return fmt.Sprintf("%s-%d", spool, n) }

func newBook(upto uint64) *Book {
	b := &Book{}
	b.begin(Tally{Since: now, Upto: upto, Instances: map[string]*Counts{}})
	return b
}

// TestNumbers: what is missing by the numbers of an edge's messages.
func TestNumbers(t *testing.T) {
	for _, tc := range []struct {
		name    string
		came    []int
		missing uint64
	}{
		{"in order, from any number on", []int{7, 8, 9}, 0},
		{"one is lost", []int{1, 2, 4, 5}, 1},
		{"a late one is not", []int{1, 2, 4, 3, 5}, 0},
		{"one that is repeated is no other one", []int{1, 3, 1, 3, 3}, 1},
		{"a gap is filled from its middle", []int{1, 9, 5, 4, 6, 5}, 4},
		{"and completely", []int{1, 5, 2, 4, 3}, 0},
		{"no edge jumps so far", []int{1, 2, 1 << 40, 1<<40 + 1}, 0},
		{"a window is sent again", []int{1, 2, 3, 4, 2, 3, 4, 5}, 0},
	} {
		b := newBook(0)
		for i, n := range tc.came {
			b.Saw(uint64(i+1), "as-1", 1, id(n))
			b.Close(uint64(i+1), now)
		}
		c := b.tally.Instances["as-1"]
		if c.Missing != tc.missing || tc.missing > 0 && !c.Missed.Equal(now) {
			t.Errorf("%s: %d missing, noticed %v", tc.name, c.Missing, c.Missed)
		}
	}
}

// TestNumbersAreBounded: gaps and spools are, and what was missing stays so.
func TestNumbersAreBounded(t *testing.T) {
	b := newBook(0)
	seq := uint64(0)
	come := func(id string) {
		seq++
		b.Saw(seq, "as-1", 1, id)
		b.Close(seq, now.Add(time.Duration(seq)*time.Second))
	}
	for n := range 3 * maxGaps {
		come(id(1 + 2*n))
	}
	for n := range 2 * maxSources {
		come(fmt.Sprintf("%032x-1", n))
	}
	c := b.tally.Instances["as-1"]
	if c.Missing != 3*maxGaps-1 || len(c.Sources) != maxSources {
		t.Errorf("%d missing, %d spools", c.Missing, len(c.Sources))
	}
	come(id(2)) // its spool has been forgotten: nothing is known to be missing
	if c.Missing != 3*maxGaps-1 {
		t.Errorf("%d missing", c.Missing)
	}
	for n := range maxInstances + 10 {
		seq++
		b.Saw(seq, fmt.Sprint("other-", n), 1, "")
		b.Close(seq, now)
	}
	if n := len(b.tally.Instances); n != maxInstances+1 || b.tally.Instances[Others].Items != 11 {
		t.Errorf("%d instances", n)
	}
}

// TestFloor: a tally has what the floor has passed, once, whatever was read again.
func TestFloor(t *testing.T) {
	b := newBook(10)
	b.Saw(10, "as-1", 100, "") // counted by the previous owner
	b.Saw(11, "as-1", 3, "")
	b.Saw(11, "as-2", 2, "")
	b.Saw(11, "as-2", 2, "") // another frame
	b.Saw(12, "as-1", 5, "")
	b.Ended(12, "as-1", Delivered, 5)
	b.Ended(11, "as-2", SampledOut, 4)
	b.Ended(10, "as-1", Delivered, 100)
	b.Close(11, now)
	if c := b.tally.Instances["as-1"]; c.Items != 3 || c.Sum() != 0 || b.tally.Upto != 11 {
		t.Errorf("%+v: 3 items have no outcome, and must be seen to have none", c)
	}
	if c := b.tally.Instances["as-2"]; c.Items != 4 || c.Ended[SampledOut] != 4 {
		t.Errorf("%+v", c)
	}
	again := &Book{} // the lane is claimed again
	again.begin(b.tally)
	again.Saw(11, "as-1", 3, "")
	again.Saw(12, "as-1", 5, "")
	again.EndedTogether([]Part{{11, "as-1", 3}, {12, "as-1", 5}}, &Outcomes{Delivered: 5, Dead: 3})
	again.Close(12, now)
	if c := again.tally.Instances["as-1"]; c.Items != 8 || !maps.Equal(c.Ended, map[Outcome]uint64{Delivered: 2, Dead: 3}) {
		t.Errorf("%+v", c)
	}
}

// TestRescued: items that have ended once and end again, with a later message, also of an instance that it has nothing
// of; and not with one that is counted already.
func TestRescued(t *testing.T) {
	b := newBook(0)
	for seq, instance := range []string{"as-1", "as-2", "as-1"} {
		b.Saw(uint64(seq+1), instance, 2, "")
		b.Ended(uint64(seq+1), instance, SampledOut, 2)
	}
	b.Close(2, now)
	for _, p := range []Part{{3, "as-2", 2}, {3, "as-1", 4}, {2, "as-1", 9}} {
		b.Rescued(p.Seq, p.Instance, p.Items)
		b.EndedTogether([]Part{p}, &Outcomes{Delivered: p.Items})
	}
	b.Saw(4, "as-2", 1, "")
	b.Ended(4, "as-2", Filtered, 1)
	b.Close(4, now)
	for instance, want := range map[string]Counts{
		"as-1": {Items: 4, Rescued: 4, Ended: map[Outcome]uint64{SampledOut: 4, Delivered: 4}},
		"as-2": {Items: 3, Rescued: 2, Ended: map[Outcome]uint64{SampledOut: 2, Delivered: 2, Filtered: 1}},
	} {
		if c := b.tally.Instances[instance]; c.Items != want.Items || c.Rescued != want.Rescued || !maps.Equal(c.Ended, want.Ended) {
			t.Errorf("%s: %+v, want %+v", instance, c, want)
		}
	}
}

// TestRescuedAhead: another owner sends a rescue with a message that it has not come to.
func TestRescuedAhead(t *testing.T) {
	b := newBook(0)
	for seq := uint64(7); seq < 10; seq++ {
		b.Rescued(seq, "as-2", 3)
		b.Ended(seq, "as-2", Delivered, 3)
	}
	for seq := uint64(1); seq <= 10; seq++ {
		for _, instance := range []string{"as-1", "as-2", "as-1"} {
			b.Saw(seq, instance, 1, id(int(seq)))
			b.Ended(seq, instance, SampledOut, 1)
		}
		b.Close(seq-min(seq, 2), now)
	}
	b.Close(10, now)
	for instance, want := range map[string]Counts{
		"as-1": {Items: 20, Ended: map[Outcome]uint64{SampledOut: 20}},
		"as-2": {Items: 10, Rescued: 9, Ended: map[Outcome]uint64{SampledOut: 10, Delivered: 9}},
	} {
		c := b.tally.Instances[instance]
		if c.Items != want.Items || c.Rescued != want.Rescued || !maps.Equal(c.Ended, want.Ended) || c.Missing != 0 || c.Sources[spool].Last != 10 {
			t.Errorf("%s: %+v, want %+v", instance, c, want)
		}
	}
}

// TestResume: where counting continues, and what it says when it cannot.
func TestResume(t *testing.T) {
	made := now.Add(-time.Hour)
	for _, tc := range []struct {
		name    string
		tally   Tally
		hub     stream
		floor   uint64
		recount bool
		upto    uint64
		because string
		anew    bool // numbers are followed anew
	}{
		{"nothing yet", Tally{}, stream{made, 1, 9}, 4, false, 4, "", false},
		{"at the floor", Tally{Since: made, Created: made, Upto: 4}, stream{made, 1, 9}, 4, false, 4, "", false},
		{"behind the floor", Tally{Since: made, Created: made, Upto: 2}, stream{made, 3, 9}, 4, true, 2, "", false},
		{"before the floor", Tally{Since: made, Created: made, Upto: 6}, stream{made, 1, 9}, 4, false, 6, "", false},
		{"gone", Tally{Since: made, Created: made, Upto: 2}, stream{made, 4, 9}, 6, true, 3, "messages may have been finished while no tally was stored", true},
		{"another stream", Tally{Since: made, Created: made.Add(-1), Upto: 6}, stream{made, 1, 9}, 0, false, 0, "the stream was recreated", false},
		{"a shorter one", Tally{Since: made, Created: made, Upto: 10}, stream{made, 1, 9}, 4, false, 4, "the hub lost the end of the stream", false},
	} {
		tally := tc.tally
		tally.Instances = map[string]*Counts{"as-1": {Sources: map[string]*source{spool: {Last: 3}}}}
		recount := tally.resume(tc.hub, tc.floor, now)
		because := ""
		if len(tally.Breaks) > 0 {
			because = tally.Breaks[0].Because
		}
		if recount != tc.recount || tally.Upto != tc.upto || because != tc.because || !tally.Created.Equal(made) || (tally.Instances["as-1"].Sources == nil) != tc.anew {
			t.Errorf("%s: %v %+v", tc.name, recount, tally)
		}
	}
}

// TestStored: what is stored is read as it was.
func TestStored(t *testing.T) {
	for _, instances := range []int{1, 500} { // the larger one is compressed
		b := newBook(0)
		for n := range instances {
			b.Saw(uint64(n+1), fmt.Sprint("as-", n), 3, id(n+1))
			b.Ended(uint64(n+1), fmt.Sprint("as-", n), Filtered, 3)
		}
		b.Close(uint64(instances), now)
		value, err := encode(b.tally)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decode(value)
		if err != nil || fmt.Sprintf("%+v", *got.Instances["as-0"].Sources[spool]) != fmt.Sprintf("%+v", *b.tally.Instances["as-0"].Sources[spool]) || len(got.Instances) != instances || got.Instances["as-0"].Ended[Filtered] != 3 || got.Upto != uint64(instances) {
			t.Errorf("%+v %v", got, err)
		}
	}
	if _, err := decode([]byte("nonsense")); err == nil {
		t.Error("nonsense is a tally")
	}
}

// TestALargeTally is stored without the numbers that edges give, and with all counts: a message has a bound.
func TestALargeTally(t *testing.T) {
	b := newBook(0)
	for n := range maxInstances {
		for k := range maxSources {
			seq := uint64(n*maxSources + k + 1)
			b.Saw(seq, fmt.Sprint("as-", n), 1, fmt.Sprintf("%032x-%d", rand.Uint64(), k+1))
			b.Close(seq, now)
		}
	}
	value, err := encode(b.tally)
	if err != nil || len(value) > maxStored {
		t.Fatalf("%d bytes, %v", len(value), err)
	}
	got, err := decode(value)
	if err != nil || len(got.Instances) != maxInstances || got.Instances["as-7"].Items != maxSources || got.Instances["as-7"].Sources != nil {
		t.Errorf("%v: %d instances, %+v", err, len(got.Instances), got.Instances["as-7"])
	}
	if len(b.tally.Instances["as-7"].Sources) != maxSources {
		t.Error("its owner has forgotten the numbers, too")
	}
}

// TestClone: nothing that a copy counts is counted in the original.
func TestClone(t *testing.T) {
	b := newBook(0)
	b.Saw(1, "as-1", 1, id(1))
	b.Ended(1, "as-1", Delivered, 1)
	b.Close(1, now)
	again := &Book{}
	again.begin(b.tally.clone())
	for seq := uint64(2); seq < 9; seq += 2 {
		again.Saw(seq, "as-1", 1, id(int(seq)))
		again.Ended(seq, "as-1", Unrecorded, 1)
		again.Close(seq, now)
	}
	c := b.tally.Instances["as-1"]
	if c.Items != 1 || c.Sum() != 1 || c.Missing != 0 || c.Sources[spool].Last != 1 || len(c.Sources[spool].Gaps) != 0 {
		t.Errorf("%+v %+v", c, c.Sources[spool])
	}
}
