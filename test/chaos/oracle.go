package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/audit"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/test/daemon"
)

// Summary is the judgement. All but duplicates, refused, faults and recovery are in items
// that were acknowledged, split in traces.
type Summary struct {
	Acked, Delivered, SampledOut, Dead int
	Poisoned                           int // dead because no backend takes them
	Cursed                             int // acknowledged items that are to be
	Lost                               int // none of these, or dropped against the policies
	WronglyDropped                     int // traces with an error that are not kept, whatever happened to them
	Split                              int // traces with spans in Tempo and spans not, or with two decisions
	Leaked                             int // in Tempo without a recorded decision to keep, or against the policies; points and records that nobody sent
	Misordered                         int // points and records that came behind a later one of their instance
	Duplicates                         int // deliveries of an item that was there
	Refused                            int // requests that were told to come again
	Faults                             int
	WorstRecovery                      time.Duration
	Unaccounted                        int     // acknowledged items of which the hub's tallies do not know what has become
	SlowHandOvers                      bool    // a stopped process did not give its lanes back
	Missing                            bool    // a signal of which nothing was acknowledged
	P99Ratio                           float64 // of the delays beside an instance in trouble to those of before, of the signal with the highest
	Slowed                             bool    // it is too high, where it is judged
	NoFlood                            bool    // that instance did not flood, where it is judged
}

func (s Summary) items() string {
	return fmt.Sprintf("acked=%d delivered=%d sampled_out=%d dead=%d poisoned=%d lost=%d wrongly_dropped=%d split=%d leaked=%d misordered=%d duplicates=%d",
		s.Acked, s.Delivered, s.SampledOut, s.Dead, s.Poisoned, s.Lost, s.WronglyDropped, s.Split, s.Leaked, s.Misordered, s.Duplicates)
}

func (s Summary) String() string {
	return fmt.Sprintf("%s unaccounted=%d refused=%d faults=%d worst_recovery=%.1fs p99_ratio=%.1f", s.items(), s.Unaccounted, s.Refused, s.Faults, s.WorstRecovery.Seconds(), s.P99Ratio)
}

// add adds what came of another signal's items.
func (s *Summary) add(o Summary) {
	s.Acked += o.Acked
	s.Delivered += o.Delivered
	s.SampledOut += o.SampledOut
	s.Dead += o.Dead
	s.Poisoned += o.Poisoned
	s.Cursed += o.Cursed
	s.Lost += o.Lost
	s.WronglyDropped += o.WronglyDropped
	s.Split += o.Split
	s.Leaked += o.Leaked
	s.Misordered += o.Misordered
	s.Duplicates += o.Duplicates
	s.Missing = s.Missing || o.Acked == 0
}

// Broken reports whether a promise was.
func (s Summary) Broken() bool {
	return s.Lost+s.WronglyDropped+s.Split+s.Leaked+s.Misordered+s.Dead+s.Unaccounted > 0 || s.Acked == 0 || s.Delivered == 0 || s.SampledOut == 0 || s.SlowHandOvers || s.Slowed || s.NoFlood || s.Missing || s.Poisoned != s.Cursed
}

// handOverBound is what no hand-over takes when pins are given back, and every one
// when they are not: a pin lives for 6 s. A busy machine may be slow once, not
// every time.
const handOverBound = 5 * time.Second

type verdict struct {
	kept, dropped, rescued bool
	from                   uint64 // where its spans begin in SPANS, if they can bring it back
}

// judge compares.
func (w *world) judge(ctx context.Context) (Summary, error) {
	all := Summary{Faults: w.faults, Refused: int(w.journal.refused.Load())}
	w.judgeRecovery(&all)
	w.judgeNeighbours(&all)
	conn, err := w.connect(ctx)
	if err != nil {
		return all, err
	}
	defer conn.Close()
	decisions, err := w.decisions(ctx, conn)
	if err != nil {
		return all, err
	}
	spans, others, err := w.deadLetters(ctx, conn)
	if err != nil {
		return all, err
	}
	traces := w.judgeTraces(decisions, spans)
	w.say("traces: %s", traces.items())
	all.add(traces)
	for _, sig := range []otlpwire.Signal{otlpwire.Metrics, otlpwire.Logs} {
		of, came := Summary{}, w.arrived(sig)
		for _, q := range w.journal.sequences {
			if q.sig == sig {
				of.add(q.judge(came[q.instance], w.say))
				delete(came, q.instance)
			}
		}
		for instance, n := range came {
			of.Leaked += len(n)
			w.say("leaked: %v of %q", sig, instance)
		}
		of.Dead, of.Poisoned = others[sig].dead, others[sig].poisoned
		of.Lost -= min(of.Lost, of.Dead+of.Poisoned)
		w.say("%v: %s", sig, of.items())
		all.add(of)
	}
	all.Unaccounted, err = w.unaccounted(ctx, conn, all.Acked)
	if err != nil {
		return all, err
	}
	w.say("%d outages of backends lasted until edges refused", w.filled)
	return all, nil
}

