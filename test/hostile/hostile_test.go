package hostile

import (
	"flag"
	"fmt"
	"os"
	"testing"
	"time"
)

var only = flag.String("only", "", "make the attempts of this `kind` alone")

var whole = flag.Bool("whole", false, "check after each attempt, as make hostile does; else after each kind")

// TestHostileEdge makes every attempt. What must be refused is refused with the server's word;
// what is taken harms nobody but the instance that sent it.
func TestHostileEdge(t *testing.T) {
	w := newWorld(t)
	if err := w.check(0); err != nil {
		t.Fatal(err)
	}
	attempts, refused, harmless, harmed := 0, 0, 0, 0
	began := time.Now()
	var slowest, victim time.Duration // a check, and what the victim's data took of it
	var slow string
	for _, g := range groups() {
		if *only != "" && g.name != *only {
			continue
		}
		before := len(w.log.String())
		w.sendVictim()
		well := func(name string) {
			since := time.Now()
			if err := w.check(before); err != nil {
				harmed++
				t.Errorf("%s: %s: %v", g.name, name, err)
			}
			if took := time.Since(since); took > slowest {
				slowest, slow = took, g.name+": "+name
			}
			victim = max(victim, w.victim)
			before = len(w.log.String())
		}
		fmt.Fprintf(os.Stderr, "%s: %d attempts, %d made before, %v so far\n", g.name, len(g.attempts), attempts, time.Since(began).Truncate(time.Second))
		for _, a := range g.attempts {
			attempts++
			was, answer := a.do(w)
			switch {
			case was:
				refused++
			case a.denied:
				harmed++
				t.Errorf("%s: %s is allowed: %.300q", g.name, a.name, answer)
			default:
				harmless++
			}
			if *whole {
				if well(a.name); t.Failed() {
					t.FailNow() // the world is not what it was
				}
			}
		}
		if !*whole {
			well("after all of them")
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	if attempts < 150 && *only == "" {
		t.Errorf("only %d attempts", attempts)
	}
	fmt.Fprintf(os.Stderr, "attempts=%d refused=%d harmless=%d harmed=%d victim=%.1fs slowest=%.1fs (%s)\n", attempts, refused, harmless, harmed, victim.Seconds(), slowest.Seconds(), slow)
}
