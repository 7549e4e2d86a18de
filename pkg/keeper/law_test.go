package keeper

import (
	"math/rand/v2"
	"testing"
	"time"
)

func TestRemovable(t *testing.T) {
	// A thousand messages of a thousand bytes, 101 to 1100.
	at := stream{first: 101, last: 1100, messages: 1000, bytes: 1_000_000, max: 16_000_000, done: 1100}
	for name, tc := range map[string]struct {
		change func(*stream)
		upTo   uint64
	}{
		"room enough":              {func(*stream) {}, 0},
		"some is old":              {func(s *stream) { s.aged = 300 }, 300},
		"old and owed":             {func(s *stream) { s.aged, s.done = 300, 250 }, 250},
		"old, the first is owed":   {func(s *stream) { s.aged, s.done = 300, 100 }, 0},
		"nothing was ever done":    {func(s *stream) { s.aged, s.done = 300, 0 }, 0},
		"all is old":               {func(s *stream) { s.aged = 5000 }, 1100},
		"full":                     {func(s *stream) { s.max = 1_000_000 }, 100 + 94}, // a sixteenth, and half as much again
		"full and owed":            {func(s *stream) { s.max, s.done = 1_000_000, 150 }, 150},
		"full of what is owed":     {func(s *stream) { s.max, s.done = 1_000_000, 100 }, 0},
		"nearly full":              {func(s *stream) { s.max = 1_050_000 }, 100 + 49},
		"fast":                     {func(s *stream) { s.max, s.rate = 2_000_000, 40_000 }, 0}, // 30 s of that are half
		"faster":                   {func(s *stream) { s.max, s.rate = 1_500_000, 40_000 }, 100 + 251},
		"no bound":                 {func(s *stream) { s.max, s.rate = 0, 1e9 }, 0},
		"larger than its bound":    {func(s *stream) { s.max = 10_000 }, 1091},
		"empty":                    {func(s *stream) { *s = stream{first: 7, last: 6, max: 1000, done: 6, aged: 6} }, 0},
		"empty, and fast":          {func(s *stream) { *s = stream{first: 7, last: 6, max: 1000, done: 6, rate: 1e12} }, 0},
		"a rate beyond all bounds": {func(s *stream) { s.rate = 1e30 }, 0}, // half of the bound is free
	} {
		s := at
		tc.change(&s)
		if got := s.removable(); got != tc.upTo {
			t.Errorf("%s: up to %d, want %d", name, got, tc.upTo)
		}
	}
}

// TestNothingOwedIsRemovable looks at streams of any kind.
func TestNothingOwedIsRemovable(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	removed := 0
	for range 100_000 {
		s := stream{first: 1 + r.Uint64N(100), bytes: r.Uint64N(1 << 20), max: r.Uint64N(1 << 20), rate: r.Float64() * 1e6, aged: r.Uint64N(300)}
		s.messages = r.Uint64N(100)
		s.last = s.first + s.messages - 1 + r.Uint64N(2)*r.Uint64N(20) // some are missing in between
		s.done = s.first - 1 + r.Uint64N(s.last-s.first+2)
		upTo := s.removable()
		switch {
		case upTo > s.done || upTo > s.last:
			t.Fatalf("%+v: up to %d", s, upTo)
		case upTo != 0 && upTo < s.first:
			t.Fatalf("%+v: up to %d, which is not there", s, upTo)
		case upTo != 0:
			removed++
		}
		if room := s.room(); room > s.max || s.owed() > s.bytes {
			t.Fatalf("%+v: room %d, owed %d", s, room, s.owed())
		}
	}
	if removed < 10_000 {
		t.Errorf("only %d of them had something to remove", removed)
	}
}

// TestSettled: what was finished some seconds ago may be removed, whatever the looks in between found.
func TestSettled(t *testing.T) {
	var s kept
	begin := time.Unix(1_700_000_000, 0)
	for _, look := range []struct {
		at         time.Duration
		upTo, want uint64
	}{
		{0, 100, 0}, {2, 150, 0}, {3, 160, 100}, {4, 170, 100}, {5, 180, 150}, {6, 90, 90}, // less is wanted
		{7, 0, 0}, {8, 300, 180}, {10, 310, 180}, {20, 400, 310}, {40, 500, 400},
	} {
		if got := s.settled(begin.Add(look.at*time.Second), 3*time.Second, look.upTo); got != look.want {
			t.Errorf("after %d s: up to %d, want %d", look.at, got, look.want)
		}
		if len(s.done) > 5 {
			t.Errorf("%d looks are remembered", len(s.done))
		}
	}
}
