package pkg

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// dialect matches words that are not ordinary technical English. CONTRIBUTING.md says what to write
// instead.
var dialect = regexp.MustCompile(`(?i)\b(anew|likewise|at hand|lets? go of|who(so)?ever|made again|mends?|mending|may heal|` +
	`(give[sn]?|gave) back|of late|by and by|for want of|those there are|stands? twice|at the least|` +
	`go(es)? on|gets? on|passed over|tells? of|mended|comes? again|the owner before|those before|nobody knows|` +
	`left behind|for the moment)\b`)

// TestPlainWords keeps them out of what users read: the documentation, and the texts of messages, errors
// and help.
func TestPlainWords(t *testing.T) {
	read := 0
	say := func(where, text string) {
		read++
		if found := dialect.FindString(text); found != "" {
			t.Errorf("%s: %q in %q", where, found, text)
		}
	}
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	reference, err := filepath.Glob("../docs/reference/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range append(append(pages, reference...), "../README.md", "../SECURITY.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for line := range strings.Lines(string(text)) {
			n++
			say(page+":"+strconv.Itoa(n), line)
		}
	}
	for _, root := range []string{"../cmd", "."} {
		if err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			set := token.NewFileSet()
			file, err := parser.ParseFile(set, path, nil, 0)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				if lit, is := n.(*ast.BasicLit); is && lit.Kind == token.STRING {
					say(set.Position(lit.Pos()).String(), lit.Value)
				}
				return true
			})
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if read < 5000 {
		t.Errorf("only %d lines and texts were read", read)
	}
}
