package main

import (
	"flag"

	"github.com/penstock/penstock/pkg/allinone"
	"github.com/penstock/penstock/pkg/app"
)

const aboutUp = `Runs edge, hub, router and sink in this process. Send OTLP to 127.0.0.1:4317
(gRPC) or :4318 (HTTP). Without a backend, traces.jsonl, metrics.jsonl and
logs.jsonl appear in the data directory. Ctrl-C drains; nothing is lost.

A configuration file accepts every section of the roles except hub and central
(docs/reference/configuration.md). Environment: INSTANCE_ID, INSTANCE_NAME,
CUSTOMER_ID, SERVICE_NAMESPACE, DEPLOYMENT_ENVIRONMENT, TEMPO_ENDPOINT,
PROMETHEUS_URL, LOKI_URL, CENTRAL_TOKENS_FILE (a gateway on 4327 and 4328).

Examples:
  penstock up
  penstock up -tempo-endpoint tempo:4317 -prometheus-url http://prometheus:9090 -loki-url http://loki:3100
  penstock up -config.check -sampling.file sampling.yaml`

func up(args []string) int {
	cfg := allinone.DefaultConfig()
	return app.Command{
		Name: "penstock up", About: aboutUp, Settings: &cfg,
		Flags: func(fs *flag.FlagSet) {
			fs.StringVar(&cfg.DataDir, "data-dir", cfg.DataDir, "`directory` of spool, hub and files")
			fs.StringVar(&cfg.Edge.Instance.ID, "instance-id", cfg.Edge.Instance.ID, "instance.id of this machine")
			fs.StringVar(&cfg.Sink.Tempo.Endpoint, "tempo-endpoint", "", "Tempo's OTLP `endpoint`, host:4317, for gRPC (HTTP: tempo.protocol in a file)")
			fs.StringVar(&cfg.Sink.Prometheus.URL, "prometheus-url", "", "Prometheus with remote_write receiver, `http://host:9090`")
			fs.StringVar(&cfg.Sink.Loki.URL, "loki-url", "", "Loki, `http://host:3100`")
			fs.StringVar(&cfg.Sink.Sampling.File, "sampling.file", "", "the collector's tail_sampling configuration, a YAML `file`")
		},
		Build: func(p *app.Process) ([]app.Stage, error) { return allinone.Build(p, &cfg) },
	}.Main(args)
}
