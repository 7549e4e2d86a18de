package main

import (
	"testing"
	"time"

	"github.com/penstock/penstock/test/daemon"
)

// TestMain is the hub's process, too.
func TestMain(m *testing.M) { daemon.TestMain(m) }

// TestChaos is a short `make chaos`.
func TestChaos(t *testing.T) {
	sum, err := Run(t.Context(), daemon.Options{Seed: 3, For: 25 * time.Second, Out: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(sum)
	if sum.Broken() || sum.Faults < 3 {
		t.Error("a promise was broken")
	}
}

// TestSummaryIsBroken: the judge cannot be pleased by nothing.
func TestSummaryIsBroken(t *testing.T) {
	good := Summary{Acked: 3, Delivered: 2, SampledOut: 1}
	if good.Broken() {
		t.Error("a good run counts as broken")
	}
	for name, change := range map[string]func(*Summary){
		"lost": func(s *Summary) { s.Lost = 1 }, "wrong": func(s *Summary) { s.WronglyDropped = 1 }, "split": func(s *Summary) { s.Split = 1 }, "leaked": func(s *Summary) { s.Leaked = 1 }, "dead": func(s *Summary) { s.Dead = 1 }, "unaccounted": func(s *Summary) { s.Unaccounted = 1 },
		"poisoned": func(s *Summary) { s.Poisoned = 1 }, "not poisoned": func(s *Summary) { s.Cursed = 1 },
		"misordered": func(s *Summary) { s.Misordered = 1 }, "no logs": func(s *Summary) { s.add(Summary{}) },
		"slow": func(s *Summary) { s.SlowHandOvers = true }, "slowed": func(s *Summary) { s.Slowed = true }, "no flood": func(s *Summary) { s.NoFlood = true }, "nothing sent": func(s *Summary) { s.Acked = 0 }, "all kept": func(s *Summary) { s.SampledOut = 0 }, "none kept": func(s *Summary) { s.Delivered = 0 },
	} {
		s := good
		if change(&s); !s.Broken() {
			t.Errorf("%s: not broken", name)
		}
	}
}
