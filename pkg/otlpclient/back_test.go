package otlpclient

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestServerComesBack: a server is away for several attempts, and used again when it is
// there. With grpc's own pauses six attempts would take 13 s or more, and twenty half an
// hour.
func TestServerComesBack(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	const attempts = 6
	began := time.Now()
	away := make(chan time.Duration, 1)
	go func() {
		for range attempts {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
		away <- time.Since(began)
		srv := grpc.NewServer(grpc.ForceServerCodecV2(otlpgrpc.Codec{}), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
			var in []byte
			if err := s.RecvMsg(&in); err != nil {
				return err
			}
			return s.SendMsg([]byte(nil))
		}))
		context.AfterFunc(t.Context(), srv.Stop)
		_ = srv.Serve(ln)
	}()
	c, err := New("central.endpoint", Config{Endpoint: ln.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		_, _, err := c.Export(ctx, otlpwire.Traces, nil, nil)
		if err == nil {
			break
		}
		if _, given := fault.Reason(err); given || ctx.Err() != nil {
			t.Fatalf("%v, want it to be tried again", err)
		}
		c.conn.WaitForStateChange(ctx, connectivity.TransientFailure)
	}
	if took := <-away; took > 12*time.Second {
		t.Errorf("%d attempts took %v", attempts, took)
	}
}
