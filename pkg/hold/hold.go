// Package hold is how an instance that fills a stream of the hub is told to hold back: its edges and gateways ask the
// keeper, and keep what they have, or refuse it, while the answer says so.
//
// # Promises
//
//   - Whoever gets no answer does not hold back: no keeper runs, or a credential of an earlier version may not ask.
//   - Asking holds up nobody: an answer is at most [Interval] and the time of one request old.
//
// # Not here
//
// Who has to hold back: package keeper. An edge that does not ask: docs/backends.md.
package hold

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
)

const (
	subject = "penstock.hold."

	// Interval is how old an answer may be before the keeper is asked again.
	Interval = 5 * time.Second

	// deniedInterval is the same where the credential does not allow to ask: each attempt is an error in the logs
	// of both sides.
	deniedInterval = 10 * time.Minute

	// maxKnown bounds the instances whose answers are known.
	maxKnown = 4096
)

// Answer says of which signals an instance is to hold back, and why.
type Answer struct {
	Signals []string `json:"signals,omitempty"`
	Why     string   `json:"why,omitempty"`
}

// Serve answers requests until stop, with what of returns for an instance.
func Serve(conn *bus.Conn, of func(instance string) Answer) (stop func(), err error) {
	return conn.Serve(subject+"*", "sinks", func(subj string, _ []byte) []byte {
		text, _ := json.Marshal(of(strings.TrimPrefix(subj, subject))) // cannot fail
		return text
	})
}

// Asker knows the answers for instances. It is safe for concurrent use.
type Asker struct {
	log *slog.Logger

	mu   sync.Mutex
	of   map[string]*known
	work context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup
}

// known is the last answer for an instance.
type known struct {
	Answer
	next  time.Time // when to ask again
	asked bool      // a request is on its way
}

// NewAsker returns an asker, which ends with Close.
func NewAsker(log *slog.Logger) *Asker {
	a := &Asker{log: log, of: map[string]*known{}}
	a.work, a.stop = context.WithCancel(context.Background())
	return a
}

// Close ends what is on its way.
func (a *Asker) Close() {
	if a == nil {
		return
	}
	a.mu.Lock()
	a.stop()
	a.mu.Unlock()
	a.wg.Wait()
}

// Held returns why an instance is to hold back with a signal, by the last answer; empty if it is not. When that is old,
// it asks again, and does not wait for it. Nobody holds back for a nil asker.
func (a *Asker) Held(conn *bus.Conn, instance string, sig otlpwire.Signal, now time.Time) (why string) {
	if a == nil {
		return ""
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	k := a.of[instance]
	if k == nil {
		if len(a.of) >= maxKnown {
			clear(a.of)
		}
		k = new(known)
		a.of[instance] = k
	}
	if !k.asked && !now.Before(k.next) && conn != nil && a.work.Err() == nil {
		k.asked = true
		a.wg.Go(func() { a.ask(conn, instance, k) })
	}
	if slices.Contains(k.Signals, sig.String()) {
		return k.Why
	}
	return ""
}

// Asks reports whether a request is on its way.
func (a *Asker) Asks() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, k := range a.of {
		if k.asked {
			return true
		}
	}
	return false
}

func (a *Asker) ask(conn *bus.Conn, instance string, k *known) {
	var answer Answer
	text, err := conn.Ask(a.work, subject+instance, nil)
	if err == nil {
		err = json.Unmarshal(text, &answer)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	next := Interval
	if errors.Is(err, bus.ErrDenied) {
		next = deniedInterval
		a.log.Warn("the credential does not allow to ask whether to hold back: this instance may fill the hub for all; see docs/upgrading.md", "instance", instance, "err", err)
	}
	if (len(answer.Signals) > 0) != (len(k.Signals) > 0) {
		a.log.Warn("the hub's keeper says which signals are to be held back now", "instance", instance, "signals", answer.Signals, "because", answer.Why)
	}
	k.Answer, k.next, k.asked = answer, time.Now().Add(next), false
}
