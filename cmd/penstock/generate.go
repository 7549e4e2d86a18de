package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/generate"
)

func generateTraffic(args []string) int {
	cfg := generate.Config{}
	fs := flag.NewFlagSet("penstock generate", flag.ContinueOnError)
	fs.StringVar(&cfg.Endpoint, "endpoint", "http://127.0.0.1:4318", "OTLP endpoint: http://host:4318 or grpc://host:4317, https:// and grpcs:// for TLS")
	fs.StringVar(&cfg.Token, "token", "", "bearer `token` for a gateway; default: PENSTOCK_TOKEN")
	fs.Float64Var(&cfg.Rate, "rate", 10, "checkouts a second; each is a trace of 12 spans and two log records")
	fs.Var((*config.Duration)(&cfg.For), "for", "how long to send; 0 until stopped")
	cfg.Wait = 10 * time.Second
	fs.Var((*config.Duration)(&cfg.Wait), "wait", "how long the endpoint may take to appear")
	fs.Uint64Var(&cfg.Seed, "seed", 1, "the same seed gives the same traffic")
	fs.Usage = func() {
		fmt.Fprint(fs.Output(), "Usage: penstock generate [flags]\n\nSends traces, metrics and logs of a small shop: nine services, some errors, some\nslow checkouts.\n\nFlags:\n")
		fs.PrintDefaults()
	}
	if err := app.Parse(fs, args); err != nil {
		return parseExit(err)
	}
	cfg.Token = cmp.Or(cfg.Token, os.Getenv("PENSTOCK_TOKEN"))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	st, err := generate.Run(ctx, cfg)
	fmt.Printf("acknowledged: %d spans, %d data points, %d log records; refused requests: %d\n", st.Acked[0], st.Acked[1], st.Acked[2], st.Rejected)
	if err != nil {
		fmt.Fprintf(os.Stderr, "penstock generate: %v\n", err)
		return 1
	}
	return 0
}
