package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

const replayUsage = `Usage: penstock replay --from T [--to T] [flags]
       penstock replay list
       penstock replay status ID
       penstock replay stop ID | resume ID | remove ID

Sends a range of the data in the hub's streams to the backends again. It files a
job; the sinks do the work, and continue when this command ends: Ctrl-C leaves the job
running. The same request twice is one job.

T is a time (2026-01-31T08:00:00Z), a time before now (-2h), now, or a sequence of
the signal's stream. A range selects by the arrival at the edge; a trace belongs to the
range in which its first span arrived, and is replayed whole. --to itself is not in the
range, if it is a time.

Traces are decided again as they were: the same policies keep the same traces.
--policies uses other policies, --no-sampling none. Before the first item every
backend is asked whether it accepts data of that age.

Examples:
  penstock replay --from -2h --instance shop-berlin
  penstock replay --from 2026-01-31T08:00:00Z --to 2026-01-31T09:00:00Z --signal logs --dry-run
  penstock replay --from -24h --signal traces --policies second-chance.yaml --rate 5MB/s

Flags:
`

// list is a flag that may be given several times, or with several values separated by commas.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

func (l *list) Set(text string) error {
	for v := range strings.SplitSeq(text, ",") {
		if v = strings.TrimSpace(v); v != "" {
			*l = append(*l, v)
		}
	}
	return nil
}

// rate is a flag in bytes a second, such as 20MB/s.
type rate config.Bytes

func (r *rate) String() string { return rateText(int64(*r)) }

func (r *rate) Set(text string) error {
	return (*config.Bytes)(r).UnmarshalText([]byte(strings.TrimSuffix(text, "/s")))
}

// defaultRate leaves room for live traffic on small machines.
const defaultRate = rate(20e6)

// rangeFlags select a range of the past.
type rangeFlags struct {
	from, to  string
	late      config.Duration
	instances list
}

func (f *rangeFlags) add(fs *flag.FlagSet) {
	fs.StringVar(&f.from, "from", "", "where the range begins, `T`")
	fs.StringVar(&f.to, "to", "now", "where it ends, `T`")
	fs.Var(&f.late, "late", "how long after --to the hub may have received what belongs to the range, from edges that were disconnected; 0: read to the end of the stream")
	fs.Var(&f.instances, "instance", "`name` of an instance or a glob such as 'shop-*'; several times or with commas; default: all")
}

func (f *rangeFlags) request(now time.Time) (r replay.Request, err error) {
	var errs [2]error
	r.From, errs[0] = replay.ParsePoint(f.from, now)
	r.To, errs[1] = replay.ParsePoint(f.to, now)
	if f.to == "now" && r.From.Seq > 0 {
		r.To = replay.Point{Seq: 1<<63 - 1}
	}
	r.Instances, r.Late = f.instances, time.Duration(f.late)
	return r, errors.Join(errs[0], errs[1])
}

// replayFlags say what is asked for, and how it is done.
type replayFlags struct {
	span       rangeFlags
	signals    list
	backends   list
	cap        rate
	file       string
	noSampling bool
	acceptLoss bool
	dryRun     bool
	detach     bool
	as         string
}

func (f *replayFlags) add(fs *flag.FlagSet) {
	f.cap = defaultRate
	f.span.add(fs)
	fs.Var(&f.signals, "signal", "traces, metrics or logs, with commas; default: all")
	fs.Var(&f.backends, "backend", "`name` of the backend to replay to, where there are several (tempo, prometheus, loki, file); an error if the sinks have none of that name")
	fs.Var(&f.cap, "rate", "how many `bytes` of messages, as stored, are read a second; 0: as fast as live traffic allows")
	fs.StringVar(&f.file, "policies", "", "decide by the tail_sampling configuration in this `file`, not by the policies in force at that time")
	fs.BoolVar(&f.noSampling, "no-sampling", false, "send every span of the range")
	fs.BoolVar(&f.acceptLoss, "accept-loss", false, "run the job although a backend says that it refuses data of that age")
	fs.BoolVar(&f.dryRun, "dry-run", false, "count the content of the range, and since when the hub has each instance's data; file nothing")
	fs.BoolVar(&f.detach, "detach", false, "file the job and do not wait")
	fs.StringVar(&f.as, "as", "", "`instance` of the credential, if it is not an operator's: the command then asks the sinks about that instance's jobs")
}

