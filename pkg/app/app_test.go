package app

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/config"
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// recorder makes stages that write down when they start and stop.
type recorder struct {
	mu  sync.Mutex
	log []string
}

func (r *recorder) note(text string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = append(r.log, text)
	return nil
}

func (r *recorder) stage(name string, run func(context.Context) error) Stage {
	return Stage{name, services.NewBasicService(
		func(context.Context) error { return r.note("start " + name) }, run,
		func(error) error { return r.note("stop " + name) }), nil}
}

func untilDone(ctx context.Context) error { <-ctx.Done(); return nil }

func TestRunStartsInOrderAndStopsInReverse(t *testing.T) {
	var r recorder
	ctx, cancel := context.WithCancel(t.Context())
	stages := []Stage{r.stage("a", untilDone), r.stage("b", untilDone), r.stage("c", func(ctx context.Context) error { cancel(); return untilDone(ctx) })}
	if err := Run(ctx, quiet(), stages); err != nil {
		t.Fatal(err)
	}
	want := []string{"start a", "start b", "start c", "stop c", "stop b", "stop a"}
	if !slices.Equal(r.log, want) {
		t.Errorf("got %v, want %v", r.log, want)
	}
}

func TestRunStopsTheOthersWhenOneFails(t *testing.T) {
	var r recorder
	boom := errors.New("boom")
	err := Run(t.Context(), quiet(), []Stage{r.stage("a", untilDone), r.stage("b", func(context.Context) error { return boom }), r.stage("c", untilDone)})
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), "b: ") {
		t.Errorf("got %v, want b: boom", err)
	}
	if r.log[len(r.log)-1] != "stop a" {
		t.Errorf("the others were not stopped: %v", r.log)
	}

	var fresh recorder
	broken := Stage{"b", services.NewBasicService(func(context.Context) error { return boom }, untilDone, nil), nil}
	err = Run(t.Context(), quiet(), []Stage{fresh.stage("a", untilDone), broken, fresh.stage("c", untilDone)})
	if !errors.Is(err, boom) || !slices.Equal(fresh.log, []string{"start a", "stop a"}) {
		t.Errorf("start failure: got %v, %v", err, fresh.log)
	}
}

type testSettings struct {
	Config `yaml:",inline"`
	Token  config.Secret `yaml:"token"`
	URL    string        `yaml:"url"`
}

func (s *testSettings) Process() *Config             { return &s.Config }
func (s *testSettings) ApplyEnv(func(string) string) {}
func (s *testSettings) Validate() error              { return nil }

func TestAdminAnswers(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	set := &testSettings{Token: "canary"}
	set.Admin.Listen = addr
	p := NewProcess(quiet(), set)
	work := Stage{"work", Service(untilDone), nil}

	// The port is taken: the start says so and what to do.
	admin, err := NewAdmin(p, []Stage{work})
	if err != nil {
		t.Fatal(err)
	}
	if err := services.StartAndAwaitRunning(t.Context(), admin); err == nil || !strings.Contains(err.Error(), "address already in use") || !strings.Contains(err.Error(), "another") {
		t.Errorf("port in use: %v", err)
	}
	_ = ln.Close()

	admin, _ = NewAdmin(p, []Stage{work})
	if err := services.StartAndAwaitRunning(t.Context(), admin); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = services.StopAndAwaitTerminated(context.Background(), admin) }()
	get := func(path string) (int, string) {
		res, err := http.Get("http://" + addr + path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		b, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(b)
	}
	if code, body := get("/ready"); code != 503 || !strings.Contains(body, "work is New") {
		t.Errorf("/ready before the start: %d %s", code, body)
	}
	if err := services.StartAndAwaitRunning(t.Context(), work); err != nil {
		t.Fatal(err)
	}
	defer work.StopAsync()
	if code, body := get("/ready"); code != 200 {
		t.Errorf("/ready: %d %s", code, body)
	}
	if code, body := get("/services"); code != 200 || !strings.Contains(body, `"work","state":"Running"`) {
		t.Errorf("/services: %d %s", code, body)
	}
	if code, body := get("/config"); code != 200 || strings.Contains(body, "canary") || !strings.Contains(body, config.Redacted) {
		t.Errorf("/config: %d %s", code, body)
	}
	if code, body := get("/metrics"); code != 200 || !strings.Contains(body, `penstock_refused_items_total{reason="full",signal="logs"} 0`) {
		t.Errorf("/metrics: %d %.300s", code, body)
	}
	if code, _ := get("/debug/pprof/"); code != 404 {
		t.Errorf("/debug/pprof/ is on by default: %d", code)
	}
}

