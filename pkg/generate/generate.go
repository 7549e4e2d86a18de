package generate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Config says what is sent, and where.
type Config struct {
	// Endpoint is http://host:4318 for OTLP/HTTP or grpc://host:4317 for OTLP/gRPC
	// (https://, grpcs:// for TLS).
	Endpoint string
	Token    string        // bearer token; empty for none
	Rate     float64       // checkouts a second
	For      time.Duration // 0: until stopped
	Wait     time.Duration // how long the endpoint may take to appear
	Seed     uint64
}

// Stats is the number of acknowledged items, by signal.
type Stats struct {
	Acked    [len(otlpwire.Signals)]int
	Rejected int // requests that the endpoint refused for good
}

const (
	metricsInterval = 5 * time.Second
	retryPause      = time.Second
)

// Run sends until the configured time is over or ctx ends. A request that fails temporarily is sent
// again, as by an SDK, but without a limit: every item in Stats has been acknowledged.
func Run(ctx context.Context, cfg Config) (Stats, error) {
	var st Stats
	send, closeSender, err := newSender(cfg)
	if err != nil {
		return st, err
	}
	defer closeSender()
	if cfg.Rate <= 0 || cfg.Rate > 10_000 {
		return st, fmt.Errorf("rate is %v, want more than 0 and at most 10000 checkouts a second", cfg.Rate)
	}
	if err := await(ctx, send, cfg.Wait); err != nil {
		return st, err
	}
	if cfg.For > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, cfg.For)
		defer cancel()
	}
	shop := NewShop(cfg.Seed, time.Now())
	// Many checkouts a tick at high rates, one at low ones.
	interval := max(time.Duration(float64(time.Second)/cfg.Rate), 20*time.Millisecond)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	var owed float64
	nextMetrics := time.Now().Add(time.Second) // when there is something to count
	for {
		now := time.Now()
		owed += cfg.Rate * interval.Seconds()
		for ; owed >= 1; owed-- {
			c := shop.Checkout(now)
			if !st.deliver(ctx, send, otlpwire.Traces, c.Spans) || !st.deliver(ctx, send, otlpwire.Logs, c.Logs) {
				return st, nil
			}
		}
		if now.After(nextMetrics) {
			nextMetrics = now.Add(metricsInterval)
			if !st.deliver(ctx, send, otlpwire.Metrics, shop.Metrics(now)) {
				return st, nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return st, nil
		}
	}
}

// deliver sends one request until it has a final answer. It returns false if ctx ended first.
func (st *Stats) deliver(ctx context.Context, send sender, sig otlpwire.Signal, m proto.Message) bool {
	payload, err := proto.Marshal(m)
	if err != nil {
		st.Rejected++
		return true
	}
	for {
		err := send(ctx, sig, payload)
		if err == nil {
			st.Acked[sig] += otlpwire.Count(sig, payload)
			return true
		}
		if errors.Is(err, errFinal) {
			st.Rejected++
			return true
		}
		if !backoff.Sleep(ctx, retryPause) {
			return false
		}
	}
}

// await sends empty requests until one is answered.
func await(ctx context.Context, send sender, patience time.Duration) error {
	deadline := time.Now().Add(patience)
	for {
		err := send(ctx, otlpwire.Traces, nil)
		if err == nil {
			return nil
		}
		if errors.Is(err, errFinal) || time.Now().After(deadline) {
			return fmt.Errorf("the endpoint does not accept OTLP: %w", err)
		}
		if !backoff.Sleep(ctx, 100*time.Millisecond) {
			return nil
		}
	}
}

// sender sends one request. errFinal marks what must not be sent again.
type sender func(ctx context.Context, sig otlpwire.Signal, payload []byte) error

var errFinal = errors.New("refused for good")

func newSender(cfg Config) (sender, func(), error) {
	u, err := url.Parse(cfg.Endpoint)
	if err != nil || u.Host == "" {
		return nil, nil, fmt.Errorf("endpoint %q: want http://host:4318 or grpc://host:4317", cfg.Endpoint)
	}
	switch u.Scheme {
	case "http", "https":
		return httpSender(strings.TrimSuffix(cfg.Endpoint, "/"), cfg.Token), func() {}, nil
	case "grpc", "grpcs":
		creds := insecure.NewCredentials()
		if u.Scheme == "grpcs" {
			creds = credentials.NewTLS(nil)
		}
		conn, err := grpc.NewClient(u.Host, append(otlpgrpc.DialOptions(), grpc.WithTransportCredentials(creds))...)
		if err != nil {
			return nil, nil, fmt.Errorf("endpoint %q: %w", cfg.Endpoint, err)
		}
		return grpcSender(conn, cfg.Token), func() { _ = conn.Close() }, nil
	}
	return nil, nil, fmt.Errorf("endpoint %q: unknown scheme %q; want http, https, grpc or grpcs", cfg.Endpoint, u.Scheme)
}

const sendTimeout = 10 * time.Second

func httpSender(base, token string) sender {
	client := &http.Client{Timeout: sendTimeout}
	return func(ctx context.Context, sig otlpwire.Signal, payload []byte) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/v1/"+sig.String(), bytes.NewReader(payload))
		if err != nil {
			return fmt.Errorf("%w: %w", errFinal, err)
		}
		req.Header.Set("Content-Type", "application/x-protobuf")
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		res, err := client.Do(req)
		if err != nil {
			return err
		}
		_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 64<<10))
		_ = res.Body.Close()
		switch res.StatusCode {
		case 200:
			return nil
		case 429, 502, 503, 504:
			return errors.New("answered " + strconv.Itoa(res.StatusCode))
		}
		return fmt.Errorf("%w: answered %s", errFinal, res.Status)
	}
}

func grpcSender(conn *grpc.ClientConn, token string) sender {
	return func(ctx context.Context, sig otlpwire.Signal, payload []byte) error {
		ctx, cancel := context.WithTimeout(ctx, sendTimeout)
		defer cancel()
		if token != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
		}
		var answer []byte
		err := conn.Invoke(ctx, otlpgrpc.Method(sig), payload, &answer)
		switch status.Code(err) {
		case codes.OK, codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Aborted, codes.ResourceExhausted:
			return err
		}
		return fmt.Errorf("%w: %w", errFinal, err)
	}
}
