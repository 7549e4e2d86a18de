// Package domain determines which instances may have spans of the same trace: those of one domain. A trace that
// passes through several instances of a customer is decided as a whole if they are in one domain; without a
// configuration each instance is a domain of its own.
//
//	set := domain.New(cfg)
//	set.Of("acme-shop") // @acme
//
// # Promises
//
//   - A named domain is never taken for an instance: it begins with "@", which no instance id has.
//   - All functions are pure: the same configuration and instance give the same domain on every sink.
//
// # Not here
//
// Which configuration is in force from when on: pkg/sampling/versions. The traces themselves: pkg/sampling/sampler.
package domain

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/penstock/penstock/pkg/envelope"
)

// Config is the key domains: the named domains, of which the first that has an instance counts.
type Config []Named

// Named is a domain of several instances.
type Named struct {
	// The name of the domain: letters, digits, _ and -, as in the id of an instance.
	Name string `yaml:"name" json:"name"`
	// The instances of the domain, names or globs such as acme-*.
	Instances []string `yaml:"instances" json:"instances"`
}

// The bounds of a configuration.
const (
	maxDomains = 256
	maxGlobs   = 256 // of a domain
	maxGlob    = 256 // bytes
	maxBytes   = 64 << 10
)

// Validate reports every mistake at once; section is the key of c in the configuration.
func (c Config) Validate(section string) error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if len(c) > maxDomains {
		wrong("%s has %d domains, want at most %d", section, len(c), maxDomains)
	}
	bytes, first := 0, map[string]string{} // the key of the first domain with a name
	for i, d := range c {
		key := fmt.Sprintf("%s[%d]", section, i)
		bytes += len(d.Name)
		if (envelope.Instance{ID: d.Name}).Validate() != nil {
			wrong("%s.name is %.256q, want 1 to 128 letters, digits, '_' or '-', the first a letter or digit", key, d.Name)
		} else if other := first[d.Name]; other != "" {
			wrong("%s.name is %q, which %s has, too: want another name", key, d.Name, other)
		} else {
			first[d.Name] = key
		}
		if n := len(d.Instances); n < 1 || n > maxGlobs {
			wrong("%s.instances has %d entries, want 1 to %d names or globs", key, n, maxGlobs)
		}
		for j, g := range d.Instances {
			bytes += len(g)
			if _, err := path.Match(g, ""); err != nil || g == "" || len(g) > maxGlob || !utf8.ValidString(g) {
				wrong("%s.instances[%d] is %.256q, want a name or a glob such as shop-*, of at most %d bytes", key, j, g, maxGlob)
			}
		}
	}
	if bytes > maxBytes {
		wrong("%s has %d bytes of names and globs, want at most %d", section, bytes, maxBytes)
	}
	return errors.Join(errs...)
}

// Equal reports whether both have the same domains, in the same order.
func (c Config) Equal(other Config) bool {
	return slices.EqualFunc(c, other, func(a, b Named) bool { return a.Name == b.Name && slices.Equal(a.Instances, b.Instances) })
}

// Set finds the domain of an instance. It is immutable and safe for concurrent use; in a nil Set each instance is
// a domain of its own.
type Set struct{ domains []Named } // their names with "@"

// New returns the domains of a valid configuration.
func New(c Config) *Set {
	s := &Set{slices.Clone(c)}
	for i := range s.domains {
		s.domains[i].Name = named + s.domains[i].Name
	}
	return s
}

// Of returns the domain of an instance: "@" and the name of the first one that has it, else the instance itself.
func (s *Set) Of(instance string) string {
	if s == nil {
		return instance
	}
	for _, d := range s.domains {
		for _, g := range d.Instances {
			if is, _ := path.Match(g, instance); is {
				return d.Name
			}
		}
	}
	return instance
}

// Version is a set with the sequence from which it is in force.
type Version struct {
	Number uint64
	From   uint64 // the first sequence, of the stream that is read
	*Set
}

// Versions are sets by number. Each is in force for traces that begin at its sequence or later, until the next is.
type Versions []Version

// Of returns the domain of an instance for traces that begin at seq, and the other domains that it had before,
// oldest first, each once. Before the first version it is a domain of its own.
func (v Versions) Of(instance string, seq uint64) (now string, before []string) {
	now = instance
	for _, one := range v {
		if one.From > seq {
			continue
		}
		if next := one.Of(instance); next != now {
			if !slices.Contains(before, now) {
				before = append(before, now)
			}
			now = next
		}
	}
	return now, slices.DeleteFunc(before, func(d string) bool { return d == now })
}

// Left returns the sequence at which an instance was last put out of a domain; 0 if it never was.
func (v Versions) Left(instance, domain string) (seq uint64) {
	was := instance
	for _, one := range v {
		is := one.Of(instance)
		if was == domain && is != domain {
			seq = one.From
		}
		was = is
	}
	return seq
}

// Shared reports whether a domain is one that is named, which several instances may be in.
func Shared(domain string) bool { return strings.HasPrefix(domain, named) }

// named begins the names of such domains.
const named = "@"
