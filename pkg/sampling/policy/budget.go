package policy

import (
	"time"

	"github.com/penstock/penstock/pkg/envelope"
)

// Budgets is the state of the rate limits of one instance in one partition. The zero Budgets is ready
// to use. Traces are decided in the order of Due.
//
// # The rule
//
// A limiter is a token bucket on stream time, as in the collector: it begins with the burst,
// refills at the rate and holds at most the burst; a trace is kept if the bucket has enough for all
// of it, and one larger than the burst never is. The traces of an instance are spread over P
// partitions, which share nothing: each has a P-th of the rate and begins with a P-th of the burst.
// A trace is kept if the bucket has a P-th of it; the bucket then goes into debt, as far as the debt is
// paid by the end of the minute.
//
// So that traffic below the rate is kept completely, however it is spread over the partitions, every
// frame says how much its source recently received for all of them ([envelope.Load]). If that is within
// rate and burst in every window, a trace is kept, and its bucket may go into debt for it.
//
// All buckets are reset at the first trace that is kept in every minute of stream time, so that reading
// may begin anywhere and comes to the same verdicts a minute later. In a minute an instance therefore
// keeps little more than its rate and the burst.
type Budgets struct {
	buckets []bucket         // by index of the limiter
	taken   []envelope.Spend // by the current decision
}

// limiter is one budget of a set.
type limiter struct {
	place int
	rate  int64 // spans or bytes a second
	burst int64 // spans or bytes
}

// bucket is a limiter's budget in one partition. It changes only when something is taken, so that the next owner, who knows what
// was taken and not what was asked for, has the same one to the last bit.
type bucket struct {
	minute int64
	at     int64 // when it held level, in Unix nanoseconds
	level  float64
	// restored is what was taken in a minute, according to recorded decisions, and is not booked yet.
	restored []spent
}

type spent struct{ due, amount int64 }

const minute = int64(time.Minute)

// bucketOf returns the bucket of a limiter's index.
func (b *Budgets) bucketOf(place int) *bucket {
	for len(b.buckets) <= place {
		b.buckets = append(b.buckets, bucket{minute: -1})
	}
	return &b.buckets[place]
}

// turns reports whether due is in another minute than a bucket's. It is in an earlier one only if it is more than one minute
// earlier, which means that the instance's clock was set back.
func turns(of, due int64) bool { return due/minute > of || due/minute < of-1 }

// when returns the bucket at the time when a trace is due, or when something was taken later. float64() prevents fused operations,
// so that the same stream gives the same verdicts on every machine.
func (k bucket) when(l limiter, due int64, partitions int) bucket {
	if turns(k.minute, due) {
		return bucket{minute: due / minute, at: due, level: float64(l.burst) / float64(partitions)}
	}
	if due > k.at {
		k.level = min(k.level+float64(l.perSecond(partitions)*(float64(due-k.at)/1e9)), float64(l.burst))
		k.at = due
	}
	return k
}

// pays is how much will come in until the end of the minute.
func (k bucket) pays(l limiter, partitions int) float64 {
	return float64(l.perSecond(partitions) * (float64((k.minute+1)*minute-k.at) / 1e9))
}

// without returns the bucket after an amount was taken. There is no debt that is not paid by the end of the minute, at which it
// would be forgotten.
func (k bucket) without(l limiter, amount int64, partitions int) bucket {
	k.level = max(k.level-float64(amount), min(k.level, -k.pays(l, partitions)))
	return k
}

func (l limiter) perSecond(partitions int) float64 { return float64(l.rate) / float64(partitions) }

// keepsTo reports whether a load is known and within the limiter's rate and burst.
func (l limiter) keepsTo(load envelope.Load) bool {
	for i, seconds := range envelope.Windows {
		if load[i] > l.rate*seconds+l.burst {
			return false
		}
	}
	return load[len(load)-1] > 0
}

// spend takes amount from a limiter's bucket at the time when t is due. load is that of t, in the same
// unit.
func (b *Budgets) spend(l limiter, t *Trace, amount int64, load envelope.Load) bool {
	t.chance = unknown
	k := b.bucketOf(l.place)
	for _, s := range k.restored {
		*k = k.when(l, s.due, t.partitions).without(l, s.amount, t.partitions)
	}
	k.restored = nil
	now, need := k.when(l, t.Due, t.partitions), float64(amount)
	owes := now.level >= need/float64(t.partitions) && now.level+now.pays(l, t.partitions) >= need
	if amount > l.burst || now.level < need && !owes && (t.partitions == 1 || !l.keepsTo(load)) {
		return false
	}
	*k = now.without(l, amount, t.partitions)
	b.taken = append(b.taken, envelope.Spend{Limiter: l.place, Amount: amount})
	return true
}

// Restore books what a recorded decision has taken, in the order of the decisions, so that the next
// owner continues with the same budgets.
func (b *Budgets) Restore(due int64, took []envelope.Spend) {
	for _, s := range took {
		k := b.bucketOf(s.Limiter)
		if n := len(k.restored); n > 0 && turns(k.restored[0].due/minute, due) {
			k.restored = k.restored[:0]
		}
		k.restored = append(k.restored, spent{due, s.Amount})
	}
}
