// Package ledger counts every item on its way through penstock, so that at any time and for
// every signal
//
//	accepted + rescued = delivered + sampled_out + filtered + dead_lettered + dropped + in flight
//
// where rescued are spans that were sampled out, and then delivered with a trace that a late span has brought back, and
// dropped is zero unless an edge is configured to drop, or its disk or gateway loses
// items. For a signal with several backends the equation holds for each of them.
//
// All counts are in items: spans, data points, log records. Every label value exists from the
// start, so that a count of zero is visible.
//
// One Ledger serves a whole process; `penstock up` passes the same one to all roles.
package ledger

import (
	"strconv"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// Why a receiver refused items.
const (
	RefusedMalformed    = "malformed"    // the sender must not retry
	RefusedTooLarge     = "too_large"    // the sender must not retry
	RefusedInvalid      = "invalid"      // these items only, for their IDs or buckets; partial success
	RefusedTimeout      = "timeout"      // the request did not arrive in time
	RefusedUnauthorized = "unauthorized" // no token, or a wrong one
	RefusedFull         = "full"         // spool or disk full; retryable
	RefusedUnavailable  = "unavailable"  // the next stage is not available; retryable
	RefusedOverload     = "overload"     // too many bytes in flight; retryable
	RefusedRate         = "rate"         // the instance sends more than limits.instance; retryable
)

// Why connections were closed.
const (
	ClosedFull    = "full"    // max_connections are open: one without a request was closed
	ClosedAddress = "address" // limits.address.connections are open from one address: one of them, or the new one
)

// Why items were dead-lettered.
const (
	DeadRefused     = "refused"      // the backend will never take them
	DeadUndecodable = "undecodable"  // a message that is not a valid envelope
	DeadUnsupported = "unsupported"  // no translation for the backend
	DeadOutOfOrder  = "out_of_order" // older than what the backend has of the series
	DeadTooOld      = "too_old"      // older than the backend accepts
	DeadTooNew      = "too_new"      // from the future
	DeadTooLarge    = "too_large"    // one item or line larger than a request may be
	DeadCardinality = "cardinality"  // too many new series or streams of one instance
	DeadPoison      = "poison"       // penstock panics on them, or a backend never answers them
)

// Where panics are caught.
const (
	PanicReceiver  = "receiver"
	PanicRouter    = "router"
	PanicSampler   = "sampler"
	PanicPolicy    = "policy" // of the sampler
	PanicReader    = "reader" // of what a lane of metrics or logs reads
	PanicProcessor = "processor"
	PanicWriter    = "writer"
)

// Why an edge lost items that it had acknowledged, and why a router or sink dropped messages
// that no edge sends.
const (
	DroppedFull    = "full"    // the spool was full, and spool.on_full is drop_oldest
	DroppedRefused = "refused" // the gateway refuses them for good
	DroppedDamaged = "damaged" // the spool's disk returns other data than was written

	DroppedUndecodable = "undecodable" // unreadable messages beyond those that become dead letters
)

// Why a lane went back to its floor.
const (
	InterruptedPin        = "pin"        // another has it, or a message was missing
	InterruptedHub        = "hub"        // the hub gave no answer, or no usable one
	InterruptedSuperseded = "superseded" // another sink records the decisions
	InterruptedFull       = "full"       // the sampler had no room
	InterruptedMoved      = "moved"      // somebody else has moved the floor
	InterruptedGone       = "gone"       // the consumer was deleted
	InterruptedPanic      = "panic"      // the sampler has panicked
)

// What becomes of traces that late spans could bring back.
const (
	LateRescued    = "rescued"    // they are kept
	LateTooLate    = "too_late"   // the earlier spans are too far back
	LateOverLimit  = "over_limit" // of traces a minute
	LateIncomplete = "incomplete" // kept, but the hub did not have all of the earlier spans any more
)

// Errors of the connection to the hub.
const (
	HubSlowConsumer = "slow_consumer"
	HubDenied       = "denied"
	HubOther        = "other"
)

// Outcomes of items for an edge's local backend.
const (
	LocalDelivered = "delivered"
	LocalRefused   = "refused" // the backend will never take them
	LocalMissed    = "missed"  // the spool deleted them before the backend took them; counts messages, not items
)

// Backends by name; a label of the delivered counter.
var backends = []string{"tempo", "prometheus", "loki", "file"}

// Ledger holds the counters. Use the methods of [Ledger.Of].
type Ledger struct {
	signals [len(otlpwire.Signals)]Signal
	// SpoolBytes is the size of what the edge's spool holds and the hub has not acknowledged.
	SpoolBytes prometheus.Gauge
	// SpoolHeld is the size of what both have; it is sent again if the hub loses it.
	SpoolHeld prometheus.Gauge
	// SpoolWritable is 1 while the edge's spool accepts writes.
	SpoolWritable prometheus.Gauge
	// HubAlarms counts how often a hub turned out to have lost what it had acknowledged.
	HubAlarms prometheus.Counter
	spoolLost *prometheus.CounterVec
	closed    *prometheus.CounterVec
	local     *prometheus.CounterVec
	// SamplerFull counts how often a partition had no room for new traces.
	SamplerFull prometheus.Counter
	// SamplerUnordered counts frames of a domain that did not wait longer for the routers of its other instances.
	SamplerUnordered prometheus.Counter
	// PoliciesVersion is the number of the sampling policies in force for new traces.
	PoliciesVersion prometheus.Gauge
	// PoliciesRefused counts versions in the hub that could not be used.
	PoliciesRefused prometheus.Counter
	lag             *prometheus.GaugeVec
	owned           *prometheus.GaugeVec
	asideInstances  *prometheus.GaugeVec
	asideSince      *prometheus.GaugeVec
	missing         *prometheus.GaugeVec
	eta             *prometheus.GaugeVec
	paused          *prometheus.GaugeVec
	interrupted     *prometheus.CounterVec
	stalled         *prometheus.GaugeVec
	stalls          *prometheus.CounterVec
	// HubConnected is 1 while the hub, or an edge's gateway, can be reached.
	HubConnected prometheus.Gauge
	hubErrors    *prometheus.CounterVec
	panics       *prometheus.CounterVec
	heldTraces   *prometheus.GaugeVec
	heldBytes    *prometheus.GaugeVec
	decided      *prometheus.CounterVec
	late         *prometheus.CounterVec
	sources      *prometheus.GaugeVec
	waiting      *prometheus.GaugeVec
	replayed     *prometheus.CounterVec
	// Keeper is 1 while this sink is the keeper of the hub's streams.
	Keeper     prometheus.Gauge
	streamOwed *prometheus.GaugeVec
	streamRoom *prometheus.GaugeVec
	streamLeft *prometheus.GaugeVec
	unread     *prometheus.GaugeVec
	removed    *prometheus.CounterVec
	abandoned  *prometheus.CounterVec
	lost       *prometheus.CounterVec
	oldest     *prometheus.GaugeVec
	pushed     *prometheus.CounterVec

	instances *instances

	mu       sync.Mutex
	pushedOf map[string]bool // names of the instances that have a counter in pushed
}

// Signal is the part of the ledger for one signal.
type Signal struct {
	Accepted   prometheus.Counter
	Forwarded  prometheus.Counter
	Routed     prometheus.Counter
	SampledOut prometheus.Counter
	Rescued    prometheus.Counter
	Duplicate  prometheus.Counter
	Sanitised  prometheus.Counter
	Crowded    prometheus.Counter
	Filtered   prometheus.Counter
	Restamped  prometheus.Counter
	refused    *prometheus.CounterVec
	delivered  *prometheus.CounterVec
	aside      *prometheus.CounterVec
	dedup      *prometheus.CounterVec
	dead       *prometheus.CounterVec
	dropped    *prometheus.CounterVec
}

// New registers the ledger.
func New(reg prometheus.Registerer) *Ledger {
	f := promauto.With(reg)
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return f.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, append([]string{"signal"}, labels...))
	}
	accepted := counter("penstock_accepted_items_total", "Items that were acknowledged to their sender: they are durable.")
	refused := counter("penstock_refused_items_total", "Items that were refused, by reason. The sender received an error; for full, unavailable, overload and rate a retryable one. A request that could not be read, or in which nothing of its signal was found, counts as one item.", "reason")
	forwarded := counter("penstock_forwarded_items_total", "Items that the hub has acknowledged to an edge.")
	routed := counter("penstock_routed_items_total", "Items that the router has published to the stream SPANS.")
	delivered := counter("penstock_delivered_items_total", "Items that a backend has acknowledged.", "backend")
	dedup := counter("penstock_deduped_by_backend_items_total", "Items that a backend refused because it has stored them in an earlier attempt, whose answer was lost, and points without their own sample: deltas that have already been counted, several points of one stream in a millisecond. They count as delivered.", "backend")
	sampledOut := counter("penstock_sampled_out_items_total", "Items of traces that the sampling policies did not keep.")
	rescued := counter("penstock_rescued_items_total", "Items of traces that were not kept and that a late span has brought back (sampling.late). They are counted in penstock_sampled_out_items_total, and once more where they are delivered.")
	aside := counter("penstock_set_aside_items_total", "Items that were published to the stream ASIDE because the backend refuses their instance. They are in flight until the backend stores them.", "backend")
	dead := counter("penstock_dead_lettered_items_total", "Items published to the stream DEADLETTER, by reason. penstock deadletter list shows them.", "reason")
	duplicate := counter("penstock_duplicate_items_total", "Items that arrived again and were recognised as duplicates.")
	dropped := counter("penstock_dropped_items_total", "Acknowledged items that an edge has lost, by reason: full, with spool.on_full: drop_oldest; refused, for good, by the gateway; damaged, on the edge's disk. With undecodable it counts unreadable messages of an instance beyond 100 a minute; those up to that are dead letters.", "reason")
	sanitised := counter("penstock_sanitised_strings_total", "Strings of accepted requests that were not valid UTF-8 and were repaired: each bad byte became '?', in JSON U+FFFD.")
	filtered := counter("penstock_filtered_items_total", "Items that processing.filter has dropped, at an edge or a sink.")
	restamped := counter("penstock_restamped_messages_total", "Messages whose arrival stamp was more than an hour ahead of the hub's clock or more than 90 days behind it: the hub's time is used instead. Check the edge's clock.")
	crowded := counter("penstock_crowded_items_total", "Accepted spans and log records with more than 1024 attributes: the rest was removed and added to dropped_attributes_count.")
	l := &Ledger{
		pushedOf:         map[string]bool{},
		SamplerFull:      f.NewCounter(prometheus.CounterOpts{Name: "penstock_sampler_full_total", Help: "How often a partition's sampler had no room for new traces, which then wait in the hub."}),
		SamplerUnordered: f.NewCounter(prometheus.CounterOpts{Name: "penstock_sampler_unordered_total", Help: "How often spans of a domain had no room to wait longer for the routers of its other instances, or waited for two minutes, so that a trace may be decided without the spans of these."}),
		PoliciesVersion:  f.NewGauge(prometheus.GaugeOpts{Name: "penstock_policies_version", Help: "The version of the sampling policies that applies to new traces; 0 is the one of the configuration."}),
		PoliciesRefused:  f.NewCounter(prometheus.CounterOpts{Name: "penstock_policies_refused_total", Help: "Versions of the policies in the hub that could not be used; the previous version stays in force."}),
		SpoolBytes:       f.NewGauge(prometheus.GaugeOpts{Name: "penstock_spool_bytes", Help: "Bytes in the edge's spool that the hub has not acknowledged."}),
		SpoolHeld:        f.NewGauge(prometheus.GaugeOpts{Name: "penstock_spool_held_bytes", Help: "Bytes in the edge's spool that the hub has acknowledged; they are sent again if it loses them."}),
		SpoolWritable:    f.NewGauge(prometheus.GaugeOpts{Name: "penstock_spool_writable", Help: "1 while the edge's spool accepts writes; 0 while its disk fails or has less than spool.disk_reserve free, and requests are refused with a retryable code."}),
		HubAlarms:        f.NewCounter(prometheus.CounterOpts{Name: "penstock_hub_alarms_total", Help: "How often the hub turned out to have lost what it had acknowledged, or to know an id that was never sent. The edge has sent again what it held."}),
		closed:           f.NewCounterVec(prometheus.CounterOpts{Name: "penstock_closed_connections_total", Help: "Connections of senders that were closed because there were too many: full, max_connections were open and one without a request was replaced; address, limits.address.connections were open from one address."}, []string{"reason"}),
		spoolLost:        counter("penstock_spool_lost_messages_total", "Messages that the edge had acknowledged and its disk has lost: damaged or missing files. Copies of damaged files are under damaged in the spool's directory."),
		local:            counter("penstock_local_items_total", "Items for an edge's local backends, by outcome; missed counts messages. The items also go to the hub, and are counted there.", "backend", "outcome"),
		lag:              f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_lane_lag_messages", Help: "Messages of the partition that the lane has not finished, from its floor to the stream's end."}, []string{"signal", "partition", "backend"}),
		eta:              f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_lane_catch_up_seconds", Help: "In how many seconds the lane will have read everything that waits for it, at the rate of the last ten seconds; +Inf while it falls behind, 0 when nothing waits."}, []string{"signal", "partition", "backend"}),
		paused:           f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_lane_paused", Help: "How many partitions, and instances that are set aside, wait because the backend's address or a credential is wrong (401, 403, 404, 405, a redirect, a certificate). The data is kept. Alert on more than 0."}, []string{"signal", "backend"}),
		interrupted:      counter("penstock_lane_interruptions_total", "How often a lane that this process read was interrupted and resumed from its floor: pin, another process has it or a message was missing; hub, the hub gave no usable answer; superseded, another sink records the decisions; full, the sampler had no room; moved, somebody else has moved its floor; gone, its consumer was deleted; panic, the sampler panicked. If it rises continuously, the lane makes no progress.", "backend", "reason"),
		stalled:          f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_stalled_seconds", Help: "For how long something that has work has made no progress; 0 while it makes some. A lane: its floor does not move, or no process reads it. Backend hub or gateway: it accepts nothing of what an edge has spooled. Backend horizon: the routers' progress cannot be read. The log says why. Alert on more than 10."}, []string{"signal", "partition", "backend"}),
		stalls:           counter("penstock_stalls_total", "How often something that has work has made no progress for more than 8 seconds.", "backend"),
		HubConnected:     f.NewGauge(prometheus.GaugeOpts{Name: "penstock_hub_connected", Help: "1 while this process is connected to the hub, or an edge's gateway accepts data."}),
		hubErrors:        f.NewCounterVec(prometheus.CounterOpts{Name: "penstock_hub_errors_total", Help: "Errors of the connection to the hub: slow_consumer, messages arrived faster than they were read, and the reader requests the lost ones again; denied, the credential lacks a permission; other. The log has the details."}, []string{"kind"}),
		heldTraces:       f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_sampler_held_traces", Help: "Traces that wait for their decision."}, []string{"partition"}),
		heldBytes:        f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_sampler_held_bytes", Help: "Approximate size of these traces in bytes: their spans as on the wire and the data kept for each trace."}, []string{"partition"}),
		sources:          f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_sampler_sources", Help: "Edges and gateways that a partition's sampler has a clock of; those of which nothing has come for five minutes of the others' time are left out."}, []string{"partition"}),
		waiting:          f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_sampler_waiting_traces", Help: "Traces whose window has ended, and that wait for the spans of an edge or gateway that is behind, up to sampling.source_lag. /partitions of the sink that reads the partition says for which instance."}, []string{"partition"}),
		decided:          f.NewCounterVec(prometheus.CounterOpts{Name: "penstock_decided_traces_total", Help: "Decisions about whole traces, kept or not_kept, by the policy that decided; empty when no policy wanted the trace or it was too large."}, []string{"decision", "policy"}),
		late:             f.NewCounterVec(prometheus.CounterOpts{Name: "penstock_late_traces_total", Help: "Traces that were not kept, and then had spans that a policy without a budget wants by themselves (sampling.late): rescued, kept after all; too_late, the earlier spans are too far back, in time or bytes; over_limit, of traces a minute; incomplete, kept, but the hub did not have all of the earlier spans any more."}, []string{"outcome"}),
		replayed:         counter("penstock_replayed_items_total", "Items that a backend has acknowledged for a replay job. They are not part of penstock_delivered_items_total.", "backend"),
		panics:           f.NewCounterVec(prometheus.CounterOpts{Name: "penstock_panics_total", Help: "Panics that were caught, by stage: each is a bug of penstock. What caused it is refused (receiver), counts as a policy without an answer (policy) or is dead-lettered as poison; nothing else is affected. The log has the message and the stack. Alert on any."}, []string{"stage"}),
		asideInstances:   f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_lane_aside_instances", Help: "Instances that the backend refuses, fails for or is slow for while it accepts others: their data waits in the stream ASIDE, outside the lane. /partitions and the log name them, with the reason."}, []string{"signal", "partition", "backend"}),
		asideSince:       f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_lane_aside_since_seconds", Help: "Since when the instance waits that has been set aside for longest, in Unix time; 0 when none is. Alert on more than ten minutes ago."}, []string{"signal", "partition", "backend"}),
		missing:          f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_lane_missing_messages", Help: "Messages that edges have numbered and that never came to the lane, since its tally began: an edge or the hub has lost them, or they are still to come. penstock audit shows the instances. Alert on more than 0 for long."}, []string{"signal", "partition", "backend"}),
		Keeper:           f.NewGauge(prometheus.GaugeOpts{Name: "penstock_keeper", Help: "1 at the sink that is the keeper, which removes from the hub's streams what every lane has finished. One of all sinks is the keeper; without one, streams fill and refuse."}),
		streamOwed:       f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_stream_owed_bytes", Help: "About how many bytes of a stream of the hub at least one lane has not finished. Reported by the keeper."}, []string{"stream"}),
		streamRoom:       f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_stream_room_bytes", Help: "About how many more bytes fit into a stream of the hub before it refuses and edges must keep what they have. Reported by the keeper."}, []string{"stream"}),
		streamLeft:       f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_stream_room_seconds", Help: "For how long the room in a stream of the hub lasts at the current rate if no lane finishes anything; +Inf while nothing arrives. Reported by the keeper. Alert on less than an hour."}, []string{"stream"}),
		unread:           f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_stream_unread_lanes", Help: "Lanes of a stream that hold messages and belong to no configured backend: what they have not finished is kept until they are abandoned (penstock lanes abandon). Reported by the keeper. Alert on more than 0."}, []string{"stream"}),
		removed:          f.NewCounterVec(prometheus.CounterOpts{Name: "penstock_stream_removed_messages_total", Help: "Sequences that the keeper has removed from a stream of the hub because every lane had finished them."}, []string{"stream"}),
		abandoned:        f.NewCounterVec(prometheus.CounterOpts{Name: "penstock_stream_abandoned_messages_total", Help: "Messages of abandoned lanes (penstock lanes abandon) that these had not finished: they are lost for that backend. Reported by the keeper."}, []string{"stream"}),
		lost:             f.NewCounterVec(prometheus.CounterOpts{Name: "penstock_stream_lost_messages_total", Help: "About how many messages that a lane had not finished are missing from the stream although no keeper has removed them: the stream was purged or deleted, or the hub has lost data. Reported by the keeper; the stream AUDIT has the lanes. Alert on any."}, []string{"stream"}),
		oldest:           f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_stream_oldest_owed_seconds", Help: "How long the oldest message that a lane has not finished has been in the hub; 0 when it has finished everything. Reported by the keeper, once a minute."}, []string{"stream", "lane"}),
		pushed:           counter("penstock_dead_letters_pushed_out_items_total", "Items of dead letters that were deleted, as the oldest of a full DEADLETTER, to make room for others: they are lost for good. Reported by the keeper; beyond 1000 instances the label is _other. Alert on any.", "instance"),
		owned:            f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_lane_owned", Help: "1 when this process reads the lane."}, []string{"signal", "partition", "backend"}),
	}
	l.instances = newInstances(counter, f)
	for _, r := range []string{ClosedFull, ClosedAddress} {
		l.closed.WithLabelValues(r)
	}
	for _, outcome := range []string{LateRescued, LateTooLate, LateOverLimit, LateIncomplete} {
		l.late.WithLabelValues(outcome)
	}
	for _, stage := range []string{PanicReceiver, PanicRouter, PanicSampler, PanicPolicy, PanicReader, PanicProcessor, PanicWriter} {
		l.panics.WithLabelValues(stage)
	}
	for _, kind := range []string{HubSlowConsumer, HubDenied, HubOther} {
		l.hubErrors.WithLabelValues(kind)
	}
	for _, sig := range otlpwire.Signals {
		n := sig.String()
		s := &l.signals[sig]
		*s = Signal{
			Accepted:   accepted.WithLabelValues(n),
			Forwarded:  forwarded.WithLabelValues(n),
			Routed:     routed.WithLabelValues(n),
			SampledOut: sampledOut.WithLabelValues(n),
			Rescued:    rescued.WithLabelValues(n),
			Duplicate:  duplicate.WithLabelValues(n),
			Sanitised:  sanitised.WithLabelValues(n),
			Crowded:    crowded.WithLabelValues(n),
			Filtered:   filtered.WithLabelValues(n),
			Restamped:  restamped.WithLabelValues(n),
			refused:    refused.MustCurryWith(prometheus.Labels{"signal": n}),
			delivered:  delivered.MustCurryWith(prometheus.Labels{"signal": n}),
			aside:      aside.MustCurryWith(prometheus.Labels{"signal": n}),
			dedup:      dedup.MustCurryWith(prometheus.Labels{"signal": n}),
			dead:       dead.MustCurryWith(prometheus.Labels{"signal": n}),
			dropped:    dropped.MustCurryWith(prometheus.Labels{"signal": n}),
		}
		l.spoolLost.WithLabelValues(n)
		for _, r := range []string{RefusedMalformed, RefusedTooLarge, RefusedInvalid, RefusedTimeout, RefusedUnauthorized, RefusedFull, RefusedUnavailable, RefusedOverload, RefusedRate} {
			s.refused.WithLabelValues(r)
		}
		for _, b := range backends {
			l.Know(sig, b)
			for _, o := range []string{LocalDelivered, LocalRefused, LocalMissed} {
				l.local.WithLabelValues(n, b, o)
			}
		}
		for _, r := range []string{DroppedFull, DroppedRefused, DroppedDamaged, DroppedUndecodable} {
			s.dropped.WithLabelValues(r)
		}
		for _, r := range []string{DeadRefused, DeadUndecodable, DeadUnsupported, DeadOutOfOrder, DeadTooOld, DeadTooNew, DeadTooLarge, DeadCardinality, DeadPoison} {
			s.dead.WithLabelValues(r)
		}
	}
	return l
}

