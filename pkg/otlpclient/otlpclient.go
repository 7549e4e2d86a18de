// Package otlpclient sends encoded OTLP requests over gRPC or HTTP, and classifies the answer, in the terms
// of package fault.
//
//	c, err := otlpclient.New("tempo.endpoint", cfg)
//	rejected, message, err := c.Export(ctx, otlpwire.Traces, payload, nil)
//
// # Not here
//
// Retries: the caller decides by the fault.
package otlpclient

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/encoding/gzip" // every OTLP server must accept gzip
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/httpclient"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Config says where to send.
type Config struct {
	// Endpoint is host:port or http://host:port for plain text, https://host:port
	// for TLS.
	Endpoint string
	HTTP     bool // protobuf over HTTP, to /v1/traces and so on; otherwise gRPC
	Gzip     bool
	Headers  map[string]string // such as authorization, in lower case
	TLS      *tls.Config       // nil for the system's roots
}

// Timeout is how long a request may take.
const Timeout = 30 * time.Second

// Client sends to one endpoint.
type Client struct {
	cfg  Config
	conn *grpc.ClientConn                          // gRPC
	http [len(otlpwire.Signals)]*httpclient.Client // HTTP
}

// New returns a client; it connects with the first request. key is the name of the
// endpoint in the operator's configuration.
func New(key string, cfg Config) (*Client, error) {
	scheme, host, prefix := "http", cfg.Endpoint, ""
	if strings.Contains(host, "://") {
		u, err := url.Parse(host)
		if err != nil || (u.Scheme != "http" && u.Scheme != "https") {
			return nil, fmt.Errorf("%s: %q: want host:port, http://host:port or https://host:port", key, cfg.Endpoint)
		}
		scheme, host = u.Scheme, u.Host
		if cfg.HTTP {
			prefix = strings.TrimSuffix(u.Path, "/")
			if u.Port() == "" { // as for a proxy in front of a backend
				host = net.JoinHostPort(u.Hostname(), map[string]string{"http": "80", "https": "443"}[scheme])
			}
		}
	}
	if _, _, err := net.SplitHostPort(host); err != nil {
		return nil, fmt.Errorf("%s: %q: %w; the OTLP/gRPC port is 4317, the OTLP/HTTP port 4318", key, cfg.Endpoint, err)
	}
	c := &Client{cfg: cfg}
	if cfg.HTTP {
		for _, sig := range otlpwire.Signals {
			p, err := httpclient.New(scheme+"://"+host+prefix+"/v1/"+sig.String(), "", cfg.Headers)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", key, err)
			}
			p.TLS(cfg.TLS)
			c.http[sig] = p
		}
		return c, nil
	}
	creds := insecure.NewCredentials()
	if scheme == "https" {
		creds = credentials.NewTLS(cfg.TLS)
	}
	opts := append(otlpgrpc.DialOptions(), grpc.WithTransportCredentials(creds), grpc.WithUserAgent("penstock"))
	if cfg.Gzip {
		opts = append(opts, grpc.WithDefaultCallOptions(grpc.UseCompressor("gzip")))
	}
	var err error
	if c.conn, err = grpc.NewClient(host, opts...); err != nil {
		return nil, fmt.Errorf("%s: %q: %w", key, cfg.Endpoint, err)
	}
	return c, nil
}

// Close ends the connection.
func (c *Client) Close() error {
	if c.conn == nil {
		return nil
	}
	return c.conn.Close()
}

// Export sends one request, with further headers, and returns how many items the server has rejected in a
// partial success, and why.
func (c *Client) Export(ctx context.Context, sig otlpwire.Signal, payload []byte, headers map[string]string) (rejected int64, message string, err error) {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	var answer []byte
	if c.conn != nil {
		for _, h := range []map[string]string{c.cfg.Headers, headers} {
			for k, v := range h {
				ctx = metadata.AppendToOutgoingContext(ctx, k, v)
			}
		}
		if err := c.conn.Invoke(ctx, otlpgrpc.Method(sig), payload, &answer); err != nil {
			return 0, "", Meaning(err)
		}
	} else {
		h := http.Header{"Content-Type": {"application/x-protobuf"}}
		for k, v := range headers {
			h.Set(k, v)
		}
		if c.cfg.Gzip {
			payload = httpclient.Gzip(nil, payload)
			h.Set("Content-Encoding", "gzip")
		}
		if _, answer, err = c.http[sig].Send(ctx, "", payload, h); err != nil {
			return 0, "", err
		}
	}
	rejected, message = partialSuccess(answer)
	return rejected, message, nil
}

// Meaning classifies an error by the table of the OTLP specification, and by the answers of Tempo's
// distributor.
func Meaning(err error) error {
	st := status.Convert(err)
	switch code := st.Code(); {
	case strings.Contains(st.Message(), "LIVE_TRACES_EXCEEDED"): // temporary: there is room again when some have been flushed
		return fault.Sender(paused(st, err))
	case strings.Contains(st.Message(), "TRACE_TOO_LARGE"):
		return fault.Permanent(ledger.DeadTooLarge, err)
	case code == codes.InvalidArgument, code == codes.FailedPrecondition, code == codes.AlreadyExists:
		return fault.Permanent(ledger.DeadRefused, err)
	case code == codes.Unauthenticated, code == codes.PermissionDenied, code == codes.NotFound:
		return fault.Sender(fault.Configuration(err))
	case code == codes.Unimplemented:
		return fault.Configuration(err)
	case code == codes.Unavailable && strings.Contains(st.Message(), "authentication handshake failed"):
		return fault.Configuration(err) // certificate error
	case code == codes.ResourceExhausted:
		// A batch larger than rate and burst together can never pass: it must be halved.
		if strings.Contains(st.Message(), "batch size") || strings.Contains(st.Message(), "larger than max") {
			return fault.Permanent(ledger.DeadTooLarge, err)
		}
		return fault.Sender(paused(st, err))
	}
	return paused(st, err)
}

// paused marks an error with the pause that the server asks for, if it does.
func paused(st *status.Status, err error) error {
	for _, d := range st.Details() {
		if ri, ok := d.(*errdetails.RetryInfo); ok {
			return fault.After(err, max(0, ri.GetRetryDelay().AsDuration()))
		}
	}
	return err
}

// partialSuccess reads an Export*ServiceResponse; the three have the same fields.
func partialSuccess(answer []byte) (n int64, msg string) {
	for b := answer; len(b) > 0; {
		num, typ, size := protowire.ConsumeTag(b)
		if size < 0 {
			return 0, ""
		}
		val := b[size:]
		m := protowire.ConsumeFieldValue(num, typ, val)
		if m < 0 {
			return 0, ""
		}
		b = val[m:]
		switch {
		case num == 1 && typ == protowire.BytesType: // partial_success: look inside
			b, _ = protowire.ConsumeBytes(val)
		case num == 1 && typ == protowire.VarintType:
			v, _ := protowire.ConsumeVarint(val)
			n = int64(v)
		case num == 2 && typ == protowire.BytesType:
			msg, _ = protowire.ConsumeString(val)
		}
	}
	return n, msg
}