// unaccounted asks what `penstock audit` says: nothing is in flight, no message is missing, and what the
// hub has acknowledged adds up, and is all that the edges have, or more: an edge may have acknowledged what its
// sender then sent again.
func (w *world) unaccounted(ctx context.Context, conn *bus.Conn, acked int) (n int, err error) {
	var report audit.Report
	if err := daemon.Until(ctx, time.Minute, func() error {
		if report, err = audit.Read(ctx, conn, time.Now(), 0, io.Discard); err != nil {
			return err
		}
		for _, l := range report.Ledger {
			if l.InFlight > 0 {
				return fmt.Errorf("in flight: %+v", l)
			}
		}
		return nil
	}); err != nil {
		return 0, err
	}
	for _, l := range report.Ledger {
		w.say("ledger: %s %s %s acked=%d ended=%v difference=%d missing=%d %v", l.Instance, l.Signal, l.Backend, l.Acked, l.Ended, l.Difference, l.Missing, l.NotCounted)
		n += int(max(l.Difference, -l.Difference)) + int(l.Missing)
		acked -= int(l.Acked)
	}
	return n + max(acked, 0), nil
}

// judgeTraces compares what became of spans with what was acknowledged, decided and right.
func (w *world) judgeTraces(decisions map[[16]byte]verdict, dead map[uint64]string) (s Summary) {
	stored := map[uint64]int{}
	inTempo := map[[16]byte]bool{}
	for _, sp := range w.tempo.Spans() {
		n := binary.BigEndian.Uint64(sp.Span.GetSpanId())
		if stored[n]++; stored[n] > 1 {
			s.Duplicates++
		}
		inTempo[[16]byte(sp.Span.GetTraceId())] = true
	}
	w.journal.mu.Lock()
	defer w.journal.mu.Unlock()
	checked, rescued, gone := 0, 0, 0
	for id, t := range w.journal.traces {
		d := decisions[id]
		here := 0
		for _, n := range t.ackedIDs {
			s.Acked++
			switch {
			case stored[n] > 0:
				here++
				s.Delivered++
			case dead[n] == ledger.DeadPoison:
				s.Poisoned++
			case dead[n] != "":
				s.Dead++
			case d.dropped:
				s.SampledOut++
			default:
				s.Lost++
				w.say("lost: span %d of %x, sent %v", n, id, t.sent.Sub(w.start))
			}
		}
		if here > 0 && here < len(t.ackedIDs) && d.rescued && w.gone(t, d.from) {
			gone++ // counted as incomplete
		} else if here > 0 && here < len(t.ackedIDs) || d.kept && d.dropped && !d.rescued {
			s.Split++
			w.say("split: %x, %d of %d spans, decisions %+v, sent %v", id, here, len(t.ackedIDs), d, t.sent.Sub(w.start))
		}
		if inTempo[id] && !d.kept {
			s.Leaked += max(here, 1)
			w.say("leaked: %x has no recorded decision to keep, sent %v", id, t.sent.Sub(w.start))
		}
		if d.rescued {
			rescued++
		}
		if len(t.ackedIDs) < t.spans {
			continue
		}
		if t.failing && here == 0 && w.gone(t, d.from) {
			gone++
		} else if t.failing && here == 0 {
			s.WronglyDropped++
			w.say("wrongly dropped: %x has an error, sent %v", id, t.sent.Sub(w.start))
		}
		if !w.calm(t) {
			continue
		}
		switch checked++; {
		case t.kept() && here == 0:
			s.Lost += len(t.ackedIDs)
			w.say("lost: %x was dropped against the policies, sent %v", id, t.sent.Sub(w.start))
		case !t.kept() && here > 0:
			s.Leaked += here
			w.say("leaked: %x was kept against the policies, sent %v", id, t.sent.Sub(w.start))
		}
	}
	w.say("%d traces, the decisions of %d compared with the policies, %d brought back by late errors, %d not because a full SPANS had to let their spans go", len(w.journal.traces), checked, rescued, gone)
	return s
}

