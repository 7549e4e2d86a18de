package allinone

import (
	"context"
	"net"

	"github.com/grafana/dskit/services"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/broker"
)

// embeddedHub is the hub in this process; it runs from the start of its stage on.
type embeddedHub struct {
	cfg    broker.Config
	p      *app.Process
	broker *broker.Broker
}

func (h *embeddedHub) service() services.Service {
	return services.NewIdleService(func(context.Context) (err error) {
		h.broker, err = broker.Start(h.cfg, h.p.Log)
		return err
	}, func(error) error {
		if h.broker != nil {
			h.broker.Stop()
		}
		return nil
	})
}

// InProcessConn connects to the hub.
func (h *embeddedHub) InProcessConn() (net.Conn, error) { return h.broker.InProcessConn() }
