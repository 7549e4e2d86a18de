package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"os/user"
	"text/tabwriter"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/sink/policy"
)

const policiesUsage = `Usage: penstock policies push FILE [flags]
       penstock policies list [flags]
       penstock policies show VERSION [flags]

push checks a file with the collector's tail_sampling configuration and makes it
the next version: all sinks judge by it the traces that begin from now on, without
a restart. Traces that have begun before stay with the version before. list and
show tell what there is.

Flags:
`

// policies puts sampling policies into the hub, and shows them.
func policies(args []string) int {
	fs := flag.NewFlagSet("penstock policies", flag.ContinueOnError)
	cfg := bus.Config{URL: os.Getenv("HUB_URL"), Creds: os.Getenv("HUB_CREDS"), Name: "policies"}
	if cfg.URL == "" {
		cfg.URL = "nats://127.0.0.1:4222"
	}
	top := bus.DefaultTopology()
	fs.StringVar(&cfg.URL, "hub", cfg.URL, "`URL` of the hub; default: HUB_URL")
	fs.StringVar(&cfg.Creds, "creds", cfg.Creds, "`file` with a NATS credential; default: HUB_CREDS")
	fs.IntVar(&top.Replicas, "replicas", top.Replicas, "replicas of the bucket, when it is not there yet")
	fs.Usage = func() { fmt.Fprint(fs.Output(), policiesUsage); fs.PrintDefaults() }
	// The command and its argument stand before the flags.
	var words []string
	for len(args) > 0 && len(args[0]) > 0 && args[0][0] != '-' {
		words, args = append(words, args[0]), args[1:]
	}
	if err := fs.Parse(args); err != nil {
		return parseExit(err)
	}
	words = append(words, fs.Args()...)
	want := map[string]int{"push": 2, "list": 1, "show": 2}
	if len(words) == 0 || want[words[0]] != len(words) {
		fs.Usage()
		return 2
	}
	if err := runPolicies(cfg, top, words); err != nil {
		fmt.Fprintf(os.Stderr, "penstock policies: %v\n", err)
		return 1
	}
	return 0
}

func runPolicies(cfg bus.Config, top bus.Topology, words []string) error {
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
	conn, err := bus.Dial(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer conn.Close()
	if words[0] == "push" {
		by := os.Getenv("USER")
		if u, err := user.Current(); err == nil {
			by = u.Username
		}
		p, err := conn.PushPolicies(ctx, top, string(text), by)
		if err == nil {
			fmt.Printf("version %d is in force for traces from message %d of SPANS on\n", p.Number, p.From)
		}
		return err
	}
	all, err := conn.AllPolicies(ctx, top)
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
		return fmt.Errorf("there is no version %s; penstock policies list shows those there are", words[1])
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "VERSION\tFROM\tAT\tBY")
	for _, p := range all {
		fmt.Fprintf(w, "%d\t%d\t%s\t%s\n", p.Number, p.From, p.At.Format(time.RFC3339), p.By)
	}
	if len(all) == 0 {
		fmt.Fprintln(w, "0\t0\t\tthe sinks' configuration")
	}
	return w.Flush()
}
