package envelope

import (
	"errors"
	"fmt"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// Guard checks what comes over the bus. A credential says which subject its
// holder may publish to, not what: a hostile edge can put any bytes there. The
// zero Guard is ready; it is for one goroutine.
type Guard struct {
	stamps map[string]*otlpwire.Stamp
	buf    []byte
}

// maxStamps bounds the stamps kept ready, one an instance.
const maxStamps = 4096

// Open returns a payload that is safe to work on, with instance.id as the
// subject says, whatever the payload claims, and without items that backends
// would refuse a whole batch for. Items is their number. The payload is valid
// until the next call.
func (g *Guard) Open(sig otlpwire.Signal, instance string, payload []byte) (out []byte, items int, err error) {
	if err := (Instance{ID: instance}).Validate(); err != nil {
		return nil, 0, err
	}
	if len(payload) > MaxPayload {
		return nil, 0, fmt.Errorf("%d bytes: %w", len(payload), errSize)
	}
	rep, err := otlpwire.Scan(sig, payload, otlpwire.Limits{MaxElements: maxElements})
	if err != nil {
		return nil, 0, err
	}
	if rep.Invalid > 0 {
		return nil, 0, fmt.Errorf("%d of %d items: %w", rep.Invalid, rep.Items, errIDs)
	}
	if w := weight(payload); w > maxWeight {
		return nil, 0, fmt.Errorf("%d bytes of resources and scopes, each counted for every item in it: %w", w, errWeight)
	}
	if !rep.Sound() {
		if payload, err = otlpwire.Mend(sig, payload); err != nil {
			return nil, 0, err
		}
	}
	s := g.stamps[instance]
	if s == nil {
		if g.stamps == nil || len(g.stamps) >= maxStamps {
			g.stamps = make(map[string]*otlpwire.Stamp)
		}
		s = new(otlpwire.Stamp)
		s.Overwrite("instance.id", instance)
		g.stamps[instance] = s
	}
	if s.Holds(payload) {
		return payload, rep.Items, nil
	}
	g.buf, err = s.Append(g.buf[:0], payload)
	if err == nil && len(g.buf) > MaxPayload {
		err = fmt.Errorf("%d bytes with the identity in every resource: %w", len(g.buf), errSize)
	}
	return g.buf, rep.Items, err
}

// maxWeight bounds what all items come to when each has its resource and its scope to itself,
// as every backend has them: few bytes on the bus must not be gigabytes behind it. 32 KiB of
// resource for each of 8,000 items are within it.
const maxWeight = 256 << 20

var errWeight = errors.New("no sound sender has so much in common")

// weight returns that in bytes.
func weight(payload []byte) (sum int) {
	for r := range otlpwire.Resources(payload) {
		items := 0
		for s := range r.Scopes() {
			n := 0
			for range s.Items() {
				n++
			}
			sum += n * len(s.Scope())
			items += n
		}
		sum += items * len(r.Resource())
	}
	return sum
}

var errSize = fmt.Errorf("a payload has at most %d bytes; no edge sends more", MaxPayload)

var errIDs = errors.New("no valid trace and span ID; no edge lets them pass")

// maxElements is more than any message holds that an edge has let pass: the
// bound of requests is never tighter on this side than at the door.
const maxElements = 4 << 20