// confine asks for what concerns the instance of the credential, and takes answers where it
// may.
func (f *replayFlags) confine(hub *hubFlags) {
	if hub.given.InboxPrefix == "" {
		hub.given.InboxPrefix = "_INBOX_replay-" + f.as
	}
	if len(f.span.instances) == 0 {
		f.span.instances = list{f.as}
	}
}

// request returns what is asked for, or every mistake in it.
func (f *replayFlags) request(now time.Time) (replay.Request, error) {
	r, err := f.span.request(now)
	r.Signals, r.Backends, r.NoSampling = f.signals, f.backends, f.noSampling
	if len(r.Signals) == 0 {
		for _, sig := range otlpwire.Signals {
			r.Signals = append(r.Signals, sig.String())
		}
	}
	if f.file != "" {
		text, readErr := os.ReadFile(f.file)
		if readErr == nil {
			_, readErr = policy.Parse(f.file, text)
		}
		r.Policies, err = string(text), errors.Join(err, readErr)
	}
	return r, errors.Join(err, r.Validate())
}

func replays(args []string) int {
	fs := flag.NewFlagSet("penstock replay", flag.ContinueOnError)
	var (
		hub hubFlags
		f   replayFlags
	)
	f.add(fs)
	hub.add(fs, "replay")
	fs.Usage = hub.help(replayUsage)
	words, err := words(fs, args)
	if err != nil {
		return parseExit(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if f.as != "" {
		if f.dryRun {
			return missing("replay", "-dry-run reads telemetry, which a credential of one instance may not: leave it out")
		}
		f.confine(&hub)
	}
	c := &replayCommand{hub: &hub, as: f.as, out: os.Stdout}
	if len(words) > 0 {
		id := []string{"ID of a job, as penstock replay list shows it,"}
		if !choose("replay", words, map[string][]string{"list": {}, "status": id, "stop": id, "resume": id, "remove": id}) {
			return 2
		}
		if err := c.open(ctx, func() error { return c.about(ctx, words) }); err != nil {
			return failed("replay "+words[0], err)
		}
		return 0
	}
	if f.span.from == "" {
		return missing("replay", "--from is not set: want the beginning of the range, such as --from -2h")
	}
	now := time.Now()
	r, err := f.request(now)
	if err == nil {
		err = c.open(ctx, func() error {
			if f.dryRun {
				return c.count(ctx, r)
			}
			return c.file(ctx, &replay.Job{Request: r, Rate: int64(f.cap), AcceptLoss: f.acceptLoss}, f.detach, now)
		})
	}
	if err != nil {
		return failed("replay", err)
	}
	return 0
}

// file files a job, and follows it unless that is left to the sinks.
func (c *replayCommand) file(ctx context.Context, wanted *replay.Job, detach bool, now time.Time) error {
	job, filed, err := c.jobs.File(ctx, wanted, caller(), now)
	if err != nil {
		return err
	}
	if filed {
		fmt.Fprintf(c.out, "job %s: %s\n", job.ID, summary(wanted.Request))
	} else {
		fmt.Fprintf(c.out, "job %s exists already, filed by %s at %s\n", job.ID, name(job.By), job.At.Format(time.RFC3339))
	}
	if detach {
		return nil
	}
	err = c.follow(ctx, job.ID)
	if errors.Is(err, errRefused) && filed {
		err = errors.Join(err, c.jobs.Remove(ctx, job.ID, caller(), time.Now()))
	}
	return err
}

// errRefused is the error for a refused job, of which nothing was sent.
var errRefused = errors.New("refused, nothing was sent")

// summary describes a request in one line.
func summary(j replay.Request) string {
	who := "all instances"
	if len(j.Instances) > 0 {
		who = name(strings.Join(j.Instances, ", "))
	}
	how := ""
	switch {
	case j.NoSampling:
		how = ", without sampling"
	case j.Policies != "":
		how = ", with its own policies"
	}
	return fmt.Sprintf("%s of %s from %v to %v%s", strings.Join(j.Signals, ", "), who, j.From, j.To, how)
}

// replayCommand is a replay command with its connection.
type replayCommand struct {
	hub  *hubFlags
	as   string // the instance of the credential; empty for an operator's
	conn *bus.Conn
	jobs jobs
	out  *os.File
}

// jobs are the jobs in the hub's table, or those of one instance, through the sinks.
type jobs interface {
	File(ctx context.Context, j *replay.Job, by string, now time.Time) (job *replay.Job, filed bool, err error)
	Stop(ctx context.Context, id, by string, now time.Time) error
	Resume(ctx context.Context, id, by string, now time.Time) error
	Remove(ctx context.Context, id, by string, now time.Time) error
	Table(ctx context.Context) (*replay.Table, error)
	Status(ctx context.Context, id string) (replay.Status, error)
	Audit(ctx context.Context, id string) ([]replay.Entry, error)
}

func (c *replayCommand) open(ctx context.Context, do func() error) (err error) {
	if c.conn, err = c.hub.dial(); err != nil {
		return err
	}
	defer c.conn.Close()
	if c.as != "" {
		c.jobs, err = replay.OpenRemote(c.conn, c.as)
	} else {
		c.jobs, err = replay.Open(ctx, c.conn, c.hub.top)
	}
	if err != nil {
		return err
	}
	return do()
}

// about handles the actions on existing jobs.
func (c *replayCommand) about(ctx context.Context, words []string) error {
	now := time.Now()
	switch words[0] {
	case "stop":
		err := c.jobs.Stop(ctx, words[1], caller(), now)
		return c.said(err, "job %s is stopped and keeps its progress; penstock replay resume %s continues it\n", words[1], words[1])
	case "resume":
		if err := c.jobs.Resume(ctx, words[1], caller(), now); err != nil {
			return err
		}
		return c.follow(ctx, words[1])
	case "remove":
		err := c.jobs.Remove(ctx, words[1], caller(), now)
		return c.said(err, "job %s is removed; what it has delivered stays delivered\n", words[1])
	case "status":
		return c.status(ctx, words[1])
	}
	table, err := c.jobs.Table(ctx)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "JOB\tSTATE\tDONE\tDELIVERED\tBY\tFILED\tWHAT")
	for _, s := range table.Jobs() {
		sum, share := s.Sum("")
		fmt.Fprintf(w, "%s\t%s\t%.0f %%\t%d\t%s\t%s\t%s\n", s.ID, s.Phase(), 100*share, sum.Delivered, name(s.By), s.At.Format(time.RFC3339), summary(s.Request))
	}
	return w.Flush()
}

// said prints the result of an action.
func (c *replayCommand) said(err error, format string, args ...any) error {
	if err == nil {
		fmt.Fprintf(c.out, format, args...)
	}
	return err
}

// status prints everything about a job.
func (c *replayCommand) status(ctx context.Context, id string) error {
	s, err := c.jobs.Status(ctx, id)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.out, "job %s, %s: %s\nfiled by %s at %s, rate %s\n\n", s.ID, s.Phase(), summary(s.Request), name(s.By), s.At.Format(time.RFC3339), rateText(s.Rate))
	for _, why := range s.Refusals() {
		fmt.Fprintln(c.out, plain(why))
	}
	for _, sig := range s.Signals {
		if check, ok := s.Checks[sig]; ok && check.OK && check.Text != "" {
			fmt.Fprintf(c.out, "%s: %s\n", sig, check.Text)
		}
	}
	w := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "SIGNAL\tPARTITION\tDONE\tDELIVERED\tSAMPLED OUT\tNOT IN RANGE\tDEAD\tREAD\tSINK\tWAITS FOR")
	for _, l := range s.Lanes {
		share, _ := l.Share()
		fmt.Fprintf(w, "%s\t%d\t%.0f %%\t%d\t%d\t%d\t%d\t%s\t%s\t%s\n", l.Signal, l.Partition, 100*share, l.Delivered, l.SampledOut, l.Unchosen, l.Dead, bytesText(l.Bytes), name(l.Owner), plain(l.Wait))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if sum, _ := s.Sum(""); sum.Gone > 0 {
		fmt.Fprintf(c.out, "\n%d messages expired from the streams before they were replayed; some of them may have been in the range\n", sum.Gone)
	}
	entries, err := c.jobs.Audit(ctx, id)
	if err != nil {
		fmt.Fprintf(c.out, "\ncannot read its audit entries: %v\n", err)
		return nil
	}
	fmt.Fprintln(c.out)
	for _, e := range entries {
		fmt.Fprintf(c.out, "%s  %s  %s", e.At.Format(time.RFC3339), name(e.By), name(e.What))
		if e.Counts != nil {
			fmt.Fprintf(c.out, "  %s: %d delivered", name(e.Lane), e.Counts.Delivered)
		}
		fmt.Fprintln(c.out)
	}
	return nil
}

