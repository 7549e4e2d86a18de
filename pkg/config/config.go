// Package config reads configurations: YAML files whose errors name file, line and key, environment
// variables, secrets that are never printed, sizes and durations, and TLS files, which are reloaded when
// they change.
//
// The meaning of a configuration is not here, but in the packages that have it.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// maxConfigBytes bounds a configuration file; the largest sensible one is a few
// kilobytes.
const maxConfigBytes = 1 << 20

// LoadFile reads a YAML file into into, a pointer to a struct that has the defaults. ${NAME} in a
// value is replaced by the environment variable, which must be set. Every error names file, line
// and key:
//
//	edge.yaml:7: forward.windw: unknown key; known here: attempts, window
func LoadFile(path string, into any) error {
	_, err := LoadFileLines(path, into)
	return err
}

// LoadFileLines is LoadFile that also returns the line of every key, for At.
func LoadFileLines(path string, into any) (lines map[string]int, err error) {
	text, err := readBounded(path)
	if err != nil {
		return nil, err
	}
	return load(path, text, into)
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", path, err)
	}
	if len(text) > maxConfigBytes {
		return nil, fmt.Errorf("configuration %s: larger than %d bytes", path, maxConfigBytes)
	}
	return text, nil
}

// Load is LoadFile for a text that has been read already; name is used as the name of the file.
func Load(name string, text []byte, into any) error {
	_, err := load(name, text, into)
	return err
}

// LoadLines is Load that also returns the line of every key, as in tokens[1].instance_id.
func LoadLines(name string, text []byte, into any) (lines map[string]int, err error) {
	return load(name, text, into)
}

func load(name string, text []byte, into any) (lines map[string]int, err error) {
	var doc, more yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(text))
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, nil // an empty file changes nothing
	} else if err != nil {
		return nil, broken(name, text, err)
	}
	for err == nil && (more.Kind == 0 || more.Content[0].Tag == "!!null") { // an empty document changes nothing
		more = yaml.Node{}
		err = dec.Decode(&more)
	}
	if err == nil {
		return nil, fmt.Errorf("%s:%d: a second YAML document begins here; a configuration is one document", name, more.Line)
	} else if !errors.Is(err, io.EOF) {
		return nil, broken(name, text, err)
	}
	c := checker{file: name, lines: make(map[string]int)}
	c.check(doc.Content[0], reflect.TypeOf(into).Elem(), "")
	if len(c.errs) > 0 {
		return nil, errors.Join(c.errs...)
	}
	if err := doc.Decode(into); err != nil {
		return nil, located(name, err)
	}
	return c.lines, nil
}

// At puts file and line before every error of err that begins with a key of the file:
// "spool.max_bytes is 1, …" becomes "edge.yaml:3: spool.…".
func At(file string, lines map[string]int, err error) error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var errs []error
		for _, e := range joined.Unwrap() {
			errs = append(errs, At(file, lines, e))
		}
		return errors.Join(errs...)
	}
	if err == nil {
		return nil
	}
	key := strings.TrimRight(strings.Fields(err.Error() + " ")[0], ":")
	for key != "" { // or the nearest parent key in the file
		if line, found := lines[key]; found {
			return fmt.Errorf("%s:%d: %w", file, line, err)
		}
		key = key[:max(strings.LastIndexAny(key, ".["), 0)]
	}
	return err
}

// located turns "yaml: line 3: text" into "file:3: text".
func located(name string, err error) error {
	lines := []string{err.Error()}
	if te, ok := errors.AsType[*yaml.TypeError](err); ok {
		lines = te.Errors
	}
	for i, l := range lines {
		l = strings.TrimPrefix(l, "yaml: ")
		l = strings.TrimPrefix(l, "unmarshal errors:\n  ")
		if rest, ok := strings.CutPrefix(l, "line "); ok {
			l = name + ":" + rest
		} else {
			l = name + ": " + l
		}
		lines[i] = l
	}
	return errors.New(strings.Join(lines, "\n"))
}

// broken is a syntax error of the YAML. It mentions a tab, which editors show as spaces.
func broken(name string, text []byte, err error) error {
	for i, line := range bytes.Split(text, []byte("\n")) {
		if indent := line[:len(line)-len(bytes.TrimLeft(line, " \t"))]; bytes.ContainsRune(indent, '\t') {
			return fmt.Errorf("%s:%d: a tab in the indentation; YAML allows only spaces", name, i+1)
		}
	}
	return located(name, err)
}

