// Command wire compares penstock's work on OTLP bytes with the collector's
// pdata and with the generated Go protobuf code.
//
// All sides run alternately in one process, round by round, so that a noisy
// machine troubles all of them; the shortest round counts.
//
//	preflight        otlpwire.Scan; against decoding
//	stamp            identity into every resource; against decode, set, encode
//	preflight+stamp  what a door does; against the same
//	split            by trace ID over 64 partitions; against decode, move, encode
//	read             what a sampler reads of every span; against decode and read
//
// pdata and the generated code decode first whatever they do. penstock checks
// once, at the door, so that preflight and stamp belong together there; what
// comes over the bus is checked once more by the router.
//
// The plain side is a loop over tags and lengths that descends into
// every message and checks nothing: a limit for any code that looks at all bytes.
package main

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/penstock/penstock/bench/internal/load"
	"github.com/penstock/penstock/pkg/otlpwire"
)

func main() {
	rounds := flag.Int("rounds", 9, "rounds of each side; the shortest counts")
	slice := flag.Duration("round", 30*time.Millisecond, "length of a round")
	only := flag.Int("spans", 0, "measure requests of this many spans only; 0 for 1, 64, 512 and 8192")
	flag.Parse()

	sizes := []int{1, 64, 512, 8192}
	if *only != 0 {
		sizes = []int{*only}
	}
	fmt.Printf("%s, %d CPUs, %d rounds of %v a side, alternately\n\n", runtime.Version(), runtime.NumCPU(), *rounds, *slice)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "signal\titems\tattrs\tbytes\toperation\tside\tns/item\tMB/s\tallocs/op\ttimes penstock's\t")
	summary := map[string]float64{} // the lowest ratio at 512 spans, by operation and side
	row := func(sig otlpwire.Signal, n, attrs int) {
		payload := load.Request(sig, n, attrs)
		for _, op := range operations(sig, payload) {
			times, allocs := measure(op.sides, *rounds, *slice)
			for i, s := range op.sides {
				ratio := times[i] / times[0]
				mark := fmt.Sprintf("%.1fx", ratio)
				if i == 0 {
					mark = ""
				}
				fmt.Fprintf(w, "%v\t%d\t%d\t%d\t%s\t%s\t%.1f\t%.0f\t%.0f\t%s\t\n", sig, n, attrs, len(payload), op.name, s.name, times[i]/float64(n), float64(len(payload))*1e3/times[i], allocs[i], mark)
				if sig == otlpwire.Traces && n == 512 && i > 0 {
					key := op.name + " " + s.name
					if old, seen := summary[key]; !seen || ratio < old {
						summary[key] = ratio
					}
				}
			}
		}
		_ = w.Flush()
	}
	for _, n := range sizes {
		for _, attrs := range []int{3, 30} {
			row(otlpwire.Traces, n, attrs)
		}
	}
	if *only == 0 {
		row(otlpwire.Metrics, 512, 3)
		row(otlpwire.Logs, 512, 3)
	}
	if len(summary) > 0 {
		var parts []string
		for _, op := range []string{"stamp", "split", "read"} {
			parts = append(parts, fmt.Sprintf("%s %.1fx", op, summary[op+" pdata"]))
		}
		fmt.Println("\nAt 512 spans, the lower of 3 and 30 attributes a span:")
		fmt.Printf("preflight+stamp: %.1fx pdata's stamp; a plain scan of tags and lengths takes %.2f times as long\n", summary["preflight+stamp pdata"], summary["preflight+stamp plain"])
		fmt.Println("wire vs pdata:", strings.Join(parts, " "))
	}
}

// operation is one piece of work and those who do it, penstock first.
type operation struct {
	name  string
	sides []side
}

type side struct {
	name string
	run  func()
}

// measure returns the shortest time of one call in ns, and the allocations of
// one call in steady state, by side.
func measure(sides []side, rounds int, round time.Duration) (ns, allocs []float64) {
	ns, allocs = make([]float64, len(sides)), make([]float64, len(sides))
	calls := make([]int, len(sides))
	for i, s := range sides {
		s.run() // grow what is pooled
		start := time.Now()
		s.run()
		calls[i] = max(1, int(round/max(time.Since(start), 1)))
		allocs[i] = allocations(s.run)
	}
	best := make([][]float64, len(sides))
	for range rounds {
		for i, s := range sides {
			start := time.Now()
			for range calls[i] {
				s.run()
			}
			best[i] = append(best[i], float64(time.Since(start).Nanoseconds())/float64(calls[i]))
		}
	}
	for i := range sides {
		ns[i] = slices.Min(best[i])
	}
	return ns, allocs
}

// allocations counts those of one call, the collector off.
func allocations(run func()) float64 {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	const calls = 5
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range calls {
		run()
	}
	runtime.ReadMemStats(&after)
	return float64((after.Mallocs - before.Mallocs) / calls)
}