// name makes foreign text safe for a terminal.
func name(text string) string {
	const long = 64
	return strings.Trim(strconv.QuoteToASCII(text[:min(len(text), long)]), `"`)
}

// plain removes from a text the runes that a terminal would interpret.
func plain(text string) string {
	return strings.Map(func(r rune) rune {
		if obeyed(r) {
			return '?'
		}
		return r
	}, text)
}

// obeyed reports whether a terminal interprets a rune: control characters, and those that change the
// direction of writing.
func obeyed(r rune) bool {
	return unicode.Is(unicode.Cc, r) && r != '\n' && r != '\t' || unicode.Is(unicode.Cf, r)
}

// count prints the content of a range.
func (c *replayCommand) count(ctx context.Context, r replay.Request) error {
	plan, err := replay.MakePlan(ctx, c.conn, r, 0, nil, time.Now())
	if err != nil {
		return err
	}
	m := newMeter(c.out)
	counts, err := plan.Count(ctx, c.conn, r, func(share float64) { m.show(fmt.Sprintf("counting %s", bar(share))) })
	m.end()
	if err != nil {
		return err
	}
	fmt.Fprintf(c.out, "%s: nothing is filed. Spans are counted by the arrival of their message, before sampling.\n", summary(r))
	w := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "signal\tinstance\tmessages\titems\tstored\thas been kept since\t")
	for _, n := range counts {
		since, err := c.since(ctx, n.Signal, n.Instance)
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\t%s\t\n", n.Signal, name(n.Instance), n.Messages, n.Items, bytesText(n.Bytes), since)
	}
	return w.Flush()
}

