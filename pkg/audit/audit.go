// Package audit reads from the hub what has become of the items that it has acknowledged, and what is lost.
//
// It reads the tallies of the lanes (package tally), the messages after them, what waits in ASIDE,
// dead letters, and the losses that keepers have recorded. It changes nothing.
package audit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/keeper"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/tally"
)

// Report is the result of an audit, as JSON too.
type Report struct {
	Ledger      []Balance     `json:"ledger"`
	InFlight    []Line        `json:"in_flight"`
	DeadLetters []Line        `json:"dead_letters"`
	Losses      []keeper.Loss `json:"losses"`
}

// Line is the number of items of an instance at one place.
type Line struct {
	Instance string    `json:"instance"`
	Signal   string    `json:"signal"`
	Backend  string    `json:"backend"` // or router, for spans that are not in SPANS yet
	Items    uint64    `json:"items"`
	Messages uint64    `json:"messages"`
	Oldest   time.Time `json:"oldest"` // when the hub stored it
}

// places adds up lines.
type places map[Line]*Line

func (t places) add(instance, signal, backend string, items int, stored time.Time) {
	key := Line{Instance: instance, Signal: signal, Backend: backend}
	line := t[key]
	if line == nil {
		line = &Line{Instance: instance, Signal: signal, Backend: backend, Oldest: stored}
		t[key] = line
	}
	line.Items += uint64(max(items, 0))
	line.Messages++
	if stored.Before(line.Oldest) {
		line.Oldest = stored
	}
}

func (t places) lines() []Line {
	all := make([]Line, 0, len(t))
	for _, line := range t {
		all = append(all, *line)
	}
	slices.SortFunc(all, func(a, b Line) int {
		return cmp.Or(cmp.Compare(a.Instance, b.Instance), cmp.Compare(a.Signal, b.Signal), cmp.Compare(a.Backend, b.Backend))
	})
	return all
}

// Read reads the hub; it writes its progress to progress.
func Read(ctx context.Context, conn *bus.Conn, now time.Time, since time.Duration, progress io.Writer) (r Report, err error) {
	// Before the ends: what is routed by these tallies is in SPANS up to its end.
	counted, err := tally.All(ctx, conn)
	if err != nil {
		return r, err
	}
	ends, err := streamEnds(ctx, conn)
	if err != nil {
		return r, err
	}
	lanes, err := conn.Lanes(ctx)
	if err != nil {
		return r, err
	}
	ways, ledger := places{}, ledgerOf(counted, since, now)
	for _, l := range lanes {
		t, known := counted[l.Stream][l.Name]
		if l.Lag == 0 && (!known || t.Upto >= ends[l.Stream]) {
			continue
		}
		if !known {
			t.Upto = ends[l.Stream]
		}
		if err := onTheWay(ctx, conn, l, t.Upto, ends[l.Stream], ways, ledger, progress); err != nil {
			return r, err
		}
	}
	r.Ledger = ledger.lines()
	if err := setAside(ctx, conn, ends[bus.Aside], ways); err != nil {
		return r, err
	}
	dead := places{}
	if err := conn.Letters(ctx, "", "", false, func(l bus.Letter) bool {
		if l.Seq > ends[bus.DeadLetter] {
			return false
		}
		dead.add(l.Instance, l.Signal, l.Backend, l.Items, l.At)
		return true
	}); err != nil {
		return r, err
	}
	r.InFlight, r.DeadLetters = ways.lines(), dead.lines()
	r.Losses, err = losses(ctx, conn, since, now)
	return r, err
}

// losses returns those of the last while, of all times if since is 0.
func losses(ctx context.Context, conn *bus.Conn, since time.Duration, now time.Time) ([]keeper.Loss, error) {
	all, err := keeper.Losses(ctx, conn)
	some := []keeper.Loss{}
	for _, l := range all {
		if since == 0 || l.At.After(now.Add(-since)) {
			some = append(some, l)
		}
	}
	return some, err
}

// streamEnds returns the last sequences; later messages are not read.
func streamEnds(ctx context.Context, conn *bus.Conn) (map[string]uint64, error) {
	ends := map[string]uint64{}
	for _, stream := range []string{"TRACES", "METRICS", "LOGS", bus.Spans, bus.Aside, bus.DeadLetter} {
		state, err := conn.State(ctx, stream)
		if err != nil && !errors.Is(err, bus.ErrNoStream) {
			return nil, err
		}
		ends[stream] = state.LastSeq
	}
	return ends, nil
}

// onTheWay adds what a lane has not finished, up to a sequence, to ways, and what its tally does not have,
// from counted on, to ledger.
func onTheWay(ctx context.Context, conn *bus.Conn, l bus.LaneState, counted, end uint64, ways places, ledger ledger, progress io.Writer) error {
	spans := l.Stream == bus.Spans
	cfg := bus.ReaderConfig{Stream: l.Stream, From: min(l.Done, counted) + 1, Headers: !spans}
	if l.Filter != "" {
		cfg.Filters = []string{l.Filter}
	}
	r, err := conn.OpenReaderOf(ctx, cfg)
	if err != nil {
		return err
	}
	defer r.Close()
	backend := bus.LaneBackend(l.Name)
	signal := strings.ToLower(l.Stream)
	if spans {
		signal = otlpwire.Traces.String()
	}
	said := time.Now()
	var buf []byte
	add := func(seq uint64, instance string, items int, stored time.Time) {
		if seq > l.Done {
			ways.add(instance, signal, backend, items, stored)
		}
		if seq > counted {
			ledger.inFlight(instance, signal, backend, items)
		}
	}
	return r.Each(ctx, func(d bus.Delivery) bool {
		if d.Seq > end {
			return false
		}
		if time.Since(said) > 2*time.Second {
			said = time.Now()
			_, _ = fmt.Fprintf(progress, "%s/%s: %d messages left\n", l.Stream, l.Name, r.Left())
		}
		if !spans {
			add(d.Seq, d.Instance(), max(d.Header.Items, 1), d.Stored)
			return true
		}
		d.Decompress(&buf)
		for body := d.Body; d.Err == nil && len(body) > 0; {
			var f envelope.Frame
			if f, body, d.Err = envelope.NextFrame(body); d.Err == nil {
				add(d.Seq, f.Instance, otlpwire.Count(otlpwire.Traces, f.Payload), d.Stored)
			}
		}
		if d.Err != nil {
			add(d.Seq, d.Instance(), 1, d.Stored) // unreadable
		}
		return true
	})
}

// setAside adds what waits in ASIDE, which hubs of older versions do not have.
func setAside(ctx context.Context, conn *bus.Conn, end uint64, ways places) error {
	if end == 0 {
		return nil
	}
	r, err := conn.OpenReaderOf(ctx, bus.ReaderConfig{Stream: bus.Aside, Headers: true})
	if err != nil {
		return err
	}
	defer r.Close()
	return r.Each(ctx, func(d bus.Delivery) bool {
		if d.Seq > end {
			return false
		}
		if tokens := strings.Split(d.Subject, "."); len(tokens) == 5 { // aside.<signal>.<backend>.<p>.<instance>
			ways.add(tokens[4], tokens[1], tokens[2]+", aside", d.Header.Items, d.Stored)
		}
		return true
	})
}