// Know creates the counters of a backend, with the value zero.
func (l *Ledger) Know(sig otlpwire.Signal, backend string) {
	s := l.Of(sig)
	s.delivered.WithLabelValues(backend)
	s.aside.WithLabelValues(backend)
	s.dedup.WithLabelValues(backend)
	l.replayed.WithLabelValues(sig.String(), backend)
	l.paused.WithLabelValues(sig.String(), backend)
	l.stalls.WithLabelValues(sig.String(), backend)
	for _, r := range []string{InterruptedPin, InterruptedHub, InterruptedSuperseded, InterruptedFull, InterruptedMoved, InterruptedGone, InterruptedPanic} {
		l.interrupted.WithLabelValues(sig.String(), backend, r)
	}
}

// Of returns the part of the ledger for one signal.
func (l *Ledger) Of(sig otlpwire.Signal) *Signal { return &l.signals[sig] }

// Panics returns the counter of panics that were caught in a stage.
func (l *Ledger) Panics(stage string) prometheus.Counter { return l.panics.WithLabelValues(stage) }

// ClosedConnections returns the counter of connections that were closed for a reason.
func (l *Ledger) ClosedConnections(reason string) prometheus.Counter {
	return l.closed.WithLabelValues(reason)
}

// SpoolLost returns the counter of messages that a spool's disk has lost.
func (l *Ledger) SpoolLost(sig otlpwire.Signal) prometheus.Counter {
	return l.spoolLost.WithLabelValues(sig.String())
}

