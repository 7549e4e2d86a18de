package bus

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"
)

// What waits for [Conn.Serve] at most, in requests and bytes; what comes beyond gets no
// answer.
const (
	maxAsked      = 64
	maxAskedBytes = 16 << 20
)

// Serve answers requests on a subject, one after the other, as one of a group of which each
// request reaches one. Who may ask is a matter of the credential: the tokens that stand for
// the wildcards of the subject are what it allows.
func (c *Conn) Serve(subject, group string, answer func(subject string, body []byte) []byte) (stop func(), err error) {
	sub, err := c.nc.QueueSubscribe(subject, group, func(m *nats.Msg) {
		if m.Reply != "" {
			_ = m.Respond(answer(m.Subject, m.Data)) // else it is asked again
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
// reach them.
var ErrUnserved = errors.New("nobody answers: does a sink run, and is the credential the instance's?")

// Ask returns the answer to a request.
func (c *Conn) Ask(ctx context.Context, subject string, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	m, err := c.nc.RequestWithContext(ctx, subject, body)
	switch {
	case err == nil:
		return m.Data, nil
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, context.DeadlineExceeded), errors.Is(err, nats.ErrPermissionViolation):
		return nil, fmt.Errorf("ask %s: %w: %w", subject, ErrUnserved, err)
	}
	return nil, fmt.Errorf("ask %s: %w", subject, err)
}
