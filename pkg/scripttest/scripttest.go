// Package scripttest runs tests that are scripts: files with commands, and below each what it did.
//
//	# A trace's window opens with its first span.
//	policies
//		decision_wait: 10s
//
//	add at=0s trace=a1
//	----
//	add at=11s trace=b2
//	----
//	i a1 kept
//
// A command is a line that begins with one of the words of [Commands]. It has words and key=value
// pairs; lines that begin with a tab and follow it are its body. After ---- comes its output, up to the
// next command, empty line or comment. A command with a body that has no output has no ----.
//
//	go test ./pkg/… -rewrite
//
// writes the outputs as they are now; what has changed must be understood before it is committed.
//
// # Promises
//
//   - A misspelled command, a key that the command does not know and an output that could be read as
//     a command fail the test.
//
// # Not here
//
// What the commands do: the tests.
package scripttest

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

var rewrite = flag.Bool("rewrite", false, "write the outputs of the scripts as they are now; read the diff")

// Run runs every file testdata/*.txt as a subtest: do executes it with [Script.Run].
func Run(t *testing.T, do func(*testing.T, *Script)) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			s := &Script{file: file, text: string(text)}
			do(t, s)
			switch {
			case t.Failed():
			case !s.ran:
				t.Error("the script was not run")
			case *rewrite:
				if err := os.WriteFile(file, []byte(s.got), 0o600); err != nil {
					t.Fatal(err)
				}
			case s.got != s.text:
				t.Errorf("%s\ngot:\n%s\nwant:\n%s", difference(s.got, s.text), s.got, s.text)
			}
		})
	}
}

// difference names the first line that differs.
func difference(got, want string) string {
	a, b := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return fmt.Sprintf("line %d is %q, want %q", i+1, a[i], b[i])
		}
	}
	return fmt.Sprintf("%d lines, want %d", len(a), len(b))
}

// Commands are the words with which a command begins; each returns its output, in whole lines.
type Commands map[string]func(*Call) string

// Script is one file.
type Script struct {
	file, text string

	got string // the script with the outputs of this run
	ran bool
}

// Run executes the script.
func (s *Script) Run(t *testing.T, commands Commands) {
	t.Helper()
	s.ran = true
	got, err := run(t, s.file, s.text, commands)
	if err != nil {
		t.Fatal(err)
	}
	s.got = got
}

func run(t *testing.T, file, text string, commands Commands) (string, error) {
	var out strings.Builder
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	output := false // whether the lines are what a command did before; this run writes its own
	for n := 0; n < len(lines); n++ {
		line := lines[n]
		output = !commands.begin(line) && (output || line == "----" && n > 0)
		if output {
			continue
		}
		out.WriteString(line + "\n")
		if line == "" || line[0] == '#' {
			continue
		}
		c := &Call{T: t, at: fmt.Sprintf("%s:%d", file, n+1), line: line, used: map[string]bool{}}
		for ; n+1 < len(lines) && strings.HasPrefix(lines[n+1], "\t"); n++ {
			c.Body += strings.TrimPrefix(lines[n+1], "\t") + "\n"
			out.WriteString(lines[n+1] + "\n")
		}
		did, err := c.do(commands)
		if err != nil {
			return "", err
		}
		if c.Body == "" || did != "" {
			out.WriteString("----\n" + did)
		}
	}
	return out.String(), nil
}

// begin reports whether a line ends the output before it.
func (c Commands) begin(line string) bool {
	word, _, _ := strings.Cut(line, " ")
	return line == "" || word == "#" || c[word] != nil
}

// do executes the command and returns what it did.
func (c *Call) do(commands Commands) (string, error) {
	if err := c.parse(c.line); err != nil {
		return "", err
	}
	do := commands[c.word]
	if do == nil {
		return "", fmt.Errorf("%s: no command: %s", c.at, c.line)
	}
	did := do(c)
	return did, c.check(did, commands.begin)
}

// Call is one command of a script. Its methods fail the test when what they are asked for is not what
// the script says.
type Call struct {
	T    *testing.T
	Body string // the indented lines, without their tabs

	at    string // file and line
	line  string
	word  string
	words []string
	args  map[string]string
	used  map[string]bool // keys, and words by position, that the command has asked for
}

func (c *Call) parse(line string) error {
	c.args = map[string]string{}
	for i, f := range strings.Fields(line) {
		k, v, pair := strings.Cut(f, "=")
		switch {
		case i == 0:
			c.word = f
		case !pair:
			c.words = append(c.words, f)
		case c.args[k] != "":
			return fmt.Errorf("%s: %s: %s is set twice", c.at, line, k)
		default:
			c.args[k] = v
		}
	}
	return nil
}

// check returns an error for what the command did not ask for, and for output that is not whole lines
// or would be taken for something else.
func (c *Call) check(output string, begins func(string) bool) error {
	for k := range c.args {
		if !c.used[k] {
			return fmt.Errorf("%s: %s: the command knows no %s", c.at, c.line, k)
		}
	}
	for i, w := range c.words {
		if !c.used[strconv.Itoa(i)] {
			return fmt.Errorf("%s: %s: the command does not know what %s is", c.at, c.line, w)
		}
	}
	if output != "" && !strings.HasSuffix(output, "\n") {
		return fmt.Errorf("%s: %s: the output %q does not end with a newline", c.at, c.line, output)
	}
	for l := range strings.Lines(output) {
		if l = strings.TrimSuffix(l, "\n"); begins(l) || l[0] == '\t' {
			return fmt.Errorf("%s: %s: the output %q would be read as a command", c.at, c.line, l)
		}
	}
	return nil
}

// Fatalf fails the test at this command.
func (c *Call) Fatalf(format string, args ...any) {
	c.T.Helper()
	c.T.Fatalf("%s: %s: %s", c.at, c.line, fmt.Sprintf(format, args...))
}

// Word returns the word at a position after the command, from 0; "" for none.
func (c *Call) Word(i int) string {
	c.used[strconv.Itoa(i)] = true
	if i >= len(c.words) {
		return ""
	}
	return c.words[i]
}

// Text returns the value of a key.
func (c *Call) Text(key, otherwise string) string {
	c.used[key] = true
	if v, is := c.args[key]; is {
		return v
	}
	return otherwise
}

// Number is [Call.Text] for a whole number.
func (c *Call) Number(key string, otherwise int) int {
	c.T.Helper()
	v := c.Text(key, strconv.Itoa(otherwise))
	n, err := strconv.Atoi(v)
	if err != nil {
		c.Fatalf("%s is %q, want a number", key, v)
	}
	return n
}

// Duration is [Call.Text] for a duration; 0 for none.
func (c *Call) Duration(key string) time.Duration {
	c.T.Helper()
	v := c.Text(key, "0s")
	d, err := time.ParseDuration(v)
	if err != nil {
		c.Fatalf("%s is %q, want a duration", key, v)
	}
	return d
}
