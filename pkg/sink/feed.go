package sink

import (
	"context"
	"errors"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/sink/export"
	"github.com/penstock/penstock/pkg/sink/horizon"
)

// feed is where a lane's messages come from: live traffic, or the part of a replay in one
// partition (excerpt). Lanes read both in the same way.
type feed interface {
	// claim continues the work of the previous owner. first reports that there is known to be none; of
	// live traffic that is never known.
	// errEnd: nothing is left to do.
	claim(ctx context.Context) (first bool, err error)
	// next is called with what the lane has read, before anything is done with it, and returns
	// when it may be handled. errEnd: everything has been read, and d is beyond the end.
	next(ctx context.Context, d bus.Delivery) error
	// asks reports whether what is kept of an instance is to be sent: it may have been read for what it
	// decides about traces of others.
	asks(instance string) bool
	// readable is what of the lane's stream can be read again, for rescues.
	readable() horizon.Readable
	// admits reports whether a message is wanted, and counts it if it is not.
	admits(d bus.Delivery) bool
	// unreadable handles a message that holds no telemetry; e counts what becomes of it.
	unreadable(ctx context.Context, e *export.Exporter, d bus.Delivery, why error) error
	// poisoned handles spans of one instance over which the sampler panics; e counts what becomes of them.
	poisoned(ctx context.Context, e *export.Exporter, instance string, payload []byte, from export.Origin, why error) error
	// last reports whether nothing that is to be read comes after d.
	last(d bus.Delivery) bool
	// finished notes that everything up to the floor has been handled.
	finished(floor uint64)
}

var (
	// errEnd reports that everything has been read and handled.
	errEnd = errors.New("everything has been read")

	// errLost reports that this sink does not own a lane, or does not know whether it does.
	errLost = errors.New("the lane has another owner")
)

// stopped returns why an operation that ends only in success was given up: ctx ended, or the lane is lost.
func stopped(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return errLost
}

// live is live traffic: all of it, without an end.
type live struct{ horizon *horizon.Horizon }

func (live) claim(context.Context) (bool, error)      { return false, nil }
func (live) next(context.Context, bus.Delivery) error { return nil }
func (live) asks(string) bool                         { return true }
func (l live) readable() horizon.Readable             { return l.horizon.Latest().Readable }
func (live) admits(bus.Delivery) bool                 { return true }
func (live) last(bus.Delivery) bool                   { return false }
func (live) finished(uint64)                          {}

func (live) unreadable(ctx context.Context, e *export.Exporter, d bus.Delivery, why error) error {
	if !e.Undecodable(ctx, d, why) {
		return stopped(ctx)
	}
	return nil
}

func (live) poisoned(ctx context.Context, e *export.Exporter, instance string, payload []byte, from export.Origin, why error) error {
	if !e.Unsampled(ctx, instance, payload, from, why) {
		return stopped(ctx)
	}
	return nil
}