// Local returns the counters, by outcome, of an edge's local backend.
func (l *Ledger) Local(sig otlpwire.Signal, backend string) func(outcome string) prometheus.Counter {
	return func(outcome string) prometheus.Counter {
		return l.local.WithLabelValues(sig.String(), backend, outcome)
	}
}

// Refused returns the counter of refusals for a reason.
func (s *Signal) Refused(reason string) prometheus.Counter { return s.refused.WithLabelValues(reason) }

// Delivered returns the counter of deliveries to a backend.
func (s *Signal) Delivered(backend string) prometheus.Counter {
	return s.delivered.WithLabelValues(backend)
}

// Deduplicated returns the counter of items that a backend already had.
func (s *Signal) Deduplicated(backend string) prometheus.Counter {
	return s.dedup.WithLabelValues(backend)
}

// Aside returns the counter of items that are set aside because a backend refuses their instance.
func (s *Signal) Aside(backend string) prometheus.Counter { return s.aside.WithLabelValues(backend) }

// Dead returns the counter of dead letters for a reason.
func (s *Signal) Dead(reason string) prometheus.Counter { return s.dead.WithLabelValues(reason) }

// Dropped returns the counter of items that an edge has lost, for a reason.
func (s *Signal) Dropped(reason string) prometheus.Counter { return s.dropped.WithLabelValues(reason) }

