package main

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/ptrace"
	w3c "go.opentelemetry.io/otel/trace"

	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// trace is one, and what differences.go asks about it.
type trace struct {
	name    string
	id      otlpwire.TraceID
	td      ptrace.Traces
	payload []byte // with every span, for the collector
	own     []byte // with every span once, as penstock's sampler hands it to the policies

	spans, distinct        int
	startsAtZero, badState bool
}

func newTrace(name string, td ptrace.Traces) *trace {
	t := &trace{name: name, td: td, payload: marshal(td)}
	once := ptrace.NewTraces()
	td.CopyTo(once)
	for _, rs := range once.ResourceSpans().All() {
		for _, ss := range rs.ScopeSpans().All() {
			seen := map[string]bool{}
			ss.Spans().RemoveIf(func(sp ptrace.Span) bool {
				t.look(sp)
				key := string(bytesOf(sp))
				if seen[key] {
					return true
				}
				seen[key] = true
				t.distinct++
				return false
			})
		}
	}
	t.own = marshal(once)
	return t
}

func (t *trace) look(sp ptrace.Span) {
	t.id = otlpwire.TraceID(sp.TraceID())
	t.spans++
	t.startsAtZero = t.startsAtZero || sp.StartTimestamp() == 0
	if _, err := w3c.ParseTraceState(sp.TraceState().AsRaw()); err != nil {
		t.badState = true
	}
}

func bytesOf(sp ptrace.Span) []byte {
	td := ptrace.NewTraces()
	sp.CopyTo(td.ResourceSpans().AppendEmpty().ScopeSpans().AppendEmpty().Spans().AppendEmpty())
	return marshal(td)
}

func marshal(td ptrace.Traces) []byte {
	b, err := new(ptrace.ProtoMarshaler).MarshalTraces(td)
	if err != nil {
		panic("BUG: " + err.Error())
	}
	return b
}

// onResource reports whether a resource has the key with such a value.
func (t *trace) onResource(key string, is func(pcommon.Value) bool) bool {
	for _, rs := range t.td.ResourceSpans().All() {
		if v, ok := rs.Resource().Attributes().Get(key); ok && is(v) {
			return true
		}
	}
	return false
}

// has reports whether a resource or a span has the key with such a value.
func (t *trace) has(key string, is func(pcommon.Value) bool) bool {
	if t.onResource(key, is) {
		return true
	}
	for sp := range spansOf(t.td) {
		if v, ok := sp.Attributes().Get(key); ok && is(v) {
			return true
		}
	}
	return false
}

func spansOf(td ptrace.Traces) iter.Seq[ptrace.Span] {
	return func(yield func(ptrace.Span) bool) {
		for _, rs := range td.ResourceSpans().All() {
			for _, ss := range rs.ScopeSpans().All() {
				for _, sp := range ss.Spans().All() {
					if !yield(sp) {
						return
					}
				}
			}
		}
	}
}

// edited returns a copy that edit has changed.
func (t *trace) edited(edit func(ptrace.Traces)) *trace {
	td := ptrace.NewTraces()
	t.td.CopyTo(td)
	edit(td)
	return newTrace(t.name, td)
}

// with returns a copy in which the values of the key that are such have been changed.
func (t *trace) with(key string, is func(pcommon.Value) bool, change func(pcommon.Value)) *trace {
	one := func(m pcommon.Map) {
		if v, ok := m.Get(key); ok && is(v) {
			change(v)
		}
	}
	return t.edited(func(td ptrace.Traces) {
		for _, rs := range td.ResourceSpans().All() {
			one(rs.Resource().Attributes())
		}
		for sp := range spansOf(td) {
			one(sp.Attributes())
		}
	})
}

// run compares all sets over all traces, and writes what differs to out.
func run(n int, seed uint64, peer, tests string, out io.Writer) (*comparison, error) {
	traces, err := corpus(tests, n, seed)
	if err != nil {
		return nil, err
	}
	all := leaves()
	configurations := sets(all, rand.New(rand.NewPCG(seed, 3)), 150)
	theirs, err := ask(peer, traces, configurations)
	if err != nil {
		return nil, err
	}
	c := &comparison{traces: traces, leaves: all, differs: make([]map[int]bool, len(all)), out: out}
	if c.edges, err = newEdges(traces, rand.New(rand.NewPCG(seed, 4))); err != nil {
		return nil, err
	}
	for i, s := range configurations {
		if err := c.compare(i, s, theirs[i]); err != nil {
			return nil, err
		}
	}
	for _, d := range meant {
		fmt.Fprintf(out, "%6d meant: %s\n", d.seen, d.why)
	}
	for _, why := range unseen() {
		c.differing++
		fmt.Fprintln(out, "never seen:", why)
	}
	return c, nil
}

