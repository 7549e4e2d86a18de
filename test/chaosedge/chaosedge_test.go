package main

import (
	"testing"
	"time"

	"github.com/penstock/penstock/test/daemon"
)

// TestMain is the hub's process, too.
func TestMain(m *testing.M) { daemon.TestMain(m) }

// TestChaosEdge is a short `make chaos-edge`.
func TestChaosEdge(t *testing.T) {
	sum, err := Run(t.Context(), daemon.Options{Seed: 1, For: 20 * time.Second, Out: t.Output()})
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
	good := Summary{Acked: 3, Found: 3}
	if good.Broken() {
		t.Error("a good run counts as broken")
	}
	for name, change := range map[string]func(*Summary){
		"lost": func(s *Summary) { s.Lost = 1 }, "phantom": func(s *Summary) { s.Phantom = 1 }, "misordered": func(s *Summary) { s.Misordered = 1 },
		"refused": func(s *Summary) { s.Refused = 1 }, "false alarm": func(s *Summary) { s.FalseAlarms = 1 }, "nothing sent": func(s *Summary) { s.Acked = 0 }, "nothing found": func(s *Summary) { s.Found = 0 },
	} {
		s := good
		if change(&s); !s.Broken() {
			t.Errorf("%s: not broken", name)
		}
	}
}
