package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"text/tabwriter"
	"time"

	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/versions"
)

const policiesUsage = `Usage: penstock policies push FILE [flags]
       penstock policies list [flags]
       penstock policies show VERSION [flags]

push checks a file with the collector's tail_sampling configuration and makes it
the next version: all sinks apply it to traces that begin from now on, without a
restart. Traces that began earlier stay with the previous version. list and show
print the versions.

Flags:
`

// policies pushes sampling policies to the hub, and shows them.
func policies(args []string) int {
	fs := flag.NewFlagSet("penstock policies", flag.ContinueOnError)
	var hub hubFlags
	hub.add(fs, "policies")
	fs.Usage = hub.help(policiesUsage)
	words, err := words(fs, args)
	if err != nil {
		return parseExit(err)
	}
	if !choose("policies", words, map[string][]string{"push": {"FILE"}, "list": {}, "show": {"VERSION"}}) {
		return 2
	}
	if err := runPolicies(&hub, words); err != nil {
		return failed("policies", err)
	}
	return 0
}

// unreadable reports a record of the hub that is skipped.
func unreadable(err error) { fmt.Fprintln(os.Stderr, "penstock: skipped:", err) }

func runPolicies(hub *hubFlags, words []string) error {
	var text []byte
	if words[0] == "push" {
		var err error
		if text, err = os.ReadFile(words[1]); err != nil {
			return err
		}
		if _, err := policy.Parse(words[1], text); err != nil {
			return err
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	conn, err := hub.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	if words[0] == "push" {
		p, err := versions.Push(ctx, conn, hub.top, string(text), caller(), unreadable)
		if err == nil {
			fmt.Printf("version %d is in force for traces from message %d of SPANS on\n", p.Number, p.From)
		}
		return err
	}
	all, err := versions.All(ctx, conn, hub.top, unreadable)
	if err != nil {
		return err
	}
	if words[0] == "show" {
		for _, p := range all {
			if fmt.Sprint(p.Number) == words[1] {
				fmt.Print(p.Text)
				return nil
			}
		}
		return fmt.Errorf("there is no version %s; penstock policies list shows the existing ones", words[1])
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "VERSION\tFROM\tAT\tBY")
	for _, p := range all {
		if p.Number == 0 {
			p.By = "the configuration of sink " + name(p.By)
		}
		fmt.Fprintf(w, "%d\t%d\t%s\t%s\n", p.Number, p.From, p.At.Format(time.RFC3339), p.By)
	}
	if len(all) == 0 {
		fmt.Fprintln(w, "0\t0\t\tthe sinks' configuration")
	}
	return w.Flush()
}
