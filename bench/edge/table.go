package main

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/penstock/penstock/bench/internal/load"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// distinct is how many requests there are, sent round and round: more than a group
// of the edge holds, so that no group compresses better for holding one twice.
const distinct = 128

func (b *bench) requests(spans int) [][]byte {
	all := make([][]byte, distinct)
	for i := range all {
		all[i] = load.Seeded(uint64(i+1), otlpwire.Traces, spans, b.attrs)
	}
	return all
}

// measurement is one row.
type measurement struct {
	outcome
	cpu    time.Duration
	peak   int           // bytes
	behind time.Duration // from the last answer until the next hop had everything
}

// perCPU is spans passed on a CPU second.
func (m measurement) perCPU() float64 { return float64(m.spans) / m.cpu.Seconds() }

// nameWidth is that of the longest name of a side.
const nameWidth = 52

// table measures all cells, the sides of a cell one after the other.
func (b *bench) table(ctx context.Context) error {
	fmt.Printf("%-5s %5s %6s  %-*s %9s %8s %9s %8s %8s %9s  %s\n", "fsync", "conns", "spans", nameWidth, "", "spans/s", "CPU s/M", "peak MiB", "p50 ms", "p99 ms", "behind s", "edge/this")
	var durable, possible []float64 // the ratios of edge and limit that compare like with like
	var all [2]measurement
	for _, fsync := range b.fsyncs {
		for _, connections := range b.connections {
			for _, spans := range b.spans {
				sides, err := b.row(ctx, fsync, connections, spans)
				if err != nil {
					return fmt.Errorf("fsync %s, %d connections, %d spans a request: %w", onOff(fsync), connections, spans, err)
				}
				if fsync && b.peerBin != "" {
					edge, limit, peer := sides[0], sides[1], sides[2]
					durable = append(durable, edge.perCPU()/peer.perCPU())
					possible = append(possible, limit.perCPU()/peer.perCPU())
					for i, m := range []measurement{edge, peer} {
						all[i].spans += m.spans
						all[i].cpu += m.cpu
					}
				}
			}
		}
	}
	if len(durable) > 0 {
		fmt.Printf("\nboth answering after the disk, with fsync: for a CPU second the edge takes %.1f to %.1f times the spans, %.1f times over all cells together\n",
			slices.Min(durable), slices.Max(durable), all[0].perCPU()/all[1].perCPU())
		fmt.Printf("the limit takes %.1f to %.1f times the spans of the same collector\n", slices.Min(possible), slices.Max(possible))
	}
	return nil
}

// row measures and prints all sides of a cell, in their order.
func (b *bench) row(ctx context.Context, fsync bool, connections, spans int) (all []measurement, err error) {
	bodies := b.requests(spans)
	for i, s := range b.sides() {
		m, err := b.cell(ctx, s, fsync, connections, spans, 0, bodies)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
		all = append(all, m)
		note := ""
		if i > 0 {
			note = fmt.Sprintf("%.2fx", all[0].perCPU()/m.perCPU())
		}
		if m.refused > 0 {
			note += fmt.Sprintf("  refused %d times", m.refused)
		}
		fmt.Printf("%-5s %5d %6d  %-*s %9.0f %8.2f %9.0f %8.2f %8.2f %9.1f  %s\n", onOff(fsync), connections, spans, nameWidth, s.name,
			float64(m.spans)/m.took.Seconds(), 1e6/m.perCPU(), float64(m.peak)/(1<<20), ms(quantile(m.answers, 0.5)), ms(quantile(m.answers, 0.99)), m.behind.Seconds(), note)
	}
	return all, nil
}

// lightLoad prints how long an answer takes when there is little to do.
func (b *bench) lightLoad(ctx context.Context) error {
	const spans, every = 64, 20 * time.Millisecond
	fmt.Printf("\nanswers under light load: one connection, a request of %d spans every %v\n", spans, every)
	bodies := b.requests(spans)
	for _, fsync := range b.fsyncs {
		for _, s := range b.sides() {
			m, err := b.cell(ctx, s, fsync, 1, spans, every, bodies)
			if err != nil {
				return fmt.Errorf("%s under light load: %w", s.name, err)
			}
			fmt.Printf("fsync %-4s %-*s p50 %6.2f ms  p99 %6.2f ms\n", onOff(fsync), nameWidth, s.name, ms(quantile(m.answers, 0.5)), ms(quantile(m.answers, 0.99)))
		}
	}
	return nil
}

// cell starts a side, warms it up, and measures it until it has passed on all.
func (b *bench) cell(ctx context.Context, s side, fsync bool, connections, spans int, every time.Duration, bodies [][]byte) (m measurement, err error) {
	r, err := s.start(ctx, fsync)
	if err != nil {
		return m, err
	}
	defer r.stop()
	senders, err := openSenders(b.protocol, r.otlp, connections)
	defer closeAll(senders)
	if err != nil {
		return m, err
	}
	send := func(length time.Duration) (outcome, error) {
		var n atomic.Int64
		end := time.Now().Add(length)
		t := traffic{senders: senders, spans: spans, every: every, next: func(int) []byte {
			if !time.Now().Before(end) {
				return nil
			}
			return bodies[int(n.Add(1))%len(bodies)]
		}}
		return t.run(ctx)
	}
	warm, err := send(b.round / 5)
	if err != nil {
		return m, err
	}
	if _, err := r.drained(ctx, warm.spans); err != nil {
		return m, err
	}
	before, err := r.measured.cpu()
	if err != nil {
		return m, err
	}
	if m.outcome, err = send(b.round); err != nil {
		return m, err
	}
	last := time.Now()
	all, err := r.drained(ctx, warm.spans+m.spans)
	if err != nil {
		return m, err
	}
	m.behind = all.Sub(last)
	after, err := r.measured.cpu()
	if err != nil {
		return m, err
	}
	m.cpu = after - before
	m.peak, err = r.measured.peakRSS()
	return m, err
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}
