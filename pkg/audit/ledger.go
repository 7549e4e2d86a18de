package audit

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/tally"
)

// Balance is what has become of the items of an instance for a backend.
type Balance struct {
	Instance string                   `json:"instance"`
	Signal   string                   `json:"signal"`
	Backend  string                   `json:"backend"`
	Acked    int64                    `json:"acked"`
	Ended    map[tally.Outcome]uint64 `json:"ended"`
	InFlight int64                    `json:"in_flight"`
	// Rescued is how many spans have ended twice: sampled out, and then with a trace that a late span has brought back.
	Rescued int64 `json:"rescued"`
	// Difference is Acked and Rescued less Ended and InFlight: items that a lane has read and finished without an outcome.
	// Spans that are in SPANS twice are not among the acknowledged.
	Difference int64     `json:"difference"`
	Missing    uint64    `json:"missing_messages"`
	Since      time.Time `json:"since,omitzero"` // when counting began; with several lanes at the last of them
	// NotCounted is why some messages could not be counted, and when.
	NotCounted []tally.Break `json:"not_counted,omitempty"`
}

// ledger has the lines by instance, signal and backend; the backend "router" stands for the lanes of TRACES,
// which the lines of the traces' backends include in the end.
type ledger map[[3]string]*Balance

const router = "router"

func (b ledger) of(instance, signal, backend string) *Balance {
	key := [3]string{instance, signal, backend}
	l := b[key]
	if l == nil {
		l = &Balance{Instance: instance, Signal: signal, Backend: backend, Ended: map[tally.Outcome]uint64{}}
		b[key] = l
	}
	return l
}

// ledgerOf adds up the tallies of all lanes. Missing messages count if they were noticed since then.
func ledgerOf(counted map[string]map[string]tally.Tally, since time.Duration, now time.Time) ledger {
	b := ledger{}
	for stream, lanes := range counted {
		signal := strings.ToLower(stream)
		if stream == bus.Spans {
			signal = otlpwire.Traces.String()
		}
		for name, t := range lanes {
			for instance, c := range t.Instances {
				l := b.of(instance, signal, bus.LaneBackend(name))
				l.Acked += int64(c.Items)
				l.Rescued += int64(c.Rescued)
				for what, n := range c.Ended {
					l.Ended[what] += n
				}
				if since == 0 || c.Missed.After(now.Add(-since)) {
					l.Missing += c.Missing
				}
				if t.Since.After(l.Since) {
					l.Since = t.Since
				}
				l.NotCounted = append(l.NotCounted, t.Breaks...)
			}
		}
	}
	return b
}

// inFlight adds items that a lane's tally does not have.
func (b ledger) inFlight(instance, signal, backend string, items int) {
	l := b.of(instance, signal, backend)
	l.Acked += int64(items)
	l.InFlight += int64(items)
}

// lines returns the lines of all backends. Those of the traces' backends include what routers have not
// routed, or not yet: what they have routed is told by the backends' lanes.
func (b ledger) lines() []Balance {
	all := []Balance{}
	for key, l := range b {
		in, traces := b[[3]string{l.Instance, l.Signal, router}], l.Signal == otlpwire.Traces.String()
		if traces && l.Backend == router && b.routedElsewhere(key) {
			continue
		}
		own := *l
		if traces && l.Backend != router && in != nil {
			own = l.after(in)
		}
		own.Difference = own.Acked + own.Rescued - own.InFlight
		for _, n := range own.Ended {
			own.Difference -= int64(n)
		}
		all = append(all, own)
	}
	slices.SortFunc(all, func(a, b Balance) int {
		return cmp.Or(cmp.Compare(a.Instance, b.Instance), cmp.Compare(a.Signal, b.Signal), cmp.Compare(a.Backend, b.Backend))
	})
	return all
}

// routedElsewhere reports whether a backend's line includes what the routers have of an instance.
func (b ledger) routedElsewhere(key [3]string) bool {
	for other := range b {
		if other[0] == key[0] && other[1] == key[1] && other[2] != router {
			return true
		}
	}
	return false
}

// after returns the line of a traces' backend, with what becomes of spans before they are in SPANS.
func (l Balance) after(in *Balance) Balance {
	ended := map[tally.Outcome]uint64{}
	for what, n := range l.Ended {
		if what != tally.Duplicate {
			ended[what] = n
		}
	}
	// Lanes are added up, and not compared: the routers' tallies may have begun at another time.
	l.Acked += in.Acked - int64(l.Ended[tally.Duplicate]+in.Ended[tally.Routed]+in.Ended[tally.Unrecorded])
	for _, what := range []tally.Outcome{tally.Dead, tally.Dropped} {
		if n := in.Ended[what]; n > 0 {
			ended[what] += n
		}
	}
	l.Ended, l.InFlight, l.Missing = ended, l.InFlight+in.InFlight, in.Missing
	l.NotCounted = slices.Concat(in.NotCounted, l.NotCounted)
	if in.Since.After(l.Since) {
		l.Since = in.Since
	}
	return l
}

// Wrong reports whether something is lost, or nobody knows what has become of it.
func (r Report) Wrong() bool {
	return len(r.Losses) > 0 || slices.ContainsFunc(r.Ledger, func(l Balance) bool { return l.Difference != 0 || l.Missing > 0 })
}