// calm reports whether the window of a trace was one on which edge and hub agree:
// all its spans came within it, and nothing was wrong with the way to the hub.
func (w *world) calm(t *trace) bool {
	const margin = 500 * time.Millisecond
	if t.answered.Sub(t.sent) > wait-margin || t.sent.Before(w.steady) {
		return false
	}
	if t.several && !w.apart.IsZero() && t.answered.Add(wait+2*time.Second).After(w.apart) {
		return false // whoever takes a partition over does not know at once how far clocks are apart
	}
	disturbed := w.disturbed
	if !t.several {
		disturbed = append(slices.Clone(disturbed), w.noisy.unsteady)
	}
	return !slices.ContainsFunc(disturbed, func(i interval) bool {
		return t.sent.Before(i.to) && t.answered.Add(wait+2*time.Second).After(i.from)
	})
}

func (w *world) judgeRecovery(s *Summary) {
	kinds := map[string][]time.Duration{}
	var handOvers []time.Duration
	for _, r := range w.recovery {
		kinds[r.what] = append(kinds[r.what], r.took)
		s.WorstRecovery = max(s.WorstRecovery, r.took)
		if r.planned {
			handOvers = append(handOvers, r.took)
		}
	}
	for _, what := range slices.Sorted(maps.Keys(kinds)) {
		took := kinds[what]
		slices.Sort(took)
		w.say("%-16s %2d times, owned again after %.1f to %.1f s", what, len(took), took[0].Seconds(), took[len(took)-1].Seconds())
	}
	if slices.Sort(handOvers); len(handOvers) > 1 && handOvers[len(handOvers)/2] > handOverBound {
		s.SlowHandOvers = true
		w.say("hand-overs take %.1f s: pins are not given back", handOvers[len(handOvers)/2].Seconds())
	}
}

// decisions reads DECISIONS to its end.
func (w *world) decisions(ctx context.Context, conn *bus.Conn) (map[[16]byte]verdict, error) {
	all := map[[16]byte]verdict{}
	for p := range partitions {
		mark := bus.Message{Subject: bus.DecisionsSubject(p), Header: envelope.Header{ContentType: envelope.ContentTypeDecisions, Arrival: 1}}
		_, err := conn.TakeJournal(ctx, bus.Decisions, mark, func(body []byte) error {
			of, err := envelope.ReadDecisions(body)
			for _, d := range of {
				v := all[d.TraceID]
				v.kept, v.dropped, v.rescued = v.kept || d.Kept, v.dropped || !d.Kept, v.rescued || d.Late != envelope.OnTime
				v.from = max(v.from, d.From)
				all[d.TraceID] = v
			}
			if _, is, _ := envelope.ReadSources(body); is {
				err = nil
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// letters are how many items of a signal are dead.
type letters struct{ dead, poisoned int }

// deadLetters reads DEADLETTER: the reasons by the spans' IDs, and how many items there are of the other signals.
// A sink that was killed may have left the same letter twice.
func (w *world) deadLetters(ctx context.Context, conn *bus.Conn) (spans map[uint64]string, others map[otlpwire.Signal]letters, err error) {
	spans, others = map[uint64]string{}, map[otlpwire.Signal]letters{}
	seen := map[string]bool{}
	err = conn.Letters(ctx, "", "", true, func(l bus.Letter) bool {
		w.say("dead: %d %s of %s: %s, %s", l.Items, l.Signal, l.Instance, l.Reason, l.Detail)
		if l.Signal == otlpwire.Traces.String() {
			for item := range otlpwire.Items(l.Body) {
				var sp otlpwire.Span
				sp.Parse(item)
				spans[binary.BigEndian.Uint64(sp.SpanID[:])] = l.Reason
			}
			return true
		}
		for _, sig := range otlpwire.Signals {
			if key := l.Signal + l.Reason + string(l.Body); sig.String() == l.Signal && !seen[key] {
				seen[key] = true
				of := others[sig]
				if l.Reason == ledger.DeadPoison {
					of.poisoned += l.Items
				} else {
					of.dead += l.Items
				}
				others[sig] = of
			}
		}
		return true
	})
	return spans, others, err
}
