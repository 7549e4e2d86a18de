package domain

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/penstock/penstock/pkg/config"
)

func TestTheFirstDomainThatHasAnInstanceCounts(t *testing.T) {
	set := New(Config{
		{"acme", []string{"acme-*", "portal"}},
		{"test", []string{"*-test", "stage-[0-9]", "a?"}},
		{"rest", []string{"portal", "acme-*", "bank"}},
	})
	for instance, want := range map[string]string{
		"acme-shop": "@acme", "acme-": "@acme", "portal": "@acme", "acme-test": "@acme",
		"bank-test": "@test", "stage-1": "@test", "a1": "@test",
		"bank": "@rest",
		"acme": "acme", "portal-2": "portal-2", "xacme-1": "xacme-1", "stage-12": "stage-12", "PORTAL": "PORTAL",
	} {
		if got := set.Of(instance); got != want {
			t.Errorf("%s is in %s, want %s", instance, got, want)
		}
		for _, none := range []*Set{nil, New(nil)} {
			if got := none.Of(instance); got != instance {
				t.Errorf("without domains %s is in %s", instance, got)
			}
		}
	}
}

// TestNewDoesNotChangeTheConfiguration, which others still use.
func TestNewDoesNotChangeTheConfiguration(t *testing.T) {
	c := Config{{"acme", []string{"acme-*"}}}
	New(c)
	if c[0].Name != "acme" {
		t.Errorf("the name is now %s", c[0].Name)
	}
}

func TestDomainsChange(t *testing.T) {
	in := func(name string) *Set { return New(Config{{name, []string{"i*"}}}) }
	for _, tc := range []struct {
		name   string
		sets   []*Set // in force from 10, 20, … on
		seq    uint64
		now    string
		before []string
	}{
		{"no versions", nil, 100, "i", nil},
		{"not in force yet", []*Set{in("a")}, 9, "i", nil},
		{"in force from its sequence on", []*Set{in("a")}, 10, "@a", []string{"i"}},
		{"a later version does not count yet", []*Set{in("a"), in("b")}, 19, "@a", []string{"i"}},
		{"the oldest is first", []*Set{in("b"), in("a"), in("c")}, 30, "@c", []string{"i", "@b", "@a"}},
		{"a version that changes nothing", []*Set{in("a"), in("a"), in("b")}, 99, "@b", []string{"i", "@a"}},
		{"dissolved", []*Set{in("a"), nil}, 20, "i", []string{"@a"}},
		{"dissolved by an empty list", []*Set{in("a"), New(nil)}, 20, "i", []string{"@a"}},
		{"formed again", []*Set{in("a"), nil, in("a")}, 30, "@a", []string{"i"}},
		{"each once", []*Set{in("a"), nil, in("b"), nil, in("a"), nil, in("c")}, 70, "@c", []string{"i", "@a", "@b"}},
		{"never in a domain", []*Set{New(Config{{"x", []string{"x"}}}), nil}, 30, "i", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var v Versions
			for i, s := range tc.sets {
				v = append(v, Version{uint64(i + 1), uint64(i+1) * 10, s})
			}
			if now, before := v.Of("i", tc.seq); now != tc.now || !slices.Equal(before, tc.before) {
				t.Errorf("%s, before %v; want %s, before %v", now, before, tc.now, tc.before)
			}
		})
	}
}

// TestSequencesThatBeginLower: SPANS was restored from a backup, so that a later version begins before an earlier one.
func TestSequencesThatBeginLower(t *testing.T) {
	v := Versions{{1, 50, New(Config{{"a", []string{"*"}}})}, {2, 20, New(Config{{"b", []string{"*"}}})}}
	for seq, want := range map[uint64]string{19: "i", 20: "@b", 49: "@b", 50: "@b"} {
		if now, _ := v.Of("i", seq); now != want {
			t.Errorf("at %d it is in %s, want %s", seq, now, want)
		}
	}
}