// since says when the hub stored the first message that it still has of an instance: what came before cannot be replayed.
func (c *replayCommand) since(ctx context.Context, signal, instance string) (string, error) {
	subjects := "otlp." + signal + ".*." + instance // of all partitions
	seq, at, err := c.conn.First(ctx, bus.StreamOf(subjects), subjects, 1)
	if err != nil || seq == 0 {
		return "-", err
	}
	return at.UTC().Format(time.RFC3339), nil
}

const (
	followInterval = time.Second

	// patience is how long a job may have no sink before the command says so.
	patience = 15 * time.Second
)

// follow shows how far a job is until it has ended, and says what came of it.
func (c *replayCommand) follow(ctx context.Context, id string) error {
	m := newMeter(c.out)
	s, err := c.watch(ctx, id, m)
	m.end()
	switch {
	case err != nil && ctx.Err() != nil:
		fmt.Fprintf(c.out, "detached, the job continues: penstock replay status %s\n", id)
		return nil //nolint:nilerr // interrupted by the operator; the job runs in the sinks
	case err != nil:
		return err
	case s.Phase() == replay.Refused:
		hint := ""
		if s.Plan.Error == "" {
			hint = "\nchange that and try again, or run it with --accept-loss"
		}
		return fmt.Errorf("job %s is %w: %s%s", id, errRefused, plain(strings.Join(s.Refusals(), "; ")), hint)
	}
	sum, _ := s.Sum("")
	fmt.Fprintf(c.out, "job %s is %s: %d items delivered, %d spans sampled out, %d dead-lettered\n", id, s.Phase(), sum.Delivered, sum.SampledOut, sum.Dead)
	if sum.Gone > 0 {
		return fmt.Errorf("job %s: %d messages expired from the streams before they were replayed; some of them may have been in the range", id, sum.Gone)
	}
	return nil
}

