package edge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpclient"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/proc"
)

// CentralConfig is the other way to the centre: OTLP to a router's gateway, for
// networks that let only OTLP out.
type CentralConfig struct {
	// Endpoint is https://host:port of the gateway. When it is set, hub is not used.
	Endpoint string `yaml:"endpoint"`
	// Token is the instance's bearer token, as `penstock token` makes it.
	Token proc.Secret `yaml:"token"`
	// Protocol is grpc or http.
	Protocol string         `yaml:"protocol"`
	TLS      proc.ClientTLS `yaml:"tls"`
	// Insecure allows to send token and data in plain text.
	Insecure bool `yaml:"insecure"`
}

func (c CentralConfig) validate() error {
	if c.Endpoint == "" {
		return nil
	}
	var errs []error
	if c.Token == "" {
		errs = append(errs, errors.New("central.token is not set; set it in the configuration or as CENTRAL_OTEL_TOKEN"))
	}
	if c.Protocol != "grpc" && c.Protocol != "http" {
		errs = append(errs, fmt.Errorf("central.protocol is %q, want grpc or http", c.Protocol))
	}
	if !strings.HasPrefix(c.Endpoint, "https://") && !c.Insecure {
		errs = append(errs, fmt.Errorf("central.endpoint: %q is plain text, and the token with it: write https://, or set central.insecure: true", c.Endpoint))
	}
	client, err := c.client()
	if err == nil {
		err = client.Close()
	}
	return errors.Join(append(errs, err)...)
}

func (c CentralConfig) client() (*otlpclient.Client, error) {
	tlsConfig, err := c.TLS.Load("central.tls")
	if err != nil {
		return nil, err
	}
	return otlpclient.New("central.endpoint", otlpclient.Config{
		Endpoint: c.Endpoint, HTTP: c.Protocol == "http", Gzip: true, TLS: tlsConfig,
		Headers: map[string]string{"authorization": "Bearer " + string(c.Token)},
	})
}

// maxMerge is how far apart the arrivals of messages may be that are sent as one
// request: they arrive centrally with the time of the first.
const maxMerge = time.Second

// gatewayWay sends OTLP requests. A signal has one request out at a time: only so is
// order kept. So that a backlog does not move at the pace of round trips, messages
// that wait are sent together.
type gatewayWay struct {
	client *otlpclient.Client
	spool  *spool
	led    *ledger.Ledger
	log    *slog.Logger
	away   atomic.Bool
}

func newGatewayWay(cfg CentralConfig, sp *spool, led *ledger.Ledger, log *slog.Logger) (*gatewayWay, error) {
	client, err := cfg.client()
	w := &gatewayWay{client: client, spool: sp, led: led, log: log}
	w.away.Store(true)
	return w, err
}

func (w *gatewayWay) connected() bool { return !w.away.Load() }
func (w *gatewayWay) close()          { _ = w.client.Close() }

// merged is one request made of messages of the spool.
type merged struct {
	arrived
	id      string
	arrival int64
	body    []byte
}

func (w *gatewayWay) session(ctx context.Context, st *store, sig otlpwire.Signal, done func(arrived)) error {
	r, err := st.conn.OpenReader(ctx, bus.SpoolStream(sig), w.spool.marks.get(hubReader, sig).Done+1)
	if err != nil {
		return err
	}
	defer r.Close()
	var next *bus.Delivery
	for {
		var m merged
		if m, next, err = w.gather(ctx, st, sig, r, next); err != nil {
			return err
		}
		if len(m.body) > 0 {
			if err := w.send(ctx, sig, m); err != nil {
				if !w.away.Swap(true) {
					w.log.Warn("gateway does not take data, spooling", "err", err)
				}
				return err
			}
			if w.away.Swap(false) {
				w.log.Info("gateway takes data")
			}
		}
		done(m.arrived)
	}
}

// gather waits for a message and adds those that are there already, up to the size
// of a message. It returns one that did not fit.
func (w *gatewayWay) gather(ctx context.Context, st *store, sig otlpwire.Signal, r *bus.Reader, first *bus.Delivery) (m merged, next *bus.Delivery, err error) {
	for {
		d := first
		if first = nil; d == nil {
			read, err := r.Next(ctx)
			if err != nil {
				return m, nil, err
			}
			d = &read
		}
		if d.Seq <= w.spool.marks.get(hubReader, sig).Done {
			continue // dropped since it was read
		}
		var body []byte
		if err = d.Err; err == nil {
			body, err = envelope.Decompress(d.Body, d.Header.Encoding)
		}
		if err != nil {
			w.log.Error("spooled message is damaged and was left out", "signal", sig, "seq", d.Seq, "err", err)
			w.led.Of(sig).Dead(ledger.DeadUndecodable).Inc()
			body = nil
		}
		if m.seq > 0 && (len(m.body)+len(body) > envelope.MaxPayload || d.Header.Arrival-m.arrival > int64(maxMerge)) {
			return m, d, nil
		}
		if m.seq == 0 {
			m.id, m.arrival = fmt.Sprintf("%s-%d", st.nonce(), d.Seq), d.Header.Arrival
		}
		m.seq, m.items, m.bytes = d.Seq, m.items+d.Header.Items, m.bytes+int64(len(d.Body))
		m.body = append(m.body, body...)
		if d.Pending == 0 {
			return m, nil, nil
		}
	}
}

// send returns nil when the gateway has everything that it will ever take.
func (w *gatewayWay) send(ctx context.Context, sig otlpwire.Signal, m merged) error {
	rejected, message, err := w.client.Export(ctx, sig, m.body, map[string]string{
		envelope.OriginID: m.id + "-" + strconv.FormatUint(m.seq, 10), envelope.OriginArrival: strconv.FormatInt(m.arrival, 10),
	})
	reason, permanent := fault.Reason(err)
	switch {
	case permanent:
		first, second, ok := otlpwire.Halve(sig, m.body)
		if ok {
			a, b := m, m
			a.id, a.body = m.id+"a", first
			b.id, b.body = m.id+"b", second
			if err := w.send(ctx, sig, a); err != nil {
				return err
			}
			return w.send(ctx, sig, b)
		}
		items := otlpwire.Count(sig, m.body)
		w.log.Error("the gateway refuses an item for good: it is lost", "signal", sig, "items", items, "reason", reason, "err", err)
		w.led.Of(sig).Dead(reason).Add(float64(items))
		return nil
	case err != nil:
		return err
	case rejected > 0:
		w.log.Error("the gateway has refused items of a request: they are lost", "signal", sig, "items", rejected, "why", message)
		w.led.Of(sig).Dead(ledger.DeadRefused).Add(float64(rejected))
	}
	return nil
}
