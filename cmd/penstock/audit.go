package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/keeper"
	"github.com/penstock/penstock/pkg/otlpwire"
)

const auditUsage = `Usage: penstock audit [-since 24h] [-o json] [flags]

Shows, by instance, what the hub has acknowledged and a backend does not have: items in
flight to each backend, items set aside for a backend that refuses the instance, dead
letters, and losses. While data flows, some items in flight are already at the backend; an
idle pipeline shows none.

Losses come from the stream AUDIT, where keepers record them: messages that were purged or deleted before
they were delivered, messages that the hub lost, abandoned lanes, and dead letters deleted because
DEADLETTER was full. The exit code is 1 when there is one.

  penstock audit
  penstock audit -since 7d -o json

Flags:
`

// audit shows what has not arrived.
func audit(args []string) int {
	fs := flag.NewFlagSet("penstock audit", flag.ContinueOnError)
	var (
		hub    hubFlags
		format string
		since  config.Duration
	)
	fs.StringVar(&format, "o", "text", "`format`, text or json")
	fs.Var(&since, "since", "show only losses of the last `duration`, such as 24h or 7d; default: all recorded losses")
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
	report, err := newAuditReport(ctx, conn, time.Now(), time.Duration(since), os.Stderr)
	if err == nil {
		err = report.print(format, os.Stdout)
	}
	switch {
	case err != nil:
		return failed("audit", err)
	case len(report.Losses) > 0:
		return 1
	}
	return 0
}

// auditReport is what -o json prints.
type auditReport struct {
	InFlight    []auditLine   `json:"in_flight"`
	DeadLetters []auditLine   `json:"dead_letters"`
	Losses      []keeper.Loss `json:"losses"`
}

// auditLine is the number of items of an instance at one place.
type auditLine struct {
	Instance string    `json:"instance"`
	Signal   string    `json:"signal"`
	Backend  string    `json:"backend"` // or router, for spans that are not in SPANS yet
	Items    uint64    `json:"items"`
	Messages uint64    `json:"messages"`
	Oldest   time.Time `json:"oldest"` // when the hub stored it
}

// tallies adds up lines.
type tallies map[auditLine]*auditLine

func (t tallies) add(instance, signal, backend string, items int, stored time.Time) {
	key := auditLine{Instance: instance, Signal: signal, Backend: backend}
	line := t[key]
	if line == nil {
		line = &auditLine{Instance: instance, Signal: signal, Backend: backend, Oldest: stored}
		t[key] = line
	}
	line.Items += uint64(max(items, 0))
	line.Messages++
	if stored.Before(line.Oldest) {
		line.Oldest = stored
	}
}

func (t tallies) lines() []auditLine {
	all := make([]auditLine, 0, len(t))
	for _, line := range t {
		all = append(all, *line)
	}
	slices.SortFunc(all, func(a, b auditLine) int {
		return cmp.Or(cmp.Compare(a.Instance, b.Instance), cmp.Compare(a.Signal, b.Signal), cmp.Compare(a.Backend, b.Backend))
	})
	return all
}

// newAuditReport reads the hub; it writes its progress to progress.
func newAuditReport(ctx context.Context, conn *bus.Conn, now time.Time, since time.Duration, progress io.Writer) (r auditReport, err error) {
	ends := map[string]uint64{} // messages after these are not read
	for _, stream := range []string{"TRACES", "METRICS", "LOGS", bus.Spans, bus.Aside, bus.DeadLetter} {
		state, err := conn.State(ctx, stream)
		if err != nil && !errors.Is(err, bus.ErrNoStream) {
			return r, err
		}
		ends[stream] = state.LastSeq
	}
	lanes, err := conn.Lanes(ctx)
	if err != nil {
		return r, err
	}
	ways := tallies{}
	for _, l := range lanes {
		if l.Lag == 0 {
			continue
		}
		if err := onTheWay(ctx, conn, l, ends[l.Stream], ways, progress); err != nil {
			return r, err
		}
	}
	if err := setAside(ctx, conn, ends[bus.Aside], ways); err != nil {
		return r, err
	}
	dead := tallies{}
	if err := conn.Letters(ctx, "", "", false, func(l bus.Letter) bool {
		if l.Seq > ends[bus.DeadLetter] {
			return false
		}
		dead.add(l.Instance, l.Signal, l.Backend, l.Items, l.At)
		return true
	}); err != nil {
		return r, err
	}
	losses, err := keeper.Losses(ctx, conn)
	if err != nil {
		return r, err
	}
	r.InFlight, r.DeadLetters, r.Losses = ways.lines(), dead.lines(), []keeper.Loss{}
	for _, l := range losses {
		if since == 0 || l.At.After(now.Add(-since)) {
			r.Losses = append(r.Losses, l)
		}
	}
	return r, nil
}

// onTheWay adds what a lane has not finished, up to a sequence.
func onTheWay(ctx context.Context, conn *bus.Conn, l bus.LaneState, end uint64, ways tallies, progress io.Writer) error {
	spans := l.Stream == bus.Spans
	cfg := bus.ReaderConfig{Stream: l.Stream, From: l.Done + 1, Headers: !spans}
	if l.Filter != "" {
		cfg.Filters = []string{l.Filter}
	}
	r, err := conn.OpenReaderOf(ctx, cfg)
	if err != nil {
		return err
	}
	defer r.Close()
	backend := bus.LaneBackend(l.Name)
	signal := strings.ToLower(l.Stream)
	if spans {
		signal = otlpwire.Traces.String()
	}
	said := time.Now()
	var buf []byte
	return r.Each(ctx, func(d bus.Delivery) bool {
		if d.Seq > end {
			return false
		}
		if time.Since(said) > 2*time.Second {
			said = time.Now()
			_, _ = fmt.Fprintf(progress, "%s/%s: %d messages left\n", l.Stream, l.Name, r.Left())
		}
		if !spans {
			ways.add(d.Instance(), signal, backend, max(d.Header.Items, 1), d.Stored)
			return true
		}
		d.Decompress(&buf)
		for body := d.Body; d.Err == nil && len(body) > 0; {
			var f envelope.Frame
			if f, body, d.Err = envelope.NextFrame(body); d.Err == nil {
				ways.add(f.Instance, signal, backend, otlpwire.Count(otlpwire.Traces, f.Payload), d.Stored)
			}
		}
		if d.Err != nil {
			ways.add("", signal, backend, 0, d.Stored) // unreadable
		}
		return true
	})
}

// setAside adds what waits in ASIDE, which hubs of older versions do not have.
func setAside(ctx context.Context, conn *bus.Conn, end uint64, ways tallies) error {
	if end == 0 {
		return nil
	}
	r, err := conn.OpenReaderOf(ctx, bus.ReaderConfig{Stream: bus.Aside, Headers: true})
	if err != nil {
		return err
	}
	defer r.Close()
	return r.Each(ctx, func(d bus.Delivery) bool {
		if d.Seq > end {
			return false
		}
		if tokens := strings.Split(d.Subject, "."); len(tokens) == 5 { // aside.<signal>.<backend>.<p>.<instance>
			ways.add(tokens[4], tokens[1], tokens[2]+", aside", d.Header.Items, d.Stored)
		}
		return true
	})
}

func (r auditReport) print(format string, out io.Writer) error {
	if format == "json" {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, part := range []struct {
		title string
		lines []auditLine
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
