// Command edge receives OTLP beside an AppServer and forwards it to the hub.
package main

import (
	"os"

	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/proc"
)

const about = `Receives OTLP on 4317 (gRPC) and 4318 (HTTP), stamps it with the instance,
keeps it on disk and forwards it to the hub, however long that is away.

The least it needs is INSTANCE_ID and HUB_URL in the environment; see also
INSTANCE_NAME, CUSTOMER_ID, SERVICE_NAMESPACE, DEPLOYMENT_ENVIRONMENT, HUB_CREDS, HUB_CA_FILE.
Where only OTLP is let out: CENTRAL_OTEL_ENDPOINT and CENTRAL_OTEL_TOKEN of a
router's gateway, in place of HUB_URL.`

func main() {
	cfg := edge.DefaultConfig()
	os.Exit(proc.Command{
		Name: "edge", About: about, Settings: &cfg,
		Build: func(p *proc.Process) ([]proc.Stage, error) { return edge.Build(p, cfg) },
	}.Main(os.Args[1:]))
}
