package sink

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/failpoint"
)

const (
	// maxDecisions is how many decisions are gathered for one message: of 40
	// bytes, a name of up to 128 and a few for each budget they stay below a stock
	// server's 1 MiB.
	maxDecisions = 2048

	// maxSources is of how many instances the sources are gathered for one message: each has up to 32, of 12 bytes.
	maxSources = 512
)

func (l *traceLane) decisionsMessage(items int) bus.Message {
	return bus.Message{Subject: l.journalSubject, Header: envelope.Header{
		ContentType: envelope.ContentTypeDecisions, Items: items, Arrival: time.Now().UnixNano(),
	}}
}

// record makes the decisions durable: before the first span of a kept trace is
// sent, and before the floor passes a span of a trace that was not kept. After an error nothing
// may be sent; [bus.ErrSuperseded]: the lane has another owner.
func (l *traceLane) record(ctx context.Context) error {
	if failpoint.DecisionNotLogged {
		l.decisions = l.decisions[:0]
	}
	if failpoint.RescueNotRecorded {
		l.decisions = slices.DeleteFunc(l.decisions, func(d envelope.Decision) bool { return d.Late != envelope.OnTime })
	}
	for chunk := range slices.Chunk(l.sources, maxSources) {
		if err := l.append(ctx, 0, envelope.AppendSources(nil, chunk)); err != nil {
			return err
		}
	}
	l.sources = l.sources[:0]
	if len(l.rescuing) > 0 {
		l.hold(ctx)
	}
	entries := []envelope.Decision{{}} // all that was recorded before has been sent by now, but for rescues
	for chunk := range slices.Chunk(l.decisions, maxDecisions) {
		if err := l.append(ctx, len(chunk), envelope.AppendDecisions(nil, append(entries, chunk...)...)); err != nil {
			return err
		}
		entries = nil
	}
	l.rescues.waiting = append(l.rescues.waiting, l.rescuing...)
	if l.rescuing = nil; l.released {
		l.released = false
		l.hold(ctx)
	}
	l.decisions = l.decisions[:0]
	return nil
}

// hold notes from where on the earlier spans of rescues are still to be read.
func (l *traceLane) hold(ctx context.Context) {
	from := uint64(0)
	for _, all := range [][]envelope.Decision{l.rescuing, l.rescues.waiting, l.rescues.reading} {
		for _, d := range all {
			if from == 0 || d.From < from {
				from = d.From
			}
		}
	}
	l.tally.Again(ctx, from)
}

// append stores a message of the journal.
func (l *traceLane) append(ctx context.Context, items int, body []byte) error {
	msg := l.journal.Entry(l.decisionsMessage(items))
	msg.Body, msg.Header.Encoding = envelope.Compress(nil, body, envelope.S2)
	superseded := false
	if !l.exporter.Retry(ctx, "record decisions", func() error {
		err := l.journal.Append(ctx, msg)
		if superseded = errors.Is(err, bus.ErrSuperseded); superseded {
			return nil
		}
		return err
	}) {
		return stopped(ctx)
	}
	if superseded {
		if more, due := l.exporter.Said.Due("superseded "+l.journalSubject, time.Now()); due {
			l.exporter.Log.Info("another sink has taken over the partition, its decisions apply", "more_since_last_said", more)
		}
		return bus.ErrSuperseded
	}
	l.written = time.Now()
	return nil
}

// checkpoint records that everything decided has been sent: an owner that reads the spans
// again, after a stop the next one, sends none of them again.
func (l *traceLane) checkpoint(ctx context.Context) {
	if l.sampler == nil {
		return
	}
	l.written = time.Now()
	msg := l.journal.Entry(l.decisionsMessage(0))
	msg.Body = envelope.AppendDecision(nil, envelope.Decision{})
	if err := l.journal.Append(ctx, msg); err != nil {
		l.exporter.Log.Debug("checkpoint not written; some traces may be exported twice after failover", "err", err)
	}
}
