// Package fault classifies errors by what has to happen next: give up, retry, or stop until an operator
// intervenes.
//
// An error without a mark is temporary: the work is retried after a backoff.
package fault

import (
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"time"
)

type marked struct {
	err    error
	reason string        // of a permanent fault, a closed set: it becomes a label
	config bool          // wrong configuration: data is kept, the lane pauses
	after  time.Duration // the server asked for this pause
	whole  bool          // a permanent fault of the work as a whole
}

func (m *marked) Error() string { return m.err.Error() }
func (m *marked) Unwrap() error { return m.err }

// Permanent marks work that will never succeed unchanged: it is narrowed down and dead-lettered.
// reason is a short name from a closed set.
func Permanent(reason string, err error) error { return &marked{err: err, reason: reason} }

// Whole is [Permanent] for an error that concerns every part of the work: it is not narrowed down.
func Whole(reason string, err error) error { return &marked{err: err, reason: reason, whole: true} }

// IsWhole reports whether err was marked by [Whole].
func IsWhole(err error) bool {
	m, is := errors.AsType[*marked](err)
	return is && m.whole
}

// Configuration marks a refusal that an operator must resolve (401, 403, 404): the data is kept and
// there is a longer pause before the next attempt.
func Configuration(err error) error { return &marked{err: err, config: true} }

type sender struct{ error }

func (s sender) Unwrap() error { return s.error }

// Sender marks, in addition to other marks, a refusal that concerns one tenant, or the rate or data of only
// that tenant (401, 403, 404, 429): another one may be accepted.
func Sender(err error) error { return sender{err} }

// IsSender reports whether err was marked by [Sender].
func IsSender(err error) bool {
	_, is := errors.AsType[sender](err)
	return is
}

// After marks a refusal that asks for a pause.
func After(err error, pause time.Duration) error { return &marked{err: err, after: pause} }

// Reason returns the reason of a permanent fault; ok is false for other errors.
func Reason(err error) (reason string, ok bool) {
	if m, is := errors.AsType[*marked](err); is && m.reason != "" {
		return m.reason, true
	}
	return "", false
}

// IsConfiguration reports whether err was marked by [Configuration].
func IsConfiguration(err error) bool {
	m, is := errors.AsType[*marked](err)
	return is && m.config
}

// Panic is the error of work that panicked.
type Panic struct {
	Value any
	Stack string
}

func (p *Panic) Error() string { return fmt.Sprintf("panic: %v", p.Value) }

// Guard does a piece of work, and returns a [Panic] if it panics: one bad input must not end the process, or
// the next one that reads it. What the work has changed is then not to be relied on.
func Guard(do func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &Panic{v, string(debug.Stack())}
		}
	}()
	return do()
}

const (
	minPause    = 100 * time.Millisecond
	maxPause    = 30 * time.Second
	configPause = 30 * time.Second

	// MaxHubPause caps the pauses between attempts to reach the hub, so that a backlog is sent soon
	// after an outage: a thousand edges that try every five seconds are no load.
	MaxHubPause = 5 * time.Second
)

// Pause returns how long to wait before attempt number n+1, n counted from 1: doubling from 100 ms
// to 30 s, at least what the server asked for, but never more than 30 s (a Retry-After of 10^9 must
// not stop penstock for 30 years). jitter is a number in [0,1) and shortens the pause by up to a
// quarter.
func Pause(err error, n int, jitter float64) time.Duration {
	if IsConfiguration(err) {
		return configPause
	}
	pause := maxPause
	if n < 10 {
		pause = min(minPause<<max(n-1, 0), maxPause)
	}
	pause -= time.Duration(jitter * float64(pause) / 4)
	if m, is := errors.AsType[*marked](err); is {
		pause = max(pause, min(m.after, maxPause))
	}
	return pause
}

// Part is a part of a payload that a backend refuses for good, or already has.
type Part struct {
	Payload []byte
	Items   int
	Reason  string // as for [Permanent]
	Err     error  // why
	// Known says that the backend already has these items: they count as stored, and there is no payload.
	Known bool
}

// Parts is an error that means that the rest of the payload is stored.
type Parts []Part

// Rejections collects, by reason, the items of a payload that a writer itself rejects.
type Rejections []Rejection

// Rejection is the items for one reason.
type Rejection struct {
	Reason string
	Err    error // of the first
	Items  []int // by number in the payload, ascending
}

// Add records an item.
func (r *Rejections) Add(reason string, err error, item int) {
	for i := range *r {
		if one := &(*r)[i]; one.Reason == reason {
			one.Items = append(one.Items, item)
			return
		}
	}
	*r = append(*r, Rejection{reason, err, []int{item}})
}

// Parts returns them as an error; nil if there are none. pick returns a payload with the items of the given
// numbers.
func (r Rejections) Parts(pick func(items []int) []byte) error {
	if len(r) == 0 {
		return nil
	}
	var parts Parts
	for _, one := range r {
		parts = append(parts, Part{Payload: pick(one.Items), Items: len(one.Items), Reason: one.Reason, Err: one.Err})
	}
	return parts
}

var errKnown = errors.New("stored already")

// Known adds to the error of [Rejections.Parts] the number of items that the backend already has.
func Known(err error, items int) error {
	if items == 0 {
		return err
	}
	parts, _ := errors.AsType[Parts](err)
	return append(parts, Part{Items: items, Err: errKnown, Known: true})
}

// Error lists the reasons.
func (p Parts) Error() string {
	var text []string
	for _, part := range p {
		text = append(text, part.Err.Error())
	}
	return strings.Join(text, "; ")
}
