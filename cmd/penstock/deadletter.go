package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"path"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
)

const deadLetterUsage = `Usage: penstock deadletter list [filters] [flags]
       penstock deadletter show SEQ [flags]
       penstock deadletter resend [SEQ...] [filters] -config.file SINK.yaml [flags]
       penstock deadletter purge [SEQ...] [filters] [-yes] [flags]

Items that a backend has refused for good are kept in the stream DEADLETTER: only the items
that were refused, as they were sent, with the reason, the backend's error text, and the
message they came in.

list prints a summary and the newest ones. show prints one as OTLP/JSON. resend writes them
once more to the backend that refused them, after the cause has been removed: it uses the
configuration of the sinks, so run it where their backends can be reached. Letters that are
accepted are deleted, those that are refused again stay. purge deletes letters; without -yes
it asks first.

  penstock deadletter list -signal logs -reason too_large
  penstock deadletter resend -backend loki -config.file /etc/penstock/sink.yaml
  penstock deadletter purge -before 168h -yes

Flags:
`

// letterFilter selects dead letters.
type letterFilter struct {
	signal, instance, reason, backend string
	before                            config.Duration
	seqs                              map[uint64]bool // empty: all
}

func (f *letterFilter) add(fs *flag.FlagSet) {
	fs.StringVar(&f.signal, "signal", "", "traces, metrics or `logs`; default: all")
	fs.StringVar(&f.instance, "instance", "", "`name` of an instance or a glob such as 'shop-*'; default: all")
	fs.StringVar(&f.reason, "reason", "", "`reason`, such as refused, too_old, too_new, out_of_order, too_large, cardinality, unsupported or undecodable; default: all")
	fs.StringVar(&f.backend, "backend", "", "`name` of the backend that refused them; default: all")
	fs.Var(&f.before, "before", "only those that are older than this `duration`, such as 24h or 7d")
}

// parse reads the numbers after the command's verb.
func (f *letterFilter) parse(words []string) error {
	f.seqs = map[uint64]bool{}
	for _, w := range words {
		n, err := strconv.ParseUint(w, 10, 64)
		if err != nil || n == 0 {
			return fmt.Errorf("%q is not the number of a dead letter; penstock deadletter list shows the numbers", w)
		}
		f.seqs[n] = true
	}
	if f.signal != "" {
		if _, err := otlpwire.ParseSignal(f.signal); err != nil {
			return err
		}
	}
	if _, err := path.Match(f.instance, ""); err != nil {
		return fmt.Errorf("--instance %q is not a valid glob", f.instance)
	}
	return nil
}

// all reports whether the filter selects everything.
func (f *letterFilter) all() bool {
	return len(f.seqs) == 0 && f.signal+f.instance+f.reason+f.backend == "" && f.before == 0
}

func (f *letterFilter) matches(l bus.Letter, now time.Time) bool {
	of, _ := path.Match(f.instance, l.Instance)
	return (len(f.seqs) == 0 || f.seqs[l.Seq]) && (f.instance == "" || of) && (f.reason == "" || f.reason == l.Reason) &&
		(f.backend == "" || f.backend == l.Backend) && (f.before == 0 || l.At.Before(now.Add(-time.Duration(f.before))))
}

// letters calls visit with the letters that match.
func (f *letterFilter) letters(ctx context.Context, conn *bus.Conn, bodies bool, visit func(bus.Letter) bool) error {
	now := time.Now()
	return conn.Letters(ctx, f.signal, "", bodies, func(l bus.Letter) bool { return !f.matches(l, now) || visit(l) })
}

