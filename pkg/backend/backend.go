// Package backend puts the writers of all backends behind one interface, and brings
// payloads to one of them, whatever it takes. Sinks use it, and edges that have
// backends of their own.
//
// # Promises
//
//   - What may heal is tried again for ever; what will not is halved until the
//     culprits are found, and they alone are given up.
//
// # Not here
//
// Where payloads come from, and what becomes of those that are given up.
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

// Config says where the signals go: traces to Tempo, metrics to Prometheus, logs to
// Loki, and to files what has no other.
type Config struct {
	Tempo      tempo.Config      `yaml:"tempo"`
	Prometheus prometheus.Config `yaml:"prometheus"`
	Loki       loki.Config       `yaml:"loki"`
	File       file.Config       `yaml:"file"`
	// Counts items and discards them, whatever else is set: to measure the cost of everything
	// before a backend.
	Discard bool `yaml:"discard"`
}

// DefaultConfig has no backend but the labels of those that may be set.
func DefaultConfig() Config {
	return Config{
		Tempo:      tempo.DefaultConfig(),
		Prometheus: prometheus.DefaultConfig(),
		Loki:       loki.DefaultConfig(),
		File:       file.Config{MaxBytes: 1 << 30},
	}
}

// Validate reports every mistake at once; section is the key that c stands under,
// with a dot behind, or empty.
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

// Writer writes the payloads of one signal to one backend. One goroutine uses it.
type Writer interface {
	// Name is the backend's label.
	Name() string
	// Write returns nil when the backend has stored every item of a payload of
	// one instance, and [fault.Parts] when it has stored all but those named there. It does
	// not keep the payload. Other errors are marked as package fault says.
	Write(ctx context.Context, instance string, payload []byte) error
	Close() error
}

// Dated is a [Writer] to which it matters when a payload arrived at its edge. That time stays the
// same however often, and by whomever, the payload is written.
type Dated interface {
	// WriteArrived is Write of a payload with a time of arrival; the zero time means now.
	WriteArrived(ctx context.Context, instance string, payload []byte, arrival time.Time) error
}

// Session returns a writer for another goroutine, which remembers nothing of what w has
// written. It is not closed.
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

// Asked is a [Writer] whose backend refuses what is old, and says from when on.
type Asked interface {
	// Takes reports whether the backend takes items from since on, while it is also
	// fed with those of now; text says what to change, or what to know. An error means
	// that it gave no answer.
	Takes(ctx context.Context, since, now time.Time) (ok bool, text string, err error)
}

// Takes asks the backend of w, see [Asked]; one that cannot be asked takes everything.
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

// UnmarshalYAML begins with the defaults of one that is alone.
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

// ValidateNamed reports every mistake in further sets of backends; section is their key.
func ValidateNamed(section string, all []Named) error {
	var errs []error
	seen := map[string]bool{}
	for i, n := range all {
		key := fmt.Sprintf("%s[%d]", section, i)
		if !nameForm.MatchString(n.Name) || seen[n.Name] {
			errs = append(errs, fmt.Errorf("%s.name is %q: want one of its own, up to 32 lower case letters, digits and -", key, n.Name))
		}
		seen[n.Name] = true
		none := n.File.Dir == "" && !n.Discard
		if none && n.Tempo.Endpoint == "" && n.Prometheus.URL == "" && n.Loki.URL == "" {
			errs = append(errs, fmt.Errorf("%s.name is %q: it has no backend; set tempo.endpoint, prometheus.url, loki.url or file.dir", key, n.Name))
		}
		errs = append(errs, n.Validate(key+"."))
	}
	return errors.Join(errs...)
}

// Open is [Config.Open] of a set with a name.
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

// Open returns the writer of a signal; nil when there is none.
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

// discard is a writer that has no backend.
type discard struct{}

func (discard) Name() string                                { return "discard" }
func (discard) Write(context.Context, string, []byte) error { return nil }
func (discard) Close() error                                { return nil }
