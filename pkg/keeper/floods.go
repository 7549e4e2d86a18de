package keeper

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/penstock/penstock/pkg/bus"
)

const (
	// floodInterval is how often the keeper looks who holds what is owed, while a stream is more than a quarter full of it.
	floodInterval = 10 * time.Second

	// maxFlooding is of how many instances this is determined: those with the most messages in the stream.
	maxFlooding = 20
)

// holding is what is owed of one instance, about.
type holding struct {
	instance string
	bytes    uint64
}

// flooding returns the instance that holds more than half of what is owed on a stream that is more than half full of
// it; empty for none, and when there is no other instance.
func flooding(at stream, holds []holding) string {
	if at.owed() <= at.max/2 {
		return ""
	}
	all := uint64(0)
	for _, h := range holds {
		all += h.bytes
	}
	for _, h := range holds {
		if h.bytes > at.owed()/2 && h.bytes < all {
			return h.instance
		}
	}
	return ""
}

// floods shows which instances hold most of what is owed on a stream, and names one that fills it.
func (k *Keeper) floods(ctx context.Context, s *kept, at stream, floors map[string]bus.Floor) error {
	if at.max == 0 || at.owed() <= at.max/4 {
		if !s.flooded.IsZero() {
			s.flooded = time.Time{}
			k.led.ForgetOwed(s.signal)
		}
		return nil
	}
	if s.signal == "" || time.Since(s.flooded) < floodInterval {
		return nil
	}
	s.flooded = time.Now()
	holds, err := k.holds(ctx, s, floors)
	if err != nil {
		return err
	}
	k.led.ForgetOwed(s.signal)
	for _, h := range holds {
		k.led.Owed(s.signal, h.instance).Set(float64(h.bytes))
	}
	if one := flooding(at, holds); one != "" {
		if more, due := k.said.Due("floods "+s.name, s.flooded); due {
			k.log.Warn("one instance holds more than half of what is owed on a stream, which fills up: when it is full, all instances are refused; penstock nats-config remove-instance stops it (docs/backends.md)", "stream", s.name, "instance", one, "more_since_last_said", more)
		}
	}
	return nil
}

// holds returns what is owed of the instances with the most messages.
func (k *Keeper) holds(ctx context.Context, s *kept, floors map[string]bus.Floor) ([]holding, error) {
	done := map[string]uint64{} // by filter: what all lanes of a partition have finished
	for _, f := range floors {
		if upTo, known := done[f.Filter]; !known || f.Done < upTo {
			done[f.Filter] = f.Done
		}
	}
	there, err := k.conn().Subjects(ctx, s.name, ">")
	if err != nil {
		return nil, err
	}
	subjects := make([]string, 0, len(there))
	for subject := range there {
		subjects = append(subjects, subject)
	}
	slices.SortFunc(subjects, func(a, b string) int { return cmp.Or(cmp.Compare(there[b], there[a]), cmp.Compare(a, b)) })
	var all []holding
	for _, subject := range subjects[:min(len(subjects), maxFlooding)] {
		dot := strings.LastIndexByte(subject, '.')
		_, bytes, err := k.conn().Left(ctx, s.name, subject, done[subject[:dot]+".*"]+1)
		if err != nil {
			return nil, err
		}
		all = append(all, holding{subject[dot+1:], bytes})
	}
	return all, nil
}
