package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

type inner struct {
	Wait time.Duration     `yaml:"wait"`
	Size Bytes             `yaml:"size"`
	Tags map[string]string `yaml:"tags"`
	List []string          `yaml:"list"`
}

type outer struct {
	Embedded `yaml:",inline"`
	Inner    inner  `yaml:"inner"`
	Pass     Secret `yaml:"password"`
	Count    int    `yaml:"count"`
	On       bool   `yaml:"on"`

	Level slog.Level `yaml:"level"`
}

// Embedded stands in for app.Config.
type Embedded struct {
	Name string `yaml:"name"`
}

func TestLoadReadsEveryKind(t *testing.T) {
	t.Setenv("PENSTOCK_TEST_COUNT", "7")
	t.Setenv("PENSTOCK_TEST_NAME", "a: b # no comment\n- x")
	var c outer
	err := Load("c.yaml", []byte("name: ${PENSTOCK_TEST_NAME}\ncount: ${PENSTOCK_TEST_COUNT}\non: true\npassword: hunter2\ninner:\n  wait: 1m30s\n  size: 64MiB\n  tags: {a: b}\n  list: [x, y]\n"), &c)
	if err != nil {
		t.Fatal(err)
	}
	want := outer{Embedded{"a: b # no comment\n- x"}, inner{90 * time.Second, 64 << 20, map[string]string{"a": "b"}, []string{"x", "y"}}, "hunter2", 7, true, 0}
	if fmt.Sprintf("%#v", c) != fmt.Sprintf("%#v", want) || c.Pass != "hunter2" {
		t.Errorf("got %+v, want %+v", c, want)
	}
}

func TestLoadSaysWhereItIsWrong(t *testing.T) {
	for text, want := range map[string]string{
		"naem: x\n":                     "c.yaml:1: naem: unknown key; known here: count, inner, level, name, on, password",
		"name: x\ninner:\n  siez: 1\n":  "c.yaml:3: inner.siez: unknown key",
		"count: abc\n":                  "c.yaml:1:",
		"inner:\n  wait: 5\n":           "c.yaml:2: inner.wait: 5 has no unit",
		"inner:\n  size: 9EiB\n":        `c.yaml:2: inner.size: "9EiB" is not a size`,
		"inner:\n  wait: 3x\n":          `c.yaml:2: inner.wait: "3x" is not a duration; write 200ms, 5s`,
		"count: 0.5\n":                  `c.yaml:1: count: got "0.5", want a whole number`,
		"on: 1\n":                       `c.yaml:1: on: got "1", want true or false`,
		"level: verbose\n":              `c.yaml:1: level: "verbose" is not a level; want debug, info, warn, error`,
		"name: x\n---\nname: y\n":       "c.yaml:2: a second YAML document begins here",
		"name: x\n---\n---\nname: y\n":  "a second YAML document begins here",
		"inner:\n\twait: 5s\n":          "c.yaml:2: a tab in the indentation",
		"inner:\n  size: -1\n":          "c.yaml:2:",
		"inner: 5\n":                    "c.yaml:1: inner: got \"5\", want a mapping",
		"inner:\n  list: {a: b}\n":      "c.yaml:2: inner.list: got a mapping, want a list",
		"count: [1]\n":                  "c.yaml:1: count: got a list, want a single value",
		"name: ${PENSTOCK_TEST_UNSET}":  "c.yaml:1: name: environment variable PENSTOCK_TEST_UNSET is not set",
		"name: ${PENSTOCK":              "c.yaml:1: name: ${ without a closing brace",
		"a: &a x\nname: *a\n":           "c.yaml:2: name: YAML aliases are not supported",
		"name: x\nname: y\n":            "c.yaml:2:",
		"name: x\n\tcount: 1\n":         "c.yaml:2: a tab in the indentation",
		"name: [x\n":                    "c.yaml:",
		"- x\n":                         "c.yaml:1: got a list, want a mapping",
		"\x00\x01binary":                "c.yaml",
		"inner:\n  tags:\n    a: [1]\n": "c.yaml:3: inner.tags.a: got a list, want a single value",
	} {
		var c outer
		err := Load("c.yaml", []byte(text), &c)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
}

// TestNumbers: an integer will do for a number, a text that looks like one will not.
func TestNumbers(t *testing.T) {
	for text, want := range map[string]string{
		"share: 1":     "",
		"share: 0.5":   "",
		"share: '0.5'": `c.yaml:1: share: got "0.5", want a number`,
		"share: half":  `c.yaml:1: share: got "half", want a number`,
	} {
		var c struct {
			Share float64 `yaml:"share"`
		}
		if err := Load("c.yaml", []byte(text), &c); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
}

func TestDurations(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"0": 0, "5s": 5 * time.Second, "1m30s": 90 * time.Second, "3d": 72 * time.Hour, "2w": 14 * 24 * time.Hour, "1w2d3h": 219 * time.Hour, "1.5d": 36 * time.Hour, ".5s": 500 * time.Millisecond, "3μs": 3 * time.Microsecond, "-2h": -2 * time.Hour,
	} {
		if got, err := ParseDuration(text); err != nil || got != want {
			t.Errorf("%q is %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "d", "5", "5 s", "3y", "1d-2h", "300000d", "99999999999h", "106000d1000d"} {
		if got, err := ParseDuration(text); err == nil {
			t.Errorf("%q is %v", text, got)
		}
	}
	var c outer
	if err := Load("c.yaml", []byte("inner: {wait: 2d}"), &c); err != nil || c.Inner.Wait != 48*time.Hour {
		t.Errorf("%v, %v", c.Inner.Wait, err)
	}
}

// TestErrorsOfValidationHaveALine also where the key is within a list, or not in the file.
func TestErrorsOfValidationHaveALine(t *testing.T) {
	lines := map[string]int{"a": 1, "a.list": 2, "a.list[0]": 3}
	for text, want := range map[string]string{
		"a.list[0].pattern is wrong": "f:3: a.list[0].pattern is wrong", "a.list[1]: no": "f:2: a.list[1]: no", "a.other is 0": "f:1: a.other is 0", "b is 0": "b is 0",
	} {
		if got := At("f", lines, errors.New(text)); got.Error() != want {
			t.Errorf("got %v, want %s", got, want)
		}
	}
}

func TestSecretIsNeverPrinted(t *testing.T) {
	c := outer{Pass: "hunter2"}
	js, _ := json.Marshal(c)
	ym, _ := yaml.Marshal(c)
	for _, out := range []string{fmt.Sprint(c), fmt.Sprintf("%+v %#v %s %v", c, c, c.Pass, c.Pass), string(js), string(ym)} {
		if strings.Contains(out, "hunter2") {
			t.Errorf("printed: %s", out)
		}
	}
}

func TestBytesRoundTrip(t *testing.T) {
	for text, want := range map[string]int64{"0": 0, "17": 17, "1KiB": 1024, "3 GiB": 3 << 30, "8MB": 8_000_000, "5B": 5} {
		var b Bytes
		if err := b.UnmarshalText([]byte(text)); err != nil || int64(b) != want {
			t.Errorf("%q = %d, %v; want %d", text, b, err, want)
		}
		var again Bytes
		if err := again.UnmarshalText([]byte(b.String())); err != nil || again != b {
			t.Errorf("%v does not read back: %d, %v", b, again, err)
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add("name: x\ninner: {wait: 5s, list: [a]}\n")
	f.Add("a: &a [*a]\n")
	f.Fuzz(func(t *testing.T, text string) {
		var c outer
		_ = Load("c.yaml", []byte(text), &c)
	})
}
