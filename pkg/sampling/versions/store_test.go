package versions

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
)

var quiet = slog.New(slog.DiscardHandler)

func testHub(t *testing.T) *bus.Conn {
	t.Helper()
	c, _ := testHubOf(t)
	return c
}

func testHubOf(t *testing.T) (*bus.Conn, *broker.Broker) {
	t.Helper()
	b, err := broker.Start(broker.Config{Name: "test", Dir: t.TempDir()}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	top := bus.DefaultTopology()
	top.Partitions, top.MaxBytes = 1, 64<<20
	c, err := bus.OpenHub(t.Context(), bus.Config{Name: "test", InProcess: b}, top, quiet, Bucket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c, b
}

// TestPoliciesAreVersions pushes more versions than are kept, while somebody
// watches.
func TestPoliciesAreVersions(t *testing.T) {
	c := testHub(t)
	top := bus.DefaultTopology()
	h := &bus.Hub{Conn: c, Topology: top}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	seen := make(chan *Record, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		follow(ctx, h, quiet, func(p *Record) { seen <- p }, func(err error) { t.Error(err) })
	}()
	if p := <-seen; p != nil {
		t.Errorf("a new hub has policies: %+v", p)
	}
	for i := range maxKept + 3 {
		text := fmt.Sprintf("policies: %d", i)
		p, err := Push(t.Context(), c, top, text, "me", func(err error) { t.Error(err) })
		if err != nil {
			t.Fatal(err)
		}
		if p.Number != uint64(i+1) || p.From != uint64(i+1) {
			t.Errorf("push %d is version %d from %d", i, p.Number, p.From)
		}
		select {
		case got := <-seen:
			if got == nil || got.Text != text || got.Number != p.Number || got.From != p.From || got.By != "me" {
				t.Errorf("the watch says %+v", got)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("the watch says nothing")
		}
		m := bus.Message{Subject: bus.SpansSubject(0), Header: envelope.Header{ContentType: envelope.ContentTypeFrames}}
		if _, err := c.Publish(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	all, err := All(t.Context(), c, top, func(err error) { t.Error(err) })
	if err != nil || len(all) != maxKept || all[0].Number != 4 {
		t.Errorf("%d versions, %v", len(all), err)
	}
	cancel()
	<-done
}

// TestARecordThatIsNoVersion: it is reported, and does not hide the versions beside it.
func TestARecordThatIsNoVersion(t *testing.T) {
	t.Parallel()
	c := testHub(t)
	bucket, err := c.OpenBucket(t.Context(), Bucket, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := bucket.Put(t.Context(), "1", []byte("not JSON")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	refused, known := make(chan error, 1), make(chan struct{}, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		h := &bus.Hub{Conn: c, Topology: bus.DefaultTopology()}
		follow(ctx, h, quiet, func(p *Record) { known <- struct{}{} }, func(err error) { refused <- err })
	}()
	defer func() { cancel(); <-done }()
	if err := <-refused; !strings.Contains(err.Error(), `policies "1"`) {
		t.Error(err)
	}
	<-known
}
