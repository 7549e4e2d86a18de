package backoff

import (
	"sync"
	"time"
)

// Repeats lets one of many equal messages through a minute, with how many it held back
// since the last. The zero Repeats is ready, and safe for concurrent use;
// a nil one lets all through.
type Repeats struct {
	mu   sync.Mutex
	said map[string]said
}

type said struct {
	at   time.Time
	held int
}

// maxSaid bounds the messages that are told apart; beyond it all are let through.
const maxSaid = 256

// Due reports whether a message is due at now, and how many equal ones were held back
// since it was let through last.
func (r *Repeats) Due(message string, now time.Time) (held int, due bool) {
	if r == nil {
		return 0, true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s, known := r.said[message]
	if known && now.Sub(s.at) < time.Minute {
		s.held++
		r.said[message] = s
		return 0, false
	}
	for other, old := range r.said { // what is of no use any more
		if now.Sub(old.at) >= time.Minute && old.held == 0 || now.Sub(old.at) >= time.Hour {
			delete(r.said, other)
		}
	}
	if r.said == nil {
		r.said = map[string]said{}
	}
	if known || len(r.said) < maxSaid {
		r.said[message] = said{at: now}
	}
	return s.held, true
}