func TestOfDoesNotAllocate(t *testing.T) {
	none, same := Versions(nil), Versions{{1, 1, New(Config{{"a", []string{"x-*"}}})}}
	if n := testing.AllocsPerRun(100, func() { none.Of("i", 1); same.Of("i", 1) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestEqual(t *testing.T) {
	a, b := Named{"a", []string{"1", "2"}}, Named{"b", []string{"3"}}
	for _, tc := range []struct {
		one, other Config
		want       bool
	}{
		{nil, Config{}, true}, {Config{a, b}, Config{a, {"b", []string{"3"}}}, true},
		{Config{a, b}, Config{b, a}, false}, {Config{a}, nil, false}, {Config{a}, Config{a, b}, false},
		{Config{a}, Config{{"a", []string{"2", "1"}}}, false}, {Config{a}, Config{{"c", a.Instances}}, false},
	} {
		if got := tc.one.Equal(tc.other); got != tc.want {
			t.Errorf("%v and %v are equal: %v", tc.one, tc.other, got)
		}
	}
}

func TestValidateReportsEveryMistake(t *testing.T) {
	many := func(n int, text string) (all []string) {
		for range n {
			all = append(all, text)
		}
		return all
	}
	var domains Config
	for i := range maxDomains {
		domains = append(domains, Named{fmt.Sprint("d", i), []string{"x"}})
	}
	long := strings.Repeat("x", maxGlob)
	for _, tc := range []struct {
		name string
		cfg  Config
		want []string // a part of each mistake
	}{
		{"none", nil, nil},
		{"all is well", Config{{"acme", []string{"acme-*", "portal", "[a-c]?", long}}, {"B_2", []string{"*"}}}, nil},
		{"names", Config{{"", []string{"a"}}, {"a b", []string{"a"}}, {"@a", []string{"a"}}, {strings.Repeat("n", 129), []string{"a"}}, {"_a", []string{"a"}}},
			[]string{`domains[0].name is "", want 1 to 128 letters`, `domains[1].name is "a b"`, `domains[2].name is "@a"`, `domains[3].name is "nnn`, `domains[4].name is "_a"`}},
		{"a name twice", Config{{"a", []string{"x"}}, {"b", []string{"x"}}, {"a", []string{"y"}}}, []string{`domains[2].name is "a", which domains[0] has, too`}},
		{"no instance", Config{{"a", nil}, {"b", []string{}}}, []string{"domains[0].instances has 0 entries", "domains[1].instances has 0 entries"}},
		{"globs", Config{{"a", []string{"ok", "[", "", long + "x", `x\`, "\xff"}}},
			[]string{`domains[0].instances[1] is "["`, `domains[0].instances[2] is ""`, `domains[0].instances[3] is "xxx`, `domains[0].instances[4] is "x\\"`, `domains[0].instances[5] is "\xff"`}},
		{"as many domains as may be", domains, nil},
		{"too many domains", append(slices.Clone(domains), Named{"more", []string{"x"}}), []string{"domains has 257 domains, want at most 256"}},
		{"as many globs as may be", Config{{"a", many(maxGlobs, "x")}}, nil},
		{"too many globs", Config{{"a", many(maxGlobs+1, "x")}}, []string{"domains[0].instances has 257 entries, want 1 to 256"}},
		{"as many bytes as may be", Config{{"a", many(255, long)}, {"b", []string{long[2:]}}}, nil},
		{"too many bytes", Config{{"a", many(255, long)}, {"b", []string{long[1:]}}}, []string{"domains has 65537 bytes of names and globs, want at most 65536"}},
		{"all at once", Config{{"a b", nil}, {"c", []string{"["}}}, []string{"domains[0].name", "domains[0].instances has", "domains[1].instances[0]"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.cfg.Validate("domains")
			var got []string
			if err != nil {
				got = strings.Split(err.Error(), "\n")
			}
			if len(got) != len(tc.want) {
				t.Fatalf("%d mistakes, want %d: %v", len(got), len(tc.want), err)
			}
			for i, want := range tc.want {
				if !strings.HasPrefix(got[i], want) {
					t.Errorf("mistake %d is %s, want %s", i, got[i], want)
				}
			}
		})
	}
}

// TestMistakesNameTheirLine in the configuration, and an empty list is not the same as no key.
func TestMistakesNameTheirLine(t *testing.T) {
	load := func(text string) (path string, lines map[string]int, c Config) {
		var file struct {
			Domains Config `yaml:"domains"`
		}
		path = filepath.Join(t.TempDir(), "sink.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		lines, err := config.LoadFileLines(path, &file)
		if err != nil {
			t.Fatal(err)
		}
		return path, lines, file.Domains
	}
	path, lines, c := load("domains:\n  - name: acme\n    instances: ['acme-*', portal]\n  - name: '@b'\n    instances:\n      - x\n      - '['\n  - name: c\n")
	err := config.At(path, lines, c.Validate("domains"))
	for _, want := range []string{":4: domains[1].name", ":7: domains[1].instances[1]", ":8: domains[2].instances"} {
		if err == nil || !strings.Contains(err.Error(), "sink.yaml"+want) {
			t.Errorf("want %s in %v", want, err)
		}
	}
	if _, _, c := load("domains: []\n"); c == nil || len(c) != 0 {
		t.Errorf("an empty list is %#v", c)
	}
	if _, _, c := load("{}\n"); c != nil {
		t.Errorf("no key is %#v", c)
	}
}

// TestLeft: when an instance was put out of a domain, the last time.
func TestLeft(t *testing.T) {
	acme, bank := New(Config{{Name: "acme", Instances: []string{"a*"}}}), New(Config{{Name: "bank", Instances: []string{"a*"}}})
	v := Versions{{Number: 1, From: 5, Set: acme}, {Number: 2, From: 7, Set: bank}, {Number: 3, From: 9, Set: acme}, {Number: 4, From: 11}}
	for domain, want := range map[string]uint64{"a1": 5, "@acme": 11, "@bank": 9, "@other": 0} {
		if got := v.Left("a1", domain); got != want {
			t.Errorf("%s: %d, want %d", domain, got, want)
		}
	}
	if v[:3].Left("a1", "@acme") != 7 || !Shared("@acme") || Shared("a1") {
		t.Error("a later version counts, or an instance is shared")
	}
}
