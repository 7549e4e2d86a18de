package integration

import (
	"context"
	"fmt"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/edge/forward"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/router"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend"
	"github.com/penstock/penstock/test/backend/loki"
	"github.com/penstock/penstock/test/backend/tempo"
)

// newToken makes a token as an operator does, and the file that the gateway reads.
func newToken(t *testing.T, instance string) (token, file string) {
	t.Helper()
	cmd := exec.Command(penstockBinary(t), "token", "-instance-id", instance, "-customer-id", "acme")
	var shown strings.Builder
	cmd.Stderr = &shown
	entry, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, shown.String())
	}
	_, line, _ := strings.Cut(shown.String(), "token (shown once): ")
	return strings.TrimSpace(line), writeFile(t, "tokens.yaml", "tokens:\n"+string(entry))
}

// startGateway starts a router with a gateway in place of the one that runs.
func (p *pipeline) startGateway(t *testing.T, tokens string) (*role, router.Config) {
	t.Helper()
	p.router.stop()
	rc := router.DefaultConfig()
	rc.Hub.URL, rc.Gateway.TokensFile = p.hub.url, tokens
	rc.Gateway.GRPC.Listen, rc.Gateway.HTTP.Listen = backend.FreeAddr(t), backend.FreeAddr(t)
	pr := app.NewProcess(p.log, &rc)
	stages, err := router.Build(pr, rc)
	p.router = start(t, pr, stages, err)
	return p.router, rc
}

// TestGateway sends with a bearer token to the router, without an edge.
func TestGateway(t *testing.T) {
	token, tokens := newToken(t, "as-7")
	lok := loki.Start(t)
	p := startPipeline(t, func(c *sink.Config) { c.Loki.URL = lok.URL })
	r, rc := p.startGateway(t, tokens)

	send := func(auth string) int {
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+rc.Gateway.HTTP.Listen+"/v1/logs",
			strings.NewReader(`{"resourceLogs":[{"resource":{"attributes":[{"key":"instance.id","value":{"stringValue":"forged"}}]},"scopeLogs":[{"logRecords":[{"timeUnixNano":"`+fmt.Sprint(time.Now().UnixNano())+`","body":{"stringValue":"hello"}}]}]}]}`))
		req.Header.Set("Content-Type", "application/json")
		if auth != "" {
			req.Header.Set("Authorization", auth)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		return res.StatusCode
	}
	for auth, want := range map[string]int{"": 401, "Bearer wrong": 401, "Bearer " + token: 200} {
		if code := send(auth); code != want {
			t.Errorf("authorization %.10q…: %d, want %d", auth, code, want)
		}
	}
	eventually(t, 30*time.Second, "the record arrives", func() error {
		if es := lok.Entries(); len(es) != 1 || es[0].Labels["instance_id"] != "as-7" || es[0].Metadata["customer_id"] != "acme" {
			return fmt.Errorf("got %+v", es)
		}
		return nil
	})
	if strings.Contains(p.text.String(), token) {
		t.Error("the token stands in the log")
	}
	// Without the hub the gateway must not say success.
	p.hub.stop()
	if code := send("Bearer " + token); code != 503 {
		t.Errorf("without a hub: %d, want 503", code)
	}
	p.hub.start(t)
	eventually(t, 30*time.Second, "the gateway takes data again", func() error {
		if code := send("Bearer " + token); code != 200 {
			return fmt.Errorf("status %d", code)
		}
		return nil
	})
	r.stop()
}

// TestEdgeThroughGateway forwards all three signals over OTLP to the gateway, over both
// protocols, while the hub behind it comes and goes, and with a token that is wrong at
// first. What was acknowledged arrives once and in order.
func TestEdgeThroughGateway(t *testing.T) {
	for _, protocol := range []string{"grpc", "http"} {
		t.Run(protocol, func(t *testing.T) {
			token, tokens := newToken(t, "as-7")
			tmp, lok := tempo.Start(t), loki.Start(t)
			var dir string
			p := startPipeline(t, func(c *sink.Config) { c.Tempo.Endpoint, c.Loki.URL, dir = tmp.Addr, lok.URL, c.File.Dir })
			_, rc := p.startGateway(t, tokens)
			ec := edge.DefaultConfig()
			ec.Instance, ec.Spool.Dir, ec.Spool.Reserve = edge.InstanceConfig{ID: "as-7"}, t.TempDir(), 1<<20
			ec.Receive.GRPC.Listen, ec.Receive.HTTP.Listen = "", backend.FreeAddr(t)
			ec.Central = forward.CentralConfig{Endpoint: "http://" + rc.Gateway.GRPC.Listen, Token: "wrong", Protocol: protocol, Insecure: true}
			if protocol == "http" {
				ec.Central.Endpoint = "http://" + rc.Gateway.HTTP.Listen
			}
			run := func() *role {
				if err := ec.Validate(); err != nil {
					t.Fatal(err)
				}
				pr := app.NewProcess(p.log.With("role", "edge"), &ec)
				stages, err := edge.Build(pr, ec)
				return start(t, pr, stages, err)
			}
			sent := 0
			send := func(n int) {
				for range n {
					for _, sig := range otlpwire.Signals {
						if err := post(context.WithoutCancel(t.Context()), ec.Receive.HTTP.Listen, sig, numbered(sig, sent)); err != nil {
							t.Fatal(err)
						}
					}
					sent++
				}
			}
			e := run()
			send(20) // kept: the gateway does not know the token
			e.stop()
			if n := count(t, otlpwire.Logs, "penstock_forwarded_items_total", e); n != 0 {
				t.Errorf("%d items forwarded with a wrong token", n)
			}
			ec.Central.Token = config.Secret(token)
			run()
			send(30)
			p.hub.stop()
			send(30)
			p.hub.start(t)
			send(20)

			eventually(t, 60*time.Second, "everything arrives", func() error {
				got := arrivals(t, tmp, lok, dir)
				for _, sig := range otlpwire.Signals {
					if ns := got["as-7 "+sig.String()]; distinct(ns) != sent {
						return fmt.Errorf("%v: %d of %d", sig, distinct(ns), sent)
					}
				}
				return nil
			})
			got := arrivals(t, tmp, lok, dir)
			for _, sig := range []otlpwire.Signal{otlpwire.Metrics, otlpwire.Logs} {
				if ns := got["as-7 "+sig.String()]; len(ns) != sent || !slices.IsSorted(ns) {
					t.Errorf("%v: %d arrived of %d, in order: %v", sig, len(ns), sent, slices.IsSorted(ns))
				}
			}
			if strings.Contains(p.text.String(), token) {
				t.Error("the token stands in the log")
			}
		})
	}
}
