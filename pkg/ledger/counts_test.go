package ledger

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// series returns the values of all series, by name and labels without the common prefix.
func series(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			v := m.GetGauge().GetValue()
			if c := m.GetCounter(); c != nil {
				v = c.GetValue()
			}
			all[strings.TrimPrefix(f.GetName(), "penstock_")+" "+strings.Join(labels, " ")] = v
		}
	}
	return all
}

// changed returns the series that are not as they were.
func changed(before, after map[string]float64) (out []string) {
	for name, v := range after {
		if was, there := before[name]; !there || was != v {
			out = append(out, fmt.Sprintf("%s: %v", name, v))
		}
	}
	for name := range before {
		if _, there := after[name]; !there {
			out = append(out, name+": gone")
		}
	}
	slices.Sort(out)
	return out
}

// TestWhatEachMethodCounts: under which name and labels, and nothing else.
func TestWhatEachMethodCounts(t *testing.T) {
	logs := func(l *Ledger) *Signal { return l.Of(otlpwire.Logs) }
	for _, tc := range []struct {
		count func(l *Ledger)
		want  []string
	}{
		{func(l *Ledger) { logs(l).Accepted.Add(3) }, []string{"accepted_items_total signal=logs: 3"}},
		{func(l *Ledger) { logs(l).Forwarded.Add(3) }, []string{"forwarded_items_total signal=logs: 3"}},
		{func(l *Ledger) { logs(l).Routed.Add(3) }, []string{"routed_items_total signal=logs: 3"}},
		{func(l *Ledger) { logs(l).SampledOut.Add(3) }, []string{"sampled_out_items_total signal=logs: 3"}},
		{func(l *Ledger) { logs(l).Duplicate.Add(3) }, []string{"duplicate_items_total signal=logs: 3"}},
		{func(l *Ledger) { logs(l).Sanitised.Add(3) }, []string{"sanitised_strings_total signal=logs: 3"}},
		{func(l *Ledger) { logs(l).Crowded.Add(3) }, []string{"crowded_items_total signal=logs: 3"}},
		{func(l *Ledger) { logs(l).Filtered.Add(3) }, []string{"filtered_items_total signal=logs: 3"}},
		{func(l *Ledger) { logs(l).Restamped.Add(3) }, []string{"restamped_messages_total signal=logs: 3"}},
		{func(l *Ledger) { logs(l).Refused(RefusedFull).Add(3) }, []string{"refused_items_total reason=full signal=logs: 3"}},
		{func(l *Ledger) { logs(l).Delivered("loki").Add(3) }, []string{"delivered_items_total backend=loki signal=logs: 3"}},
		{func(l *Ledger) { logs(l).Deduplicated("loki").Add(3) }, []string{"deduped_by_backend_items_total backend=loki signal=logs: 3"}},
		{func(l *Ledger) { logs(l).Aside("loki").Add(3) }, []string{"set_aside_items_total backend=loki signal=logs: 3"}},
		{func(l *Ledger) { logs(l).Dead(DeadTooOld).Add(3) }, []string{"dead_lettered_items_total reason=too_old signal=logs: 3"}},
		{func(l *Ledger) { logs(l).Dropped(DroppedDamaged).Add(3) }, []string{"dropped_items_total reason=damaged signal=logs: 3"}},
		{func(l *Ledger) { l.Of(otlpwire.Traces).Accepted.Inc() }, []string{"accepted_items_total signal=traces: 1"}},
		{func(l *Ledger) { l.Of(otlpwire.Metrics).Accepted.Inc() }, []string{"accepted_items_total signal=metrics: 1"}},
		{func(l *Ledger) { l.ClosedConnections(ClosedAddress).Inc() }, []string{"closed_connections_total reason=address: 1"}},
		{func(l *Ledger) { l.SpoolLost(otlpwire.Logs).Inc() }, []string{"spool_lost_messages_total signal=logs: 1"}},
		{func(l *Ledger) { l.Local(otlpwire.Logs, "loki")(LocalMissed).Inc() }, []string{"local_items_total backend=loki outcome=missed signal=logs: 1"}},
		{func(l *Ledger) { l.Replayed(otlpwire.Logs, "loki").Inc() }, []string{"replayed_items_total backend=loki signal=logs: 1"}},
		{func(l *Ledger) { l.Interrupted("logs", "loki")(InterruptedHub) }, []string{"lane_interruptions_total backend=loki reason=hub signal=logs: 1"}},
		{func(l *Ledger) { l.HubErrors(HubDenied).Inc() }, []string{"hub_errors_total kind=denied: 1"}},
		{func(l *Ledger) { l.Aside("logs", 7, "loki").Set(2) }, []string{"lane_aside_instances backend=loki partition=7 signal=logs: 2"}},
		{func(l *Ledger) { l.Missing("logs", 7, "loki")(2) }, []string{"lane_missing_messages backend=loki partition=7 signal=logs: 2"}},
		{func(l *Ledger) { l.Pushed("logs", "as-1").Add(2) }, []string{"dead_letters_pushed_out_items_total instance=as-1 signal=logs: 2"}},
		{func(l *Ledger) { l.Lost("LOGS").Inc() }, []string{"stream_lost_messages_total stream=LOGS: 1"}},
		{func(l *Ledger) { l.Removed("LOGS").Inc() }, []string{"stream_removed_messages_total stream=LOGS: 1"}},
		{func(l *Ledger) { l.Abandoned("LOGS").Inc() }, []string{"stream_abandoned_messages_total stream=LOGS: 1"}},
		{func(l *Ledger) { l.Decided(true, "errors"); l.Decided(false, "") }, []string{"decided_traces_total decision=kept policy=errors: 1", "decided_traces_total decision=not_kept policy=: 1"}},
		{func(l *Ledger) {
			lag, owned, eta := l.Lane("logs", "7", "loki")
			lag.Set(1)
			owned.Set(2)
			eta.Set(3)
		}, []string{"lane_catch_up_seconds backend=loki partition=7 signal=logs: 3", "lane_lag_messages backend=loki partition=7 signal=logs: 1", "lane_owned backend=loki partition=7 signal=logs: 2"}},
		{func(l *Ledger) {
			seconds, stalls := l.Stall("logs", "7", "loki")
			seconds.Set(9)
			stalls.Inc()
		}, []string{"stalled_seconds backend=loki partition=7 signal=logs: 9", "stalls_total backend=loki signal=logs: 1"}},
		{func(l *Ledger) {
			traces, bytes := l.Sampler("7")
			traces.Set(1)
			bytes.Set(2)
		}, []string{"sampler_held_bytes partition=7: 2", "sampler_held_traces partition=7: 1"}},
		{func(l *Ledger) {
			paused := l.Paused(otlpwire.Logs, "loki")
			paused(true)
			paused(true)
			paused(false)
		}, []string{"lane_paused backend=loki signal=logs: 1"}},
		// A backend that is none of those that every sink may have is known from the start, too.
		{func(l *Ledger) { l.Know(otlpwire.Logs, "loki") }, nil},
		{func(l *Ledger) { l.Know(otlpwire.Logs, "loki-b") }, []string{
			"deduped_by_backend_items_total backend=loki-b signal=logs: 0", "delivered_items_total backend=loki-b signal=logs: 0",
			"lane_interruptions_total backend=loki-b reason=full signal=logs: 0", "lane_interruptions_total backend=loki-b reason=gone signal=logs: 0",
			"lane_interruptions_total backend=loki-b reason=hub signal=logs: 0", "lane_interruptions_total backend=loki-b reason=moved signal=logs: 0",
			"lane_interruptions_total backend=loki-b reason=panic signal=logs: 0", "lane_interruptions_total backend=loki-b reason=pin signal=logs: 0", "lane_interruptions_total backend=loki-b reason=superseded signal=logs: 0",
			"lane_paused backend=loki-b signal=logs: 0", "replayed_items_total backend=loki-b signal=logs: 0",
			"set_aside_items_total backend=loki-b signal=logs: 0", "stalls_total backend=loki-b signal=logs: 0",
		}},
	} {
		reg := prometheus.NewPedanticRegistry()
		l := New(reg)
		before := series(t, reg)
		tc.count(l)
		if got := changed(before, series(t, reg)); !slices.Equal(got, tc.want) {
			t.Errorf("got  %q\nwant %q", got, tc.want)
		}
	}
}

