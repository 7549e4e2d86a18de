package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/klauspost/compress/snappy"
)

// fake is a Loki that takes what the quiet instances send, and knows when each record has come.
type fake struct {
	status int           // of the noisy one's pushes, if not 0
	slow   time.Duration // how long the answers to it take

	mu   sync.Mutex
	came map[int]time.Time // by number
}

// serve serves on loopback until stop.
func (f *fake) serve() (url string, stop func()) {
	f.came = map[int]time.Time{}
	srv := httptest.NewServer(f)
	return srv.URL, srv.Close
}

// line is the body of a record. A push holds it as it is.
func line(number int) string { return fmt.Sprintf("record <%d> of a neighbour", number) }

var numbers = regexp.MustCompile(`record <(\d+)>`)

// ServeHTTP implements the push API.
func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	now := time.Now()
	compressed, err := io.ReadAll(r.Body)
	if err == nil && r.Header.Get("X-Scope-OrgID") == noisy {
		if f.slow > 0 {
			select {
			case <-time.After(f.slow):
			case <-r.Context().Done():
				return
			}
		}
		if f.status != 0 {
			http.Error(w, "not for this tenant", f.status)
			return
		}
	}
	var body []byte
	if err == nil {
		body, err = snappy.Decode(nil, compressed)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range numbers.FindAllSubmatch(body, -1) {
		if n, err := strconv.Atoi(string(m[1])); err == nil && f.came[n].IsZero() {
			f.came[n] = now
		}
	}
	w.WriteHeader(http.StatusNoContent)
}

// at returns when a record came; zero: it has not.
func (f *fake) at(number int) time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.came[number]
}