// TestAdminPagesAreForThoseTheyAreFor: a page of another origin, or of a name that was made to
// lead here, sees nothing; what tells of the process is for its machine, or a token.
func TestAdminPagesAreForThoseTheyAreFor(t *testing.T) {
	set := &testSettings{URL: "nats://user:hunter2@hub:4222"}
	p := NewProcess(quiet(), set)
	cfg := AdminConfig{Listen: "penstock.internal:9661", Hosts: []string{"edge-1.example"}, Pprof: true}
	withToken := cfg
	withToken.Token = "s3cret"
	const local, remote = "127.0.0.1:5000", "10.1.2.3:5000"
	for _, tc := range []struct {
		method, path, host, from, header string
		cfg                              AdminConfig
		want                             int
	}{
		{"GET", "/metrics", "127.0.0.1:9661", local, "", cfg, 200},
		{"HEAD", "/metrics", "127.0.0.1:9661", local, "", cfg, 200},
		{"POST", "/metrics", "127.0.0.1:9661", local, "", cfg, 405},
		{"DELETE", "/config", "127.0.0.1:9661", local, "", cfg, 405},
		{"GET", "/ready", "10.0.0.7:9661", remote, "", cfg, 200},
		{"GET", "/ready", "[2001:db8::1]:9661", remote, "", cfg, 200},
		{"GET", "/ready", "[fe80::1]", remote, "", cfg, 200},
		{"GET", "/ready", "", remote, "", cfg, 200},
		{"GET", "/ready", "LOCALHOST.", local, "", cfg, 200},
		{"GET", "/ready", "penstock.internal:9661", remote, "", cfg, 200},
		{"GET", "/ready", "Edge-1.example:80", remote, "", cfg, 200},
		{"GET", "/ready", "rebound.example:9661", local, "", cfg, 403},
		{"GET", "/config", "rebound.example:9661", local, "", cfg, 403},
		{"GET", "/config", "127.0.0.1.rebound.example", local, "", cfg, 403},
		{"GET", "/metrics", "127.0.0.1:9661", local, "Origin: http://evil.example", cfg, 403},
		{"GET", "/metrics", "127.0.0.1:9661", local, "Origin: null", cfg, 403},
		{"GET", "/metrics", "127.0.0.1:9661", local, "Origin: http://127.0.0.1:9661", cfg, 200},
		{"GET", "/config", "127.0.0.1:9661", local, "", cfg, 200},
		{"GET", "/config", "[::1]:9661", "[::1]:5000", "", cfg, 200},
		{"GET", "/config", "10.0.0.7:9661", "[::ffff:127.0.0.1]:5000", "", withToken, 200},
		{"GET", "/config", "10.0.0.7:9661", remote, "", cfg, 403},
		{"GET", "/config", "127.0.0.1:9661", remote, "X-Forwarded-For: 127.0.0.1", cfg, 403},
		{"GET", "/debug/pprof/heap", "10.0.0.7:9661", remote, "", cfg, 403},
		{"GET", "/debug/pprof/profile", "10.0.0.7:9661", remote, "Authorization: Bearer ", cfg, 403},
		{"GET", "/debug/pprof/trace", "10.0.0.7:9661", remote, "Authorization: Bearer ", cfg, 403},
		{"GET", "/config", "10.0.0.7:9661", remote, "", withToken, 401},
		{"GET", "/config", "10.0.0.7:9661", remote, "Authorization: Bearer wrong", withToken, 401},
		{"GET", "/config", "10.0.0.7:9661", remote, "Authorization: Bearer s3cret", withToken, 200},
		{"GET", "/debug/pprof/heap", "10.0.0.7:9661", remote, "Authorization: Bearer s3cret", withToken, 200},
		{"GET", "/config", "rebound.example", remote, "Authorization: Bearer s3cret", withToken, 403},
	} {
		r := httptest.NewRequestWithContext(t.Context(), tc.method, tc.path, nil)
		r.Host, r.RemoteAddr = tc.host, tc.from
		if name, value, has := strings.Cut(tc.header, ": "); has {
			r.Header.Set(name, value)
		}
		w := httptest.NewRecorder()
		adminPages(p, nil, tc.cfg).ServeHTTP(w, r)
		if w.Code != tc.want {
			t.Errorf("%s %s of %q from %s, %s: %d %.100s, want %d", tc.method, tc.path, tc.host, tc.from, tc.header, w.Code, w.Body, tc.want)
		}
		if strings.Contains(w.Body.String(), "hunter2") || tc.path == "/config" && tc.want == 200 && !strings.Contains(w.Body.String(), "@hub:4222") {
			t.Errorf("/config: %s", w.Body)
		}
	}
}

// TestStagesBelowWorkWhileOneStops looks, while the last stage stops, whether the
// first has been told to: it must not be, the last may still need it.
func TestStagesBelowWorkWhileOneStops(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	below := make(chan context.Context, 1)
	stages := []Stage{
		{"below", Service(func(ctx context.Context) error { below <- ctx; return untilDone(ctx) }), nil},
		{"above", services.NewBasicService(nil, func(ctx context.Context) error { cancel(); return untilDone(ctx) }, func(error) error {
			if c := <-below; c.Err() != nil {
				t.Error("the stage below was told to stop before the one above had finished")
			}
			return nil
		}), nil},
	}
	if err := Run(ctx, quiet(), stages); err != nil {
		t.Fatal(err)
	}
}
