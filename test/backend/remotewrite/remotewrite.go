// Package remotewrite is a Prometheus for tests that count: remote_write 1.0 in, every
// sample kept in memory. It enforces what Prometheus's write handler enforces without an out-of-order
// window: a sample that is older than the newest of its series, or of the same time with another
// value, is refused with 400 in Prometheus's words, and the others of the request are
// stored. A sample that is there already is taken.
package remotewrite

import (
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/klauspost/compress/snappy"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/test/backend/tenants"
)

// Sample is one sample as it was taken, or taken again.
type Sample struct {
	Labels map[string]string
	At     int64 // Unix milliseconds
	Value  float64
	Came   time.Time // when the request was taken
}

// Server is a running receiver.
type Server struct {
	tenants.Script[int] // statuses
	URL                 string

	mu struct {
		sync.Mutex
		samples []Sample
		newest  map[string]Sample // by series
		fail    int
	}
}

// Serve serves on loopback until stop.
func Serve() (s *Server, stop func()) {
	s = &Server{}
	s.mu.newest = map[string]Sample{}
	srv := httptest.NewServer(s)
	s.URL = srv.URL
	return s, srv.Close
}

// Fail makes every request answer with a status until it is called with 0.
func (s *Server) Fail(status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.fail = status
}

// Samples returns what was taken, in the order of arrival.
func (s *Server) Samples() []Sample {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.mu.samples)
}

// ServeHTTP implements POST /api/v1/write.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	tenant := r.Header.Get("X-Scope-OrgID")
	// The body first: only then does the server notice a sender that waits no longer.
	compressed, err := io.ReadAll(io.LimitReader(r.Body, 100<<20))
	if !s.Wait(r.Context(), tenant, 0) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.fail != 0 {
		http.Error(w, "scripted failure", s.mu.fail)
		return
	}
	if status := s.Answer(tenant); status != 0 {
		http.Error(w, "scripted failure of a tenant", status)
		return
	}
	if r.Method != http.MethodPost || r.URL.Path != "/api/v1/write" {
		http.NotFound(w, r)
		return
	}
	if ct := r.Header.Get("Content-Type"); ct != "application/x-protobuf" {
		http.Error(w, "content type "+ct, http.StatusUnsupportedMediaType)
		return
	}
	var body []byte
	if err == nil {
		body, err = snappy.Decode(nil, compressed)
	}
	if err == nil {
		err = s.writeLocked(body, time.Now())
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// writeLocked stores a prometheus.WriteRequest; the error names the last thing that was left out, as
// Prometheus's does.
func (s *Server) writeLocked(body []byte, now time.Time) (refused error) {
	err := fields(body, func(num protowire.Number, series []byte, _ uint64) error {
		if num != 1 {
			return nil
		}
		labels := map[string]string{}
		var names []string
		return fields(series, func(num protowire.Number, b []byte, _ uint64) error {
			switch num {
			case 1:
				var pair [2]string
				if err := fields(b, func(num protowire.Number, b []byte, _ uint64) error {
					if num == 1 || num == 2 {
						pair[num-1] = string(b)
					}
					return nil
				}); err != nil {
					return err
				}
				labels[pair[0]] = pair[1]
				names = append(names, pair[0]+"\x00"+pair[1])
			case 2:
				sample := Sample{Labels: labels, Came: now}
				if err := fields(b, func(num protowire.Number, _ []byte, v uint64) error {
					switch num {
					case 1:
						sample.Value = math.Float64frombits(v)
					case 2:
						sample.At = int64(v)
					}
					return nil
				}); err != nil {
					return err
				}
				if err := s.takeLocked(strings.Join(names, "\x00"), sample); err != nil {
					refused = err
				}
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	return refused
}

func (s *Server) takeLocked(series string, sample Sample) error {
	newest, known := s.mu.newest[series]
	switch {
	case known && sample.At < newest.At:
		return fmt.Errorf("out of order sample")
	case known && sample.At == newest.At && sample.Value != newest.Value:
		return fmt.Errorf("duplicate sample for timestamp")
	}
	s.mu.newest[series] = sample
	s.mu.samples = append(s.mu.samples, sample)
	return nil
}

// fields visits the fields of a message: b of those with a length, v of the others.
func fields(m []byte, visit func(num protowire.Number, b []byte, v uint64) error) error {
	for len(m) > 0 {
		num, typ, n := protowire.ConsumeTag(m)
		if n < 0 {
			return fmt.Errorf("no WriteRequest: %w", protowire.ParseError(n))
		}
		m = m[n:]
		var b []byte
		var v uint64
		switch typ {
		case protowire.BytesType:
			b, n = protowire.ConsumeBytes(m)
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(m)
		case protowire.Fixed64Type:
			v, n = protowire.ConsumeFixed64(m)
		default:
			n = protowire.ConsumeFieldValue(num, typ, m)
		}
		if n < 0 {
			return fmt.Errorf("no WriteRequest: field %d: %w", num, protowire.ParseError(n))
		}
		if err := visit(num, b, v); err != nil {
			return err
		}
		m = m[n:]
	}
	return nil
}
