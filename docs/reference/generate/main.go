// Command generate writes docs/reference: the configuration of every role, with
// keys and defaults from the structs and descriptions from their comments, and
// the metrics, from the registry. `make docs` runs it; its test fails when the
// files in the repository differ.
package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/allinone"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/router"
	"github.com/penstock/penstock/pkg/sink"
)

const module = "github.com/penstock/penstock/"

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: generate DIRECTORY")
		os.Exit(2)
	}
	for name, text := range pages(".") {
		if err := os.WriteFile(filepath.Join(os.Args[1], name), []byte(text), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

// pages returns every page by file name; root is the repository's root.
func pages(root string) map[string]string {
	return map[string]string{"configuration.md": configuration(root), "metrics.md": metrics()}
}

const generated = "<!-- Written by `make docs`. Change the comments in the source instead. -->\n"

func configuration(root string) string {
	var b strings.Builder
	b.WriteString(generated + `# Configuration

Each role reads a YAML file (` + "`-config.file`" + `), in which ` + "`${NAME}`" + ` is replaced by an
environment variable, which must be set; the variables named by ` + "`-help`" + ` override
the file. ` + "`-config.check`" + ` checks the whole configuration and exits. Sizes are written
64MiB or 8MB, durations 5s or 1m30s.
`)
	for _, role := range []struct {
		name string
		cfg  any
	}{{"edge", edge.DefaultConfig()}, {"router", router.DefaultConfig()}, {"sink", sink.DefaultConfig()}} {
		fmt.Fprintf(&b, "\n## %s\n\n| key | meaning |\n|---|---|\n%s", role.name, strings.Join(rows(root, role.cfg), ""))
	}
	b.WriteString(upText)
	up := allinone.DefaultConfig()
	own := rows(root, up.Own)
	for _, role := range [][2]any{{edge.DefaultConfig(), up.Edge}, {router.DefaultConfig(), up.Router}, {sink.DefaultConfig(), up.Sink}} {
		before := rows(root, role[0])
		for _, row := range rows(root, role[1]) {
			hub := strings.HasPrefix(row, "| `hub.")
			key, _, _ := strings.Cut(row, " | ")
			if hub || slices.Contains(before, row) || slices.ContainsFunc(own, func(o string) bool { return strings.HasPrefix(o, key+" | ") }) {
				continue
			}
			own = append(own, row)
		}
	}
	b.WriteString(strings.Join(own, ""))
	return b.String()
}

const upText = `
## penstock up

It accepts every section of edge, router and sink except hub and central, because it runs its
own hub. A section that several roles have applies to all of them, and processing is done
once, where data comes in: by edge and gateway. Its own keys, and keys with another default:

| key | meaning |
|---|---|
`

// rows returns the table of a configuration.
func rows(root string, cfg any) []string {
	var b strings.Builder
	writeFields(&b, comments{root: root}, reflect.ValueOf(cfg), "")
	return slices.Collect(strings.Lines(b.String()))
}

func writeFields(b *strings.Builder, c comments, v reflect.Value, prefix string) {
	t := v.Type()
	for i := range t.NumField() {
		f := t.Field(i)
		name, opts, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		key := strings.TrimPrefix(prefix+"."+name, ".")
		switch {
		case opts == "inline":
			writeFields(b, c, v.Field(i), prefix)
		case name == "" || name == "-":
		case f.Type.Kind() == reflect.Struct:
			writeFields(b, c, v.Field(i), key)
		default:
			fmt.Fprintf(b, "| `%s` | %s %s |\n", key, c.of(t, f.Name), byDefault(v.Field(i)))
		}
	}
}

// byDefault returns the sentence about a default.
func byDefault(v reflect.Value) string {
	switch v.Kind() {
	case reflect.String, reflect.Slice, reflect.Map:
		if v.Len() == 0 {
			return "The default is empty."
		}
	case reflect.Pointer:
		if v.IsNil() {
			return "The default is empty."
		}
	}
	return "The default is " + value(v) + "."
}

// value formats a default as YAML does.
func value(v reflect.Value) string {
	if d, ok := v.Interface().(time.Duration); ok {
		return "`" + d.String() + "`"
	}
	text, err := yaml.Marshal(v.Interface())
	if err != nil {
		panic(err)
	}
	s := strings.Trim(strings.TrimSpace(string(text)), `"`)
	if v.Kind() == reflect.Slice {
		s = "[" + strings.ReplaceAll(strings.TrimPrefix(s, "- "), "\n- ", ", ") + "]"
		if v.Len() == 0 {
			s = "[]"
		}
	}
	return "`" + s + "`"
}

// comments finds the comments of struct fields in the source.
type comments struct{ root string }

func (c comments) of(t reflect.Type, field string) string {
	dir := filepath.Join(c.root, strings.TrimPrefix(t.PkgPath(), module))
	files, _ := filepath.Glob(filepath.Join(dir, "*.go"))
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
		if err != nil {
			panic(err)
		}
		found := ""
		ast.Inspect(f, func(n ast.Node) bool {
			ts, ok := n.(*ast.TypeSpec)
			if !ok || ts.Name.Name != t.Name() {
				return true
			}
			if st, ok := ts.Type.(*ast.StructType); ok {
				for _, fd := range st.Fields.List {
					for _, id := range fd.Names {
						if id.Name == field {
							found = strings.Join(strings.Fields(fd.Doc.Text()+" "+fd.Comment.Text()), " ")
						}
					}
				}
			}
			return false
		})
		if found != "" {
			return strings.ReplaceAll(describe(found, field, keys(t)), "|", `\|`)
		}
	}
	return ""
}

// describe turns a field's comment into a description: a sentence that begins with what the key is or
// does, not with the name of the field, and that names other keys as a configuration does.
func describe(comment, field string, keys map[string]string) string {
	if rest, is := strings.CutPrefix(comment, field+" "); is {
		comment = rest
		for _, verb := range []string{"is ", "are "} {
			comment = strings.TrimPrefix(comment, verb)
		}
	}
	comment = camel.ReplaceAllStringFunc(comment, func(name string) string { return cmp.Or(keys[name], name) })
	if first, rest := comment[:1], comment[1:]; word.MatchString(comment) {
		comment = strings.ToUpper(first) + rest
	}
	if !strings.HasSuffix(comment, ".") {
		comment += "."
	}
	return comment
}

// word matches a text that begins with an English word, not with a key or a path.
var word = regexp.MustCompile(`^[a-z]+([ ,;]|: |$)`)

// camel matches a name of several words.
var camel = regexp.MustCompile(`\b[A-Z][a-z]+[A-Z][A-Za-z]*\b`)

// keys returns the keys of a struct's fields, by their names.
func keys(t reflect.Type) map[string]string {
	all := map[string]string{}
	for i := range t.NumField() {
		all[t.Field(i).Name], _, _ = strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
	}
	return all
}

func metrics() string {
	reg := prometheus.NewRegistry()
	l := ledger.New(reg)
	l.Lane("traces", "0", "tempo")
	l.Stream("SPANS")
	l.Unread("SPANS")
	l.Lost("SPANS")
	l.Oldest("SPANS", "tempo-0")
	l.Pushed("logs", "as-1")
	l.Removed("SPANS")
	l.Abandoned("SPANS")
	l.Aside("traces", 0, "tempo")
	l.Missing("traces", 0, "router")(0)
	l.AsideSince("traces", 0, "tempo")
	l.Saw(otlpwire.Logs, "as-1", 0, 0, time.Time{})
	l.Owed("logs", "as-1")
	l.Held("logs", "as-1")
	l.Disobeys("logs", "as-1")
	l.AsideBytes("logs", "loki", "as-1")
	l.Sampler("0")
	l.Sources("0")
	l.Stall("traces", "0", "tempo")
	l.Decided(true, "errors")
	families, err := reg.Gather()
	if err != nil {
		panic(err)
	}
	var b strings.Builder
	b.WriteString(generated + `# Metrics

On /metrics of every role, besides those of the Go runtime and the process. For
every signal, when nothing is in flight:

    accepted + rescued = delivered + sampled_out + filtered + dead_lettered + dropped

Copies of an item are outside this equation: one that a sender repeats is accepted again, one
that penstock repeats after a failure is not; a span that is recognised as a copy counts in
duplicate, any other copy in delivered again.

| metric | type | labels | meaning |
|---|---|---|---|
`)
	for _, f := range families {
		var labels []string
		values := map[string][]string{}
		for _, m := range f.GetMetric() {
			for _, p := range m.GetLabel() {
				if values[p.GetName()] == nil {
					labels = append(labels, p.GetName())
				}
				if have := values[p.GetName()]; len(have) == 0 || !contains(have, p.GetValue()) {
					values[p.GetName()] = append(have, p.GetValue())
				}
			}
		}
		for i, l := range labels {
			if len(values[l]) > 1 {
				labels[i] = l + " (" + strings.Join(values[l], ", ") + ")"
			}
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, "; "), f.GetHelp())
	}
	return b.String()
}

func contains(in []string, s string) bool {
	for _, v := range in {
		if v == s {
			return true
		}
	}
	return false
}
