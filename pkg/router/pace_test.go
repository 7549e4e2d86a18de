package router

import (
	"testing"
	"time"
)

// TestPace: a lane waits for the one that is furthest behind, as long as that moves and has something left.
func TestPace(t *testing.T) {
	var p pace
	at := time.Unix(0, 0)
	want := func(what string, seq uint64, lane string, behind uint64) {
		t.Helper()
		if got, n := p.waitsFor(seq, at); got != lane || n != behind {
			t.Errorf("%s: at %d it waits for %q, %d behind; want %q, %d", what, seq, got, n, lane, behind)
		}
	}
	want("nothing is known", 1<<40, "", 0)
	p.saw("router-0", 100, true, at)
	p.saw("router-1", 50, false, at)
	want("in step", 100+ahead, "", 0)
	want("ahead", 101+ahead, "router-0", ahead+1)
	p.saw("router-1", 50, true, at)
	want("further ahead", 200+ahead, "router-1", ahead+150)
	at = at.Add(stands - 1)
	p.saw("router-0", 101, true, at)
	p.saw("router-1", 40, true, at) // what the hub knows is older than what this router has read
	want("both", 200+ahead, "router-1", ahead+150)
	at = at.Add(1)
	want("one stands", 200+ahead, "router-0", ahead+99)
	at = at.Add(stands)
	want("both stand", 200+ahead, "", 0)
	p.saw("router-1", 51, true, at)
	want("one moves again", 200+ahead, "router-1", ahead+149)
	p.saw("router-1", 60, false, at)
	at = at.Add(time.Hour)
	p.saw("router-1", 60, true, at) // after an hour without a message
	want("new messages", 200+ahead, "router-1", ahead+140)
}
