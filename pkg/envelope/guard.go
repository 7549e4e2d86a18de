package envelope

import (
	"errors"
	"fmt"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// Guard checks messages from the bus. A credential restricts the subject to which its holder may
// publish, not the content: a hostile edge can publish any bytes there. The zero Guard is ready to use;
// it is for one goroutine.
type Guard struct {
	stamps map[string]*otlpwire.Stamp
	buf    []byte
}

// maxStamps bounds the cached stamps, one an instance.
const maxStamps = 4096

// Open returns a payload that is safe to process, with instance.id from the subject, whatever the
// payload claims, and without items for which backends would refuse a whole batch. items is the number
// of its items. The payload is valid until the next call.
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

// maxWeight bounds the total size of all items if each has its own copy of its resource and scope, as
// in every backend: few bytes on the bus must not become gigabytes after it. 32 KiB of resource for
// each of 8,000 items are within it.
const maxWeight = 256 << 20

var errWeight = errors.New("no valid sender shares so much among its items")

// weight returns that size in bytes.
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

// maxElements is more than any message has that an edge accepted: this bound must never be tighter than
// the one of the receiver.
const maxElements = 4 << 20
