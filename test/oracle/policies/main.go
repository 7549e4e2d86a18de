// Command policies compares which traces penstock's sampling policies keep with which the
// collector's tail_sampling processor keeps: the traces of pkg/sampling/policy's tests and
// generated ones, with every type of policy alone, in others and beside others. It prints
// every trace that only one of the two keeps, unless that is meant (differences.go). And it compares what penstock keeps of a
// trace that comes at once with what its sampler keeps when the spans come through three edges (edges.go).
//
//	policies -traces 10000 -seed 1
//
// The processor needs other versions than the product does and runs as a process of its
// own, bench/tailsampling, which is built there anyway.
package main

import (
	"flag"
	"fmt"
	"os"
)

func main() {
	n := flag.Int("traces", 10_000, "how many traces are generated, in addition to those of the tests")
	seed := flag.Uint64("seed", 1, "of the generator")
	peer := flag.String("peer", "../../bench/tailsampling", "`directory` of the module with the processor")
	tests := flag.String("testdata", "../../pkg/sampling/policy/testdata/41-traces.json", "`file` of the tests' traces")
	flag.Parse()
	c, err := run(*n, *seed, *peer, *tests, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "policies:", err)
		os.Exit(1)
	}
	fmt.Printf("over three edges compared %d kept sets differing %d\n", c.edges.compared, c.edges.differing)
	fmt.Printf("policies compared %d kept sets differing %d\n", c.compared, c.differing)
	if c.differing+c.edges.differing > 0 {
		os.Exit(1)
	}
}