// Replayed returns the counter of deliveries for replay jobs to a backend.
func (l *Ledger) Replayed(sig otlpwire.Signal, backend string) prometheus.Counter {
	return l.replayed.WithLabelValues(sig.String(), backend)
}

// Lane returns the gauges of one lane: its lag in messages, whether this process owns it, and
// in how many seconds it will have caught up.
func (l *Ledger) Lane(signal, partition, backend string) (lag, owned, eta prometheus.Gauge) {
	return l.lag.WithLabelValues(signal, partition, backend), l.owned.WithLabelValues(signal, partition, backend), l.eta.WithLabelValues(signal, partition, backend)
}

// Aside returns the gauge of how many instances a lane has set aside.
func (l *Ledger) Aside(signal string, partition int, backend string) prometheus.Gauge {
	return l.asideInstances.WithLabelValues(signal, strconv.Itoa(partition), backend)
}

// AsideSince returns the gauge of since when a lane has set an instance aside, in Unix time.
func (l *Ledger) AsideSince(signal string, partition int, backend string) prometheus.Gauge {
	return l.asideSince.WithLabelValues(signal, strconv.Itoa(partition), backend)
}

// Interrupted counts how often a lane went back to its floor, by reason.
func (l *Ledger) Interrupted(signal, backend string) func(reason string) {
	return func(reason string) { l.interrupted.WithLabelValues(signal, backend, reason).Inc() }
}

