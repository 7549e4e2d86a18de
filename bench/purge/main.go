// Command purge measures for how long a keeper's removal holds up those who publish: a hub in
// this process, a stream with so many GiB of messages of 64 KiB of two instances in turn, and one message of
// 1 KiB after the other while half of the stream is removed: from its front, as a keeper does, or all that one
// instance has, as it would have to do to thin what one has flooded the stream with.
//
//	go run ./purge -gib 1,10
//
// It prints how long the removal took, and the longest time that a publish took during it, beside
// the longest one in as long a time afterwards.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

func main() {
	sizes := flag.String("gib", "1,10", "`sizes` of the stream, in GiB")
	dir := flag.String("dir", "", "`directory` for the streams; default: a new one under the system's")
	flag.Parse()
	for _, size := range strings.Split(*sizes, ",") {
		gib, err := strconv.ParseFloat(size, 64)
		for _, instance := range []string{"", "as-1"} {
			if err == nil {
				err = measure(gib, *dir, instance)
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "purge:", err)
			os.Exit(1)
		}
	}
}

func message(instance, size int) bus.Message {
	return bus.Message{Subject: bus.Subject(otlpwire.Logs, fmt.Sprint("as-", instance)), Body: make([]byte, size), Header: envelope.Header{Items: 1, Arrival: 1}}
}

// measure removes half of a stream: the messages of an instance, or from the front.
func measure(gib float64, under, instance string) error {
	dir, err := os.MkdirTemp(under, "penstock-purge-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	quiet := slog.New(slog.DiscardHandler)
	hub, err := broker.Start(broker.Config{Name: "hub", Dir: dir, MaxPayload: 2 << 20}, quiet)
	if err != nil {
		return err
	}
	defer hub.Stop()
	top := bus.DefaultTopology()
	top.MaxBytes = config.Bytes(2 * gib * (1 << 30))
	ctx := context.Background()
	conn, err := bus.OpenHub(ctx, bus.Config{Name: "purge", InProcess: hub}, top, quiet)
	if err != nil {
		return err
	}
	defer conn.Close()
	const body = 64 << 10
	n := int(gib * (1 << 30) / body)
	var flights []bus.Pending
	for i := range n {
		flights = append(flights, conn.PublishAsync(message(1+i%2, body)))
		if len(flights) == 64 || i == n-1 {
			for _, f := range flights {
				if err := f.Wait(ctx); err != nil {
					return err
				}
			}
			flights = flights[:0]
		}
	}
	removal := time.Duration(0)
	during := func(d func() bool) (longest time.Duration, count int, err error) {
		for ; d(); count++ {
			begin := time.Now()
			if _, err := conn.Publish(ctx, message(3, 1<<10)); err != nil {
				return 0, 0, err
			}
			longest = max(longest, time.Since(begin))
		}
		return longest, count, nil
	}
	upTo, subject, what := n/2, "", "from the front"
	if instance != "" {
		there, err := conn.Subjects(ctx, bus.Stream(otlpwire.Logs), ">")
		if err != nil {
			return err
		}
		for one := range there {
			if strings.HasSuffix(one, "."+instance) {
				upTo, subject, what = n, one, "of one instance"
			}
		}
	}
	removed := make(chan error, 1)
	begin := time.Now()
	go func() {
		err := conn.Remove(ctx, bus.Stream(otlpwire.Logs), subject, uint64(upTo))
		removal = time.Since(begin)
		removed <- err
	}()
	var failure error
	longest, count, err := during(func() bool {
		select {
		case failure = <-removed:
			return false
		default:
			return true
		}
	})
	if err := errors.Join(err, failure); err != nil {
		return err
	}
	begin = time.Now()
	without, before, err := during(func() bool { return time.Since(begin) < removal })
	if err != nil {
		return err
	}
	fmt.Printf("%5.1f GiB, %7d messages: half of it, %-15s, removed in %8v; the longest of %d publishes %8v, of %d without a removal %8v\n",
		gib, n, what, removal.Round(time.Millisecond), count, longest.Round(100*time.Microsecond), before, without.Round(100*time.Microsecond))
	return nil
}
