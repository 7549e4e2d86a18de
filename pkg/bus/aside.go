package bus

import (
	"context"
	"fmt"
	"strconv"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// Aside has what a backend refuses of some instances while it accepts what others send, one
// subject for each backend, partition and instance. Messages are removed once they have been
// delivered; the server removes nothing. When it is full, lanes wait.
const Aside = "ASIDE"

// AsideSubject returns where the owner of a lane puts what the backend refuses of an
// instance; "*" for instance: of all of them.
func AsideSubject(sig otlpwire.Signal, backend string, partition int, instance string) string {
	return "aside." + sig.String() + "." + backend + "." + strconv.Itoa(partition) + "." + instance
}

// Remove removes the messages of a subject, empty for all, up to a sequence from a stream that
// allows it.
func (c *Conn) Remove(ctx context.Context, stream, subject string, upTo uint64) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	s, err := c.js.Stream(ctx, stream)
	what := []jetstream.StreamPurgeOpt{jetstream.WithPurgeSequence(upTo + 1)}
	if subject != "" {
		what = append(what, jetstream.WithPurgeSubject(subject))
	}
	if err == nil {
		err = s.Purge(ctx, what...)
	}
	if err != nil {
		return fmt.Errorf("remove messages of %s from stream %s: %w", subject, stream, err)
	}
	return nil
}