// comparison is how far run has come.
type comparison struct {
	traces              []*trace
	leaves              []leaf
	differs             []map[int]bool // by leaf, on which traces
	out                 io.Writer
	compared, differing int
	edges               *edges
	told                int
}

// compare compares the kept set of one configuration. The first ones are the leaves, each
// alone.
func (c *comparison) compare(place int, s set, theirs map[int]bool) error {
	own, err := policy.Parse("set", []byte(s.text))
	if err != nil {
		return fmt.Errorf("%s: %w", s.text, err)
	}
	c.compared++
	alone := place < len(c.leaves)
	if alone {
		c.differs[place] = map[int]bool{}
	}
	same := true
	for i, t := range c.traces {
		if s.only != "" && s.only != t.name {
			continue
		}
		ours := t.kept(own)
		if ours == theirs[i] {
			continue
		}
		if alone {
			c.differs[place][i] = true
		}
		if c.isMeant(s, alone, i, theirs[i]) {
			continue
		}
		same = false
		if c.told++; c.told <= 20 {
			fmt.Fprintf(c.out, "%s\n  keeps trace %d (%x): penstock %v, collector %v\n  %s\n", s.text, i, t.id, ours, theirs[i], otlpwire.AppendJSON(nil, otlpwire.Traces, t.payload))
		}
	}
	if !same {
		c.differing++
	}
	return c.edges.compare(c, s, own)
}

// isMeant reports whether a difference on a trace is meant, and counts which.
func (c *comparison) isMeant(s set, alone bool, i int, theirs bool) bool {
	t := c.traces[i]
	if s.meant != nil {
		s.meant(t)
		return true
	}
	if !alone {
		return slices.ContainsFunc(s.leaves, func(l int) bool { return c.differs[l][i] })
	}
	l := c.leaves[s.leaves[0]]
	for _, d := range meant {
		if d.applies(l, t) && (d.reads == nil || decided(d.reads(l, t)) == theirs) {
			d.seen++
			return true
		}
	}
	return false
}

// kept is what penstock decides.
func (t *trace) kept(by *policy.Set) bool {
	pt := policy.Trace{ID: t.id, Spans: t.distinct, Payload: t.own}
	return by.Decide(&pt, &policy.Budgets{}).Keep
}

// parsed are the policies of decided.
var parsed = map[string]*policy.Set{}

func decided(l leaf, t *trace) bool {
	by, known := parsed[l.body]
	if !known {
		var err error
		if by, err = policy.Parse("leaf", []byte(l.alone())); err != nil {
			panic("BUG: " + err.Error())
		}
		parsed[l.body] = by
	}
	return t.kept(by)
}

// ask returns which traces the collector keeps, by configuration.
func ask(peer string, traces []*trace, configurations []set) ([]map[int]bool, error) {
	dir, err := os.MkdirTemp("", "policies")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	var requests []byte
	for _, t := range traces {
		requests = append(binary.BigEndian.AppendUint32(requests, uint32(len(t.payload))), t.payload...)
	}
	type question struct {
		Policies string
		Only     []int
	}
	questions := make([]question, len(configurations))
	for i, s := range configurations {
		questions[i].Policies = s.text
		for n, t := range traces {
			if s.only != "" && s.only == t.name {
				questions[i].Only = append(questions[i].Only, n)
			}
		}
	}
	text, err := json.Marshal(questions)
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{"requests": requests, "sets": text}
	args := []string{"run", "."}
	for name, b := range files {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			return nil, err
		}
		args = append(args, "-"+name, path)
	}
	cmd := exec.Command("go", args...)
	cmd.Dir, cmd.Stderr = peer, os.Stderr
	answer, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("the collector's processor: %w", err)
	}
	var kept [][]int
	if err := json.Unmarshal(answer, &kept); err != nil || len(kept) != len(configurations) {
		return nil, fmt.Errorf("%d answers for %d questions: %w", len(kept), len(configurations), err)
	}
	out := make([]map[int]bool, len(kept))
	for i, k := range kept {
		out[i] = map[int]bool{}
		for _, n := range k {
			out[i][n] = true
		}
	}
	return out, nil
}
