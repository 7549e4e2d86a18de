package otlpgrpc

import (
	"testing"
	"time"
)

func TestPausesAreBounded(t *testing.T) {
	b := reconnect.Backoff
	if most := time.Duration(float64(b.MaxDelay) * (1 + b.Jitter)); most > 5*time.Second {
		t.Errorf("a server that is back waits %v for us, want 5s at the most", most)
	}
	if reconnect.MinConnectTimeout > 5*time.Second || reconnect.MinConnectTimeout < time.Second {
		t.Errorf("a connection may take %v", reconnect.MinConnectTimeout)
	}
	// Servers in Go allow a ping in five minutes, without a request none at all.
	if alive.PermitWithoutStream || alive.Time < 5*time.Minute || alive.Timeout > time.Minute {
		t.Errorf("keepalive is %+v", alive)
	}
}
