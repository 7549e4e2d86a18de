// Command oracle compares penstock's metrics with those of Prometheus itself: the same
// generated OTLP requests go through Prometheus's translation and through
// remotewrite.Writer, whose requests are read with Prometheus's own types. It prints
// every series that differs in a label, sample, start time, histogram, exemplar or its metadata.
//
//	oracle -metrics 20000 -seed 1
//
// What is meant to differ stands in differences.go.
package main

import (
	"flag"
	"fmt"
	"os"
)

func main() {
	metrics := flag.Int("metrics", 20_000, "how many metrics are compared, over all strategies and both protocols")
	seed := flag.Uint64("seed", 1, "of the generator")
	flag.Parse()
	n, differ, err := compareMetrics(*metrics, *seed, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "oracle:", err)
		os.Exit(1)
	}
	fmt.Printf("metrics compared %d series differing %d\n", n, differ)
	if differ > 0 {
		os.Exit(1)
	}
}
