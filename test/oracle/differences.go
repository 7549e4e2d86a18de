package main

import "strings"

// What is meant to differ from Prometheus's translation, and why. The comparison leaves it
// out as it says here; TestMeantDifferences shows each.
//
//  1. Resource labels win over data point attributes of the same name, and le and quantile over attributes
//     of histograms and summaries: a customer must not forge instance_id. The attribute is exported_instance_id
//     then, as where Prometheus scrapes. In its translation the data point wins over the resource, and le and
//     quantile take its attribute's place. The generator gives data points no attributes of resources.
//  2. An attribute whose label would begin with __ gets key before it: those are Prometheus's
//     own. The generator makes none.
//  3. Of samples of one stream and millisecond in one request the last is sent: a
//     receiver takes one, and refuses the request or the sample for the others. Of several streams with the
//     same labels the first is sent, the others are dead-lettered.
//  4. target_info is written every 2.5 minutes of a resource's time, not with every request, for an hour
//     at the most, without attributes that no label can have, and not for resources with more than 256
//     attributes; points that are refused do not count for its time. Compared are its labels, values and
//     metadata.
//  5. Exemplars are put into the bucket they belong to in any order, one without a value
//     is left out; Prometheus wants them in order, and drops the metric for one without a value. The
//     generator orders them.
//  6. A point that has no translation is refused alone, not with its metric, and not
//     silently: it is dead-lettered. So is one with more than 4096 buckets or quantiles, or with more than
//     4 KiB of attributes that share a label. The generator makes none but metrics without a name.
//  7. Histograms that are finer than schema 8 are made coarser as Histogram.ReduceResolution does; the
//     translation of Prometheus puts what is behind an empty bucket into the wrong one then (see coarse).
//  8. Buckets are compared after Compact(0): the same ones can be written with more or fewer spans.
//  9. Deltas are added up, where Prometheus refuses them by default: TestDeltas holds the sums against
//     the cumulative points they were made of.
//     The deltas of a sum that may fall are refused.
// 10. NaN and infinity inside of arrays and maps are text; pdata writes nothing for the whole value.
// 11. The zero bucket of an exponential histogram is as wide as the point says; that of Prometheus's
//     translation is always 1e-128.
// 12. Where a histogram ends its sum ends, too, also when the last point has none, and its buckets, also
//     when that names none: the generator names them. A histogram's infinite bounds are left out, and a point from the future is refused, its exemplar left out.
// 13. deployment.environment stands for deployment.environment.name, where a resource has only that.

// meant takes away what is meant to differ.
func (b book) meant() {
	for key, s := range b {
		if strings.Contains(key, `__name__="target_info"`) {
			values := map[int64]string{}
			for _, v := range s.samples {
				values[0] = v
			}
			s.samples = values
		}
	}
}