// watch shows how far a job is, and returns how it ended.
func (c *replayCommand) watch(ctx context.Context, id string, m *meter) (replay.Status, error) {
	var p pace
	for {
		s, err := c.jobs.Status(ctx, id)
		if err = cmp.Or(ctx.Err(), err); err != nil {
			return s, err
		}
		p.begin(s)
		switch s.Phase() {
		case replay.Checking:
			line := "asking the backends whether they accept data of that age"
			if time.Since(p.started) > patience {
				line += "; is a sink running?"
			}
			m.show(line)
		case replay.Refused:
			return s, nil
		case replay.Done, replay.Stopped:
			m.show(p.line(s))
			return s, nil
		default:
			m.show(p.line(s))
		}
		backoff.Sleep(ctx, followInterval)
	}
}

// pace is how fast a job is, since its status was first seen.
type pace struct {
	started time.Time
	first   replay.Progress
	share   float64 // that was done then
}

func (p *pace) begin(s replay.Status) {
	if p.started.IsZero() {
		p.started = time.Now()
		p.first, p.share = s.Sum("")
	}
}

// line says how far a job is, and what it waits for.
func (p *pace) line(s replay.Status) string {
	sum, share := s.Sum("")
	took := time.Since(p.started).Seconds()
	line := fmt.Sprintf("%s  %d items  %.0f/s  %s", bar(share), sum.Delivered, float64(sum.Delivered-p.first.Delivered)/max(took, 1), rateText(int64(float64(sum.Bytes-p.first.Bytes)/max(took, 1))))
	if rest := (1 - share) / max(share-p.share, 1e-9) * took; s.Phase() == replay.Running && share > p.share {
		line += fmt.Sprintf("  %v left", time.Duration(rest*float64(time.Second)).Round(time.Second))
	}
	if s.Phase() == replay.Waiting {
		line += fmt.Sprintf("  (%d jobs run at a time)", replay.MaxRunning)
	}
	if wait := waits(s); wait != "" {
		line += "  (" + wait + ")"
	}
	for _, sig := range s.Signals { // the first to go where the terminal is narrow
		_, part := s.Sum(sig)
		line += fmt.Sprintf("  %s %.0f %%", sig, 100*part)
	}
	return line
}

// waits returns what the lanes of a job wait for.
func waits(s replay.Status) string {
	var all []string
	for _, l := range s.Lanes {
		if l.Wait != "" && !l.Done {
			all = append(all, plain(l.Wait))
		}
	}
	return strings.Join(slices.Compact(slices.Sorted(slices.Values(all))), "; ")
}

func bytesText(n int64) string {
	switch {
	case n >= 10e9:
		return fmt.Sprintf("%.0f GB", float64(n)/1e9)
	case n >= 10e6:
		return fmt.Sprintf("%.0f MB", float64(n)/1e6)
	case n >= 10e3:
		return fmt.Sprintf("%.0f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%d B", n)
}

func rateText(n int64) string {
	if n == 0 {
		return "0"
	}
	return bytesText(n) + "/s"
}
