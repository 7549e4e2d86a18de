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
	"log/slog"
	"math/rand/v2"
	"regexp"
	"slices"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/backend/file"
	"github.com/penstock/penstock/pkg/backend/loki"
	"github.com/penstock/penstock/pkg/backend/prometheus"
	"github.com/penstock/penstock/pkg/backend/tempo"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/httpclient"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Config says where the signals go: traces to Tempo, metrics to Prometheus, logs to
// Loki, and to files what has no other.
type Config struct {
	Tempo      tempo.Config      `yaml:"tempo"`
	Prometheus prometheus.Config `yaml:"prometheus"`
	Loki       loki.Config       `yaml:"loki"`
	File       file.Config       `yaml:"file"`
	// Discard counts items and throws them away, whatever else is set: to measure what
	// everything before a backend costs.
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
	// WriteArrived is Write of a payload of that arrival; the zero time stands for now.
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
	// Name stands behind the backends' own: prometheus-site-b.
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

// Delivery brings payloads of one signal to one backend.
type Delivery struct {
	Signal otlpwire.Signal
	Writer Writer
	Log    *slog.Logger
	// Arrival is when what is written arrived at its edge, in Unix nanoseconds; 0: nobody knows.
	Arrival int64
	// Delivered counts items that the backend has.
	Delivered func(items int)
	// Deduplicated counts those among them that the backend has refused because it has
	// them already, as far as can be known.
	Deduplicated func(items int)
	// Paused says whether it waits for a person to mend an address or a credential.
	Paused func(bool)
	// Waits, where it is set, is told when a payload is written, with why that was not done
	// before each pause, and nil when it is over.
	Waits func(why error)
	// GiveUp takes a payload that the backend will never take, in which no half is
	// better than the other. It returns false when ctx ended first.
	GiveUp func(ctx context.Context, instance string, payload []byte, reason string, why error) bool
	// Aside, where it is set, takes a payload out of the way: before it is tried, with why
	// nil, when older ones of its instance are waiting there, and after some tries with a
	// refusal marked by [fault.Sender]. again says that the payload may have been written before.
	// It returns put when it has taken it, and goOn false when ctx ended first. It may change Writer.
	Aside func(ctx context.Context, instance string, payload []byte, again bool, why error) (put, goOn bool)
	// refused is how many of the payload at hand were given up one after the other, asked how
	// often the backend was asked for it.
	refused, asked int
	// Owned, where it is set, is asked before something is tried again or given up:
	// an owner that has slept must not bring old items behind newer ones.
	Owned func() bool
}

// maxRefused is after how many culprits in a row the rest of a payload that is refused, too, is
// given up as it is: all of an instance whose clock is wrong must not cost everybody of its
// partition two requests an item.
const maxRefused = 256

// maxAsked is after how many requests for one payload what is refused, too, is given up as it is:
// good and bad ones in turn make two requests an item. What may be a repetition is told apart to the end.
const maxAsked = 512

// asideAfter is how often a backend must refuse who sends a payload before that goes aside, and
// maxPatience the longest pause for which that waits.
const (
	asideAfter  = 3
	maxPatience = time.Second
)

// definite reports whether a backend has said that it stored nothing.
func definite(err error) bool {
	var answer *httpclient.Error
	return errors.As(err, &answer) && slices.Contains([]int{401, 403, 404, 405, 429}, answer.Status) && !errors.Is(err, httpclient.ErrBegun)
}

// Write returns true when every one of a payload's items is stored or given up, and
// false when ctx ended first. again says that the payload may have been written before.
func (d *Delivery) Write(ctx context.Context, instance string, payload []byte, items int, again bool) bool {
	d.refused, d.asked = 0, 0
	if d.Waits != nil {
		d.Waits(errNoAnswer)
		defer d.Waits(nil)
	}
	return d.write(ctx, instance, payload, items, again)
}

// errNoAnswer is what a write waits for first.
var errNoAnswer = errors.New("the backend gives no answer")

// pause waits before the next attempt. It returns false when ctx ended, or another owner may have
// come meanwhile.
func (d *Delivery) pause(ctx context.Context, wait time.Duration, why error) bool {
	if d.Waits != nil {
		d.Waits(why)
	}
	return backoff.Sleep(ctx, wait) && (d.Owned == nil || d.Owned())
}

func (d *Delivery) write(ctx context.Context, instance string, payload []byte, items int, again bool) bool {
	paused, said := false, false
	pause := func(now bool) {
		if now != paused {
			paused = now
			d.Paused(now)
		}
	}
	defer pause(false)
	var arrival time.Time
	if d.Arrival > 0 {
		arrival = time.Unix(0, d.Arrival)
	}
	if d.Aside != nil {
		if put, goOn := d.Aside(ctx, instance, payload, again, nil); put || !goOn {
			return goOn
		}
	}
	for attempt := 1; ; attempt++ {
		d.asked++
		err := writeArrived(ctx, d.Writer, instance, payload, arrival)
		var parts fault.Parts
		if err == nil || errors.As(err, &parts) {
			if attempt > 1 {
				d.Log.Info("backend takes data again", "attempts", attempt)
			}
			for _, p := range parts {
				if p.Known {
					d.Deduplicated(p.Items)
					continue
				}
				if items -= p.Items; !d.GiveUp(ctx, instance, p.Payload, p.Reason, p.Err) {
					return false
				}
			}
			d.refused = 0
			d.Delivered(items)
			return true
		}
		if ctx.Err() != nil || (d.Owned != nil && !d.Owned()) {
			return false
		}
		if reason, permanent := fault.Reason(err); permanent {
			first, second, several := otlpwire.Halve(d.Signal, payload)
			if several && !fault.IsWhole(err) && d.refused < maxRefused && (again || d.asked < maxAsked) {
				return d.write(ctx, instance, first, otlpwire.Count(d.Signal, first), again) && d.write(ctx, instance, second, otlpwire.Count(d.Signal, second), again)
			}
			// A sample is a part of a series, in order; a line that is too far behind need not be there.
			if again && !several && reason == ledger.DeadOutOfOrder && d.Signal == otlpwire.Metrics {
				d.Deduplicated(items)
				d.Delivered(items)
				return true
			}
			d.refused++
			return d.GiveUp(ctx, instance, payload, reason, err)
		}
		again = again || !definite(err) // the answer may be lost, and not the request
		wait := fault.Pause(err, attempt, rand.Float64())
		if d.Aside != nil && fault.IsSender(err) {
			if attempt < asideAfter && (wait <= maxPatience || fault.IsConfiguration(err)) {
				if !d.pause(ctx, min(wait, maxPatience/4), err) {
					return false
				}
				continue
			}
			if put, goOn := d.Aside(ctx, instance, payload, again, err); put || !goOn {
				return goOn
			}
		}
		was := paused
		pause(fault.IsConfiguration(err))
		switch {
		case paused && !was:
			d.Log.Error("lane paused: the backend's address or credential is wrong; the data is kept", "err", err)
		case !said:
			said = true
			d.Log.Warn("backend does not take data, will try again", "err", err)
		}
		if !d.pause(ctx, wait, err) {
			return false
		}
	}
}
