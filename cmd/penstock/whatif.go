package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"text/tabwriter"
	"time"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/pkg/sampling/whatif"
)

const whatifUsage = `Usage: penstock whatif --policies FILE --from T [--to T] [flags]

Shows what other sampling policies would keep of the traces in the hub's stream, compared
with what the running ones keep. Nothing is sent; the work is done in this process.

The running policies are the versions that penstock policies push has pushed to the hub,
and before the first of them those of the sinks' configuration, which the sinks publish in
the hub; --running names a file to use instead.

Examples:
  penstock whatif --policies new.yaml --from -1h
  penstock whatif --policies new.yaml --running sampling.yaml --from -24h --instance 'shop-*'

Flags:
`

func whatIf(args []string) int {
	fs := flag.NewFlagSet("penstock whatif", flag.ContinueOnError)
	var (
		hub           hubFlags
		span          rangeFlags
		file, running string
		memory        = config.Bytes(1 << 30)
	)
	span.add(fs)
	fs.StringVar(&file, "policies", "", "the tail_sampling configuration to try, a `file`")
	fs.StringVar(&running, "running", "", "the `file` that the sinks had as sampling.file; default: what they publish in the hub")
	fs.TextVar(&memory, "memory", memory, "how many `bytes` of spans may be held for decisions")
	hub.add(fs, "whatif")
	fs.Usage = hub.help(whatifUsage)
	if err := app.Parse(fs, args); err != nil {
		return parseExit(err)
	}
	switch {
	case file == "":
		return missing("whatif", "--policies is not set: want a file with the tail_sampling configuration to try")
	case span.from == "":
		return missing("whatif", "--from is not set: want the beginning of the range, such as --from -2h")
	case fs.NArg() > 0:
		return missing("whatif", fmt.Sprintf("unexpected argument %q", fs.Arg(0)))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	r, err := span.request(time.Now())
	r.Signals = []string{otlpwire.Traces.String()}
	var rules [2]whatif.Rules // running, proposed
	if err == nil {
		rules[1].Base, err = policy.LoadFile(file)
	}
	if err == nil && running != "" {
		rules[0].Base, err = policy.LoadFile(running)
	}
	if err == nil {
		err = compare(ctx, &hub, r, rules, int(memory))
	}
	if err != nil {
		return failed("whatif", err)
	}
	return 0
}

// keepAllWait is how long a sink without policies waits.
const keepAllWait = 2 * time.Second

// compare reads the range and prints the comparison.
func compare(ctx context.Context, hub *hubFlags, r replay.Request, rules [2]whatif.Rules, memory int) error {
	conn, err := hub.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	records, err := versions.All(ctx, conn, hub.top, unreadable)
	if err != nil {
		return err
	}
	partitions, err := conn.Partitions(ctx)
	if err != nil {
		return err
	}
	for _, v := range records {
		if v.Number == 0 {
			if rules[0].Base == nil {
				if rules[0].Base, err = baseOf(v); err != nil {
					return err
				}
			}
			rules[0].Base.Settings, rules[1].Base.Settings = v.Settings, v.Settings
			continue
		}
		set, err := policy.Parse(fmt.Sprintf("policies version %d", v.Number), []byte(v.Text))
		if err != nil {
			return err
		}
		set.Settings = rules[1].Base.Settings
		set.Partitions = partitions
		rules[0].Versions = append(rules[0].Versions, policy.Version{Number: v.Number, From: v.Traces, Set: set})
	}
	if rules[0].Base == nil {
		fmt.Println("no sink has published its policies in the hub: compared with keeping every trace; --running names a file")
		rules[0].Base = policy.KeepAll(keepAllWait)
	}
	grouping, err := versions.AllDomains(ctx, conn, hub.top, unreadable)
	if err != nil {
		return err
	}
	plan, err := replay.MakePlan(ctx, conn, r, max(rules[0].Base.Wait, rules[1].Base.Wait), grouping, time.Now())
	if err != nil {
		return err
	}
	spans, err := conn.State(ctx, bus.Spans)
	if err != nil {
		return err
	}
	c := whatif.New(rules[0], rules[1], whatif.Range{In: r.In, Spread: partition.Spread{N: partitions, ByInstance: !spans.ByTrace}, Domains: grouping}, memory)
	m := newMeter(os.Stdout)
	for i, l := range plan.Lanes {
		err := readLane(ctx, conn, r, grouping, l, c, func(share float64) {
			m.show("reading " + bar((float64(i)+share)/float64(len(plan.Lanes))))
		})
		if err != nil {
			m.end()
			return err
		}
		c.Settle()
		m.show("reading " + bar(float64(i+1)/float64(len(plan.Lanes))))
	}
	m.end()
	return printComparison(os.Stdout, r, c.Finish())
}

// baseOf returns the policies of the sinks' own configuration.
func baseOf(v versions.Record) (*policy.Set, error) {
	set := policy.KeepAll(keepAllWait)
	if v.Text != "" {
		var err error
		if set, err = policy.Parse("the configuration of sink "+name(v.By), []byte(v.Text)); err != nil {
			return nil, err
		}
	}
	return set, nil
}

// readLane adds the messages of one partition to c.
func readLane(ctx context.Context, conn *bus.Conn, q replay.Request, grouping domain.Versions, l replay.Lane, c *whatif.Comparison, told func(float64)) error {
	reader, err := conn.OpenReaderOf(ctx, bus.ReaderConfig{Stream: bus.Stream(otlpwire.Traces), From: l.First, Filters: l.Filters()})
	if err != nil {
		return err
	}
	defer reader.Close()
	var guard envelope.Guard
	var (
		n    int
		buf  []byte
		fail error
	)
	err = reader.Each(ctx, func(d bus.Delivery) bool {
		if d.Seq > l.Last {
			return false
		}
		if n++; n%256 == 0 {
			told(float64(d.Seq-l.First) / float64(l.Last-l.First+1))
		}
		if d.Err != nil || !q.Matches(d.Instance()) && !l.Shares(grouping, d.Instance()) {
			return true
		}
		body, err := envelope.Decompress(buf, d.Body, d.Header.Encoding)
		if err == nil {
			if d.Header.Encoding != "" {
				buf = body
			}
			body, _, err = guard.Open(otlpwire.Traces, d.Instance(), body)
		}
		if err != nil {
			return true // it is in DEADLETTER
		}
		if fail = c.Add(d.Seq, envelope.Frame{Instance: d.Instance(), Arrival: d.Header.Arrival, Seq: d.Seq, Source: envelope.SourceOf(d.Header.ID), Load: d.Header.Load, Payload: body}); fail == nil && c.Full() {
			fail = errors.New("more spans must be held for their decisions than --memory allows: increase it, or select fewer instances")
		}
		return fail == nil
	})
	return errors.Join(fail, err)
}

func printComparison(out *os.File, q replay.Request, r whatif.Result) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	percent := func(part, all int64) string {
		if all == 0 {
			return "-"
		}
		return fmt.Sprintf("%.2f %%", 100*float64(part)/float64(all))
	}
	row := func(name string, of, all whatif.Tally) string {
		return fmt.Sprintf("%s\t%s\t%d\t%d\t%s", name, percent(of.Traces, all.Traces), of.Traces, of.Spans, bytesText(of.Bytes))
	}
	fmt.Fprintf(out, "%s: %d traces, %d spans, %s\n\n", summary(q), r.Total.All.Traces, r.Total.All.Spans, bytesText(r.Total.All.Bytes))
	head := func(what string) {
		fmt.Fprintf(w, "%s\trunning keep\ttraces\tspans\tbytes\tthese keep\ttraces\tspans\tbytes\t\n", what)
	}
	both := func(name string, l whatif.Line, all whatif.Tally) {
		fmt.Fprintf(w, "%s%s\t\n", row(name, l.Running, all), row("", l.Proposed, all))
	}
	head("policy")
	for _, l := range r.Policies {
		both(name(l.Name), l, r.Total.All)
	}
	both("together", r.Total, r.Total.All)
	fmt.Fprintln(w, "\t\t\t\t\t\t\t\t\t")
	head("service")
	for _, l := range r.Services {
		both(name(l.Name), l, l.All)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(out)
	for _, l := range r.Lost {
		fmt.Fprintf(out, "kept by %s and not by these: %d traces", l.Policy, l.Traces)
		for _, e := range l.Examples {
			fmt.Fprintf(out, "  %s/%x", e.Instance, e.TraceID)
		}
		fmt.Fprintln(out)
	}
	if len(r.Lost) == 0 {
		fmt.Fprintln(out, "nothing that the running policies keep would be missing")
	}
	if late := r.Late; late.Running.Traces+late.Proposed.Traces > 0 {
		fmt.Fprintf(out, "brought back by late spans: %d traces by the running policies, %d by these; their spans are not in the table\n", late.Running.Traces, late.Proposed.Traces)
	}
	fmt.Fprintf(out, "kept by these and not by the running policies: %d traces\n", r.Gained)
	return nil
}
