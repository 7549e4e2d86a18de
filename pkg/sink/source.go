package sink

import (
	"context"
	"errors"

	"github.com/penstock/penstock/pkg/bus"
)

// source is what a lane's messages are of: live traffic, or the part of a replay in one partition
// (excerpt). Lanes read both in the same way.
type source interface {
	// claim takes up the work where the owner before was; first reports that there was none.
	// errEnd: nothing is left to do.
	claim(ctx context.Context) (first bool, err error)
	// next is asked about what the lane has read, before anything is done with it, and returns
	// when that may be done. errEnd: all that is to be read has been read, and d is not of it.
	next(ctx context.Context, d bus.Delivery) error
	// admits reports whether a message is asked for, and counts it when it is not.
	admits(d bus.Delivery) bool
	// unreadable deals with a message that holds no telemetry.
	unreadable(ctx context.Context, d bus.Delivery, why error) error
	// last reports whether nothing that is to be read comes after d.
	last(d bus.Delivery) bool
	// finished notes that everything up to the floor has been dealt with.
	finished(floor uint64)
}

var (
	// errEnd says that everything that is to be read has been dealt with.
	errEnd = errors.New("everything has been read")

	// errLost says that a lane is not ours, or not known to be.
	errLost = errors.New("the lane has another owner")
)

// stopped is why something has not been done that is done unless ctx ends or the lane is lost.
func stopped(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return errLost
}

// live is traffic as it comes: all of it, without an end.
type live struct{ delivery *delivery }

func (live) claim(context.Context) (bool, error)      { return false, nil }
func (live) next(context.Context, bus.Delivery) error { return nil }
func (live) admits(bus.Delivery) bool                 { return true }
func (live) last(bus.Delivery) bool                   { return false }
func (live) finished(uint64)                          {}

func (l live) unreadable(ctx context.Context, d bus.Delivery, why error) error {
	if !l.delivery.undecodable(ctx, d, why) {
		return stopped(ctx)
	}
	return nil
}
