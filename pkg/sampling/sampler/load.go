package sampler

import (
	"time"

	"github.com/penstock/penstock/pkg/envelope"
)

// source is the last load that one publisher of an instance reported.
type source struct {
	arrival int64
	load    envelope.Load
}

// maxSources bounds the publishers of an instance whose loads are added up.
const maxSources = 64

// load records the load in a frame, and returns the sum over all sources of the instance, window by
// window, with the last report of each source within the window. It is no less than what arrived here,
// items by now. It is the zero Load if a source does not report.
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
		clear(in.sources) // unknown then, for a while
		return envelope.Load{}
	}
	sum.Max(mine)
	return sum
}
