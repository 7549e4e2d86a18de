package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// rounds is how often each of the two is measured, in turn; the best of each counts.
const rounds = 5

// compare runs this benchmark and that of an earlier revision in turn, each with its own sampler, and prints the ratio of
// what they use of the CPU for a span.
func compare(revision string) error {
	dir, err := os.MkdirTemp("", "bench-sampler-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	tree := filepath.Join(dir, "tree")
	if err := run("git", "worktree", "add", "--detach", tree, revision); err != nil {
		return err
	}
	defer func() { _ = run("git", "worktree", "remove", "--force", tree) }()
	bins := [2]string{filepath.Join(dir, "before"), filepath.Join(dir, "now")}
	for i, in := range []string{filepath.Join(tree, "bench"), "."} {
		if err := run("go", "build", "-C", in, "-o", bins[i], "./sampler"); err != nil {
			return err
		}
	}
	best := [2]map[string]float64{{}, {}}
	for range rounds {
		for i, bin := range bins {
			out, err := exec.Command(bin, "-peer", "").Output()
			if err != nil {
				return fmt.Errorf("%s: %w", bin, err)
			}
			for line := range strings.Lines(string(out)) {
				// policies, kept (a number and %), ns/span, spans/s, allocs/span, CPU ns/span
				f := strings.Fields(line)
				if len(f) < 7 || f[2] != "%" {
					continue
				}
				ns, err := strconv.ParseFloat(f[6], 64)
				if err != nil {
					return fmt.Errorf("%s printed %q", bin, line)
				}
				if was, there := best[i][f[0]]; !there || ns < was {
					best[i][f[0]] = ns
				}
			}
		}
	}
	fmt.Printf("policies  CPU ns/span at %s  now  ratio\n", revision)
	for _, policies := range []string{"1", "10", "50"} {
		was, now := best[0][policies], best[1][policies]
		if was == 0 || now == 0 {
			return fmt.Errorf("%s measures nothing with %s policies", revision, policies)
		}
		fmt.Printf("%8s  %*.0f  %.0f  %.2f\n", policies, len("CPU ns/span at ")+len(revision), was, now, now/was)
	}
	return nil
}

func run(name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return nil
}
