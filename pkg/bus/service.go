package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
)

// How much may wait for [Conn.Serve] at most, in requests and bytes; requests beyond that get
// no answer.
const (
	maxAsked      = 64
	maxAskedBytes = 16 << 20
)

// Serve answers requests on a subject, one after the other, as a member of a group: each request
// reaches one member. The credential determines who may ask, by the tokens that it allows in place
// of the subject's wildcards.
func (c *Conn) Serve(subject, group string, answer func(subject string, body []byte) []byte) (stop func(), err error) {
	sub, err := c.nc.QueueSubscribe(subject, group, func(m *nats.Msg) {
		if m.Reply != "" {
			_ = m.Respond(answer(m.Subject, m.Data)) // if it fails, the caller asks again
		}
	})
	if err == nil {
		err = sub.SetPendingLimits(maxAsked, maxAskedBytes)
	}
	if err != nil {
		return nil, fmt.Errorf("serve %s: %w", subject, err)
	}
	return func() { _ = sub.Unsubscribe() }, nil
}

// ErrUnserved reports that nobody answers a request: no sink runs, or the credential does not
// allow the subject.
var ErrUnserved = errors.New("nobody answers: does a sink run, and is the credential the instance's?")

// Ask returns the answer to a request; [ErrDenied] if the credential does not allow it, [ErrUnserved] if nobody answers.
func (c *Conn) Ask(ctx context.Context, subject string, body []byte) ([]byte, error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	m, err := c.nc.RequestWithContext(ctx, subject, body)
	if err == nil {
		return m.Data, nil
	}
	denied, _ := c.denials.since(began, subject, "")
	switch {
	case denied:
		return nil, fmt.Errorf("ask %s: %w: %w: %w", subject, ErrDenied, ErrUnserved, err)
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, context.DeadlineExceeded), errors.Is(err, nats.ErrPermissionViolation):
		return nil, fmt.Errorf("ask %s: %w: %w", subject, ErrUnserved, err)
	}
	return nil, fmt.Errorf("ask %s: %w", subject, err)
}
