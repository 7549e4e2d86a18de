package forward

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/edge/edgetest"
	"github.com/penstock/penstock/pkg/edge/spool"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/receive"
	"github.com/penstock/penstock/pkg/wal"
)

// startGateway serves OTLP to a sender with a token, and returns where.
func startGateway(t *testing.T, protocol string, maxPayload int, accept func(context.Context, receive.Batch) error) (addr string) {
	t.Helper()
	rc := receive.DefaultConfig()
	rc.GRPC.Listen, rc.HTTP.Listen = "127.0.0.1:0", "127.0.0.1:0"
	gateway, err := receive.New(rc, receive.Deps{
		Identify: func(c receive.Credentials) (*receive.Sender, error) {
			if c.Authorization != "Bearer secret" {
				return nil, errors.New("no such token")
			}
			return receive.NewSender(envelope.Instance{ID: "as-1"}), nil
		},
		Origin: true, MaxPayload: maxPayload, Ledger: ledger.New(prometheus.NewRegistry()), Log: silent, Accept: accept,
	})
	if err != nil {
		t.Fatal(err)
	}
	svc := gateway.Service()
	if err := services.StartAndAwaitRunning(t.Context(), svc); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = services.StopAndAwaitTerminated(context.Background(), svc) })
	return gateway.Addrs()[map[string]int{"grpc": 0, "http": 1}[protocol]]
}

// TestGatewayRefusesAnItem: what the gateway will never accept is counted as lost, not as
// forwarded, and delays nothing.
func TestGatewayRefusesAnItem(t *testing.T) {
	taken := 0
	addr := startGateway(t, "grpc", 256<<10, func(_ context.Context, b receive.Batch) error { taken += b.Items; return nil })
	cfg := newConfig(t)
	cfg.Forward.Central = CentralConfig{Endpoint: "http://" + addr, Token: "secret", Protocol: "grpc", Insecure: true}
	s, led, _ := runSpool(t, cfg.Spool)
	accept(t, s, 0, 5)
	if err := s.Accept(t.Context(), edgetest.Log(t, 5, 600<<10)); err != nil {
		t.Fatal(err)
	}
	accept(t, s, 6, 10)
	stop := startForward(t, cfg.Forward, s, led)
	drained(t, s)
	stop()
	logs := led.Of(otlpwire.Logs)
	if lost, forwarded := testutil.ToFloat64(logs.Dropped(ledger.DroppedRefused)), testutil.ToFloat64(logs.Forwarded); taken != 9 || lost != 1 || forwarded != 9 {
		t.Errorf("%d taken, %v counted as refused, %v as forwarded; want 9, 1 and 9", taken, lost, forwarded)
	}
}

// TestGatewayWay forwards over OTLP, with both protocols, to a gateway that is unavailable,
// refuses, loses answers and comes back.
func TestGatewayWay(t *testing.T) {
	for _, protocol := range []string{"grpc", "http"} {
		t.Run(protocol, func(t *testing.T) {
			var mu sync.Mutex
			var got []int
			ids := map[string]int{}
			fail := 3
			addr := startGateway(t, protocol, envelope.MaxPayload, func(_ context.Context, b receive.Batch) error {
				mu.Lock()
				defer mu.Unlock()
				if fail--; fail > 1 {
					return errors.New("not now")
				}
				if b.Origin.ID == "" || time.Since(time.Unix(0, b.Origin.Arrival)) > time.Minute {
					t.Errorf("the origin is %+v", b.Origin)
				}
				if ids[b.Origin.ID]++; ids[b.Origin.ID] == 1 { // the hub stores an id once
					for item := range otlpwire.Items(b.Payload) {
						got = append(got, edgetest.Number(item))
					}
				}
				if fail%5 == 0 {
					return errors.New("the answer is lost")
				}
				return nil
			})
			cfg := newConfig(t)
			cfg.Forward.Central = CentralConfig{Endpoint: "http://" + addr, Token: "secret", Protocol: protocol, Insecure: true}
			if err := cfg.Forward.Central.Validate(); err != nil {
				t.Fatal(err)
			}
			s, led, _ := runSpool(t, cfg.Spool)
			accept(t, s, 0, 100) // a backlog
			startForward(t, cfg.Forward, s, led)
			accept(t, s, 100, 200)
			drained(t, s)
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(got, want(200)) {
				t.Errorf("the gateway got %v", got)
			}
			if len(ids) > 150 {
				t.Errorf("%d requests for 200 messages: a backlog is not merged", len(ids))
			}
		})
	}
}

// TestGatewayMergesWhatIsClose: messages that wait become one request, as long as they
// fit and have arrived within a second; one that does not begins the next.
func TestGatewayMergesWhatIsClose(t *testing.T) {
	var waiting []spool.Message
	for i, m := range []struct {
		at   time.Duration
		size int
	}{{0, 10}, {time.Second / 2, 10}, {2 * time.Second, 10}, {2 * time.Second, 600 << 10}, {2 * time.Second, 600 << 10}} {
		waiting = append(waiting, spool.Message{
			Record: wal.Record{Seq: uint64(i + 1), Body: edgetest.Log(t, i, m.size).Payload, Behind: uint64(4 - i)},
			Header: envelope.Header{Items: 1, Arrival: 1_790_000_000_000_000_000 + int64(m.at)},
		})
	}
	read := func(context.Context) (m spool.Message, err error) {
		m, waiting = waiting[0], waiting[1:]
		return m, nil
	}
	s, led, _ := runSpool(t, newConfig(t).Spool)
	w := &gatewayWay{spool: s, led: led, log: silent}
	var err error
	var next *spool.Message
	var got [][]int
	for seq := uint64(0); seq < 5; {
		var m merged
		if m, next, err = w.gather(t.Context(), "nonce", otlpwire.Logs, read, next); err != nil {
			t.Fatal(err)
		}
		var ns []int
		for item := range otlpwire.Items(m.body) {
			ns = append(ns, edgetest.Number(item))
		}
		if m.items != len(ns) || m.seq <= seq || len(m.body) > envelope.MaxPayload {
			t.Errorf("%d items up to message %d, %d bytes, hold %v", m.items, m.seq, len(m.body), ns)
		}
		got, seq = append(got, ns), m.seq
	}
	if fmt.Sprint(got) != "[[0 1] [2 3] [4]]" {
		t.Errorf("requests of %v", got)
	}
}
