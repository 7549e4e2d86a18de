// Command edge receives OTLP beside an application server and forwards it to the hub.
package main

import (
	"os"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/edge"
)

const about = `Receives OTLP on 4317 (gRPC) and 4318 (HTTP), stamps it with the instance,
keeps it on disk and forwards it to the hub, however long the hub is unreachable.

It needs at least INSTANCE_ID and HUB_URL in the environment; see also
INSTANCE_NAME, CUSTOMER_ID, SERVICE_NAMESPACE, DEPLOYMENT_ENVIRONMENT, HUB_CREDS, HUB_CA_FILE.
Where the network lets only OTLP out: CENTRAL_OTEL_ENDPOINT and CENTRAL_OTEL_TOKEN of a
router's gateway, instead of HUB_URL.`

func main() {
	cfg := edge.DefaultConfig()
	os.Exit(app.Command{
		Name: "edge", About: about, Settings: &cfg,
		Build: func(p *app.Process) ([]app.Stage, error) { return edge.Build(p, cfg) },
	}.Main(os.Args[1:]))
}
