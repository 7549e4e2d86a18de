package main

import (
	"fmt"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/term"
)

// meter shows the progress of long work: one line that changes in a terminal, a line every few seconds
// elsewhere.
type meter struct {
	out      *os.File
	terminal bool
	next     time.Time
	width    int
	last     string
}

// plainInterval is how often a line is printed without a terminal.
const plainInterval = 5 * time.Second

func newMeter(out *os.File) *meter {
	info, err := out.Stat()
	return &meter{out: out, terminal: err == nil && info.Mode()&os.ModeCharDevice != 0}
}

func (m *meter) show(line string) {
	m.last = line
	if m.terminal {
		line = fit(line, columns(m.out))
		fmt.Fprintf(m.out, "\r%-*s", m.width, line)
		m.width = utf8.RuneCountInString(line)
		return
	}
	if now := time.Now(); now.After(m.next) {
		m.next = now.Add(plainInterval)
		fmt.Fprintln(m.out, line)
		m.last = ""
	}
}

// columns is the width of a terminal, less the last column, at which some terminals wrap.
func columns(out *os.File) int {
	if width, _, err := term.GetSize(int(out.Fd())); err == nil && width > 20 {
		return width - 1
	}
	return 79
}

// fit cuts a line to a width.
func fit(line string, width int) string {
	if r := []rune(line); len(r) > width {
		return string(r[:width-1]) + "…"
	}
	return line
}

// end keeps the last line on the screen.
func (m *meter) end() {
	if m.terminal && m.width > 0 || m.last != "" {
		if !m.terminal {
			fmt.Fprint(m.out, m.last)
		}
		fmt.Fprintln(m.out)
	}
	m.width, m.last = 0, ""
}

// bar draws a share from 0 to 1.
func bar(share float64) string {
	const width = 24
	n := int(share * width)
	return fmt.Sprintf("[%s%s] %3.0f %%", strings.Repeat("#", n), strings.Repeat(".", width-n), 100*share)
}