// deadLetters shows what backends have refused, sends it to them again, or deletes it.
func deadLetters(args []string) int {
	fs := flag.NewFlagSet("penstock deadletter", flag.ContinueOnError)
	var (
		hub    hubFlags
		filter letterFilter
		file   string
		most   int
		yes    bool
		raw    bool
	)
	filter.add(fs)
	fs.StringVar(&file, "config.file", "", "resend: `file` with the sinks' configuration; without it their environment alone (PROMETHEUS_URL and so on)")
	fs.IntVar(&most, "n", 20, "list: show the newest `n`; 0 for all")
	fs.BoolVar(&yes, "yes", false, "purge: do not ask")
	fs.BoolVar(&raw, "raw", false, "show: write the unchanged bytes, OTLP in protobuf")
	hub.add(fs, "deadletter")
	fs.Usage = hub.help(deadLetterUsage)
	words, err := words(fs, args)
	if err != nil {
		return parseExit(err)
	}
	if !choose("deadletter", words, map[string][]string{"list": {}, "show": {"SEQ, the number of a dead letter,"}, "resend": nil, "purge": nil}) {
		return 2
	}
	if err := filter.parse(words[1:]); err != nil {
		return failed("deadletter", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	conn, err := hub.dial()
	if err != nil {
		return failed("deadletter", err)
	}
	defer conn.Close()
	switch words[0] {
	case "list":
		err = listLetters(ctx, conn, &filter, most, os.Stdout)
	case "show":
		err = showLetter(ctx, conn, &filter, raw, os.Stdout)
	case "resend":
		err = resendLetters(ctx, conn, &filter, file, os.Stdout)
	case "purge":
		err = purgeLetters(ctx, conn, &filter, yes)
	}
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted; what is done so far stays done")
	}
	if err != nil {
		return failed("deadletter "+words[0], err)
	}
	return 0
}

// group sums up the letters that have the same cause.
type group struct {
	signal, backend, reason, instance string
}

type sum struct {
	letters, items int
	size           int64
	first, last    time.Time
}

func listLetters(ctx context.Context, conn *bus.Conn, f *letterFilter, most int, out io.Writer) error {
	groups := map[group]*sum{}
	var young []bus.Letter
	n := 0
	if err := f.letters(ctx, conn, false, func(l bus.Letter) bool {
		g := group{l.Signal, l.Backend, l.Reason, l.Instance}
		s := groups[g]
		if s == nil {
			s = &sum{first: l.At}
			groups[g] = s
		}
		s.letters, s.items, s.size, s.last = s.letters+1, s.items+l.Items, s.size+int64(l.Size), l.At
		if young = append(young, l); most > 0 && len(young) > 2*most {
			young = append(young[:0], young[len(young)-most:]...)
		}
		n++
		return true
	}); err != nil {
		return err
	}
	if n == 0 {
		fmt.Fprintln(out, "no dead letters")
		return nil
	}
	keys := make([]group, 0, len(groups))
	for g := range groups {
		keys = append(keys, g)
	}
	slices.SortFunc(keys, func(a, b group) int {
		return cmp.Or(cmp.Compare(a.signal, b.signal), cmp.Compare(a.backend, b.backend), cmp.Compare(a.reason, b.reason), cmp.Compare(a.instance, b.instance))
	})
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "SIGNAL\tBACKEND\tREASON\tINSTANCE\tLETTERS\tITEMS\tSIZE\tFIRST\tLAST")
	for _, g := range keys {
		s := groups[g]
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d\t%s\t%s\t%s\n", g.signal, name(g.backend), name(g.reason), name(g.instance), s.letters, s.items, bytesText(s.size), s.first.UTC().Format(time.RFC3339), s.last.UTC().Format(time.RFC3339))
	}
	if most > 0 && len(young) > most {
		young = young[len(young)-most:]
	}
	fmt.Fprintln(w)
	fmt.Fprintln(w, "SEQ\tAT\tSIGNAL\tINSTANCE\tITEMS\tFROM\tREASON\tBACKEND'S WORDS")
	for _, l := range young {
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", l.Seq, l.At.UTC().Format(time.RFC3339), l.Signal, name(l.Instance), l.Items, name(l.Source), name(l.Reason), line(l.Detail, 160))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if n > len(young) {
		fmt.Fprintf(out, "the newest %d of %d; -n 0 shows all\n", len(young), n)
	}
	return nil
}

// line makes foreign text safe for a terminal, cut to most bytes.
func line(s string, most int) string {
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strings.Trim(strconv.QuoteToASCII(s), `"`)
}

