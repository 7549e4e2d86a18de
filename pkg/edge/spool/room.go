package spool

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/disk"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/wal"
)

// makeRoom deletes from a full log what the hub has and then, with on_full: drop_oldest,
// what the hub does not have, and tries to append again after each. It returns
// [wal.ErrFull] when nothing more may be deleted.
func (s *Spool) makeRoom(st *Store, sig otlpwire.Signal, head, body []byte) (seq uint64, err error) {
	if err := s.release(st, sig); err != nil {
		return 0, err
	}
	seq, err = st.logs[sig].Append(head, body)
	for errors.Is(err, wal.ErrFull) && s.cfg.OnFull == DropOldest {
		dropped, dropErr := s.dropOldest(st, sig, int64(len(body)))
		if dropErr != nil {
			return 0, dropErr
		}
		if dropped == 0 {
			break
		}
		seq, err = st.logs[sig].Append(head, body)
	}
	return seq, err
}

// release deletes what the hub has.
func (s *Spool) release(st *Store, sig otlpwire.Signal) error {
	h := &s.held[sig]
	h.Lock()
	h.forget()
	h.Unlock()
	return s.letGo(st, sig, s.positions.get(Hub, sig).Done)
}

// letGo deletes messages up to a sequence that the hub's position has passed. The positions
// are written to the disk first. If the disk has no room for them, they are written after
// the deletion, and the epoch is removed before it: if the process ends in between, the
// next start could give sequences again, and then must use new ids.
func (s *Spool) letGo(st *Store, sig otlpwire.Signal, upto uint64) error {
	marked := s.positions.save()
	if marked != nil {
		if !disk.NoSpace(marked) {
			return marked
		}
		_ = os.Remove(filepath.Join(s.cfg.Dir, epochFile))
	}
	err := st.logs[sig].Release(upto)
	if err == nil && marked != nil {
		err = s.positions.save()
	}
	return err
}

// dropTimeout bounds the search for what may be dropped.
const dropTimeout = 5 * time.Second

// dropOldest deletes messages that the hub does not have, the oldest first, until
// there is room for need bytes, and counts their items as lost. One that is on its
// way to the hub at this moment counts, too.
func (s *Spool) dropOldest(st *Store, sig otlpwire.Signal, need int64) (messages int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), dropTimeout)
	defer cancel()
	state := st.logs[sig].State()
	if state.Records() == 0 {
		return 0, nil
	}
	r := Reader{st.logs[sig].Read(state.First)}
	defer r.Close()
	// Drop some more than needed, so that not every group has to do this.
	need = max(need, int64(s.cfg.share(sig))/64)
	var last uint64
	items := 0
	for freed := int64(0); freed < need && last < state.Last; messages++ {
		m, err := r.Next(ctx)
		if err != nil {
			return 0, err
		}
		last = m.Seq
		freed += int64(len(m.Body))
		items += max(m.Header.Items, int(m.Missing), 1)
	}
	s.log.Warn("spool full, oldest messages dropped", "signal", sig, "items", items, "messages", messages)
	s.led.Of(sig).Dropped(ledger.DroppedFull).Add(float64(items))
	s.positions.advance(Hub, sig, last, 0)
	return messages, s.letGo(st, sig, last)
}

// Forwarded notes that the hub has everything of a signal up to a message, bytes more than before; hub is the
// sequence that the hub's stream gave to it, 0 when that is not known.
func (s *Spool) Forwarded(sig otlpwire.Signal, seq, hub uint64, bytes int64) {
	s.Advance(Hub, sig, seq, hub)
	h := &s.held[sig]
	h.Lock()
	h.add(s.now(), seq, bytes)
	h.Unlock()
}

// purgeInterval is how often what the hub has had for long enough is deleted.
const purgeInterval = 250 * time.Millisecond

// Purge deletes what the hub has had for retain_after_ack, until ctx ends.
func (s *Spool) Purge(ctx context.Context, st *Store, sig otlpwire.Signal) {
	owing := uint64(0) // up to where messages are to be deleted
	for goOn := true; goOn; {
		goOn = backoff.Sleep(ctx, purgeInterval)
		h := &s.held[sig]
		h.Lock()
		owing = max(owing, h.expire(s.now()))
		h.Unlock()
		if owing == 0 {
			continue
		}
		if err := s.letGo(st, sig, owing); err != nil {
			s.log.Debug("could not delete what the hub has", "signal", sig, "err", err)
			continue
		}
		owing = 0
	}
}
