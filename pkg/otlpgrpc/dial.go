package otlpgrpc

import (
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"
)

// reconnect is how clients reconnect after an outage of the server. grpc's own pause grows to two
// minutes, for which data would wait after the server is back; one client a machine is no load from
// which a server would have to be protected.
var reconnect = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 4 * time.Second},
	MinConnectTimeout: 5 * time.Second,
}

// alive detects a server that has vanished without closing the connection, which a client that only
// waits for an answer would never notice: data that is not acknowledged within Timeout ends the
// connection (TCP_USER_TIMEOUT, which grpc sets with these), and so does a ping without an answer.
// Pings are sent at most every five minutes, and only while a request is in progress: servers in Go
// close the connection of clients that ping more often.
var alive = keepalive.ClientParameters{Time: 5*time.Minute + 10*time.Second, Timeout: 20 * time.Second}

// DialOptions are the options of all clients, besides their credentials.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithConnectParams(reconnect), grpc.WithKeepaliveParams(alive),
		grpc.WithNoProxy(), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(Codec{})),
	}
}
