// Command router regroups spans by trace and takes OTLP from services that have
// no edge.
package main

import (
	"os"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/router"
)

const about = `Reads the TRACES stream of the hub and writes SPANS, by trace ID.
With gateway.tokens_file (or CENTRAL_TOKENS_FILE) it also receives OTLP with
"Authorization: Bearer <token>" from services that have no edge.

It needs at least HUB_URL in the environment; see also HUB_CREDS,
HUB_CA_FILE.`

func main() {
	cfg := router.DefaultConfig()
	os.Exit(app.Command{
		Name: "router", About: about, Settings: &cfg,
		Build: func(p *app.Process) ([]app.Stage, error) { return router.Build(p, cfg) },
	}.Main(os.Args[1:]))
}
