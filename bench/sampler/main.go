// Command sampler measures the sampler alone: spans a second and allocations a
// span at 1, 10 and 50 policies, beside the collector's tail_sampling processor on
// the same requests with the same policies; and the memory that a held span takes
// beside its bytes on the wire.
//
// With -before REVISION it compares this sampler with that of an earlier revision (before.go).
package main

import (
	"encoding/binary"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/penstock/penstock/bench/internal/load"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/sampler"
)

const perFrame = 512 // spans of one message of an edge, in traces of 8

func main() {
	spans := flag.Int("spans", 200_000, "spans a measurement")
	attrs := flag.Int("attrs", 10, "attributes a span")
	peer := flag.String("peer", "tailsampling", "`directory` of the module with the collector's processor; empty for none")
	revision := flag.String("before", "", "a `revision` of this repository to compare with, instead of with the collector")
	flag.Parse()
	if *revision != "" {
		if err := compare(*revision); err != nil {
			fmt.Fprintln(os.Stderr, "sampler:", err)
			os.Exit(1)
		}
		return
	}

	frames := make([][]byte, max(*spans/perFrame, 1))
	wire := 0
	for i := range frames {
		frames[i] = load.Seeded(uint64(i+1), otlpwire.Traces, perFrame, *attrs)
		wire += len(frames[i])
	}
	n := float64(len(frames) * perFrame)
	fmt.Printf("%s, %d spans of %.0f bytes in traces of 8\n\n", runtime.Version(), len(frames)*perFrame, float64(wire)/n)

	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "policies\tkept\tns/span\tspans/s\tallocs/span\tCPU ns/span\ttail_sampling: with decoding\talone\tkept\t")
	for _, count := range []int{1, 10, 50} {
		var before, after runtime.MemStats
		s := sampler.New(policies(count, "5s"), 1<<40, 0)
		runtime.GC()
		runtime.ReadMemStats(&before)
		start, used := time.Now(), cpu()
		kept := feed(s, frames)
		took, ours := time.Since(start), float64(cpu()-used)/n
		runtime.ReadMemStats(&after)
		fmt.Fprintf(w, "%d\t%.0f %%\t%.0f\t%.0f\t%.2f\t%.0f\t", count, float64(kept)/n*100, float64(took.Nanoseconds())/n, n/took.Seconds(), float64(after.Mallocs-before.Mallocs)/n, ours)
		if *peer != "" {
			theirs, err := measurePeer(*peer, frames, count)
			if err != nil {
				fmt.Fprintln(os.Stderr, "sampler: tail_sampling is left out:", err)
				os.Exit(1)
			}
			fmt.Fprintf(w, "%.0f (%.1fx)\t%.0f (%.1fx)\t%.0f %%\t", theirs[0], theirs[0]/ours, theirs[1], theirs[1]/ours, theirs[2]*100)
		}
		fmt.Fprintln(w)
	}
	_ = w.Flush()

	// Nothing is decided: what is held is everything.
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	s := sampler.New(policies(1, "1h"), 1<<40, 0)
	feed(s, frames)
	runtime.GC()
	runtime.ReadMemStats(&after)
	runtime.KeepAlive(frames) // they are in before, too
	traces, held := s.Held()
	heap := float64(after.HeapAlloc) - float64(before.HeapAlloc)
	fmt.Printf("\nheld: %d traces, counted as %d bytes, %.0f bytes of heap: %.2f times the wire bytes, %.0f bytes a span\n", traces, held, heap, heap/float64(wire), heap/n)
}

// feed sends a frame every 100 ms of stream time and returns the spans exported.
func feed(s *sampler.Sampler, frames [][]byte) (kept int) {
	at := time.Unix(1_790_000_000, 0)
	for i, f := range frames {
		at = at.Add(100 * time.Millisecond)
		out, err := s.Add(uint64(i+1), envelope.Frame{Instance: "as-1", Arrival: at.UnixNano(), Payload: f})
		if err != nil {
			panic(err) // BUG: the requests are sound
		}
		for _, e := range out.Exports {
			kept += e.Spans
			s.Release(e.Seq)
		}
	}
	return kept
}

// cpu is what this process has used, of all its threads.
func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// measurePeer runs the collector's processor on the same frames: CPU nanoseconds a
// span with decoding and without, and the share kept.
func measurePeer(module string, frames [][]byte, policies int) (result [3]float64, err error) {
	dir, err := os.MkdirTemp("", "bench-sampler-")
	if err != nil {
		return result, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	var requests []byte
	for _, f := range frames {
		requests = append(binary.BigEndian.AppendUint32(requests, uint32(len(f))), f...)
	}
	files := map[string][]byte{"requests": requests, "policies": []byte(load.Policies(policies, "1s") + fmt.Sprintf("num_traces: %d\n", len(frames)*perFrame))}
	args := []string{"run", "-C", module, "."}
	for name, body := range files {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, body, 0o600); err != nil {
			return result, err
		}
		args = append(args, "-"+name, path)
	}
	cmd := exec.Command("go", args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err == nil {
		_, err = fmt.Sscan(string(out), &result[0], &result[1], &result[2])
	}
	return result, err
}

// policies are one for slow traces and more that look for attributes nobody has.
func policies(n int, wait string) *policy.Set {
	set, err := policy.Parse("bench", []byte(load.Policies(n, wait)))
	if err != nil {
		panic(err) // BUG: the text is sound
	}
	return set
}
