package otlpgrpc

import (
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"
)

// reconnect is how clients here come back to a server that was away. grpc's own pause
// grows to two minutes, which data would wait for after the server is back; one client
// a machine is no crowd that a server would have to be protected from.
var reconnect = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 4 * time.Second},
	MinConnectTimeout: 5 * time.Second,
}

// alive notices a server that has vanished without a word, which a connection that only
// waits for its answer never does: what is written and not acknowledged for Timeout ends
// the connection (TCP_USER_TIMEOUT, which grpc sets with these), and so does a ping without
// an answer. A ping goes every five minutes at the most, and only while a request is under
// way: servers in Go close the connection of clients that ping more often.
var alive = keepalive.ClientParameters{Time: 5*time.Minute + 10*time.Second, Timeout: 20 * time.Second}

// DialOptions are what clients connect with, besides their credentials.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithConnectParams(reconnect), grpc.WithKeepaliveParams(alive),
		grpc.WithNoProxy(), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(Codec{})),
	}
}
