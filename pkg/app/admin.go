package app

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/grafana/dskit/services"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/config"
)

// AdminConfig configures the admin server.
type AdminConfig struct {
	// The address of the admin server, host:port. Empty: there is none.
	Listen string `yaml:"listen"`
	// Names under which the admin server may be reached, besides IP addresses, localhost and the
	// host of listen. Requests to other names are refused, because a website can point its own name
	// at this address.
	Hosts []string `yaml:"hosts"`
	// Serves /debug/pprof.
	Pprof bool `yaml:"pprof"`
	// Lets other machines read /config and /debug/pprof, with the header Authorization: Bearer
	// <token>. Without it only this machine may.
	Token config.Secret `yaml:"token"`
}

// guard refuses requests that a foreign web page may make a browser send.
func (c AdminConfig) guard(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !c.knows(r.Host) {
			http.Error(w, fmt.Sprintf("%q is not a name of this server: use its IP address, or add the name to admin.hosts", r.Host), http.StatusForbidden)
			return
		}
		if origin := r.Header.Get("Origin"); origin != "" {
			if u, err := url.Parse(origin); err != nil || !strings.EqualFold(u.Host, r.Host) {
				http.Error(w, "requests from pages of another origin are not allowed", http.StatusForbidden)
				return
			}
		}
		h.ServeHTTP(w, r)
	})
}

// knows reports whether a Host header names this server, and not a foreign name that resolves to its
// address. An IP address does, and so does an empty header, which no browser sends.
func (c AdminConfig) knows(host string) bool {
	name := hostname(host)
	if _, err := netip.ParseAddr(name); err == nil || name == "" {
		return true
	}
	is := func(known string) bool { return strings.EqualFold(name, known) }
	return is("localhost") || is(hostname(c.Listen)) || slices.ContainsFunc(c.Hosts, is)
}

// hostname returns a host without its port, brackets and last dot.
func hostname(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	return strings.TrimSuffix(strings.Trim(host, "[]"), ".")
}

// private restricts a page to requests from this machine or with the token.
func (c AdminConfig) private(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		from, err := netip.ParseAddrPort(r.RemoteAddr)
		token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		switch {
		case err == nil && from.Addr().Unmap().IsLoopback():
		case c.Token == "":
			http.Error(w, "this page answers only requests from the same machine, or with the token of admin.token", http.StatusForbidden)
			return
		case subtle.ConstantTimeCompare([]byte(token), []byte(c.Token)) != 1:
			w.Header().Set("WWW-Authenticate", "Bearer")
			http.Error(w, "no valid token: send the header Authorization: Bearer <admin.token>", http.StatusUnauthorized)
			return
		}
		h(w, r)
	}
}

// userInfo matches the part of a URL before its host: a user, a password, a token. An unescaped one may
// contain an @, too.
var userInfo = regexp.MustCompile(`([a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/]*@`)

// NewAdmin returns a service that answers /ready, /metrics, /services and
// /config for the stages. It listens when it starts, so that a port in use is
// an error of its start.
func NewAdmin(p *Process, stages []Stage) (services.Service, error) {
	cfg := p.Settings.Process().Admin
	if cfg.Listen == "" {
		return services.NewIdleService(nil, nil), nil
	}
	protocols := new(http.Protocols) // without HTTP/2, as in package receive
	protocols.SetHTTP1(true)
	srv := &http.Server{Handler: adminPages(p, stages, cfg), Protocols: protocols, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10}
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
			<-served //nolint:errcheck // that it was closed
			return nil
		}
	}
	return services.NewBasicService(start, run, nil), nil
}

// adminPages serves the pages, for GET and HEAD only.
func adminPages(p *Process, stages []Stage, cfg AdminConfig) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(p.Registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) { ready(w, stages) })
	mux.HandleFunc("GET /services", func(w http.ResponseWriter, _ *http.Request) { list(w, stages) })
	mux.HandleFunc("GET /config", cfg.private(func(w http.ResponseWriter, _ *http.Request) {
		text, err := yaml.Marshal(p.Settings)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "text/yaml; charset=utf-8")
		_, _ = w.Write(userInfo.ReplaceAll(text, []byte("${1}"+config.Redacted+"@")))
	}))
	for path, h := range p.pages {
		mux.Handle("GET "+path, h)
	}
	if cfg.Pprof {
		mux.HandleFunc("GET /debug/pprof/", cfg.private(pprof.Index))
		mux.HandleFunc("GET /debug/pprof/profile", cfg.private(pprof.Profile))
		mux.HandleFunc("GET /debug/pprof/trace", cfg.private(pprof.Trace))
	}
	return cfg.guard(mux)
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