// Stall returns the gauge of how long something has made no progress, and the counter of how
// often that took long.
func (l *Ledger) Stall(signal, partition, backend string) (seconds prometheus.Gauge, stalls prometheus.Counter) {
	return l.stalled.WithLabelValues(signal, partition, backend), l.stalls.WithLabelValues(signal, backend)
}

// HubErrors returns the counter of one kind of error of the connection to the hub.
func (l *Ledger) HubErrors(kind string) prometheus.Counter { return l.hubErrors.WithLabelValues(kind) }

// Paused returns a function that counts a lane as waiting for an operator, or no longer so.
func (l *Ledger) Paused(sig otlpwire.Signal, backend string) func(now bool) {
	g := l.paused.WithLabelValues(sig.String(), backend)
	return func(now bool) {
		if now {
			g.Inc()
		} else {
			g.Dec()
		}
	}
}

// Stream returns the gauges of a stream of the hub: about how many bytes are owed, how many
// more fit, and for how many seconds that lasts.
func (l *Ledger) Stream(name string) (owed, room, left prometheus.Gauge) {
	return l.streamOwed.WithLabelValues(name), l.streamRoom.WithLabelValues(name), l.streamLeft.WithLabelValues(name)
}

// ForgetStreams removes the gauges that a keeper reports of streams, because another sink has
// become the keeper.
func (l *Ledger) ForgetStreams() {
	for _, g := range []*prometheus.GaugeVec{l.streamOwed, l.streamRoom, l.streamLeft, l.unread, l.oldest, l.instances.owed} {
		g.Reset()
	}
}

