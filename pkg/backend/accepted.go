package backend

import (
	"sync"
	"time"
)

// Accepted is of whom a backend has lately accepted something: it tells one that refuses an instance from one that is
// away. All lanes of a process share it; the zero value is ready, and safe for concurrent use.
type Accepted struct {
	mu    sync.Mutex
	last  acceptance
	other acceptance // the last one of another instance than last has
}

type acceptance struct {
	instance string
	at       time.Time
}

// Note notes that something of an instance was accepted.
func (a *Accepted) Note(instance string, at time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.last.instance != instance {
		a.other = a.last
	}
	a.last = acceptance{instance, at}
}

// Others reports whether something of another instance was accepted after a time.
func (a *Accepted) Others(instance string, since time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	newest := a.last
	if newest.instance == instance {
		newest = a.other
	}
	return newest.at.After(since)
}
