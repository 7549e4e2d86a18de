package httpclient

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/fault"
)

// TestAnswersMeanWhatTheySay has one row a kind of answer.
func TestAnswersMeanWhatTheySay(t *testing.T) {
	canary := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a redirect was followed") }))
	defer canary.Close()
	for name, tc := range map[string]struct {
		answer func(http.ResponseWriter)
		want   string // stored, again, permanent or configuration
		pause  time.Duration
	}{
		"204":                   {func(w http.ResponseWriter) { w.WriteHeader(204) }, "stored", 0},
		"200 with HTML":         {func(w http.ResponseWriter) { _, _ = w.Write([]byte("<html>")) }, "stored", 0},
		"299":                   {func(w http.ResponseWriter) { w.WriteHeader(299) }, "stored", 0},
		"400":                   {func(w http.ResponseWriter) { w.WriteHeader(400) }, "permanent", 0},
		"413":                   {func(w http.ResponseWriter) { w.WriteHeader(413) }, "permanent", 0},
		"422":                   {func(w http.ResponseWriter) { w.WriteHeader(422) }, "permanent", 0},
		"401":                   {func(w http.ResponseWriter) { w.WriteHeader(401) }, "configuration", 0},
		"403":                   {func(w http.ResponseWriter) { w.WriteHeader(403) }, "configuration", 0},
		"404":                   {func(w http.ResponseWriter) { w.WriteHeader(404) }, "configuration", 0},
		"redirect":              {func(w http.ResponseWriter) { w.Header().Set("Location", canary.URL); w.WriteHeader(307) }, "configuration", 0},
		"429":                   {func(w http.ResponseWriter) { w.WriteHeader(429) }, "again", 100 * time.Millisecond},
		"429 after 3 seconds":   {func(w http.ResponseWriter) { w.Header().Set("Retry-After", "3"); w.WriteHeader(429) }, "again", 3 * time.Second},
		"503 after a long time": {func(w http.ResponseWriter) { w.Header().Set("Retry-After", "1000000000"); w.WriteHeader(503) }, "again", 30 * time.Second},
		"503 after nonsense":    {func(w http.ResponseWriter) { w.Header().Set("Retry-After", "abc"); w.WriteHeader(503) }, "again", 100 * time.Millisecond},
		"503 after less":        {func(w http.ResponseWriter) { w.Header().Set("Retry-After", "-1"); w.WriteHeader(503) }, "again", 100 * time.Millisecond},
		"500":                   {func(w http.ResponseWriter) { w.WriteHeader(500) }, "again", 100 * time.Millisecond},
		"500 that means 400":    {func(w http.ResponseWriter) { w.WriteHeader(500); _, _ = w.Write([]byte("too old sample")) }, "permanent", 0},
		"endless body":          {func(w http.ResponseWriter) { w.WriteHeader(503); _, _ = w.Write(make([]byte, 4<<20)) }, "again", 100 * time.Millisecond},
		"gzip bomb": {func(w http.ResponseWriter) {
			w.Header().Set("Content-Encoding", "gzip")
			w.WriteHeader(400)
			zw := gzip.NewWriter(w)
			_, _ = zw.Write(make([]byte, 4<<20))
			_ = zw.Close()
		}, "permanent", 0},
		"control characters": {func(w http.ResponseWriter) { w.WriteHeader(400); _, _ = w.Write([]byte("a\x1b[31m\nb")) }, "permanent", 0},
		"closed":             {func(w http.ResponseWriter) { panic(http.ErrAbortHandler) }, "again", 100 * time.Millisecond},
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			tc.answer(w)
		}))
		c, err := New(srv.URL, "/push", nil)
		if err != nil {
			t.Fatal(err)
		}
		c.Refused = func(code int, body string) string {
			if code == 500 && strings.Contains(body, "too old") {
				return "too_old"
			}
			return ""
		}
		err = post(t, c, "x")
		srv.Close()
		_, permanent := fault.Reason(err)
		got := "again"
		switch {
		case err == nil:
			got = "stored"
		case permanent:
			got = "permanent"
		case fault.IsConfiguration(err):
			got = "configuration"
		}
		if got != tc.want || (tc.pause > 0 && fault.Pause(err, 1, 0) != tc.pause) {
			t.Errorf("%s: %s (%v), pause %v; want %s, %v", name, got, err, fault.Pause(err, 1, 0), tc.want, tc.pause)
		}
		if err != nil && (strings.ContainsAny(err.Error(), "\n\x1b") || len(err.Error()) > 1024) {
			t.Errorf("%s: the error is no line for a log: %q", name, err)
		}
	}
}

func TestRetryAfterTakesDates(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	if got := retryAfter(now.Add(7*time.Second).UTC().Format(http.TimeFormat), now); got != 7*time.Second {
		t.Errorf("future date: %v", got)
	}
	if got := retryAfter(now.Add(-time.Hour).UTC().Format(http.TimeFormat), now); got != 0 {
		t.Errorf("past date: %v", got)
	}
}

func TestURLs(t *testing.T) {
	for base, want := range map[string]string{"http://h:9090": "http://h:9090/p", "http://h/": "http://h/p", "https://h/own/path": "https://h/own/path", "h:9090": "", "file:///x": "", "": "", "http://": ""} {
		c, err := New(base, "/p", nil)
		if (err != nil) != (want == "") || (err == nil && c.url != want) {
			t.Errorf("%q: %v, %v; want %q", base, c, err, want)
		}
	}
	var body bytes.Buffer
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = body.ReadFrom(r.Body)
		if r.URL.Path != "/p" || r.Header.Get("X-A") != "b" || r.Header.Get("User-Agent") != "penstock" || r.Header.Get("Accept-Encoding") != "" {
			t.Errorf("got %s %v", r.URL, r.Header)
		}
	}))
	defer srv.Close()
	c, _ := New(srv.URL, "/p", map[string]string{"X-A": "b"})
	if err := post(t, c, "hello"); err != nil || body.String() != "hello" {
		t.Errorf("%v, %q", err, body.String())
	}
}

func post(t *testing.T, c *Client, body string) error {
	_, _, err := c.Send(t.Context(), "as-1", []byte(body), nil)
	return err
}