func showLetter(ctx context.Context, conn *bus.Conn, f *letterFilter, raw bool, out io.Writer) error {
	var found *bus.Letter
	if err := f.letters(ctx, conn, true, func(l bus.Letter) bool {
		found = &l
		return false
	}); err != nil {
		return err
	}
	if found == nil {
		return errors.New("there is no dead letter with that number; penstock deadletter list shows the numbers")
	}
	l := *found
	if raw {
		_, err := out.Write(l.Body)
		return err
	}
	fmt.Fprintf(out, "number    %d\nstored    %s\nsignal    %s\ninstance  %s\nitems     %d\nbackend   %s\nreason    %s\nfrom      %s\nwords     %s\n\n",
		l.Seq, l.At.UTC().Format(time.RFC3339), l.Signal, name(l.Instance), l.Items, name(l.Backend), name(l.Reason), name(l.Source), line(l.Detail, 600))
	sig, err := otlpwire.ParseSignal(l.Signal)
	if err == nil && l.Err == nil {
		_, err = otlpwire.Scan(sig, l.Body, otlpwire.DefaultLimits)
	}
	if err = errors.Join(err, l.Err); err != nil {
		return fmt.Errorf("its %d bytes are not valid OTLP (%w); -raw writes them unchanged", len(l.Body), err)
	}
	var tree any
	if err := json.Unmarshal(otlpwire.AppendJSON(nil, sig, l.Body), &tree); err != nil {
		return err
	}
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(tree); err != nil {
		return err
	}
	_, err = out.Write(escaped(text.Bytes()))
	return err
}

// escaped writes runes that a terminal would interpret as JSON escapes: they occur only within strings.
func escaped(text []byte) []byte {
	var b []byte
	for _, r := range string(text) {
		if obeyed(r) && r <= 0xffff {
			b = fmt.Appendf(b, `\u%04x`, r)
		} else if !obeyed(r) {
			b = utf8.AppendRune(b, r)
		}
	}
	return b
}

// openWriters opens the sinks' writers, by signal and name.
func openWriters(file string) (sink.Writers, error) {
	cfg := sink.DefaultConfig()
	if file != "" {
		if err := config.LoadFile(file, &cfg); err != nil {
			return sink.Writers{}, err
		}
	}
	cfg.ApplyEnv(os.Getenv)
	return cfg.Writers()
}

const backendVariables = "TEMPO_ENDPOINT, PROMETHEUS_URL or LOKI_URL"

func resendLetters(ctx context.Context, conn *bus.Conn, f *letterFilter, file string, out io.Writer) error {
	writers, err := openWriters(file)
	if err != nil {
		return err
	}
	defer func() { _ = writers.Close() }()
	r := newResending(writers, out)
	m := newMeter(os.Stderr)
	defer m.end()
	var failure error
	err = f.letters(ctx, conn, true, func(l bus.Letter) bool {
		sig, w, why := r.addressee(l)
		if why != "" {
			r.passed[why]++
			return true
		}
		refused, goOn := r.write(ctx, sig, w, l)
		if !goOn {
			return false
		}
		if refused > 0 {
			r.again++
			return true
		}
		r.taken++
		m.show(fmt.Sprintf("%d accepted, %d refused again", r.taken, r.again))
		failure = conn.DropLetter(ctx, l.Seq)
		return failure == nil
	})
	if err = cmp.Or(failure, err, ctx.Err()); err != nil {
		err = fmt.Errorf("after %d were accepted: %w", r.taken, err)
	}
	skipped := r.summary()
	if r.taken > 0 {
		err = errors.Join(err, recordLetters(ctx, conn, "resend", f, r.taken))
	}
	switch {
	case err == nil && r.again > 0:
		err = fmt.Errorf("%d were refused again", r.again)
	case err == nil && skipped > 0:
		err = fmt.Errorf("%d were skipped", skipped)
	}
	return err
}

// resending brings dead letters to the backends that refused them.
type resending struct {
	writers      map[string]backend.Writer // by signal and name
	out          io.Writer
	log          *slog.Logger
	taken, again int
	passed       map[string]int // why, how many
}

