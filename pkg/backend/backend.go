// Package backend has one interface for the writers of all backends, and delivers payloads to one of
// them with retries. Sinks use it, and edges that have local backends.
//
// # Promises
//
//   - A temporary failure is retried for ever; a payload that is refused for good is halved until
//     the refused items are found, and only these are given up.
//
// # Not here
//
// The source of payloads, and what happens to those that are given up.
package backend

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/backend/file"
	"github.com/penstock/penstock/pkg/backend/loki"
	"github.com/penstock/penstock/pkg/backend/prometheus"
	"github.com/penstock/penstock/pkg/backend/tempo"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Config configures the backends: Tempo for traces, Prometheus for metrics, Loki for logs, and files
// for signals that have no other backend.
type Config struct {
	Tempo      tempo.Config      `yaml:"tempo"`
	Prometheus prometheus.Config `yaml:"prometheus"`
	Loki       loki.Config       `yaml:"loki"`
	File       file.Config       `yaml:"file"`
	// Counts items and discards them, whatever else is set: to measure the cost of everything
	// before a backend.
	Discard bool `yaml:"discard"`
}

// DefaultConfig has no backend, only the defaults of those that may be configured.
func DefaultConfig() Config {
	return Config{
		Tempo:      tempo.DefaultConfig(),
		Prometheus: prometheus.DefaultConfig(),
		Loki:       loki.DefaultConfig(),
		File:       file.Config{MaxBytes: 1 << 30},
	}
}

// Validate reports all errors at once; section is the key under which c is configured, followed by a
// dot, or empty.
func (c Config) Validate(section string) error {
	var errs []error
	check := func(w interface{ Close() error }, err error) {
		if err == nil {
			err = w.Close()
		}
		if err != nil && section != "" {
			err = fmt.Errorf("%s%w", section, err)
		}
		errs = append(errs, err)
	}
	if c.File.MaxBytes < 1<<20 {
		errs = append(errs, fmt.Errorf("%sfile.max_bytes is %v, want at least 1MiB", section, c.File.MaxBytes))
	}
	if c.Tempo.Endpoint != "" {
		check(tempo.New(c.Tempo))
	}
	if c.Prometheus.URL != "" {
		check(prometheus.New(c.Prometheus))
	}
	if c.Loki.URL != "" {
		check(loki.New(c.Loki))
	}
	return errors.Join(errs...)
}

// Writer writes the payloads of one signal to one backend. It is for one goroutine.
type Writer interface {
	// Name is the backend's label.
	Name() string
	// Write returns nil when the backend has stored every item of a payload of
	// one instance, and [fault.Parts] when it has stored all but those named there. It does
	// not keep the payload. Other errors are marked as described in package fault.
	Write(ctx context.Context, instance string, payload []byte) error
	Close() error
}

// Dated is a [Writer] that uses the time at which a payload arrived at its edge. That time is the same
// for every attempt and every process that writes the payload.
type Dated interface {
	// WriteArrived is Write for a payload with a time of arrival; the zero time means now.
	WriteArrived(ctx context.Context, instance string, payload []byte, arrival time.Time) error
}

// Session returns a writer for another goroutine, which shares no memory of earlier payloads with w.
// It need not be closed.
func Session(w Writer) Writer {
	switch w := w.(type) {
	case *prometheus.Writer:
		return w.Session()
	case *loki.Writer:
		return w.Session()
	case named:
		return named{Session(w.Writer), w.name}
	}
	return w
}

// Asked is a [Writer] whose backend refuses old items, and can be asked how old they may be.
type Asked interface {
	// Takes reports whether the backend accepts items from since on while it also receives current
	// ones; text says which setting to change, or has a remark. An error means that the backend gave
	// no answer.
	Takes(ctx context.Context, since, now time.Time) (ok bool, text string, err error)
}

// Takes asks the backend of w, see [Asked]; a backend that cannot be asked counts as accepting
// everything.
func Takes(ctx context.Context, w Writer, since, now time.Time) (ok bool, text string, err error) {
	if n, is := w.(named); is {
		w = n.Writer
	}
	if asked, can := w.(Asked); can {
		return asked.Takes(ctx, since, now)
	}
	return true, "", nil
}

// Named is a further set of backends.
type Named struct {
	// The name of the set, which is appended to the backends' names: prometheus-site-b.
	Name   string `yaml:"name"`
	Config `yaml:",inline"`
}

// UnmarshalYAML begins with the same defaults as the main set.
func (n *Named) UnmarshalYAML(node *yaml.Node) error {
	type plain Named // without this method
	own := plain{Config: DefaultConfig()}
	if err := node.Decode(&own); err != nil {
		return err
	}
	*n = Named(own)
	return nil
}

var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)

// ValidateNamed reports all errors in further sets of backends; section is their key.
func ValidateNamed(section string, all []Named) error {
	var errs []error
	seen := map[string]bool{}
	for i, n := range all {
		key := fmt.Sprintf("%s[%d]", section, i)
		if !nameForm.MatchString(n.Name) || seen[n.Name] {
			errs = append(errs, fmt.Errorf("%s.name is %q: want a unique name of up to 32 lower case letters, digits and -", key, n.Name))
		}
		seen[n.Name] = true
		none := n.File.Dir == "" && !n.Discard
		if none && n.Tempo.Endpoint == "" && n.Prometheus.URL == "" && n.Loki.URL == "" {
			errs = append(errs, fmt.Errorf("%s.name is %q: this set has no backend; set tempo.endpoint, prometheus.url, loki.url or file.dir", key, n.Name))
		}
		errs = append(errs, n.Validate(key+"."))
	}
	return errors.Join(errs...)
}

// Open is [Config.Open] for a named set.
func (n Named) Open(sig otlpwire.Signal) (Writer, error) {
	w, err := n.Config.Open(sig)
	if w == nil || err != nil || n.Name == "" {
		return w, err
	}
	return named{w, w.Name() + "-" + n.Name}, nil
}

// named is a writer of a further set.
type named struct {
	Writer
	name string
}

func (n named) Name() string { return n.name }

func (n named) WriteArrived(ctx context.Context, instance string, payload []byte, arrival time.Time) error {
	return writeArrived(ctx, n.Writer, instance, payload, arrival)
}

func writeArrived(ctx context.Context, w Writer, instance string, payload []byte, arrival time.Time) error {
	if dated, is := w.(Dated); is {
		return dated.WriteArrived(ctx, instance, payload, arrival)
	}
	return w.Write(ctx, instance, payload)
}

// Open returns the writer of a signal; nil if there is none.
func (c Config) Open(sig otlpwire.Signal) (Writer, error) {
	switch {
	case c.Discard:
		return discard{}, nil
	case sig == otlpwire.Traces && c.Tempo.Endpoint != "":
		return tempo.New(c.Tempo)
	case sig == otlpwire.Metrics && c.Prometheus.URL != "":
		return prometheus.New(c.Prometheus)
	case sig == otlpwire.Logs && c.Loki.URL != "":
		return loki.New(c.Loki)
	case c.File.Dir != "":
		return file.New(c.File, sig)
	}
	return nil, nil
}

// discard is a writer without a backend.
type discard struct{}

func (discard) Name() string                                { return "discard" }
func (discard) Write(context.Context, string, []byte) error { return nil }
func (discard) Close() error                                { return nil }
