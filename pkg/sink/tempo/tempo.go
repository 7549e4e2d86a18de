// Package tempo writes traces to Tempo over OTLP/gRPC. Payloads travel as the
// bytes they came in.
package tempo

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Config is what an operator may set.
type Config struct {
	// Endpoint is host:port or http://host:port for plain text, https://host:port
	// for TLS. Empty: no Tempo.
	Endpoint string `yaml:"endpoint"`
}

// Writer sends to one Tempo.
type Writer struct {
	conn *grpc.ClientConn
}

const timeout = 30 * time.Second

// New returns a writer; it connects with the first write.
func New(cfg Config) (*Writer, error) {
	target, creds := cfg.Endpoint, insecure.NewCredentials()
	if strings.Contains(target, "://") {
		u, err := url.Parse(target)
		if err != nil || (u.Scheme != "http" && u.Scheme != "https") {
			return nil, fmt.Errorf("tempo.endpoint: %q: want host:port, http://host:port or https://host:port", cfg.Endpoint)
		}
		if target = u.Host; u.Scheme == "https" {
			creds = credentials.NewTLS(nil)
		}
	}
	if _, _, err := net.SplitHostPort(target); err != nil {
		return nil, fmt.Errorf("tempo.endpoint: %q: %w; the OTLP/gRPC port is 4317", cfg.Endpoint, err)
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds), grpc.WithNoProxy(),
		grpc.WithUserAgent("penstock"), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(otlpgrpc.Codec{})))
	if err != nil {
		return nil, fmt.Errorf("tempo.endpoint: %q: %w", cfg.Endpoint, err)
	}
	return &Writer{conn: conn}, nil
}

// Name is the backend's label.
func (w *Writer) Name() string { return "tempo" }

// Close ends the connection.
func (w *Writer) Close() error { return w.conn.Close() }

// Write returns nil when Tempo has accepted every span of an OTLP request.
func (w *Writer) Write(ctx context.Context, _ string, payload []byte) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var answer []byte
	err := w.conn.Invoke(ctx, otlpgrpc.Method(otlpwire.Traces), payload, &answer)
	if err != nil {
		return meaning(err)
	}
	if n, msg := rejected(answer); n > 0 {
		return fault.Permanent(ledger.DeadRefused, fmt.Errorf("tempo rejected %d spans: %s", n, msg))
	}
	return nil
}

// meaning follows the table of the OTLP specification, and what Tempo's
// distributor answers.
func meaning(err error) error {
	st := status.Convert(err)
	werr := fmt.Errorf("tempo: %w", err)
	switch st.Code() {
	case codes.InvalidArgument, codes.FailedPrecondition, codes.AlreadyExists:
		return fault.Permanent(ledger.DeadRefused, werr)
	case codes.Unauthenticated, codes.PermissionDenied, codes.NotFound, codes.Unimplemented:
		return fault.Configuration(werr)
	case codes.ResourceExhausted:
		// Larger than rate and burst together it can never pass: cut it.
		if strings.Contains(st.Message(), "batch size") || strings.Contains(st.Message(), "larger than max") {
			return fault.Permanent(ledger.DeadRefused, werr)
		}
	}
	for _, d := range st.Details() {
		if ri, ok := d.(*errdetails.RetryInfo); ok {
			return fault.After(werr, max(0, ri.GetRetryDelay().AsDuration()))
		}
	}
	return werr
}

// rejected reads partial_success of an ExportTraceServiceResponse.
func rejected(answer []byte) (n int64, msg string) {
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
