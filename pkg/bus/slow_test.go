package bus

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// slowHub acknowledges what is published to slow.x, one message after the other, each
// after a pause, and stops after some.
func slowHub(t *testing.T, c *Conn, pause time.Duration, most int) {
	t.Helper()
	n := 0
	sub, err := c.nc.Subscribe("slow.x", func(m *nats.Msg) {
		if n++; n > most {
			return
		}
		<-time.After(pause)
		_ = m.Respond(fmt.Appendf(nil, `{"stream":"S","seq":%d}`, n))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	if err := c.nc.Flush(); err != nil {
		t.Fatal(err)
	}
}

func publishSlow(c *Conn, n int) (all []Pending) {
	for range n {
		all = append(all, c.PublishAsync(Message{Subject: "slow.x", Header: envelope.Header{ContentType: envelope.ContentTypeOTLP}}))
	}
	return all
}

// TestASlowHubIsNotAwayWhileItAcknowledges: the end of a window is waited for as long as
// its beginning is acknowledged.
func TestASlowHubIsNotAwayWhileItAcknowledges(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	hub, conn := connectTo(t, b, "hub"), connectTo(t, b, "edge")
	slowHub(t, hub, publishTimeout/25, 1000)
	began := time.Now()
	for i, p := range publishSlow(conn, 40) {
		if s, err := p.Stored(t.Context()); err != nil || s.Seq != uint64(i+1) {
			t.Fatalf("message %d: %+v, %v", i, s, err)
		}
	}
	if took := time.Since(began); took < publishTimeout {
		t.Fatalf("all came within %v: the test tests nothing", took)
	}
}

// TestAHubThatStopsAnsweringIsAway, whatever it has answered before.
func TestAHubThatStopsAnsweringIsAway(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	hub, conn := connectTo(t, b, "hub"), connectTo(t, b, "edge")
	slowHub(t, hub, time.Millisecond, 3)
	all := publishSlow(conn, 4)
	for _, p := range all[:3] {
		if err := p.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := all[3].Wait(t.Context()); !errors.Is(err, nats.ErrTimeout) {
		t.Errorf("got %v", err)
	}
}

// TestDenialsAreOfTheirTime: only what the server has denied since the request began is the
// reason of a failure.
func TestDenialsAreOfTheirTime(t *testing.T) {
	d := newDenials()
	d.add(`Permissions Violation for Publish to "$KV.REPLAYS.job.a"`)
	d.ring[0].at = time.Now().Add(-time.Minute)
	began := time.Now()
	if denied, _ := d.since(began, "$KV.REPLAYS.job.a", ""); denied {
		t.Error("a denial of a minute ago is the reason of now")
	}
	d.add(`Permissions Violation for Publish to "$KV.REPLAYS.job.ab"`)
	a, _ := d.since(began, "$KV.REPLAYS.job.a", "")
	ab, _ := d.since(began, "$KV.REPLAYS.job.ab", "")
	if a || !ab {
		t.Error("the denial is of another key")
	}
}

// TestLanesOfAThousandPartitions: nats-server's own bound of 1,000 consumers a stream does
// not apply to streams that are created here.
func TestLanesOfAThousandPartitions(t *testing.T) {
	t.Parallel()
	const partitions = 1024
	hub := testHub(t, testBroker(t), partitions)
	for p := range partitions {
		for _, backend := range []string{"loki", "loki-site-b"} {
			l, err := hub.OpenLane(t.Context(), LaneConfig{Stream: "LOGS", Filter: PartitionFilter(otlpwire.Logs, p), Name: fmt.Sprintf("%s-%d", backend, p)})
			if err != nil {
				t.Fatalf("partition %d: %v", p, err)
			}
			l.Close()
		}
	}
}

// TestAStreamThatStopsAnswering: a stream counts as unavailable though another one answers, and
// messages that were sent together are given up together.
func TestAStreamThatStopsAnswering(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	hub, conn := connectTo(t, b, "hub"), connectTo(t, b, "edge")
	slowHub(t, hub, time.Millisecond, 1<<20)
	mute, err := hub.nc.SubscribeSync("mute.x")
	if err != nil || hub.nc.Flush() != nil {
		t.Fatal(err)
	}
	defer func() { _ = mute.Unsubscribe() }()
	var lost []Pending
	for range 8 {
		lost = append(lost, conn.PublishAsync(Message{Subject: "mute.x", Header: envelope.Header{ContentType: envelope.ContentTypeOTLP}}))
	}
	done := make(chan struct{})
	defer func() { <-done }()
	stop := make(chan struct{})
	defer close(stop)
	go func() { // the other stream continues
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_ = publishSlow(conn, 1)[0].Wait(t.Context())
			}
		}
	}()
	for _, p := range lost {
		if err := p.Wait(t.Context()); !errors.Is(err, nats.ErrTimeout) {
			t.Fatalf("got %v", err)
		}
	}
	if last := lost[len(lost)-1]; last.patience(time.Now()) < -4*publishTimeout {
		t.Errorf("the last of them was given up %v after its time", -last.patience(time.Now()))
	}
}
