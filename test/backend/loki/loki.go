// Package loki is a Loki for tests: the push API in, every entry kept in
// memory. It enforces what Loki's distributor and ingester enforce by default:
//
//   - at most 15 labels a stream, names to 1024 and values to 2048 bytes;
//   - lines to 256 KiB, structured metadata to 64 KiB and 128 pairs an entry;
//   - entries not older than 7 days, not more than 10 minutes ahead, and not
//     more than an hour behind the newest of their stream, half of max_chunk_age.
//
// What is wrong with an entry is a 400 that names it; the good entries of the
// same push are stored.
package loki

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/snappy"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/test/backend/tenants"
)

// Entry is one log line as it arrived.
type Entry struct {
	Labels   map[string]string
	At       time.Time
	Came     time.Time // when the push was taken
	Line     string
	Metadata map[string]string
}

// Server is a running Loki.
type Server struct {
	tenants.Script[int] // statuses
	URL                 string

	mu struct {
		sync.Mutex
		entries []Entry
		newest  map[string]time.Time // by stream
		fail    int
		poison  []byte
		chunk   time.Duration // ingester.max_chunk_age
	}
}

// Start serves on loopback until the test ends.
func Start(t testing.TB) *Server {
	t.Helper()
	s, stop := Serve()
	t.Cleanup(stop)
	return s
}

// Serve serves on loopback until stop.
func Serve() (s *Server, stop func()) {
	s = &Server{}
	s.mu.newest, s.mu.chunk = map[string]time.Time{}, 2*time.Hour
	srv := httptest.NewServer(s)
	s.URL = srv.URL
	return s, srv.Close
}

// Fail makes every push answer with a status until it is called with 0.
func (s *Server) Fail(status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.fail = status
}

// Poison makes every push that contains a text answer with 500; "" for none.
func (s *Server) Poison(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.poison = []byte(text)
}

// SetMaxChunkAge sets ingester.max_chunk_age.
func (s *Server) SetMaxChunkAge(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.chunk = d
}

// Entries returns what has arrived, in the order of arrival.
func (s *Server) Entries() []Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Entry(nil), s.mu.entries...)
}

