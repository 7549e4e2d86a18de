package edge

import (
	"context"
	"errors"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// makeRoom deletes from a full stream what the hub has, then, with on_full:
// drop_oldest, what it has not, and tries to publish again after each. It returns
// [bus.ErrFull] when nothing may be deleted.
func (s *spool) makeRoom(ctx context.Context, st *store, sig otlpwire.Signal, msg bus.Message) (seq uint64, err error) {
	if err := s.release(ctx, st, sig); err != nil {
		return 0, err
	}
	seq, err = st.publish(ctx, msg)
	for errors.Is(err, bus.ErrFull) && s.cfg.OnFull == DropOldest {
		dropped, dropErr := s.dropOldest(ctx, st, sig, int64(len(msg.Body)))
		if dropErr != nil {
			return 0, dropErr
		}
		if dropped == 0 {
			break
		}
		seq, err = st.publish(ctx, msg)
	}
	return seq, err
}

// release deletes what the hub has.
func (s *spool) release(ctx context.Context, st *store, sig otlpwire.Signal) error {
	h := &s.held[sig]
	h.Lock()
	h.forget()
	h.Unlock()
	if err := s.marks.save(); err != nil {
		return err
	}
	return st.conn.PurgeBelow(ctx, bus.SpoolStream(sig), s.marks.get(hubReader, sig).Done+1)
}

// dropTimeout bounds the search for what may go: while it lasts, the hub may have taken
// it all.
const dropTimeout = 5 * time.Second

// dropOldest deletes messages that the hub does not have, the oldest first, until
// there is room for need bytes, and counts their items as lost. One that is on its
// way to the hub at this moment counts, too.
func (s *spool) dropOldest(ctx context.Context, st *store, sig otlpwire.Signal, need int64) (messages int, err error) {
	ctx, cancel := context.WithTimeout(ctx, dropTimeout)
	defer cancel()
	stream := bus.SpoolStream(sig)
	state, err := st.conn.State(ctx, stream)
	if err != nil || state.Messages == 0 {
		return 0, err
	}
	r, err := st.conn.OpenReader(ctx, stream, state.FirstSeq)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	// A little more at a time, so that not every group has to do this.
	need = max(need, int64(s.cfg.share(sig))/64)
	var last uint64
	items := 0
	for freed := int64(0); freed < need && last < state.LastSeq; messages++ {
		d, err := r.Next(ctx)
		if err != nil {
			return 0, err
		}
		last = d.Seq
		freed += int64(len(d.Body))
		items += max(d.Header.Items, 1)
	}
	s.log.Warn("spool full, the oldest is dropped", "signal", sig, "items", items, "messages", messages)
	s.led.Of(sig).Dropped(ledger.DroppedFull).Add(float64(items))
	s.marks.advance(hubReader, sig, last, 0)
	if err := s.marks.save(); err != nil {
		return 0, err
	}
	return messages, st.conn.PurgeBelow(ctx, stream, last+1)
}