// TestEveryReasonIsThereFromTheStart: to count for a reason of the closed sets makes no series.
func TestEveryReasonIsThereFromTheStart(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	l := New(reg)
	before := len(series(t, reg))
	for _, sig := range otlpwire.Signals {
		s := l.Of(sig)
		for _, r := range []string{RefusedMalformed, RefusedTooLarge, RefusedInvalid, RefusedTimeout, RefusedUnauthorized, RefusedFull, RefusedUnavailable, RefusedOverload, RefusedRate} {
			s.Refused(r).Inc()
		}
		for _, r := range []string{DeadRefused, DeadUndecodable, DeadUnsupported, DeadOutOfOrder, DeadTooOld, DeadTooNew, DeadTooLarge, DeadCardinality} {
			s.Dead(r).Inc()
		}
		for _, r := range []string{DroppedFull, DroppedRefused, DroppedDamaged, DroppedUndecodable} {
			s.Dropped(r).Inc()
		}
		l.SpoolLost(sig).Inc()
		for _, b := range backends {
			s.Delivered(b).Inc()
			s.Deduplicated(b).Inc()
			s.Aside(b).Inc()
			l.Replayed(sig, b).Inc()
			l.Paused(sig, b)(true)
			for _, r := range []string{InterruptedPin, InterruptedHub, InterruptedSuperseded, InterruptedFull, InterruptedMoved, InterruptedGone, InterruptedPanic} {
				l.Interrupted(sig.String(), b)(r)
			}
			for _, o := range []string{LocalDelivered, LocalRefused, LocalMissed} {
				l.Local(sig, b)(o).Inc()
			}
		}
	}
	for _, r := range []string{ClosedFull, ClosedAddress} {
		l.ClosedConnections(r).Inc()
	}
	for _, k := range []string{HubSlowConsumer, HubDenied, HubOther} {
		l.HubErrors(k).Inc()
	}
	if after := len(series(t, reg)); after != before {
		t.Errorf("%d series, were %d", after, before)
	}
}