// Lost returns the counter of messages of a stream that lanes were owed and that are missing.
func (l *Ledger) Lost(stream string) prometheus.Counter { return l.lost.WithLabelValues(stream) }

// Oldest returns the gauge of how long a lane of a stream has been owed something, in seconds.
func (l *Ledger) Oldest(stream, lane string) prometheus.Gauge {
	return l.oldest.WithLabelValues(stream, lane)
}

// ForgetOldest removes the gauges of [Ledger.Oldest] of one stream.
func (l *Ledger) ForgetOldest(stream string) {
	l.oldest.DeletePartialMatch(prometheus.Labels{"stream": stream})
}

// maxPushed is how many instances have their own counter.
const maxPushed = 1000

// Pushed returns the counter of items of an instance's dead letters that were deleted to make
// room for others.
func (l *Ledger) Pushed(signal, instance string) prometheus.Counter {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.pushedOf[instance] {
		if len(l.pushedOf) == maxPushed {
			instance = "_other"
		} else {
			l.pushedOf[instance] = true
		}
	}
	return l.pushed.WithLabelValues(signal, instance)
}

// Missing returns what sets how many messages of edges never came to a lane.
func (l *Ledger) Missing(signal string, partition int, backend string) func(messages float64) {
	return func(messages float64) {
		l.missing.WithLabelValues(signal, strconv.Itoa(partition), backend).Set(messages)
	}
}

