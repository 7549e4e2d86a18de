// Command neighbours measures what the instances of a lane notice of one that is in trouble: five quiet
// instances send a log record each 100 ms to the hub, and a noisy one sends beside them.
//
//	cd bench && go run ./neighbours
//
// It measures the time from the hub's acknowledgement of a record to its arrival at Loki, of the quiet instances: alone,
// beside a flood, and beside an instance that Loki refuses, fails for, or is slow for. In these last cases the noisy
// one sends as much as a quiet one. Each case has a hub, a sink and a Loki of its own, all in this process; all
// instances share one partition. The trouble begins with the first record. After five seconds, in which the sink finds
// out, ten are measured; the longest delay of the first five is in the last column.
//
//	go run ./neighbours -history
//
// measures instead how much of its history a quiet instance can have replayed, alone and beside the flood: the age of its
// oldest record in a stream of 32 MiB that has been full for long, with records of 32 KiB. What is finished is removed from the
// front of a stream, whoever's it is.
package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sink"
)

const (
	quiet   = 5 // instances
	noisy   = "noisy"
	every   = 100 * time.Millisecond // a record of each
	warmUp  = 5 * time.Second
	measure = 10 * time.Second
)

func main() {
	flood := flag.Int("flood", 20, "how many `times` the records of a quiet instance the noisy one sends in its flood")
	history := flag.Bool("history", false, "measure how much of a quiet instance's history there is")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	measured := run
	if *history {
		measured = histories
	}
	if err := measured(ctx, *flood); err != nil {
		fmt.Fprintln(os.Stderr, "bench/neighbours:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, flood int) error {
	fmt.Printf("%s, %d CPUs shared by hub, sink, Loki and senders; %d quiet instances, %d records a second each, one partition\n\n",
		runtime.Version(), runtime.NumCPU(), quiet, time.Second/every)
	fmt.Println("                                      from the hub's ack to Loki   of alone             longest of")
	fmt.Println("quiet instances                             p50        p99        p50     p99     the first 5 s")
	var alone result
	for _, c := range []struct {
		what  string
		times int // as much as a quiet one the noisy one sends
		loki  *fake
	}{
		{"alone", 0, &fake{}},
		{fmt.Sprintf("beside a flood of %d times their rate", flood), flood, &fake{}},
		{"beside one that is refused, 429", 1, &fake{status: http.StatusTooManyRequests}},
		{"beside one that is answered 500", 1, &fake{status: http.StatusInternalServerError}},
		{"beside one that is answered in 30 s", 1, &fake{slow: 30 * time.Second}},
	} {
		r, err := one(ctx, c.times, c.loki, &sender{lasts: warmUp + measure})
		if err != nil {
			return fmt.Errorf("%s: %w", c.what, err)
		}
		if c.times == 0 {
			alone = r
		}
		fmt.Printf("%-38s %8.1f ms %7.1f ms %6.2fx %6.2fx %12.1f ms\n", c.what, ms(r.p50), ms(r.p99), float64(r.p50)/float64(alone.p50), float64(r.p99)/float64(alone.p99), ms(r.first))
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// result is of one case.
type result struct {
	p50, p99, first time.Duration
	history         time.Duration // of a quiet instance, at the end
}

// histories measures how much of the history of a quiet instance there is.
func histories(ctx context.Context, flood int) error {
	var alone result
	for _, times := range []int{0, flood} {
		r, err := one(ctx, times, &fake{}, &sender{lasts: time.Minute, pad: 24 << 10, bound: 32 << 20})
		if err != nil {
			return err
		}
		if times == 0 {
			alone = r
		}
		fmt.Printf("history of a quiet instance beside a flood of %2d times its rate: %5.1f s, %.2f of alone\n", times, r.history.Seconds(), float64(r.history)/float64(alone.history))
	}
	return nil
}

// one measures one case, in which the noisy instance sends so many times what a quiet one sends.
func one(ctx context.Context, times int, loki *fake, s *sender) (r result, err error) {
	dir, err := os.MkdirTemp("", "bench-neighbours-")
	if err != nil {
		return r, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	log := slog.New(slog.DiscardHandler)
	hub, err := broker.Start(broker.Config{Name: "hub", Dir: filepath.Join(dir, "hub"), MaxPayload: 2 << 20}, log)
	if err != nil {
		return r, err
	}
	defer hub.Stop()
	cfg := sink.DefaultConfig()
	cfg.Streams.Partitions = 1
	if s.bound > 0 {
		cfg.Streams.MaxBytes = s.bound
	}
	conn, err := bus.OpenHub(ctx, bus.Config{Name: "bench", InProcess: hub}, cfg.Streams, log)
	if err != nil {
		return r, err
	}
	defer conn.Close()

	url, closeLoki := loki.serve()
	defer closeLoki()
	cfg.Hub = bus.Config{InProcess: hub}
	cfg.Admin.Listen, cfg.Drain = "", 0
	cfg.Backends.File.Dir = filepath.Join(dir, "file")
	cfg.Backends.Loki.URL, cfg.Backends.Loki.Tenant.From = url, "instance"
	stages, err := sink.Build(app.NewProcess(log, &cfg), cfg)
	if err != nil {
		return r, err
	}
	serving, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- app.Run(serving, log, stages) }()
	defer func() {
		stop()
		err = errors.Join(err, <-ended)
	}()

	s.conn = conn
	if err := s.send(ctx, "quiet-0", new([]sent)); err != nil {
		return r, err
	}
	if !loki.await(ctx, s.next, 30*time.Second) {
		return r, errors.New("nothing arrives at Loki")
	}
	if r, err = s.measure(ctx, times, loki); err != nil {
		return r, err
	}
	_, stored, err := conn.First(ctx, bus.Stream(otlpwire.Logs), "otlp.logs.*.quiet-0", 1)
	r.history = time.Since(stored)
	return r, err
}

// sender publishes records as edges would, one in a message.
type sender struct {
	conn  *bus.Conn
	lasts time.Duration // how long each instance sends
	pad   int           // random bytes in a record, as base64
	bound config.Bytes  // of the stream; 0: the default

	mu   sync.Mutex
	next int // the number of the last record
}

// padding is an attribute that makes a record large.
func (s *sender) padding() []*commonpb.KeyValue {
	if s.pad == 0 {
		return nil
	}
	b := make([]byte, s.pad)
	_, _ = rand.Read(b)
	return []*commonpb.KeyValue{{Key: "padding", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: base64.StdEncoding.EncodeToString(b)}}}}
}

// sent is a record that the hub has acknowledged.
type sent struct {
	number  int
	at, ack time.Time
}

// measure sends for all instances, and compares what the hub has acknowledged with what has arrived.
func (s *sender) measure(ctx context.Context, times int, loki *fake) (r result, err error) {
	all, errs := make([][]sent, quiet+1), make([]error, quiet+1)
	begin := time.Now()
	var senders sync.WaitGroup
	for i := range quiet {
		senders.Go(func() {
			if backoff.Sleep(ctx, time.Duration(i)*every/quiet) { // not all at once
				errs[i] = s.each(ctx, every, begin, fmt.Sprint("quiet-", i), &all[i])
			}
		})
	}
	if times > 0 {
		senders.Go(func() { errs[quiet] = s.each(ctx, every/time.Duration(times), begin, noisy, &all[quiet]) })
	}
	senders.Wait()
	if err := errors.Join(errs...); err != nil {
		return r, err
	}
	var delays []time.Duration
	for _, one := range slices.Concat(all[:quiet]...) {
		if !loki.await(ctx, one.number, 30*time.Second) {
			return r, fmt.Errorf("record %d has not arrived", one.number)
		}
		delay := max(loki.at(one.number).Sub(one.ack), 0) // the acknowledgement may be the slower one
		if one.at.Sub(begin) < warmUp {
			r.first = max(r.first, delay)
		} else {
			delays = append(delays, delay)
		}
	}
	slices.SortFunc(delays, func(a, b time.Duration) int { return cmp.Compare(a, b) })
	r.p50, r.p99 = delays[len(delays)/2], delays[len(delays)*99/100]
	return r, nil
}

// each sends a record of an instance at each tick, until all is measured.
func (s *sender) each(ctx context.Context, tick time.Duration, begin time.Time, instance string, to *[]sent) error {
	clock := time.NewTicker(tick)
	defer clock.Stop()
	for time.Since(begin) < s.lasts {
		select {
		case <-clock.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := s.send(ctx, instance, to); err != nil {
			return err
		}
	}
	return nil
}

// send publishes a record with the next number, and notes when the hub has acknowledged it.
func (s *sender) send(ctx context.Context, instance string, to *[]sent) error {
	s.mu.Lock()
	s.next++
	one := sent{number: s.next, at: time.Now()}
	s.mu.Unlock()
	body, err := proto.Marshal(&logspb.LogsData{ResourceLogs: []*logspb.ResourceLogs{{ScopeLogs: []*logspb.ScopeLogs{{LogRecords: []*logspb.LogRecord{{
		TimeUnixNano: uint64(one.at.UnixNano()), Body: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: line(one.number)}},
		Attributes: s.padding(),
	}}}}}}})
	if err != nil {
		return err
	}
	if body, err = (envelope.Instance{ID: instance}).Stamp().Append(nil, body); err != nil {
		return err
	}
	m := bus.Message{Subject: bus.Subject(otlpwire.Logs, instance), Header: envelope.Header{
		ContentType: envelope.ContentTypeOTLP, Items: 1, ID: fmt.Sprint("neighbours-", one.number), Arrival: one.at.UnixNano(),
	}}
	m.Body, m.Header.Encoding = envelope.Compress(nil, body, envelope.S2)
	if _, err := s.conn.Publish(ctx, m); err != nil {
		return err
	}
	one.ack = time.Now()
	*to = append(*to, one)
	return nil
}

// await waits until a record has arrived.
func (f *fake) await(ctx context.Context, number int, patience time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return backoff.Until(ctx, func() bool { return !f.at(number).IsZero() })
}
