package scripttest

import (
	"fmt"
	"strings"
	"testing"
)

var testCommands = Commands{
	"add":  func(c *Call) string { return fmt.Sprintln(c.Number("a", 0) + c.Number("b", 1)) },
	"say":  func(c *Call) string { return c.Body + c.Text("text", "") },
	"wait": func(c *Call) string { c.Duration("for"); return "" },
	"word": func(c *Call) string { return c.Word(0) + "\n" },
	"keep": func(c *Call) string { _ = c.Body; return "" },
}

// TestOutputsAreReplaced: what stands below a command is what it does now; all else stays as it is.
func TestOutputsAreReplaced(t *testing.T) {
	const script = `# What this is about.
keep
	some
	text

add a=1 b=2
----
%s
wait for=1s
----
word x
----
x
# The next without its output.
say
	hello
----
hello
`
	got, err := run(t, "f", fmt.Sprintf(script, "17\nof before"), testCommands)
	if want := fmt.Sprintf(script, "3"); err != nil || got != want {
		t.Errorf("%v, got:\n%s\nwant:\n%s", err, got, want)
	}
	if got, err := run(t, "f", "add\nadd a=1\n", testCommands); err != nil || got != "add\n----\n1\nadd a=1\n----\n2\n" {
		t.Errorf("without outputs: %q, %v", got, err)
	}
}

func TestMistakes(t *testing.T) {
	for script, want := range map[string]string{
		"ad a=1\n":                 "f:1: no command",
		"\nadd a=1 c=2\n":          "f:2: add a=1 c=2: the command knows no c",
		"add a=1 a=2\n":            "a is set twice",
		"word x y\n":               "does not know what y is",
		"say text=hello\n":         "does not end with a newline",
		"say\n\tadd a=1\n":         "would be read as a command",
		"say\n\t# x\n":             "would be read as a command",
		"say\n\t\n":                "would be read as a command",
		"say\n\t\tx\n":             "would be read as a command",
		"\tbody without command\n": "no command",
	} {
		if _, err := run(t, "f", script, testCommands); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", script, err, want)
		}
	}
}
