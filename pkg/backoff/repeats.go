package backoff

import (
	"sync"
	"time"
)

// Repeats lets one of many equal messages pass each minute, with the number of those suppressed
// since the last one. The zero Repeats is ready to use, and safe for concurrent use; a nil one lets
// all messages pass.
type Repeats struct {
	mu   sync.Mutex
	said map[string]said
}

type said struct {
	at   time.Time
	held int
}

// maxSaid bounds the messages that are distinguished; beyond it all pass.
const maxSaid = 256

// Due reports whether a message is due at now, and how many equal ones were suppressed since it
// last passed.
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
	for other, old := range r.said { // drop entries that are not needed any more
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