// checker walks a YAML tree in parallel with the type into which it will be decoded.
type checker struct {
	file  string
	lines map[string]int // of keys
	errs  []error
}

func (c *checker) fail(n *yaml.Node, key, format string, args ...any) {
	if key != "" {
		key += ": "
	}
	c.errs = append(c.errs, fmt.Errorf("%s:%d: %s%s", c.file, n.Line, key, fmt.Sprintf(format, args...)))
}

var (
	durationType = reflect.TypeFor[time.Duration]()
	bytesType    = reflect.TypeFor[Bytes]()
	levelType    = reflect.TypeFor[slog.Level]()
	levels       = []string{"debug", "info", "warn", "error"}
)

func (c *checker) check(n *yaml.Node, t reflect.Type, key string) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch n.Kind {
	case yaml.AliasNode:
		c.fail(n, key, "YAML aliases are not supported")
	case yaml.ScalarNode:
		c.expand(n, key)
		c.checkScalar(n, t, key)
		if (t.Kind() == reflect.Struct || t.Kind() == reflect.Slice) && n.Tag != "!!null" && !reflect.PointerTo(t).Implements(unmarshaler) {
			c.fail(n, key, "got %q, want %s", n.Value, shape(t))
		}
	case yaml.SequenceNode:
		elem := reflect.TypeFor[any]()
		switch t.Kind() {
		case reflect.Slice:
			elem = t.Elem()
		case reflect.Interface:
		default:
			c.fail(n, key, "got a list, want %s", shape(t))
			return
		}
		for i, e := range n.Content {
			path := key + "[" + strconv.Itoa(i) + "]"
			c.lines[path] = e.Line
			c.check(e, elem, path)
		}
	case yaml.MappingNode:
		c.checkMapping(n, t, key)
	}
}

// checkScalar finds values that the decoder would silently convert, or refuse without naming the key, and
// rewrites durations in the form that it reads.
func (c *checker) checkScalar(n *yaml.Node, t reflect.Type, key string) {
	if n.Tag == "!!null" {
		return
	}
	if err := normalise(n, t); err != nil {
		c.fail(n, key, "%v", err)
	}
}

// normalise reports what is wrong with a value for t, and writes a duration as the decoder reads it.
func normalise(n *yaml.Node, t reflect.Type) error {
	switch {
	case t == durationType:
		d, err := ParseDuration(n.Value)
		if err != nil {
			return err
		}
		n.Value, n.Tag = d.String(), "!!str"
		return nil
	case t == levelType:
		if !slices.Contains(levels, strings.ToLower(n.Value)) {
			return fmt.Errorf("%q is not a level; want %s", n.Value, strings.Join(levels, ", "))
		}
		return nil
	case t == bytesType:
		return new(Bytes).UnmarshalText([]byte(n.Value))
	case reflect.PointerTo(t).Implements(unmarshaler): // says itself what is wrong
		return nil
	}
	return checkTag(n, t.Kind())
}

// checkTag reports a number or truth value that YAML would not read as one.
func checkTag(n *yaml.Node, kind reflect.Kind) error {
	switch {
	case kind >= reflect.Int && kind <= reflect.Uint64:
		if n.Tag != "!!int" {
			return fmt.Errorf("got %q, want a whole number", n.Value)
		}
	case kind == reflect.Float32 || kind == reflect.Float64:
		if n.Tag != "!!int" && n.Tag != "!!float" {
			return fmt.Errorf("got %q, want a number", n.Value)
		}
	case kind == reflect.Bool:
		if old := []string{"yes", "no", "on", "off"}; n.Tag != "!!bool" && !slices.Contains(old, strings.ToLower(n.Value)) {
			return fmt.Errorf("got %q, want true or false", n.Value)
		}
	}
	return nil
}

