package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/penstock/penstock/pkg/audit"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/tally"
)

const auditUsage = `Usage: penstock audit [-since 24h] [-o json] [flags]

Shows what has become of the items that the hub has acknowledged, by instance, signal and backend:

  acked + rescued = delivered + sampled_out + filtered + dead + dropped + aside + unrecorded + in flight

Rescued are spans that were sampled out, and then delivered with a trace that a late span has brought
back. Routers and sinks count this for each lane, across restarts. Items are unrecorded if their owner
was killed before it stored its last counts: they were finished, but the outcome is unknown. A
difference is items that a lane has finished without an outcome: they are lost. Missing messages
are gaps in the numbers that edges give their messages: a spool or the hub has lost them.

Then it lists what a backend does not have: items in flight to each backend, items set aside for a
backend that refuses the instance, dead letters, and losses. While data flows, some items in flight are
already at the backend; an idle pipeline shows none.

Losses come from the stream AUDIT, where keepers record them: messages that were purged or deleted before
they were delivered, messages that the hub lost, abandoned lanes, and dead letters deleted because
DEADLETTER was full. The exit code is 1 when there is a loss, a difference or a missing message.

  penstock audit
  penstock audit -since 7d -o json

Flags:
`

// auditHub shows what has become of everything.
func auditHub(args []string) int {
	fs := flag.NewFlagSet("penstock audit", flag.ContinueOnError)
	var (
		hub    hubFlags
		format string
		since  config.Duration
	)
	fs.StringVar(&format, "o", "text", "`format`, text or json")
	fs.Var(&since, "since", "show only losses and missing messages of the last `duration`, such as 24h or 7d; default: all that are recorded")
	hub.add(fs, "audit")
	fs.Usage = hub.help(auditUsage)
	words, err := words(fs, args)
	if err != nil {
		return parseExit(err)
	}
	if len(words) > 0 {
		return missing("audit", fmt.Sprintf("unexpected argument %q", strings.Join(words, " ")))
	}
	if format != "text" && format != "json" {
		return missing("audit", fmt.Sprintf("-o is %q, want text or json", format))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	conn, err := hub.dial()
	if err != nil {
		return failed("audit", err)
	}
	defer conn.Close()
	report, err := audit.Read(ctx, conn, time.Now(), time.Duration(since), os.Stderr)
	if err == nil {
		err = printAudit(report, format, os.Stdout)
	}
	switch {
	case err != nil:
		return failed("audit", err)
	case report.Wrong():
		return 1
	}
	return 0
}

func printAudit(r audit.Report, format string, out io.Writer) error {
	if format == "json" {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	printLedger(w, r.Ledger)
	for _, part := range []struct {
		title string
		lines []audit.Line
	}{{"IN FLIGHT", r.InFlight}, {"DEAD LETTERS", r.DeadLetters}} {
		fmt.Fprintf(w, "%s\tSIGNAL\tBACKEND\tITEMS\tMESSAGES\tOLDEST\n", part.title)
		for _, l := range part.lines {
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%s\n", l.Instance, l.Signal, l.Backend, l.Items, l.Messages, time.Since(l.Oldest).Truncate(time.Second))
		}
		if len(part.lines) == 0 {
			fmt.Fprintln(w, "none")
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w, "LOST\tSTREAM\tMESSAGES\tBECAUSE\tOF")
	for _, l := range r.Losses {
		of := l.Lanes
		if of == nil {
			of = l.Items
		}
		var whose []string
		for name, n := range of {
			whose = append(whose, fmt.Sprintf("%s=%d", name, n))
		}
		slices.Sort(whose)
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\n", l.At.Format(time.RFC3339), l.Stream, l.Messages, l.Because, strings.Join(whose, " "))
	}
	if len(r.Losses) == 0 {
		fmt.Fprintln(w, "no losses recorded")
	}
	return w.Flush()
}

// printLedger prints the lines, with the outcomes that occur.
func printLedger(w io.Writer, lines []audit.Balance) {
	var columns []tally.Outcome
	for what := tally.Delivered; what <= tally.Unrecorded; what++ {
		if slices.ContainsFunc(lines, func(l audit.Balance) bool { return l.Ended[what] > 0 }) {
			columns = append(columns, what)
		}
	}
	rescued := slices.ContainsFunc(lines, func(l audit.Balance) bool { return l.Rescued > 0 })
	fmt.Fprint(w, "LEDGER\tSIGNAL\tBACKEND\tACKED")
	if rescued {
		fmt.Fprint(w, "\tRESCUED")
	}
	for _, what := range columns {
		fmt.Fprintf(w, "\t%s", strings.ToUpper(what.String()))
	}
	fmt.Fprintln(w, "\tIN FLIGHT\tDIFFERENCE\tMISSING MESSAGES")
	for _, l := range lines {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d", l.Instance, l.Signal, l.Backend, l.Acked)
		if rescued {
			fmt.Fprintf(w, "\t%d", l.Rescued)
		}
		for _, what := range columns {
			fmt.Fprintf(w, "\t%d", l.Ended[what])
		}
		fmt.Fprintf(w, "\t%d\t%d\t%d\n", l.InFlight, l.Difference, l.Missing)
		for _, b := range l.NotCounted {
			fmt.Fprintf(w, "  not counted, %s: %s\n", b.At.Format(time.RFC3339), b.Because)
		}
	}
	if len(lines) == 0 {
		fmt.Fprintln(w, "nothing counted yet")
	}
	fmt.Fprintln(w)
}
