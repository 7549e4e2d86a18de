package proc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"regexp"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.yaml.in/yaml/v3"
)

// AdminConfig says where the admin server listens.
type AdminConfig struct {
	Listen string `yaml:"listen"` // host:port; empty for none
	Pprof  bool   `yaml:"pprof"`  // serve /debug/pprof
}

// userInfo is what stands before the host of a URL: a user, a password, a token. One that
// is not escaped may hold an @, too.
var userInfo = regexp.MustCompile(`([a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/]*@`)

// NewAdmin returns a service that answers /ready, /metrics, /services and
// /config for the stages. It listens when it starts, so that a port in use is
// an error of its start.
func NewAdmin(p *Process, stages []Stage) (services.Service, error) {
	cfg := p.Settings.Process().Admin
	if cfg.Listen == "" {
		return services.NewIdleService(nil, nil), nil
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(p.Registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) { ready(w, stages) })
	mux.HandleFunc("GET /services", func(w http.ResponseWriter, _ *http.Request) { list(w, stages) })
	mux.HandleFunc("GET /config", func(w http.ResponseWriter, _ *http.Request) {
		text, err := yaml.Marshal(p.Settings)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "text/yaml; charset=utf-8")
		_, _ = w.Write(userInfo.ReplaceAll(text, []byte("${1}"+redacted+"@")))
	})
	for path, h := range p.pages {
		mux.Handle("GET "+path, h)
	}
	if cfg.Pprof {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	protocols := new(http.Protocols) // without HTTP/2, as in package receive
	protocols.SetHTTP1(true)
	srv := &http.Server{Handler: mux, Protocols: protocols, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10}
	var ln net.Listener
	start := func(ctx context.Context) (err error) {
		if ln, err = Listen(ctx, "admin", cfg.Listen); err != nil {
			return err
		}
		p.Log.Info("admin server", "url", "http://"+ln.Addr().String())
		return nil
	}
	run := func(ctx context.Context) error {
		served := make(chan error, 1)
		go func() { served <- srv.Serve(ln) }()
		select {
		case err := <-served:
			return fmt.Errorf("admin server: %w", err)
		case <-ctx.Done():
			_ = srv.Close()
			<-served
			return nil
		}
	}
	return services.NewBasicService(start, run, nil), nil
}

// Listen opens a TCP listener and says what to do when the port is taken.
func Listen(ctx context.Context, what, addr string) (net.Listener, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		var hint string
		if _, ok := errors.AsType[*net.OpError](err); ok {
			hint = "; is another penstock or a collector running? Set another address in the configuration"
		}
		return nil, fmt.Errorf("listen for %s on %s: %w%s", what, addr, err, hint)
	}
	return ln, nil
}

func ready(w http.ResponseWriter, stages []Stage) {
	for _, s := range stages {
		if st := s.State(); st != services.Running {
			http.Error(w, fmt.Sprintf("not ready: %s is %s", s.Name, st), http.StatusServiceUnavailable)
			return
		}
		if s.Ready == nil {
			continue
		}
		if err := s.Ready(); err != nil {
			http.Error(w, fmt.Sprintf("not ready: %s: %v", s.Name, err), http.StatusServiceUnavailable)
			return
		}
	}
	_, _ = w.Write([]byte("ready\n"))
}

func list(w http.ResponseWriter, stages []Stage) {
	type row struct {
		Name  string `json:"name"`
		State string `json:"state"`
		Err   string `json:"error,omitempty"`
	}
	rows := make([]row, 0, len(stages))
	for _, s := range stages {
		r := row{Name: s.Name, State: s.State().String()}
		if err := s.FailureCase(); err != nil {
			r.Err = err.Error()
		}
		rows = append(rows, r)
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(rows)
}