func (c *checker) checkMapping(n *yaml.Node, t reflect.Type, key string) {
	elem := reflect.TypeFor[any]()
	var fields map[string]reflect.Type
	switch t.Kind() {
	case reflect.Struct:
		fields = keysOf(t)
	case reflect.Map:
		elem = t.Elem()
	case reflect.Interface:
	default:
		c.fail(n, key, "got a mapping, want %s", shape(t))
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		path := strings.TrimPrefix(key+"."+k.Value, ".")
		ft := elem
		if fields != nil {
			var known bool
			if ft, known = fields[k.Value]; !known {
				names := make([]string, 0, len(fields))
				for name := range fields {
					names = append(names, name)
				}
				slices.Sort(names)
				c.fail(k, path, "unknown key; known here: %s", strings.Join(names, ", "))
				continue
			}
		}
		c.lines[path] = k.Line
		c.check(v, ft, path)
	}
}

var unmarshaler = reflect.TypeFor[yaml.Unmarshaler]()

func shape(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Struct, reflect.Map:
		return "a mapping"
	case reflect.Slice:
		return "a list"
	}
	return "a single value"
}

// keysOf returns the YAML keys of a struct and their types.
func keysOf(t reflect.Type) map[string]reflect.Type {
	keys := make(map[string]reflect.Type, t.NumField())
	for f := range t.Fields() {
		name, opts, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch {
		case opts == "inline":
			for k, v := range keysOf(f.Type) {
				keys[k] = v
			}
		case name != "" && name != "-":
			keys[name] = f.Type
		}
	}
	return keys
}

// expand replaces every ${NAME} in a scalar. The result is a value, never YAML, so that an environment
// variable cannot add keys.
func (c *checker) expand(n *yaml.Node, key string) {
	rest, out := n.Value, ""
	for {
		before, after, found := strings.Cut(rest, "${")
		out += before
		if !found {
			break
		}
		name, tail, closed := strings.Cut(after, "}")
		if !closed {
			c.fail(n, key, "${ without a closing brace")
			return
		}
		val, set := os.LookupEnv(name)
		if !set {
			c.fail(n, key, "environment variable %s is not set", name)
			return
		}
		out, rest = out+val, tail
	}
	if out == n.Value {
		return
	}
	n.Value = out
	if n.Style == 0 { // plain: 5 is a number, true a boolean
		n.Tag = ""
		if n.Tag = n.ShortTag(); n.Tag == "!!null" { // empty, and not absent
			n.Tag = "!!str"
		}
	}
}

// Secret is a string that is never printed.
type Secret string

// Redacted is shown instead of a secret.
const Redacted = "[redacted]"

// String hides the secret.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return Redacted
}

// GoString hides the secret from %#v.
func (s Secret) GoString() string { return s.String() }

// MarshalText hides the secret from JSON, YAML and slog.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads the secret.
func (s *Secret) UnmarshalText(b []byte) error { *s = Secret(b); return nil }

// Bytes is a size, written as 64MiB, 8MB or a plain number of bytes.
type Bytes int64

var byteUnits = []struct {
	suffix string
	size   int64
}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40}, {"KB", 1e3}, {"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"B", 1}, {"", 1}}

// UnmarshalText reads a size.
func (b *Bytes) UnmarshalText(text []byte) error {
	s := strings.TrimSpace(string(text))
	for _, u := range byteUnits {
		digits, ok := strings.CutSuffix(s, u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
		if err != nil || n < 0 || n > (1<<62)/u.size {
			break
		}
		*b = Bytes(n * u.size)
		return nil
	}
	return fmt.Errorf("%q is not a size; write 64MiB, 8MB or a number of bytes", s)
}

// MarshalText writes the size in the largest unit that is exact.
func (b Bytes) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// String writes the size in the largest unit that is exact.
func (b Bytes) String() string {
	for _, u := range []int{3, 2, 1, 0} {
		if n := int64(b); n != 0 && n%byteUnits[u].size == 0 {
			return strconv.FormatInt(n/byteUnits[u].size, 10) + byteUnits[u].suffix
		}
	}
	return strconv.FormatInt(int64(b), 10)
}

// UnmarshalYAML reads a size; an error names the line.
func (b *Bytes) UnmarshalYAML(n *yaml.Node) error {
	if err := b.UnmarshalText([]byte(n.Value)); err != nil {
		return fmt.Errorf("line %d: %w", n.Line, err)
	}
	return nil
}
