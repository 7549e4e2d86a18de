package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/backend"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sink"
)

// table answers with one status after the other, the last one for ever.
type table struct {
	jobs
	answers []replay.Status
	err     error
	then    func() // after the first answer
	removed []string
	filed   bool
}

func (j *table) Status(context.Context, string) (s replay.Status, err error) {
	if j.err != nil {
		return s, j.err
	}
	s = j.answers[0]
	if len(j.answers) > 1 {
		j.answers = j.answers[1:]
	}
	if j.then != nil {
		j.then()
	}
	return s, nil
}

func (j *table) File(_ context.Context, job *replay.Job, by string, now time.Time) (*replay.Job, bool, error) {
	job.ID, job.By, job.At = "r1", by, now
	return job, j.filed, j.err
}

func (j *table) Remove(_ context.Context, id, _ string, _ time.Time) error {
	j.removed = append(j.removed, id)
	return nil
}

// status is a job for logs with one lane, of which half is done.
func status(change func(*replay.Status)) replay.Status {
	lane := replay.Lane{Signal: "logs", Messages: 10, First: 1, Last: 10}
	s := replay.Status{
		Job:    &replay.Job{ID: "r1", State: replay.Running, Request: replay.Request{Signals: []string{"logs"}}},
		Plan:   &replay.Plan{Lanes: []replay.Lane{lane}},
		Checks: map[string]replay.Check{"logs": {OK: true}},
		Lanes:  []replay.LaneStatus{{Lane: lane, Progress: replay.Progress{Floor: 5, Delivered: 7, SampledOut: 3, Dead: 2}}},
	}
	change(&s)
	return s
}

// output returns a file for a command's output, and what is in it so far.
func output(t *testing.T) (*os.File, func() string) {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = out.Close() })
	return out, func() string {
		text, err := os.ReadFile(out.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
}

// TestFollow: a job is followed until it has ended, and how it ended is said.
func TestFollow(t *testing.T) {
	done := status(func(s *replay.Status) { s.Lanes[0].Done = true })
	for name, tc := range map[string]struct {
		answers []replay.Status
		err     error
		detach  bool
		out     string
		want    string // with what the error ends, empty for none
	}{
		"done":    {answers: []replay.Status{done}, out: "job r1 is done: 7 items delivered, 3 spans sampled out, 2 dead-lettered"},
		"stopped": {answers: []replay.Status{status(func(s *replay.Status) { s.State = replay.Stopped })}, out: "job r1 is stopped: 7 items"},
		"gone":    {answers: []replay.Status{status(func(s *replay.Status) { s.Lanes[0].Done, s.Lanes[0].Gone = true, 4 })}, out: "job r1 is done", want: "4 messages expired from the streams before they were replayed; some of them may have been in the range"},
		"not asked yet": {answers: []replay.Status{status(func(s *replay.Status) { s.Checks = nil }), done},
			out: "asking the backends whether they accept data of that age"},
		"running": {answers: []replay.Status{status(func(s *replay.Status) { s.Lanes[0].Wait = "busy" }), done}, out: "7 items  0/s  0  (busy)  logs 50 %"},
		"refused": {answers: []replay.Status{status(func(s *replay.Status) { s.Checks["logs"] = replay.Check{Text: "too old"} })},
			want: "job r1 is refused, nothing was sent: logs: too old\nchange that and try again, or run it with --accept-loss"},
		"no plan": {answers: []replay.Status{status(func(s *replay.Status) { s.Plan, s.Lanes = &replay.Plan{Error: "nothing there"}, nil })},
			want: "job r1 is refused, nothing was sent: nothing there"},
		"no answer": {err: errors.New("no responders"), want: "no responders"},
		"detached":  {answers: []replay.Status{status(func(*replay.Status) {})}, detach: true, out: "detached, the job continues: penstock replay status r1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			j := &table{answers: tc.answers, err: tc.err}
			if tc.detach {
				j.then = cancel
			}
			out, said := output(t)
			c := &replayCommand{jobs: j, out: out}
			err := c.follow(ctx, "r1")
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.HasSuffix(err.Error(), tc.want)) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
			if !strings.Contains(said(), tc.out) {
				t.Errorf("printed %q, want %q", said(), tc.out)
			}
		})
	}
}

// TestARefusedJobIsRemoved: by who filed it, and by nobody else.
func TestARefusedJobIsRemoved(t *testing.T) {
	refused := status(func(s *replay.Status) { s.Checks["logs"] = replay.Check{Text: "too old"} })
	for _, filed := range []bool{true, false} {
		j := &table{answers: []replay.Status{refused}, filed: filed}
		out, said := output(t)
		c := &replayCommand{jobs: j, out: out}
		err := c.file(t.Context(), &replay.Job{Request: refused.Request}, false, time.Now())
		if !errors.Is(err, errRefused) || (len(j.removed) == 1) != filed || strings.Contains(said(), "exists already") == filed {
			t.Errorf("filed %v: %v, removed %v: %s", filed, err, j.removed, said())
		}
	}
	j := &table{filed: true}
	out, said := output(t)
	if err := (&replayCommand{jobs: j, out: out}).file(t.Context(), &replay.Job{Request: refused.Request}, true, time.Now()); err != nil || !strings.HasPrefix(said(), "job r1: logs of all instances") {
		t.Errorf("detached: %v, %s", err, said())
	}
}

// taker is a writer that stores everything.
type taker struct{ backend.Writer }

func (taker) Name() string                                { return "loki" }
func (taker) Write(context.Context, string, []byte) error { return nil }

// TestWhichLettersArePassedOver: those that no backend of the configuration can take.
func TestWhichLettersArePassedOver(t *testing.T) {
	var writers sink.Writers
	writers[otlpwire.Logs] = []backend.Writer{taker{}}
	r := newResending(writers, io.Discard)
	sound := bus.Letter{Signal: "logs", Refusal: bus.Refusal{Backend: "loki", Reason: "refused"}}
	for name, tc := range map[string]struct {
		change func(*bus.Letter)
		why    string
	}{
		"sound":           {func(*bus.Letter) {}, ""},
		"undecodable":     {func(l *bus.Letter) { l.Reason, l.Backend = ledger.DeadUndecodable, "other" }, "they are not valid OTLP"},
		"another backend": {func(l *bus.Letter) { l.Backend = "loki-b" }, "this configuration has no backend loki-b for logs"},
		"another signal":  {func(l *bus.Letter) { l.Signal = "profiles" }, "this configuration has no backend loki for profiles"},
		"damaged":         {func(l *bus.Letter) { l.Body = []byte{0xff} }, "they are not valid OTLP"},
		"not decoded":     {func(l *bus.Letter) { l.Err = errors.New("encoding") }, "they are not valid OTLP"},
	} {
		l := sound
		tc.change(&l)
		sig, w, why := r.addressee(l)
		if (why == "") != (tc.why == "") || !strings.Contains(why, tc.why) {
			t.Errorf("%s: %q", name, why)
		}
		if why != "" {
			continue
		}
		if refused, goOn := r.write(t.Context(), sig, w, l); sig != otlpwire.Logs || refused != 0 || !goOn {
			t.Errorf("%s: %v, %d refused, %v", name, sig, refused, goOn)
		}
	}
}
