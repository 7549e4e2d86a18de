package receive

import (
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/ledger"
)

// LimitsConfig keeps one sender from using the capacity of all.
type LimitsConfig struct {
	Instance InstanceLimits `yaml:"instance"`
	Address  AddressLimits  `yaml:"address"`
}

// InstanceLimits are for all requests of one instance. What exceeds them is refused with a
// retryable code.
type InstanceLimits struct {
	// How many decompressed bytes a second one instance may send; the amount of one second may come
	// at once. More is refused with a retryable code. 0: no limit.
	Bytes config.Bytes `yaml:"bytes_per_second"`
	// How many requests a second one instance may send; the amount of one second may come at once.
	// More are refused with a retryable code. 0: no limit.
	Requests int `yaml:"requests_per_second"`
}

// AddressLimits are for one IPv4 address or one /64 network of IPv6.
type AddressLimits struct {
	// How many connections of each protocol one IPv4 address, or one /64 of IPv6, may have open. A
	// new one replaces one that has no request in progress; where all have one, the new one is
	// closed. 0: no limit except max_connections.
	Connections int `yaml:"connections"`
}

func (c LimitsConfig) validate(section string) error {
	if c.Instance.Bytes < 0 || c.Instance.Requests < 0 || c.Address.Connections < 0 {
		return fmt.Errorf("%s: %v, %d and %d, want 0 or more", section, c.Instance.Bytes, c.Instance.Requests, c.Address.Connections)
	}
	return nil
}

// bucket is a token bucket that holds the amount of one second. The zero bucket is full.
type bucket struct {
	level float64
	at    time.Time
}

// fill refills the bucket up to now, and reports whether it has a token.
func (b *bucket) fill(now time.Time, rate float64) bool {
	switch since := now.Sub(b.at); {
	case b.at.IsZero():
		b.level, b.at = rate, now
	case since > 0:
		b.level, b.at = min(rate, b.level+rate*since.Seconds()), now
	}
	return rate <= 0 || b.level >= 1
}

// pace tracks how much an instance has sent recently. The zero pace is ready to use.
type pace struct {
	mu       sync.Mutex
	bytes    bucket
	requests bucket
}

// begin counts a request, or refuses it before it is read.
func (p *pace) begin(l InstanceLimits, now time.Time) *refusal {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.bytes.fill(now, float64(l.Bytes)) {
		return tooFast("%v bytes a second", int64(l.Bytes))
	}
	if !p.requests.fill(now, float64(l.Requests)) {
		return tooFast("%d requests a second", l.Requests)
	}
	p.requests.level--
	return nil
}

// read counts the bytes of a request, or refuses it if concurrent requests of the instance have
// used up the bucket. One request may take more than is left, so that the largest one passes, and
// the requests after it wait.
func (p *pace) read(l InstanceLimits, now time.Time, n int) *refusal {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.bytes.fill(now, float64(l.Bytes)) {
		return tooFast("%v bytes a second", int64(l.Bytes))
	}
	p.bytes.level -= float64(n)
	return nil
}

func tooFast(format string, limit any) *refusal {
	ref := refuse(codes.ResourceExhausted, 429, ledger.RefusedRate, "the instance sends more than "+format, limit)
	ref.retry = retryAfter
	return ref
}