// Unread returns the gauge of how many lanes of a stream no configured backend reads.
func (l *Ledger) Unread(stream string) prometheus.Gauge { return l.unread.WithLabelValues(stream) }

// Removed returns the counter of messages that a keeper has removed from a stream.
func (l *Ledger) Removed(stream string) prometheus.Counter {
	return l.removed.WithLabelValues(stream)
}

// Abandoned returns the counter of messages that were lost with abandoned lanes.
func (l *Ledger) Abandoned(stream string) prometheus.Counter {
	return l.abandoned.WithLabelValues(stream)
}

// Sampler returns the gauges of one partition's sampler.
func (l *Ledger) Sampler(partition string) (traces, bytes prometheus.Gauge) {
	return l.heldTraces.WithLabelValues(partition), l.heldBytes.WithLabelValues(partition)
}

// Sources returns the gauges of the sources of one partition's sampler.
func (l *Ledger) Sources(partition string) (known, waiting prometheus.Gauge) {
	return l.sources.WithLabelValues(partition), l.waiting.WithLabelValues(partition)
}

// Late counts what has become of traces that late spans could bring back.
func (l *Ledger) Late(outcome string, traces int) {
	l.late.WithLabelValues(outcome).Add(float64(traces))
}

// Decided counts the decision about one trace.
func (l *Ledger) Decided(kept bool, policy string) {
	decision := "not_kept"
	if kept {
		decision = "kept"
	}
	l.decided.WithLabelValues(decision, policy).Inc()
}