// TestInstancesAreBounded: the only label that senders choose has no more values than that, and those
// that have one keep it.
func TestInstancesAreBounded(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	l := New(reg)
	before := len(series(t, reg))
	for i := range 3 * maxPushed {
		l.Pushed("logs", fmt.Sprint("as-", i)).Inc()
	}
	l.Pushed("logs", "as-0").Inc()
	l.Pushed("traces", "as-0").Inc()
	l.Pushed("traces", fmt.Sprint("as-", 2*maxPushed)).Inc()
	all := series(t, reg)
	const name = "dead_letters_pushed_out_items_total instance="
	if n := len(all) - before; n != maxPushed+3 { // and _other of logs, as-0 and _other of traces
		t.Errorf("%d series", n)
	}
	for labels, want := range map[string]float64{"as-0 signal=logs": 2, "as-999 signal=logs": 1, "_other signal=logs": 2 * maxPushed, "as-0 signal=traces": 1, "_other signal=traces": 1} {
		if got := all[name+labels]; got != want {
			t.Errorf("%s: %v, want %v", labels, got, want)
		}
	}
}

// TestWhatIsForgotten: a keeper that is not the first any more tells of no stream, and the counters stay.
func TestWhatIsForgotten(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	l := New(reg)
	before := series(t, reg)
	for _, stream := range []string{"LOGS", "SPANS"} {
		owed, room, left := l.Stream(stream)
		owed.Set(1)
		room.Set(2)
		left.Set(3)
		l.Unread(stream).Set(4)
		l.Oldest(stream, "loki-0").Set(5)
	}
	l.Removed("LOGS").Inc()
	told := changed(before, series(t, reg))
	if len(told) != 11 || !slices.Contains(told, "stream_owed_bytes stream=LOGS: 1") || !slices.Contains(told, "stream_oldest_owed_seconds lane=loki-0 stream=SPANS: 5") {
		t.Errorf("told: %q", told)
	}
	l.ForgetOldest("LOGS")
	if got := changed(before, series(t, reg)); len(got) != 10 || slices.Contains(got, "stream_oldest_owed_seconds lane=loki-0 stream=LOGS: 5") {
		t.Errorf("without the lanes of LOGS: %q", got)
	}
	l.ForgetStreams()
	if got := changed(before, series(t, reg)); !slices.Equal(got, []string{"stream_removed_messages_total stream=LOGS: 1"}) {
		t.Errorf("left: %q", got)
	}
}