func newResending(writers sink.Writers, out io.Writer) *resending {
	r := &resending{
		writers: map[string]backend.Writer{}, passed: map[string]int{},
		out: out, log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	for _, sig := range otlpwire.Signals {
		for _, w := range writers[sig] {
			r.writers[sig.String()+" "+w.Name()] = backend.Session(w)
		}
	}
	return r
}

// addressee returns the backend that refused a letter, or why it is skipped.
func (r *resending) addressee(l bus.Letter) (sig otlpwire.Signal, w backend.Writer, why string) {
	const noOTLP = "they are not valid OTLP, which no backend accepts"
	if l.Reason == ledger.DeadUndecodable {
		return sig, nil, noOTLP
	}
	if w = r.writers[l.Signal+" "+l.Backend]; w == nil {
		return sig, nil, fmt.Sprintf("this configuration has no backend %s for %s; set it with -config.file or %s", name(l.Backend), l.Signal, backendVariables)
	}
	sig, err := otlpwire.ParseSignal(l.Signal)
	if err == nil {
		_, err = otlpwire.Scan(sig, l.Body, otlpwire.DefaultLimits)
	}
	if err != nil || l.Err != nil {
		return sig, nil, noOTLP
	}
	return sig, w, ""
}

// write brings a letter to a backend, and returns how many of its items are refused again.
func (r *resending) write(ctx context.Context, sig otlpwire.Signal, w backend.Writer, l bus.Letter) (refused int, goOn bool) {
	d := backend.Deliverer{
		Signal: sig, Writer: w, Log: r.log, Delivered: func(int) {}, Paused: func(bool) {},
		Deduplicated: func(items int) { // or it has something newer: who knows
			refused += items
			fmt.Fprintf(r.out, "%d is refused again, %s: the backend has something newer, or the same\n", l.Seq, ledger.DeadOutOfOrder)
		},
		GiveUp: func(_ context.Context, _ string, payload []byte, reason string, why error) bool {
			refused += otlpwire.Count(sig, payload)
			fmt.Fprintf(r.out, "%d is refused again, %s: %s\n", l.Seq, reason, line(why.Error(), 300))
			return true
		},
	}
	if sig == otlpwire.Logs { // a line without a time has that one; what was ahead of its time need not be by now
		d.Arrival = l.Arrival
	}
	goOn = d.Write(ctx, l.Instance, l.Body, otlpwire.Count(sig, l.Body), false)
	return refused, goOn
}

// summary prints what was done, and returns how many were skipped.
func (r *resending) summary() (skipped int) {
	for _, why := range slices.Sorted(maps.Keys(r.passed)) {
		fmt.Fprintf(r.out, "%d are skipped: %s\n", r.passed[why], why)
		skipped += r.passed[why]
	}
	fmt.Fprintf(r.out, "%d dead letters were accepted and deleted, %d refused again, %d skipped\n", r.taken, r.again, skipped)
	return skipped
}

func purgeLetters(ctx context.Context, conn *bus.Conn, f *letterFilter, yes bool) error {
	var seqs []uint64
	items := 0
	if err := f.letters(ctx, conn, false, func(l bus.Letter) bool {
		seqs, items = append(seqs, l.Seq), items+l.Items
		return true
	}); err != nil {
		return err
	}
	if len(seqs) == 0 {
		fmt.Println("no dead letters")
		return nil
	}
	if !yes {
		what := ""
		if f.all() {
			what = "all "
		}
		if !confirmed("delete %s%d dead letters with %d items for good", what, len(seqs), items) {
			return errors.New("nothing was deleted; -yes does not ask")
		}
	}
	m := newMeter(os.Stderr)
	defer m.end()
	done := 0
	var err error
	for _, seq := range seqs {
		if err = conn.DropLetter(ctx, seq); err != nil {
			break
		}
		done++
		m.show(fmt.Sprintf("%d of %d deleted", done, len(seqs)))
	}
	fmt.Printf("%d dead letters were deleted\n", done)
	if done > 0 {
		err = errors.Join(err, recordLetters(ctx, conn, "purge", f, done))
	}
	return err
}

// recordLetters writes an audit entry about an operation.
func recordLetters(ctx context.Context, conn *bus.Conn, what string, f *letterFilter, n int) error {
	entry, _ := json.Marshal(map[string]any{ // cannot fail
		"at": time.Now().UTC(), "by": caller(), "what": "deadletter " + what, "letters": n,
		"signal": f.signal, "instance": f.instance, "reason": f.reason, "backend": f.backend,
	})
	if err := conn.Record(context.WithoutCancel(ctx), "deadletter."+what, entry); err != nil {
		return fmt.Errorf("operation succeeded; audit entry not written: %w", err)
	}
	return nil
}
