// Command sink samples traces and writes to the backends.
package main

import (
	"os"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/sink"
)

const about = `Reads SPANS, METRICS and LOGS from the hub, samples whole traces and writes to
Tempo, Prometheus and Loki. A signal without a backend goes to files.

It needs at least HUB_URL in the environment; see also HUB_CREDS, HUB_CA_FILE,
TEMPO_ENDPOINT, PROMETHEUS_URL, LOKI_URL.`

func main() {
	cfg := sink.DefaultConfig()
	os.Exit(app.Command{
		Name: "sink", About: about, Settings: &cfg,
		Build: func(p *app.Process) ([]app.Stage, error) { return sink.Build(p, cfg) },
	}.Main(os.Args[1:]))
}
