package otlpwire_test

import (
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/generate"
	"github.com/penstock/penstock/pkg/otlpwire"
)

func init() {
	now := time.Unix(1_790_000_000, 0)
	shop := generate.NewShop(1, now)
	add := func(sig otlpwire.Signal, m proto.Message) {
		p, err := proto.Marshal(m)
		if err != nil {
			panic(err)
		}
		otlpwire.AddSeed(sig, p)
	}
	for range 4 {
		c := shop.Checkout(now)
		add(otlpwire.Traces, c.Spans)
		add(otlpwire.Logs, c.Logs)
	}
	add(otlpwire.Metrics, shop.Metrics(now))
}
