// Command penstock is the operator's command: the whole pipeline on one machine, and tools for the
// pipeline.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"

	"github.com/penstock/penstock/pkg/app"
)

const usage = `penstock carries telemetry to Tempo, Prometheus and Loki without losing an
acknowledged item and without splitting a trace.

Usage: penstock <command> [flags]

Commands:
  up          run edge, hub, router and sink in this process
  generate    send the telemetry of a small shop to an OTLP endpoint
  replay      send a past time range to the backends again
  whatif      show what other sampling policies would have kept
  deadletter  show what backends refused, send it to them again, delete it
  audit       show what has become of everything, and what is lost
  lanes       show what the hub holds for which backend, abandon unread lanes
  policies    change the sinks' sampling policies without a restart
  token       create a bearer token for an instance without an edge
  nats-config add an instance to the hub's configuration, create a certificate for the hub
  version     print the version

"penstock <command> -help" shows the flags of a command.
`

func main() {
	args := os.Args[1:]
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	switch args[0] {
	case "up":
		os.Exit(up(args[1:]))
	case "generate":
		os.Exit(generateTraffic(args[1:]))
	case "audit":
		os.Exit(auditHub(args[1:]))
	case "lanes":
		os.Exit(lanes(args[1:]))
	case "policies":
		os.Exit(policies(args[1:]))
	case "replay":
		os.Exit(replays(args[1:]))
	case "deadletter":
		os.Exit(deadLetters(args[1:]))
	case "whatif":
		os.Exit(whatIf(args[1:]))
	case "token":
		os.Exit(token(args[1:]))
	case "nats-config":
		os.Exit(natsConfig(args[1:]))
	case "version", "-version", "--version":
		fmt.Println(app.VersionLine("penstock"))
	case "help", "-h", "-help", "--help":
		fmt.Print(usage)
	default:
		fmt.Fprintf(os.Stderr, "penstock: unknown command %q\n\n%s", args[0], usage)
		os.Exit(2)
	}
}

// parseExit is the exit code after flags that did not parse: -help is not an error.
func parseExit(err error) int {
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	return 2
}
