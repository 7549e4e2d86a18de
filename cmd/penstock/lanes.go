package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/penstock/penstock/pkg/bus"
)

const lanesUsage = `Usage: penstock lanes list [-o json] [flags]
       penstock lanes abandon STREAM/LANE [-yes] [flags]

Each backend, and each router, reads a partition of a stream through its own lane. The hub
keeps what a lane has not finished, for any length of time; a stream that is full of that
refuses more.

list shows how much that is, since when, and whether a process reads the lane. abandon
deletes the lane of a backend that was removed from the sinks' configuration, or renamed:
what the lane has not finished is lost for that backend. Without -yes it asks first; it
writes an entry to the stream AUDIT. A lane that is being read is not deleted.

  penstock lanes list
  penstock lanes abandon LOGS/loki-3

Flags:
`

// lanes shows what lanes are owed, or abandons a lane.
func lanes(args []string) int {
	fs := flag.NewFlagSet("penstock lanes", flag.ContinueOnError)
	var (
		hub    hubFlags
		format string
		yes    bool
	)
	fs.StringVar(&format, "o", "text", "list: `format`, text or json")
	fs.BoolVar(&yes, "yes", false, "abandon: do not ask")
	hub.add(fs, "lanes")
	fs.Usage = hub.help(lanesUsage)
	words, err := words(fs, args)
	if err != nil {
		return parseExit(err)
	}
	if !choose("lanes", words, map[string][]string{"list": {}, "abandon": {"STREAM/LANE"}}) {
		return 2
	}
	if format != "text" && format != "json" {
		return missing("lanes", fmt.Sprintf("-o is %q, want text or json", format))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute) // includes the time to answer the question
	defer cancel()
	conn, err := hub.dial()
	if err != nil {
		return failed("lanes", err)
	}
	defer conn.Close()
	if words[0] == "list" {
		err = listLanes(ctx, conn, format, os.Stdout)
	} else {
		err = abandonLane(ctx, conn, words[1], yes)
	}
	if err != nil {
		return failed("lanes", err)
	}
	return 0
}

// listLanes prints every lane.
func listLanes(ctx context.Context, conn *bus.Conn, format string, out io.Writer) error {
	all, err := conn.Lanes(ctx)
	if err != nil {
		return err
	}
	if format == "json" {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return enc.Encode(all)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "LANE\tFLOOR\tOWED\tOLDEST\tREAD")
	for _, l := range all {
		oldest, read := "", "yes"
		if !l.Oldest.IsZero() {
			oldest = time.Since(l.Oldest).Truncate(time.Second).String()
		}
		if !l.Read {
			read = "by nobody"
		}
		fmt.Fprintf(w, "%s/%s\t%d\t%d\t%s\t%s\n", l.Stream, l.Name, l.Done, l.Lag, oldest, read)
	}
	return w.Flush()
}

// abandonLane deletes a lane that no process reads.
func abandonLane(ctx context.Context, conn *bus.Conn, which string, yes bool) error {
	stream, name, _ := strings.Cut(which, "/")
	all, err := conn.Lanes(ctx)
	if err != nil {
		return err
	}
	var lane *bus.LaneState
	for i := range all {
		if all[i].Stream == stream && all[i].Name == name {
			lane = &all[i]
		}
	}
	switch {
	case lane == nil:
		return fmt.Errorf("there is no lane %q; penstock lanes list shows the existing ones, as STREAM/LANE", which)
	case lane.Read:
		return fmt.Errorf("lane %s is being read: remove its backend from the configuration of all sinks first", which)
	}
	if !yes {
		if !confirmed("abandon for good %d messages that lane %s has not finished", lane.Lag, which) {
			return errors.New("nothing was abandoned; -yes does not ask")
		}
	}
	if err := conn.DropLane(ctx, stream, name); err != nil {
		return err
	}
	fmt.Printf("lane %s was abandoned, with %d messages that it had not finished\n", which, lane.Lag)
	entry, _ := json.Marshal(map[string]any{ // cannot fail
		"at": time.Now().UTC(), "by": caller(), "what": "lanes abandon", "lane": which, "floor": lane.Done, "messages": lane.Lag,
	})
	if err := conn.Record(context.WithoutCancel(ctx), "lanes.abandon", entry); err != nil {
		return fmt.Errorf("operation succeeded; audit entry not written: %w", err)
	}
	return nil
}
