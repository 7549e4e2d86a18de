// Package tenants scripts the trouble that a backend has with one tenant.
package tenants

import (
	"context"
	"sync"
	"time"
)

// Script is that of one backend, whose refusals are an A: a status, or an error. The zero value has no trouble; it is safe
// for concurrent use.
type Script[A any] struct {
	mu      sync.Mutex
	answers map[string]A
	slow    map[string]time.Duration
}

// FailTenant makes a be the answer to every push of a tenant, until it is called with the zero value.
func (s *Script[A]) FailTenant(tenant string, a A) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.answers == nil {
		s.answers = map[string]A{}
	}
	s.answers[tenant] = a
}

// SlowTenant makes the answer to each push of a tenant take so long, if its sender waits for that.
func (s *Script[A]) SlowTenant(tenant string, d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.slow == nil {
		s.slow = map[string]time.Duration{}
	}
	s.slow[tenant] = d
}

// Wait waits as long as a push of a tenant takes, and at least for so long. It returns false if ctx ended first.
func (s *Script[A]) Wait(ctx context.Context, tenant string, least time.Duration) bool {
	s.mu.Lock()
	d := max(s.slow[tenant], least)
	s.mu.Unlock()
	if d == 0 {
		return true
	}
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// Answer is the answer to a push of a tenant; the zero value if there is no trouble.
func (s *Script[A]) Answer(tenant string) A {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answers[tenant]
}
