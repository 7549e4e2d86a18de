package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"time"

	collectorlogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	collectormetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collectortrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Summary is the judgement, in items.
type Summary struct {
	Acked, Found int
	Lost         int // acknowledged and not found
	Phantom      int // found and never sent, or not as it was sent
	Misordered   int // found for the first time behind a later one of its sender
	Duplicates   int // found again
	Refused      int // requests that were refused for good though nothing was wrong with them
	FalseAlarms  int // times that the edge took a sound hub for one that had lost data
	Faults       int
}

func (s Summary) String() string {
	return fmt.Sprintf("acked=%d found=%d lost=%d phantom=%d misordered=%d duplicates=%d faults=%d", s.Acked, s.Found, s.Lost, s.Phantom, s.Misordered, s.Duplicates, s.Faults)
}

// Broken reports whether a promise was.
func (s Summary) Broken() bool {
	return s.Lost+s.Phantom+s.Misordered+s.Refused+s.FalseAlarms > 0 || s.Acked == 0 || s.Found == 0
}

// judge compares what was acknowledged with what the hub holds.
func (w *world) judge(ctx context.Context) (Summary, error) {
	sum := Summary{Faults: w.faults}
	conn, err := w.connect(ctx)
	if err != nil {
		return sum, err
	}
	defer conn.Close()
	found := map[uint64]bool{}
	for _, sig := range otlpwire.Signals {
		if err := w.read(ctx, conn, sig, found, &sum); err != nil {
			return sum, err
		}
	}
	for _, s := range w.senders {
		s.mu.Lock()
		first, last := uint64(0), uint64(0)
		for n := uint64(1); n <= s.attempted; n++ {
			if !s.acked[n] {
				continue
			}
			sum.Acked++
			if !found[id(s.number, n)] {
				if sum.Lost++; first == 0 {
					first = n
				}
				last = n
			}
		}
		if first > 0 {
			w.say("not there: of sender %d (%v), which sent %d items, some from %d to %d", s.number, s.sig, s.attempted, first, last)
		}
		if s.refused > 0 {
			w.say("sender %d (%v) was refused %d times: %s", s.number, s.sig, s.refused, s.firstBad)
			sum.Refused += s.refused
		}
		s.mu.Unlock()
	}
	sum.Found = len(found)
	text, err := os.ReadFile(w.edge.Log)
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "all that is held is sent again") {
			sum.FalseAlarms++
			w.say("false alarm: %s", line)
		}
	}
	if err != nil {
		return sum, err
	}
	return sum, nil
}

// read takes in one stream of the hub.
func (w *world) read(ctx context.Context, conn *bus.Conn, sig otlpwire.Signal, found map[uint64]bool, sum *Summary) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	state, err := conn.State(ctx, bus.Stream(sig))
	if err != nil || state.Messages == 0 {
		return err
	}
	r, err := conn.OpenReader(ctx, bus.Stream(sig), 1)
	if err != nil {
		return err
	}
	defer r.Close()
	last := map[int]uint64{}
	for seq := uint64(0); seq < state.LastSeq; {
		d, err := r.Next(ctx)
		if err != nil {
			return err
		}
		seq = d.Seq
		body, err := envelope.Decompress(nil, d.Body, d.Header.Encoding)
		if err == nil {
			err = d.Err
		}
		if err != nil {
			return fmt.Errorf("message %d of %v: %w", d.Seq, sig, err)
		}
		err = items(sig, body, func(x uint64, attrs []*commonpb.KeyValue) {
			from, n := int(x>>40), x&(1<<40-1)
			switch {
			case from >= len(w.senders) || w.senders[from].sig != sig || n == 0 || n > w.senders[from].attempted || !intact(x, attrs):
				if sum.Phantom++; sum.Phantom <= 10 {
					w.say("phantom: %v item %d of sender %d", sig, n, from)
				}
			case found[x]:
				sum.Duplicates++
			default:
				found[x] = true
				if n < last[from] {
					if sum.Misordered++; sum.Misordered <= 10 {
						w.say("misordered: %v item %d of sender %d behind %d, in message %d", sig, n, from, last[from], d.Seq)
					}
				}
				last[from] = max(last[from], n)
			}
		})
		if err != nil {
			return fmt.Errorf("message %d of %v: %w", d.Seq, sig, err)
		}
	}
	return nil
}

// intact reports whether an item carries what it was sent with.
func intact(x uint64, attrs []*commonpb.KeyValue) bool {
	if len(attrs) != 1 {
		return false
	}
	v := attrs[0].GetValue().GetStringValue()
	return v == text(x, len(v))
}

// items calls visit for every item of a request.
func items(sig otlpwire.Signal, body []byte, visit func(id uint64, attrs []*commonpb.KeyValue)) error {
	switch sig {
	case otlpwire.Traces:
		var m collectortrace.ExportTraceServiceRequest
		if err := proto.Unmarshal(body, &m); err != nil {
			return err
		}
		for _, r := range m.GetResourceSpans() {
			for _, sc := range r.GetScopeSpans() {
				for _, sp := range sc.GetSpans() {
					visit(binary.BigEndian.Uint64(sp.GetSpanId()), sp.GetAttributes())
				}
			}
		}
	case otlpwire.Metrics:
		var m collectormetrics.ExportMetricsServiceRequest
		if err := proto.Unmarshal(body, &m); err != nil {
			return err
		}
		for _, r := range m.GetResourceMetrics() {
			for _, sc := range r.GetScopeMetrics() {
				for _, metric := range sc.GetMetrics() {
					for _, p := range metric.GetGauge().GetDataPoints() {
						visit(uint64(p.GetAsInt()), p.GetAttributes())
					}
				}
			}
		}
	case otlpwire.Logs:
		var m collectorlogs.ExportLogsServiceRequest
		if err := proto.Unmarshal(body, &m); err != nil {
			return err
		}
		for _, r := range m.GetResourceLogs() {
			for _, sc := range r.GetScopeLogs() {
				for _, rec := range sc.GetLogRecords() {
					visit(uint64(rec.GetBody().GetIntValue()), rec.GetAttributes())
				}
			}
		}
	}
	return nil
}
