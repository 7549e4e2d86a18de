package sampler

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// want is the reference: it sees every stream at once, and knows nothing of
// samplers.
func (w *world) want() map[string]bool {
	kept := map[string]bool{}
	type span struct {
		simSpan
		instance string
	}
	type id struct {
		domain string
		trace  int
	}
	var all []span
	for inst, spans := range w.streams {
		for _, sp := range spans {
			all = append(all, span{sp, inst})
		}
	}
	slices.SortFunc(all, func(a, b span) int { return cmp.Compare(a.origin, b.origin) })
	byTrace := map[id][]span{}
	for _, sp := range all { // in the order of TRACES: what has begun in a domain stays there
		now, before := w.grouping.Of(sp.instance, sp.origin)
		key := id{now, sp.trace}
		for _, domain := range before {
			begun := id{domain, sp.trace}
			if all := byTrace[begun]; len(all) > 0 && all[0].origin < w.grouping.Left(sp.instance, domain) {
				key = begun
				break
			}
		}
		byTrace[key] = append(byTrace[key], sp)
	}
	type verdict struct {
		id      id
		n       int
		due     time.Duration
		failing bool
	}
	payers := map[[2]string][]verdict{} // by domain, and the instance of the root, or of the first span
	for id, spans := range byTrace {
		slices.SortStableFunc(spans, func(a, b span) int {
			return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.instance, b.instance))
		})
		v, payer, rooted := verdict{id: id, due: spans[0].at + w.wait}, spans[0].instance, false
		for _, sp := range spans {
			if sp.at > v.due {
				break
			}
			v.n++
			v.failing = v.failing || sp.failing
			if sp.name == "root" {
				if !rooted {
					payer, rooted = sp.instance, true
				}
				if w.root > 0 {
					v.due = min(v.due, sp.at+w.root)
				}
			}
		}
		payers[[2]string{id.domain, payer}] = append(payers[[2]string{id.domain, payer}], v)
	}
	for _, verdicts := range payers {
		// The budget, 3 spans a second and a burst of 6, goes to those that are due first,
		// and begins again with every minute. All policies are asked: a trace that another
		// one keeps takes its spans out, too.
		slices.SortFunc(verdicts, func(a, b verdict) int { return cmp.Or(cmp.Compare(a.due, b.due), cmp.Compare(a.id.trace, b.id.trace)) })
		var level float64
		var at time.Time
		for _, v := range verdicts {
			due := simBase.Add(v.due)
			if !due.Truncate(time.Minute).Equal(at.Truncate(time.Minute)) {
				level, at = 6, due
			}
			level, at = min(6, level+3*due.Sub(at).Seconds()), due
			keep := v.failing || v.n >= 7
			if v.n <= 6 && level >= float64(v.n) {
				level -= float64(v.n)
				keep = true
			}
			keep = keep && !w.errors
			for _, sp := range byTrace[v.id] { // a late error brings its trace back
				keep = keep || w.late && sp.failing
			}
			for _, sp := range byTrace[v.id] {
				if keep {
					var id otlpwire.TraceID
					_, _ = fmt.Sscanf(fmt.Sprintf("%04s", fmt.Sprint(v.id.trace)), "%02x%02x", &id[14], &id[15])
					kept[fmt.Sprintf("%s %x %s", sp.instance, id[14:], sp.name)] = true
				}
			}
		}
	}
	return kept
}
