package bus

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

func TestLookingBack(t *testing.T) {
	b := testBroker(t)
	c := testHub(t, b, 3)
	before := time.Now()
	if seq, err := c.SequenceAt(t.Context(), "LOGS", before); err != nil || seq != 1 {
		t.Errorf("of an empty stream: %d, %v", seq, err)
	}
	publish(t, c, "as-1", 0, 10)
	between := time.Now()
	publish(t, c, "as-1", 10, 20)
	for at, want := range map[time.Time]uint64{before.Add(-time.Hour): 1, before: 1, between: 11, time.Now().Add(time.Hour): 21} {
		if seq, err := c.SequenceAt(t.Context(), "LOGS", at); err != nil || seq != want {
			t.Errorf("at %v: %d, %v; want %d", at, seq, err, want)
		}
	}
	if n, err := c.Partitions(t.Context()); err != nil || n != 3 {
		t.Errorf("%d partitions, %v", n, err)
	}
	r, err := c.OpenReaderOf(t.Context(), ReaderConfig{Stream: "LOGS", From: 5, Headers: true})
	if err != nil || r.Left() != 16 {
		t.Fatalf("%d left, %v", r.Left(), err)
	}
	defer r.Close()
	d, err := r.Next(t.Context())
	if err != nil || d.Err != nil || len(d.Body) != 0 || d.Size == 0 || d.Seq != 5 || r.Left() != 15 {
		t.Errorf("%+v, %v, %d left", d, err, r.Left())
	}
	for _, line := range []string{"1", "2"} {
		if err := c.Record(t.Context(), "replay.x", []byte(line)); err != nil {
			t.Fatal(err)
		}
	}
	lines, err := c.Recorded(t.Context(), "replay.x")
	if err != nil || len(lines) != 2 || string(lines[1]) != "2" {
		t.Errorf("%q, %v", lines, err)
	}
	if lines, err := c.Recorded(t.Context(), "replay.y"); err != nil || len(lines) != 0 {
		t.Errorf("%q, %v", lines, err)
	}
}

// TestRequestsShareTheConnection: lanes of a connection that all catch up request together
// no more than a server allows for a connection.
func TestRequestsShareTheConnection(t *testing.T) {
	b := testBroker(t)
	c := testHub(t, b, 1)
	if n := c.requestBytes(); n != maxRequestBytes {
		t.Errorf("%d bytes", n)
	}
	body := make([]byte, 300<<10)
	for i := range 150 {
		if err := c.PublishAsync(Message{Subject: Subject(otlpwire.Logs, "as-1"), Body: body, Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, ID: fmt.Sprint("x", i)}}).Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	conn := connectTo(t, b, "many")
	var readers []*Reader
	for range 24 {
		r, err := conn.OpenReader(t.Context(), "LOGS", 1)
		if err != nil {
			t.Fatal(err)
		}
		readers = append(readers, r)
	}
	if n := conn.requestBytes(); n*requests*len(readers) > 64<<20 { // what a server allows
		t.Errorf("%d bytes a request", n)
	}
	// All have sent requests, and nobody reads: 24 x 44 MiB would be on their way.
	for _, r := range readers {
		if _, err := r.Next(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for n := 1; n < 150; n++ {
		for _, r := range readers {
			if d, err := r.Next(t.Context()); err != nil || d.Seq != uint64(n+1) {
				t.Fatalf("%d, %v; want %d", d.Seq, err, n+1)
			}
		}
	}
	if n := conn.nc.Statistics.Reconnects; n != 0 {
		t.Errorf("the server has given the connection up %d times", n)
	}
	for _, r := range readers {
		r.Close()
	}
	if n := conn.pulls.Load(); n != 0 {
		t.Errorf("%d readers are still counted", n)
	}
}

// TestFloorsAreInterrupted: whenever the answers end, what is known comes with an error.
func TestFloorsAreInterrupted(t *testing.T) {
	t.Parallel()
	c := testHub(t, testBroker(t), 1)
	openLane(t, c)
	outcomes := map[string]int{}
	for wait := time.Microsecond; outcomes["all"] < 20 && wait < time.Minute; wait += wait/50 + time.Microsecond {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		floors, _, err := c.Floors(ctx, "LOGS")
		cancel()
		switch {
		case err == nil && len(floors) == 1:
			outcomes["all"]++
		case err == nil:
			t.Fatalf("%d floors without an error", len(floors))
		case floors == nil:
			outcomes["nothing"]++
		default:
			outcomes["some"]++
		}
	}
	t.Log(outcomes)
	if outcomes["nothing"] == 0 || outcomes["all"] == 0 {
		t.Errorf("%v", outcomes)
	}
}