// ServeHTTP implements POST /loki/api/v1/push and GET /config.
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
	if r.Method == http.MethodGet && r.URL.Path == "/config" {
		_, _ = fmt.Fprintf(w, "target: all\nlimits_config:\n  reject_old_samples: true\n  reject_old_samples_max_age: 1w\n  unordered_writes: true\ningester:\n  max_chunk_age: %v\n", s.mu.chunk)
		return
	}
	if r.Method != http.MethodPost || r.URL.Path != "/loki/api/v1/push" {
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
	if err == nil && len(s.mu.poison) > 0 && bytes.Contains(body, s.mu.poison) {
		http.Error(w, "scripted failure of a push", http.StatusInternalServerError)
		return
	}
	if err == nil {
		err = s.pushLocked(body, time.Now())
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// pushLocked stores a logproto.PushRequest; the error names what was left out.
func (s *Server) pushLocked(body []byte, now time.Time) error {
	var refused []string
	err := fields(body, func(num protowire.Number, stream []byte) error {
		if num != 1 {
			return nil
		}
		var text string
		var labels map[string]string
		return fields(stream, func(num protowire.Number, b []byte) (err error) {
			switch num {
			case 1:
				text = string(b)
				labels, err = parseLabels(text)
			case 2:
				var e Entry
				if e, err = parseEntry(b); err != nil {
					return err
				}
				e.Labels, e.Came = labels, now
				if why := s.refuseLocked(text, e, now); why != "" {
					refused = append(refused, why)
					return nil
				}
				if e.At.After(s.mu.newest[text]) {
					s.mu.newest[text] = e.At
				}
				s.mu.entries = append(s.mu.entries, e)
			}
			return err
		})
	})
	if err == nil && len(refused) > 0 {
		err = fmt.Errorf("%s, total ignored: %d", refused[0], len(refused))
	}
	return err
}

func (s *Server) refuseLocked(stream string, e Entry, now time.Time) string {
	size := 0
	for k, v := range e.Metadata {
		size += len(k) + len(v)
	}
	// In Loki's words (pkg/validation/validate.go, pkg/chunkenc/interface.go).
	switch newest := s.mu.newest[stream]; {
	case len(e.Labels) > 15:
		return fmt.Sprintf("entry for stream '%s' has %d label names; limit %d", stream, len(e.Labels), 15)
	case len(e.Line) > 256<<10:
		return fmt.Sprintf("max entry size '%d' bytes exceeded for stream '%s' while adding an entry with length '%d' bytes", 256<<10, stream, len(e.Line))
	case size > 64<<10:
		return fmt.Sprintf("stream '%s' has structured metadata too large: '%d' bytes, limit: '%d' bytes", stream, size, 64<<10)
	case len(e.Metadata) > 128:
		return fmt.Sprintf("stream '%s' has too many structured metadata labels: '%d', limit: '%d'", stream, len(e.Metadata), 128)
	case e.At.Before(now.Add(-7 * 24 * time.Hour)):
		return fmt.Sprintf("entry for stream '%s' has timestamp too old: %v", stream, e.At)
	case e.At.After(now.Add(10 * time.Minute)):
		return fmt.Sprintf("entry for stream '%s' has timestamp too new: %v", stream, e.At)
	case !newest.IsZero() && e.At.Before(newest.Add(-s.mu.chunk/2)):
		return fmt.Sprintf("entry with timestamp %v ignored, reason: 'entry too far behind, entry timestamp is: %v'", e.At, e.At)
	}
	return ""
}

var labelPair = regexp.MustCompile(`([a-zA-Z_][a-zA-Z0-9_]*)=("(?:[^"\\]|\\.)*")(?:, |$)`)

func parseLabels(text string) (map[string]string, error) {
	inner, ok := strings.CutPrefix(text, "{")
	inner, ok2 := strings.CutSuffix(inner, "}")
	if !ok || !ok2 || labelPair.ReplaceAllString(inner, "") != "" {
		return nil, fmt.Errorf("error parsing labels %q", text)
	}
	out := map[string]string{}
	for _, m := range labelPair.FindAllStringSubmatch(inner, -1) {
		v, err := strconv.Unquote(m[2])
		if err != nil || len(m[1]) > 1024 || len(v) > 2048 {
			return nil, fmt.Errorf("label %s: too long or not quoted", m[1])
		}
		out[m[1]] = v
	}
	return out, nil
}

func parseEntry(b []byte) (Entry, error) {
	e := Entry{Metadata: map[string]string{}}
	err := fields(b, func(num protowire.Number, b []byte) error {
		switch num {
		case 1:
			var sec, nsec uint64
			for len(b) > 0 {
				num, _, n := protowire.ConsumeTag(b)
				v, m := protowire.ConsumeVarint(b[n:])
				if num == 1 {
					sec = v
				} else {
					nsec = v
				}
				b = b[n+m:]
			}
			e.At = time.Unix(int64(sec), int64(nsec))
		case 2:
			e.Line = string(b)
		case 3:
			var name, value string
			if err := fields(b, func(num protowire.Number, b []byte) error {
				if num == 1 {
					name = string(b)
				} else {
					value = string(b)
				}
				return nil
			}); err != nil {
				return err
			}
			e.Metadata[name] = value
		}
		return nil
	})
	return e, err
}

// fields visits the length-delimited fields of a message.
func fields(b []byte, visit func(protowire.Number, []byte) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 || typ != protowire.BytesType {
			return fmt.Errorf("no PushRequest: field %d has wire type %d", num, typ)
		}
		body, m := protowire.ConsumeBytes(b[n:])
		if m < 0 {
			return fmt.Errorf("no PushRequest: field %d is cut short", num)
		}
		if err := visit(num, body); err != nil {
			return err
		}
		b = b[n+m:]
	}
	return nil
}
