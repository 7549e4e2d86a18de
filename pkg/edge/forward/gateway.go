package forward

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/edge/spool"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpclient"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// CentralConfig is the other way to the centre: OTLP to a router's gateway, for
// networks that let only OTLP out.
type CentralConfig struct {
	// The address of the gateway, https://host:port. When it is set, hub is not used.
	Endpoint string `yaml:"endpoint"`
	// The instance's bearer token, created by `penstock token`. It is not needed with a client
	// certificate in tls.
	Token config.Secret `yaml:"token"`
	// The protocol: grpc or http.
	Protocol string           `yaml:"protocol"`
	TLS      config.ClientTLS `yaml:"tls"`
	// Allows sending the token and the data in plain text.
	Insecure bool `yaml:"insecure"`
}

func (c CentralConfig) Validate() error {
	if c.Endpoint == "" {
		return nil
	}
	var errs []error
	if c.Token == "" && c.TLS.Cert == "" {
		errs = append(errs, errors.New("central.token is not set; set it in the configuration or as CENTRAL_OTEL_TOKEN, or set central.tls.cert_file"))
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
	cfg := otlpclient.Config{Endpoint: c.Endpoint, HTTP: c.Protocol == "http", Gzip: true, TLS: tlsConfig}
	if c.Token != "" {
		cfg.Headers = map[string]string{"authorization": "Bearer " + string(c.Token)}
	}
	return otlpclient.New("central.endpoint", cfg)
}

// maxMerge is how far apart the arrivals of messages may be that are sent as one
// request: at the centre they all have the arrival of the first.
const maxMerge = time.Second

// gatewayWay sends OTLP requests. A signal has one request in flight at a time, to keep
// the order. So that a backlog is not limited by round trips, messages that wait are
// sent together.
type gatewayWay struct {
	client *otlpclient.Client
	spool  *spool.Spool
	led    *ledger.Ledger
	log    *slog.Logger
	away   atomic.Bool
	denied atomic.Pointer[error] // why the gateway accepts nothing from this edge; nil when it does
	// fails is called with the reason why a request was not accepted.
	fails func(otlpwire.Signal, error)
}

func newGatewayWay(cfg CentralConfig, sp *spool.Spool, led *ledger.Ledger, log *slog.Logger) (*gatewayWay, error) {
	client, err := cfg.client()
	w := &gatewayWay{client: client, spool: sp, led: led, log: log}
	w.away.Store(true)
	return w, err
}

func (w *gatewayWay) connected() bool { return !w.away.Load() }
func (w *gatewayWay) close()          { _ = w.client.Close() }

func (w *gatewayWay) ready() error {
	if why := w.denied.Load(); why != nil {
		return *why
	}
	return nil
}

// merged is one request made of messages of the spool.
type merged struct {
	arrived
	id      string
	arrival int64
	load    envelope.Load
	body    []byte
	missing uint64 // messages among them that cannot be read
}

func (w *gatewayWay) session(ctx context.Context, st *spool.Store, sig otlpwire.Signal, done func(arrived)) error {
	r := st.Read(sig, w.spool.Position(spool.Hub, sig).Done)
	defer r.Close()
	var next *spool.Message
	for {
		var m merged
		var err error
		if m, next, err = w.gather(ctx, st.Nonce(), sig, r.Next, next); err != nil {
			return err
		}
		if err := w.deliver(ctx, sig, &m); err != nil {
			return err
		}
		if m.missing > 0 {
			w.spool.Damaged(sig, m.missing, m.seq)
		}
		done(m.arrived)
	}
}

// deliver sends the same request until the gateway has accepted it or ctx ends: if the same
// messages were merged otherwise, the hub would not recognise them by the request's id.
func (w *gatewayWay) deliver(ctx context.Context, sig otlpwire.Signal, m *merged) error {
	for attempt := 1; len(m.body) > 0; attempt++ {
		refused, err := w.send(ctx, sig, *m)
		if w.denied.Store(nil); fault.IsConfiguration(err) {
			w.denied.Store(&err)
		}
		if err == nil {
			m.items -= refused
			if w.away.Swap(false) {
				w.log.Info("gateway accepts data")
			}
			return nil
		}
		w.fails(sig, err)
		if !w.away.Swap(true) || attempt == 1 {
			w.log.Warn("gateway does not accept data, spooling", "signal", sig, "err", err)
		}
		if !backoff.Sleep(ctx, min(fault.Pause(err, attempt, rand.Float64()), fault.MaxHubPause)) {
			return ctx.Err()
		}
	}
	return nil
}

// gather waits for a message and adds those that can be read at once, up to the size
// of a message. It returns one that did not fit.
func (w *gatewayWay) gather(ctx context.Context, nonce string, sig otlpwire.Signal, read func(context.Context) (spool.Message, error), first *spool.Message) (m merged, next *spool.Message, err error) {
	for {
		d := first
		if first = nil; d == nil {
			one, err := read(ctx)
			if err != nil {
				return m, nil, err
			}
			d = &one
		}
		if d.Seq <= w.spool.Position(spool.Hub, sig).Done {
			continue // deleted by on_full: drop_oldest since it was read
		}
		body, err := envelope.Decompress(nil, d.Body, d.Header.Encoding)
		if err != nil {
			d.Missing = 1
		}
		if d.Missing > 0 {
			body, d.Header.Items = nil, 0
		}
		if m.seq > 0 && (len(m.body)+len(body) > envelope.MaxPayload || d.Header.Arrival-m.arrival > int64(maxMerge)) {
			later := *d
			later.Body = bytes.Clone(d.Body)
			return m, &later, nil
		}
		if m.seq == 0 {
			m.id, m.arrival = fmt.Sprintf("%s-%d", nonce, d.Seq), d.Header.Arrival
		}
		m.load = d.Header.Load
		m.missing += d.Missing
		m.seq, m.items, m.bytes = d.Seq, m.items+d.Header.Items, m.bytes+d.Held
		m.body = append(m.body, body...)
		if d.Behind == 0 {
			return m, nil, nil
		}
	}
}

// send returns nil when the gateway has everything that it will ever accept, and how many
// items it refuses for good.
func (w *gatewayWay) send(ctx context.Context, sig otlpwire.Signal, m merged) (refused int, err error) {
	rejected, message, err := w.client.Export(ctx, sig, m.body, map[string]string{
		envelope.OriginID: m.id + "-" + strconv.FormatUint(m.seq, 10), envelope.OriginArrival: strconv.FormatInt(m.arrival, 10),
		envelope.OriginLoad: m.load.String(),
	})
	reason, permanent := fault.Reason(err)
	switch {
	case permanent:
		first, second, ok := otlpwire.Halve(sig, m.body)
		if ok {
			a, b := m, m
			a.id, a.body = m.id+"a", first
			b.id, b.body = m.id+"b", second
			one, err := w.send(ctx, sig, a)
			if err != nil {
				return one, err
			}
			other, err := w.send(ctx, sig, b)
			return one + other, err
		}
		refused = otlpwire.Count(sig, m.body)
		message = fmt.Sprintf("%s: %v", reason, err)
	case err != nil:
		return 0, err
	default:
		refused = int(rejected)
	}
	if refused > 0 {
		w.log.Error("the gateway refuses items for good: they are lost", "signal", sig, "items", refused, "why", message)
		w.led.Of(sig).Dropped(ledger.DroppedRefused).Add(float64(refused))
	}
	return refused, nil
}
