package sampler

import (
	"time"

	"github.com/penstock/penstock/pkg/envelope"
)

// source is what one publisher of an instance said last of its load.
type source struct {
	arrival int64
	load    envelope.Load
}

// maxSources bounds the publishers of an instance whose loads are added up.
const maxSources = 64

// load takes in what the source of a frame says, and returns what all sources of the
// instance took, window by window: of each what it said last within the window. It is no
// less than what came here, items by now. The zero Load: a source does not say.
func (in *instance) load(f envelope.Frame, items int) (sum envelope.Load) {
	mine := in.meter.Add(f.Arrival, int64(items))
	if f.Load == (envelope.Load{}) {
		return sum
	}
	if in.sources == nil {
		in.sources = map[uint32]source{}
	}
	in.sources[f.Source] = source{f.Arrival, f.Load}
	longest := envelope.Windows[len(envelope.Windows)-1] * int64(time.Second)
	for name, s := range in.sources {
		if max(s.arrival-f.Arrival, f.Arrival-s.arrival) > longest {
			delete(in.sources, name)
			continue
		}
		for i, seconds := range envelope.Windows {
			if f.Arrival-s.arrival < seconds*int64(time.Second) {
				sum[i] += s.load[i]
			}
		}
	}
	if len(in.sources) > maxSources {
		clear(in.sources) // nobody knows then, for a while
		return envelope.Load{}
	}
	sum.Max(mine)
	return sum
}
